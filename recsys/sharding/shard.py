"""From a ranker with tables on the meta device to one whose tables are sharded and have their optimizers.

The only module that knows how TorchRec shards. The tables are sharded alone, without DistributedModelParallel: the
dense arch is wrapped in DDP anew for each stage (recsys.training.optimizers), because what requires a gradient differs
between stages and must not change once DDP has seen it.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, get_qcomm_codecs_registry
from torchrec.distributed.fbgemm_qcomm_codec import QCommsConfig as TorchRecQCommsConfig
from torchrec.distributed.shard import shard as torchrec_shard
from torchrec.distributed.types import QuantizedCommCodecs, ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from recsys.config import (
    Config,
    ConfigError,
    DataParallelOptimizerConfig,
    QCommsConfig,
    SparseOptimizerConfig,
    TableConfig,
)
from recsys.model.names import table_key, table_name
from recsys.model.ranker import Ranker
from recsys.runtime import Ranks
from recsys.sharding.machine import Machine
from recsys.sharding.memory import Beside
from recsys.sharding.plan import Plan, make_plan, possible_on_cpu
from recsys.sharding.rows import Piece, Rows

_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
_THAT_COUNT = (EmbOptimType.ADAM, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
_FUSED_ON_CPU = ("rowwise_adagrad", "adagrad", "sgd")
_DATA_PARALLEL = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
_INIT_BLOCK_ROWS = 1 << 16


@dataclass
class ShardedRanker:
    """A ranker on its ranks.

    Attributes:
        ranker: with sharded collections; its dense arch is on the device and not wrapped.
        plan: where each table is.
        sparse_optimizer: fused into the backward of the sharded tables; its step only passes on learning rates.
        data_parallel_optimizer: of the replicated tables, or None where there are none.
        rows: of the sharded tables, and what happens to them between the steps that look them up.
    """

    ranker: Ranker
    plan: ShardingPlan
    sparse_optimizer: CombinedOptimizer
    data_parallel_optimizer: KeyedOptimizer | None
    rows: Rows


def shard(
    ranker: Ranker, config: Config, ranks: Ranks, *, seed: int, ids_per_example: Mapping[str, float] | None = None
) -> ShardedRanker:
    """Place the ranker on all ranks; a collective call.

    The tables' initial weights depend on `seed` alone, not on how or over how many ranks they are sharded.
    `ids_per_example` is as for `plan_tables`.

    Raises:
        ConfigError: an optimizer or a sharding that the device lacks, or tables that do not fit.
    """
    sharder, plan = plan_tables(ranker, config, ranks, ids_per_example)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    fused: list[KeyedOptimizer] = []
    replicated: dict[str, nn.Parameter] = {}
    for name, unsharded in ranker.collections.items():
        module_plan = plan.get_plan_for_module(name)
        assert module_plan is not None
        collection = torchrec_shard(unsharded, module_plan, env, ranks.device, sharder)
        setattr(ranker, name, collection)
        if ranks.device.type == "cpu":
            _keep_on_cpu(collection)
        _initialise_tables(collection, config.tables, seed)
        fused.append(collection.fused_optimizer)
        for table, parameter in collection.named_parameters():
            if config.tables[_table_of(table)].data_parallel:
                replicated[table] = parameter
    ranker.dense_arch.to(ranks.device)
    if ranker.mean_pooling is not None:
        ranker.mean_pooling.to(ranks.device)
    sharded = ShardedRanker(
        ranker=ranker,
        plan=plan,
        sparse_optimizer=CombinedOptimizer(fused),
        data_parallel_optimizer=_data_parallel_optimizer(replicated, config.optimizers.data_parallel),
        rows=_rows(ranker, config, plan, ranks.device),
    )
    for module in _that_count(sharded):
        module.register_forward_hook(_uncount_without_gradient)
    return sharded


def to_read(config: Config, device: torch.device) -> Config:
    """The config of a ranker whose weights are loaded and no longer trained, as far as `shard` reads it.

    Its tables keep no state of an optimizer, and send embeddings as they are. On a CPU, what the tables have that only
    GPUs can do is left out: where a model was trained is nothing that it says.
    """
    sgd = SparseOptimizerConfig(type="sgd")
    optimizers = config.optimizers.model_copy(update={"sparse": sgd, "average": None})
    tables = config.tables
    if device.type == "cpu":
        tables = {name: possible_on_cpu(table) for name, table in tables.items()}
    checkpoints = config.checkpoints.model_copy(update={"asynchronous": False})
    compute = config.compute.model_copy(update={"qcomms": None})
    update = {"tables": tables, "optimizers": optimizers, "checkpoints": checkpoints, "compute": compute}
    return config.model_copy(update=update)


def _rows(ranker: Ranker, config: Config, plan: ShardingPlan, device: torch.device) -> Rows:
    """The rows of all tables with a fused optimizer.

    Raises:
        ConfigError: they are changed between steps, and some are in a cache meanwhile.
    """
    changes, max_norms = config.optimizers.changes_rows, {}
    for name, table in config.tables.items():
        if table.max_norm is not None:
            max_norms[table_key(name)] = table.max_norm
        kernels = [of[table_key(name)].compute_kernel for of in plan.plan.values()]
        by = f"tables.{name}.max_norm" if table.max_norm is not None else changes
        if by and EmbeddingComputeKernel.FUSED_UVM_CACHING.value in kernels:
            raise ConfigError(
                f"tables.{name}.compute_kernel: the planner takes fused_uvm_caching, which does not go with {by}; set "
                "it to fused, or to fused_uvm"
            )
    modules = [
        (kernel.emb_module, [_piece(table, max_norms) for table in kernel.config.embedding_tables])
        for collection in ranker.collections.values()
        for lookup in _lookups(collection)
        for kernel in lookup.modules()
        if isinstance(kernel, BatchedFusedEmbeddingBag)
    ]
    average = config.optimizers.average
    averaged = average is not None and average.tables == "touched"
    return Rows(modules, config.optimizers.sparse, max_norms, device, averaged=averaged)


def _piece(table: Any, max_norms: Mapping[str, float]) -> Piece:
    metadata = table.local_metadata
    row, column = metadata.shard_offsets if metadata is not None else (0, 0)
    return Piece(table.name, row, column, max_norms.get(table.name))


def steps_counted(sharded: ShardedRanker) -> Tensor | None:
    """How many updates the fused optimizers on this rank have counted, (1,) int64; None where none counts.

    Adam corrects its averages by it, and TorchRec leaves it out of an optimizer's state.
    """
    return next((module.iter for module in _that_count(sharded)), None)


def set_steps_counted(sharded: ShardedRanker, steps: Tensor) -> None:
    """Have the fused optimizers on this rank go on from so many updates."""
    for module in _that_count(sharded):
        module.iter.copy_(steps)
        module.iter_cpu.copy_(steps)


def _that_count(sharded: ShardedRanker) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    modules = (module for collection in sharded.ranker.collections.values() for module in _fused_modules(collection))
    return [module for module in modules if module.optimizer in _THAT_COUNT]


def _lookups(collection: Any) -> list[Any]:
    """What looks a collection's tables up on this rank, one for each way in which they are sharded."""
    lookups = collection._lookups
    return [lookup.module if isinstance(lookup, DistributedDataParallel) else lookup for lookup in lookups]


def _fused_modules(collection: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """What holds this rank's tables together with their optimizers."""
    modules = (module for lookup in _lookups(collection) for module in lookup.modules())
    return [module for module in modules if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]


def _keep_on_cpu(collection: nn.Module) -> None:
    """Have this rank look up and train tables of which it has no row, where they have fewer rows than there are ranks.

    By weights on the host fbgemm tells that it is to look up there, and not on a GPU. And its backward pass on a CPU
    looks for the size of a table among what follows it, until that is not 0: behind the last one, in whatever memory
    is there, unless something stands in it.
    """
    for module in _fused_modules(collection):
        if not module.weights_host.numel():
            module.weights_host.resize_(module.max_D).zero_()  # in place, as shards are views
        ends: Tensor = module.hash_size_cumsum
        module.hash_size_cumsum = torch.cat([ends, ends[-1:] + 1])[:-1]


def _uncount_without_gradient(module: Any, *_: object) -> None:
    """Take back a step that was counted for a forward which no update follows.

    fbgemm counts every forward, so that evaluation and stages that leave the tables alone would move Adam's correction
    of its averages on.
    """
    if not torch.is_grad_enabled():
        module.iter_cpu.sub_(1)
        module.iter.sub_(1)


def forget_cached_rows(sharded: ShardedRanker) -> None:
    """Empty the tables' caches on the device, after their weights were written in place.

    Tables of `fused_uvm_caching` would go on with the rows that they had, and write them back over those loaded.
    """
    for collection in sharded.ranker.collections.values():
        for lookup in _lookups(collection):  # as the collection does before it loads a state dict itself
            lookup.purge()


def plan_tables(
    ranker: Ranker,
    config: Config,
    ranks: Ranks,
    ids_per_example: Mapping[str, float] | None = None,
    machine: Machine | None = None,
) -> tuple[EmbeddingBagCollectionSharder, Plan]:
    """Where `shard` puts a ranker's tables, and what shards them so; see `recsys.sharding.plan.make_plan`.

    Args:
        ranker: not sharded yet.
        config: the run.
        ranks: this process among all, or one of those to plan for.
        ids_per_example: mean number of ids of sparse features, where it is known; 1 is assumed of all others.
        machine: what each machine has; None for what this one has.
    """
    sharder = EmbeddingBagCollectionSharder(
        fused_params=_fused_params(config.optimizers.sparse, ranks.device),
        qcomm_codecs_registry=_codecs(config.compute.qcomms, ranks.device),
    )
    lengths: dict[str, list[float]] = {name: [] for name in config.tables}
    for feature, settings in config.features.sparse.items():
        lengths[settings.table].append((ids_per_example or {}).get(feature, 1.0))
    plan = make_plan(
        ranker,
        sharder,
        config.tables,
        ranks,
        batch_size=config.data.batch_size,
        beside=partial(Beside.of, config=config),
        lengths=lengths,
        machine=machine,
    )
    return sharder, plan


def _fused_params(config: SparseOptimizerConfig, device: torch.device) -> dict[str, object]:
    if device.type == "cpu" and config.type not in _FUSED_ON_CPU:
        raise ConfigError(
            f"optimizers.sparse.type: fbgemm has no fused {config.type} on a CPU; there are {', '.join(_FUSED_ON_CPU)}"
        )
    is_fused = config.weight_decay_mode == "fused"
    if device.type == "cpu" and config.weight_decay and is_fused:
        # Its CPU kernels take the argument and leave it unused.
        raise ConfigError(
            "optimizers.sparse.weight_decay: fbgemm's fused optimizers ignore it on a CPU; set it to 0, or "
            "optimizers.sparse.weight_decay_mode to decoupled or coupled"
        )
    # The learning rate here is a placeholder: each stage sets it before every step.
    params: dict[str, object] = {"optimizer": _FUSED[config.type], "learning_rate": 0.0}
    if config.type != "sgd":
        params["eps"] = config.eps
    if config.weight_decay and is_fused:
        params["weight_decay"] = config.weight_decay
        params["weight_decay_mode"] = WeightDecayMode.L2
    if config.max_gradient is not None:
        params["gradient_clipping"], params["max_gradient"] = True, config.max_gradient
    if config.type == "adam":
        params["beta1"], params["beta2"] = config.betas
    return params


def _codecs(config: QCommsConfig | None, device: torch.device) -> dict[str, QuantizedCommCodecs] | None:
    """What makes of pooled embeddings and their gradients what ranks send; None where they go as they are."""
    if config is None:
        return None
    if device.type == "cpu" and "bf16" in (config.forward_precision, config.backward_precision):
        # TorchRec would take fp16 in its place, with a warning.
        raise ConfigError("compute.qcomms: gloo sends no bf16, and this run is on a CPU; take fp16 or fp32")
    settings = TorchRecQCommsConfig(
        CommType(config.forward_precision),
        CommType(config.backward_precision),
        backward_loss_scale=config.backward_loss_scale,
    )
    codecs: dict[str, QuantizedCommCodecs] | None = get_qcomm_codecs_registry(settings, device=device)
    return codecs


def _data_parallel_optimizer(
    parameters: Mapping[str, nn.Parameter], config: DataParallelOptimizerConfig
) -> KeyedOptimizer | None:
    if not parameters:
        return None
    optimizer = KeyedOptimizerWrapper(
        dict(parameters),
        lambda params: _DATA_PARALLEL[config.type](params, lr=0.0, weight_decay=config.weight_decay),
    )
    # Adam makes its state at its first step, but the state in which a stage begins must be whole to go back to.
    optimizer.init_state()
    for parameter in parameters.values():
        parameter.grad = None
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    return optimizer


@torch.no_grad()
def _initialise_tables(collection: nn.Module, tables: Mapping[str, TableConfig], seed: int) -> None:
    """Weights as each table's `init` says, drawn in blocks of rows with a seed each."""
    for name, value in collection.state_dict().items():
        table = tables[_table_of(name)]
        for local, row, column in local_parts(value):
            for start in range(row - row % _INIT_BLOCK_ROWS, row + local.shape[0], _INIT_BLOCK_ROWS):
                rows = min(_INIT_BLOCK_ROWS, table.num_embeddings - start)
                generator = np.random.default_rng((seed, zlib.crc32(_table_of(name).encode()), start))
                block = _drawn(generator, rows, table)
                low, high = max(start, row), min(start + rows, row + local.shape[0])
                part = block[low - start : high - start, column : column + local.shape[1]]
                local[low - row : high - row].copy_(torch.from_numpy(np.ascontiguousarray(part)))


def _drawn(generator: np.random.Generator, rows: int, table: TableConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Initial weights of some rows, (rows, embedding_dim); the default is that of TorchRec."""
    shape = (rows, table.embedding_dim)
    if table.init.type == "normal":
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(table.init.std)
    return (2 * generator.random(shape, dtype=np.float32) - 1) * np.float32(sqrt(1 / table.num_embeddings))


def local_parts(value: Tensor | ShardedTensor) -> list[tuple[Tensor, int, int]]:
    """This rank's pieces of a table, each with the row and the column at which it begins."""
    if isinstance(value, ShardedTensor):
        return [(part.tensor, *part.metadata.shard_offsets) for part in value.local_shards()]  # type: ignore[misc]
    return [(value, 0, 0)]


def with_parts(value: Tensor | ShardedTensor, parts: list[Tensor]) -> Tensor | ShardedTensor:
    """A tensor that lies on the ranks as `value` does, and has `parts` on this one, in the order of `local_parts`."""
    if not isinstance(value, ShardedTensor):
        (whole,) = parts
        return whole
    shards = [Shard(part, of.metadata) for part, of in zip(parts, value.local_shards(), strict=True)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, value.metadata(), process_group=value._process_group
    )


def _table_of(name: str) -> str:
    """`user` of `embedding_bags.user.weight`."""
    return table_name(name.split(".")[1])
