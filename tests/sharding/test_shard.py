"""Sharded tables train as unsharded ones do; what a device lacks is refused."""

from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tiny import tiny_config, write_tiny_log
from torch import Tensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys.config import Config, ConfigError, TableConfig
from recsys.config.schema import NormalInitConfig
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits
from recsys.model.names import POOLED
from recsys.model.ranker import Ranker, build_ranker
from recsys.runtime import Ranks, derive_seed
from recsys.sharding import shard as sharding
from recsys.training.monitor import Monitor
from recsys.training.run import Trainer


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def unsharded(config: Config, shards: ParquetShards, world_size: int) -> dict[str, Tensor]:
    """The same training without TorchRec's sharding, pipeline or DDP: plain modules and optimizers, whole batches."""
    ranker: Ranker = build_ranker(config, seed=derive_seed(config.seed, "dense arch"), device=torch.device("cpu"))
    sharding._initialise_tables(ranker.collections[POOLED], config.tables, derive_seed(config.seed, "tables"))
    stage = config.stages["joint"]
    ranker.loss_weights = stage.loss_weights
    assert stage.sparse_learning_rate is not None
    kinds: dict[str, Any] = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
    kind, parameters = config.optimizers.sparse.type, dict(ranker.collections[POOLED].named_parameters())
    options = {} if kind == "sgd" else {"eps": config.optimizers.sparse.eps}
    fused = [p for name, p in parameters.items() if not config.tables[name.split(".")[1]].data_parallel]
    replicated = [p for name, p in parameters.items() if config.tables[name.split(".")[1]].data_parallel]
    optimizers = [
        kinds[kind](fused, lr=stage.sparse_learning_rate, **options),
        torch.optim.Adam(replicated, lr=stage.learning_rate),
        torch.optim.AdamW(ranker.dense_arch.parameters(), lr=stage.learning_rate, weight_decay=0.0),
    ]
    sparse, max_norm = config.optimizers.sparse.max_gradient, config.optimizers.dense.max_grad_norm
    if sparse is not None:
        ranker.collections[POOLED].register_forward_hook(partial(_clamp_gradients, config, sparse))
    seed = derive_seed(config.seed, "order")
    steps = stage.steps or 0
    for number in range(3):
        epoch = Epoch(
            shards.row_counts, world_size, config.data.batch_size, seed=seed, epoch=number, window_row_groups=3
        )
        streams = []
        for rank in range(world_size):
            with Loader(shards, [epoch], rank) as loader:
                streams.append(list(loader))
        for batches in list(zip(*streams, strict=True))[:steps]:
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.stack([ranker(batch)[0] for batch in batches]).mean().backward()
            if max_norm is not None:
                assert torch.nn.utils.clip_grad_norm_(ranker.dense_arch.parameters(), max_norm) > max_norm
            if config.optimizers.sparse.weight_decay_mode == "decoupled":
                for parameter in fused:
                    parameter.data.mul_(1 - stage.sparse_learning_rate * config.optimizers.sparse.weight_decay)
            for optimizer in optimizers:
                optimizer.step()
        steps -= min(steps, epoch.num_steps)
    return {f"model.{name}": value for name, value in ranker.state_dict().items()}


def test_initial_weights_are_uniform_as_ever_or_normal() -> None:
    uniform = sharding._drawn(np.random.default_rng(7), 3, TableConfig(num_embeddings=50, embedding_dim=4))
    expected = (2 * np.random.default_rng(7).random((3, 4), dtype=np.float32) - 1) * np.float32(sqrt(1 / 50))
    assert uniform.dtype == np.float32 and np.array_equal(uniform, expected)
    settings = TableConfig(num_embeddings=50, embedding_dim=4, init=NormalInitConfig(type="normal", std=1e-4))
    normal = sharding._drawn(np.random.default_rng(7), 50_000, settings)
    assert normal.dtype == np.float32 and abs(normal).max() > 3e-4  # beyond what a uniform of that deviation has
    assert normal.std() == pytest.approx(1e-4, rel=0.01) and normal.mean() == pytest.approx(0, abs=1e-6)


def _clamp_gradients(config: Config, most: float, _: Any, __: Any, pooled: KeyedTensor) -> None:
    """Cut the gradients by what is pooled of tables with a fused optimizer."""

    def clamped(gradient: Tensor) -> Tensor:
        parts = []
        features = config.features.sparse.values()
        for feature, part in zip(features, gradient.split(pooled.length_per_key(), dim=1), strict=True):
            is_fused = not config.tables[feature.table].data_parallel
            assert part.abs().max() > most
            parts.append(part.clamp(-most, most) if is_fused else part)
        return torch.cat(parts, dim=1)

    if pooled.values().requires_grad:
        pooled.values().register_hook(clamped)


@pytest.mark.parametrize(
    ("optimizer", "sharding_type", "max_norm", "max_gradient"),
    [
        ("rowwise_adagrad", "table_wise", None, None),
        ("rowwise_adagrad", "table_wise", 1e-3, 1e-4),
        ("adagrad", "column_wise", None, 1e-4),
        ("sgd", "column_wise", 1e-3, 1e-4),
    ],
)
def test_sharded_equals_unsharded(
    log: Path,
    tmp_path: Path,
    process_group: None,
    optimizer: str,
    sharding_type: str,
    max_norm: float | None,
    max_gradient: float | None,
) -> None:
    raw = tiny_config(log, tmp_path / "out")
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "schedule": "constant", "warmup_steps": 0, "steps": 20}}
    raw["optimizers"] = {
        "sparse": {"type": optimizer, "max_gradient": max_gradient},
        "dense": {"max_grad_norm": max_norm},
    }
    raw["tables"]["item"] = {**raw["tables"]["item"], "sharding": [sharding_type]}
    if sharding_type != "column_wise":
        del raw["tables"]["item"]["min_partition"]
    config = as_config(raw, tmp_path)
    run_ranks(2, train_on, config)
    sharded = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-20", tmp_path)
    expected = unsharded(config, open_splits(config, ["train"])["train"], 2)
    assert {name for name in sharded if name.startswith("model.")} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            sharded[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def _fails(ranks: Ranks, config: Config) -> str:
    try:
        train_on(ranks, config)
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"optimizers": {"sparse": {"type": "adam"}}},
            "no fused adam on a CPU; there are rowwise_adagrad, adagrad",
        ),
        (
            {"optimizers": {"sparse": {"weight_decay": 0.1}}},
            "ignore it on a CPU; set it to 0, or optimizers.sparse.weight_decay_mode to decoupled or coupled",
        ),
        (
            {"tables": {"user": {"num_embeddings": 40, "embedding_dim": 8, "sharding": ["row_wise"]}}},
            "tables.user.sharding: row_wise needs GPUs; on a CPU there are table_wise, column_wise, data_parallel",
        ),
        (
            {"tables": {"user": {"num_embeddings": 40, "embedding_dim": 8, "compute_kernel": "fused_uvm"}}},
            "tables.user.compute_kernel: fused_uvm needs GPUs",
        ),
        (
            {
                "stages": {
                    "joint": {
                        "trains": "all",
                        "steps": 5,
                        "warmup_steps": 6,
                        "learning_rate": 1,
                        "sparse_learning_rate": 1,
                    }
                }
            },
            "stages.joint.warmup_steps is 6, but the stage has 5 steps",
        ),
    ],
    ids=["optimizer", "decay", "sharding", "kernel", "warm-up"],
)
def test_what_the_device_or_the_stage_lacks_is_refused(
    log: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    raw = tiny_config(log, tmp_path / "out")
    for section, values in change.items():
        raw[section] = {**raw[section], **values} if section == "tables" else values
    (message,) = run_ranks(1, _fails, as_config(raw, tmp_path))
    assert expected in message


def _steps_counted(ranks: Ranks, config: Config) -> set[int]:
    output_dir = Path(config.output_dir)
    output_dir.mkdir(exist_ok=True)
    with Monitor(output_dir, enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        trainer.run()
        collection = trainer.sharded.ranker.collections[POOLED]
    modules = sharding._fused_modules(collection)
    return {int(count) for module in modules for count in (module.iter, module.iter_cpu)}


def test_only_steps_that_update_the_tables_count(log: Path, tmp_path: Path) -> None:
    raw = tiny_config(log, tmp_path / "out")
    raw["logging"] = {"eval_every_steps": 2}
    stage = {"learning_rate": 0.01, "steps": 5}
    raw["stages"] = {
        "backbone": {"trains": "backbone", "sparse_learning_rate": 0.1, **stage},
        "experts": {"trains": "experts", **stage},
        "joint": {"trains": "all", "sparse_learning_rate": 0.1, **stage, "steps": 3},
    }
    assert run_ranks(2, _steps_counted, as_config(raw, tmp_path)) == [{8}, {8}]
