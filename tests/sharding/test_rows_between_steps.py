"""Rows between the steps that look them up: decay of every row at every step, and norms, against dense loops."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from plans import plan_by
from ranks import run_ranks
from runs import as_config
from test_types import whole
from tiny import tiny_config
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from recsys.checkpoint.pending import average_, decay_
from recsys.config import Config, ConfigError, SparseOptimizerConfig
from recsys.model.names import POOLED
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding import rows
from recsys.sharding import shard as sharding
from recsys.sharding.rows import Piece, Rows
from recsys.sharding.shard import local_parts, with_parts

ROWS = 12
DIMS = {"narrow": 4, "middle": 8, "wide": 16}
TABLE_OF = {"first": "narrow", "second": "middle", "third": "wide", "fourth": "middle"}
RATES = [0.3, 0.1, 0.2, 0.25, 0.05, 0.3, 0.15]
SETTLED_AFTER = (4, len(RATES))
AVERAGE_DECAYS = [0.6, 0.9, 0.3, 0.8, 0.5, 0.7, 0.9]
AVERAGED_FROM = 1


def config_of(
    folder: Path, optimizer: dict[str, Any], max_norm: float | None = None, *, averaged: bool = False, rows: int = ROWS
) -> Config:
    """Three tables of different widths, one with two features, which training changes by much."""
    raw = tiny_config(folder, folder / "out")
    raw["tables"] = {
        name: {"num_embeddings": rows, "embedding_dim": dim, "init": {"type": "normal", "std": 0.5}, "pooling": "sum"}
        for name, dim in DIMS.items()
    }
    raw["tables"]["middle"]["max_norm"] = max_norm
    raw["features"] = {"sparse": {name: {"table": table} for name, table in TABLE_OF.items()}, "dense": {}}
    raw["optimizers"] = {"sparse": {"eps": 1e-3, **optimizer}, "average": {"tables": "touched"} if averaged else None}
    raw["stages"] = {"joint": {"trains": "all", "steps": 1, "learning_rate": 0.1, "sparse_learning_rate": 0.3}}
    return as_config(raw, folder)


def bags_of(step: int, rank: int, rows: int) -> list[list[list[int]]]:
    """By feature and row, ids with repetitions; some rows have none, and nor has any in the third step."""
    if step == 2:
        return [[[]] * 3 for _ in TABLE_OF]
    return [
        [
            [(5 * step + 3 * rank + 2 * feature + row * k) % min(rows, 7) for k in range((row + feature + rank) % 4)]
            for row in range(3)
        ]
        for feature in range(len(TABLE_OF))
    ]


def loss_of(pooled: Tensor) -> Tensor:
    """Whose gradient is another at other weights."""
    return (pooled * torch.linspace(-1, 2, pooled.shape[1], dtype=pooled.dtype)).sin().sum()


def _train(ranks: Ranks, config: Config, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """All tables on the first rank, at the beginning and after each time that rows were settled; averages with them."""
    rows._MAX_STEPS, rows._MIN_LOG, rows._BLOCK_ROWS = 2, -0.3, 5  # so that there are several of each
    plan_by(kinds)
    sharded = sharding.shard(build_ranker(config, seed=1), config, ranks, seed=2)
    collection: Any = sharded.ranker.collections[POOLED]

    def tables() -> dict[str, Any]:
        found = {name.split(".")[1]: value for name, value in collection.state_dict().items()}
        if averages:
            parts = {name: [average_of(part) for part, _, _ in local_parts(value)] for name, value in found.items()}
            found |= {f"average.{name}": with_parts(value, parts[name]) for name, value in found.items()}
        gathered = {name: whole(value) for name, value in found.items()}
        return {name: None if value is None else value.numpy().copy() for name, value in gathered.items()}

    averages, average_of = False, sharded.rows.average_of
    told = [tables()]
    for step, rate in enumerate(RATES):
        for group in sharded.sparse_optimizer.param_groups:
            group["lr"] = rate
        sharded.sparse_optimizer.zero_grad()
        sharded.rows.begin_step(rate)
        bags = bags_of(step, ranks.rank, config.tables["narrow"].num_embeddings)
        ids = KeyedJaggedTensor(
            keys=list(TABLE_OF),
            values=torch.tensor([number for of in bags for bag in of for number in bag], dtype=torch.int64),
            lengths=torch.tensor([len(bag) for of in bags for bag in of], dtype=torch.int32),
        )
        pooled = collection(ids).to_dict()
        loss_of(torch.cat([pooled[name] for name in TABLE_OF], 1)).backward()
        sharded.sparse_optimizer.step()
        with torch.no_grad():  # in which nothing is to happen to rows
            collection(ids).to_dict()
        if averages:
            sharded.rows.average_step(AVERAGE_DECAYS[step])
        elif config.optimizers.average and step == AVERAGED_FROM:
            averages = True
            sharded.rows.catch_up()
            sharded.rows.begin_averages()
        if step + 1 in SETTLED_AFTER:
            sharded.rows.settle()
            told.append(tables())
    return told


class Dense:
    """The same by definition: every row at every step, in float64."""

    def __init__(self, tables: Mapping[str, Any], config: Config, world_size: int) -> None:
        self.tables = {name: torch.from_numpy(value).double() for name, value in tables.items()}
        self.sums = {name: torch.zeros_like(value) for name, value in self.tables.items()}
        self.sparse, self.world_size = config.optimizers.sparse, world_size
        self.is_averaged = config.optimizers.average is not None
        self.swept: list[float] = []
        self.averages: dict[str, Tensor] = {}
        self.max_norms = {name: table.max_norm for name, table in config.tables.items()}

    def renormalise(self, name: str, rows: Tensor) -> None:
        max_norm = self.max_norms[name]
        if max_norm is not None and len(rows):
            torch.embedding_renorm_(self.tables[name], rows, max_norm, 2.0)

    def settle(self) -> None:
        """What is done before an evaluation, by which all rows are looked up, and all averages in their place."""
        for name, max_norm in self.max_norms.items():
            every = torch.arange(len(self.tables[name]))
            self.renormalise(name, every)
            if max_norm is not None and self.averages:
                torch.embedding_renorm_(self.averages[name], every, max_norm, 2.0)
            self.sweep(name)
        self.swept = []

    @property
    def found(self) -> dict[str, Tensor]:
        return {**self.tables, **{f"average.{name}": value for name, value in self.averages.items()}}

    def step(self, number: int, rate: float) -> None:
        bags = [bags_of(number, rank, len(self.tables["narrow"])) for rank in range(self.world_size)]
        for feature, table in enumerate(TABLE_OF.values()):
            for of_rank in bags:
                self.renormalise(table, torch.tensor([i for bag in of_rank[feature] for i in bag], dtype=torch.int64))
        leaves = {name: value.clone().requires_grad_() for name, value in self.tables.items()}
        losses = []
        for of_rank in bags:
            pooled = []
            for feature, table in enumerate(TABLE_OF.values()):
                lengths = torch.tensor([0, *(len(bag) for bag in of_rank[feature])])
                flat = torch.tensor([i for bag in of_rank[feature] for i in bag], dtype=torch.int64)
                pooled.append(embedding_bag(flat, leaves[table], lengths.cumsum(0)[:-1], mode="sum"))
            losses.append(loss_of(torch.cat(pooled, 1)))
        torch.stack(losses).mean().backward()
        self.swept.append(rate)
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            self.update(name, leaf.grad, rate)
            if self.averages:
                decay = AVERAGE_DECAYS[number]
                self.averages[name] = decay * self.averages[name] + (1 - decay) * self.tables[name]
            if len(self.swept) == self.sparse.sweep_steps:
                self.sweep(name)
        if len(self.swept) == self.sparse.sweep_steps:
            self.swept = []
        if self.is_averaged and number == AVERAGED_FROM:
            for name, value in self.tables.items():
                self.renormalise(name, torch.arange(len(value)))
            self.averages = {name: value.clone() for name, value in self.tables.items()}

    def update(self, name: str, gradient: Tensor, rate: float) -> None:
        weight, decay = self.tables[name], self.sparse.weight_decay
        if self.sparse.weight_decay_mode == "decoupled":
            weight.mul_(1 - rate * decay)
        elif self.sparse.type == "sgd":
            gradient = gradient + decay * weight
        if self.sparse.type == "sgd":
            weight.sub_(rate * gradient)
            return
        square = gradient.square()
        self.sums[name] += square.mean(1, keepdim=True) if self.sparse.type == "rowwise_adagrad" else square
        weight.sub_(rate * gradient / (self.sums[name].sqrt() + self.sparse.eps))

    def sweep(self, name: str) -> None:
        """What docs/config.md says of Adagrad: the L2 term of several steps at once."""
        if self.sparse.weight_decay_mode != "coupled" or self.sparse.type == "sgd" or not self.swept:
            return
        weight, sums, decay = self.tables[name], self.sums[name], self.sparse.weight_decay
        square = (decay * weight).square()
        sums += len(self.swept) * (square.mean(1, keepdim=True) if self.sparse.type == "rowwise_adagrad" else square)
        factors = 1 - sum(self.swept) * decay / (sums.sqrt() + self.sparse.eps)
        weight *= factors.clamp(min=0.0) if len(self.swept) > 1 else factors


ON_ONE_RANK = dict.fromkeys(DIMS, "table_wise")  # of which the other has nothing
MIXED = {"narrow": "table_wise", "middle": "row_wise", "wide": "column_wise"}
BY_ROWS = dict.fromkeys(DIMS, "row_wise")


def _compare(folder: Path, world_size: int, kinds: dict[str, str], config: Config, bound: float) -> None:
    begun, *found = run_ranks(world_size, _train, config, kinds)[0]
    dense = Dense(begun, config, world_size)
    for step, rate in enumerate(RATES):
        dense.step(step, rate)
        if step + 1 in SETTLED_AFTER:
            dense.settle()
            now = found.pop(0)
            assert now.keys() == dense.found.keys()
            for name, expected in dense.found.items():
                value = torch.from_numpy(now[name]).double()
                torch.testing.assert_close(
                    value, expected, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
                )
    assert not found


@pytest.mark.parametrize(
    ("world_size", "kinds", "optimizer", "max_norm"),
    [
        (2, ON_ONE_RANK, "rowwise_adagrad", None),
        (2, MIXED, "adagrad", 0.8),
        pytest.param(2, BY_ROWS, "sgd", None, marks=pytest.mark.slow),
    ],
)
def test_decoupled_decay_is_that_of_every_row_at_every_step(
    tmp_path: Path, world_size: int, kinds: dict[str, str], optimizer: str, max_norm: float | None
) -> None:
    settings = {"type": optimizer, "weight_decay": 0.7, "weight_decay_mode": "decoupled"}
    _compare(tmp_path, world_size, kinds, config_of(tmp_path, settings, max_norm), 2e-6)


@pytest.mark.parametrize(
    ("optimizer", "every", "kinds"), [("sgd", 1, MIXED), ("adagrad", 3, MIXED), ("rowwise_adagrad", 2, ON_ONE_RANK)]
)
def test_coupled_decay_is_the_stated_sweep_and_for_sgd_that_of_every_step(
    tmp_path: Path, optimizer: str, every: int, kinds: dict[str, str]
) -> None:
    settings = {"type": optimizer, "weight_decay": 0.3, "weight_decay_mode": "coupled", "coupled_every": every}
    _compare(tmp_path, 2, kinds, config_of(tmp_path, settings), 5e-6)


DECOUPLED = {"weight_decay": 0.7, "weight_decay_mode": "decoupled"}
COUPLED = {"weight_decay": 0.3, "weight_decay_mode": "coupled"}


@pytest.mark.parametrize(
    ("kinds", "optimizer", "max_norm"),
    [
        (MIXED, {"type": "adagrad", **DECOUPLED}, 0.8),
        (MIXED, {"type": "adagrad", **COUPLED, "coupled_every": 3}, None),
        (BY_ROWS, {"type": "sgd"}, 0.8),
        pytest.param(MIXED, {"type": "sgd", **COUPLED, "coupled_every": 1}, None, marks=pytest.mark.slow),
        pytest.param(ON_ONE_RANK, {"type": "rowwise_adagrad", **DECOUPLED}, None, marks=pytest.mark.slow),
        pytest.param(MIXED, {"type": "adagrad"}, None, marks=pytest.mark.slow),
    ],
)
def test_averages_of_rows_are_those_of_every_step(
    tmp_path: Path, kinds: dict[str, str], optimizer: dict[str, Any], max_norm: float | None
) -> None:
    _compare(tmp_path, 2, kinds, config_of(tmp_path, optimizer, max_norm, averaged=True), 5e-6)


@pytest.mark.parametrize(
    ("optimizer", "averaged"),
    [
        ({"type": "adagrad", "weight_decay": 0.7, "weight_decay_mode": "decoupled"}, True),
        ({"type": "sgd"}, False),
    ],
)
def test_a_rank_that_has_no_row_of_any_table_takes_part(
    tmp_path: Path, optimizer: dict[str, Any], averaged: bool
) -> None:
    """Of tables of one row, by rows on two ranks."""
    max_norm = 0.8 if averaged else None
    _compare(tmp_path, 2, BY_ROWS, config_of(tmp_path, optimizer, max_norm, averaged=averaged, rows=1), 1e-5)


def _behind_sizes(ranks: Ranks, config: Config) -> list[tuple[int, int]]:
    """Of each of this rank's fused modules, the last of its sizes so far, and what stands in memory behind it."""
    plan_by(BY_ROWS)
    sharded = sharding.shard(build_ranker(config, seed=1), config, ranks, seed=2)
    ends = [module.hash_size_cumsum for module in sharding._fused_modules(sharded.ranker.collections[POOLED])]
    return [(int(of[-1]), int(of.as_strided((1,), (1,), of.storage_offset() + len(of)))) for of in ends]


def test_sizes_that_are_0_at_the_end_have_another_behind_them(tmp_path: Path) -> None:
    """There fbgemm looks for the size of a table that has no row on a rank, be it the last or all."""
    for num_rows in (1, ROWS):
        for found in run_ranks(2, _behind_sizes, config_of(tmp_path, {"type": "sgd"}, rows=num_rows)):
            assert found and all(behind == last + 1 for last, behind in found)


@pytest.mark.parametrize(("factor", "lowest"), [(1.0, 0.9), (0.999, 0.4), (0.9, 0.9999)])
def test_averages_are_exact_however_long_a_row_was_not_looked_up(factor: float, lowest: float) -> None:
    """Over so many steps that products of factors are 0; the second row is set to 1 now and then."""
    random, steps = torch.Generator().manual_seed(1), 20_000
    decays = torch.rand(steps, generator=random, dtype=torch.float64) * (1 - lowest) + lowest
    sums, weights, averages = rows._Sums(torch.device("cpu")), torch.ones(2, 4), torch.full((2, 4), 2.0)
    expected, dense, last = [2.0, 2.0], [1.0, 1.0], torch.zeros(2, dtype=torch.int64)
    for step, decay in enumerate(decays.tolist()):
        if sums.are_long:
            average_(averages, weights, sums.logs, sums.moves, last, sums.moved)
            decay_(weights, sums.logs, last, sums.log)
            last.zero_()
            sums.forget()
        sums.begin_step(math.log(factor))
        dense = [factor * row for row in dense]
        if step % 997 == 500 or step == steps - 3:
            average_(averages[1:], weights[1:], sums.logs, sums.moves, last[1:], sums.moved)
            weights[1], dense[1], last[1] = 1.0, 1.0, sums.steps
        sums.average(decay)
        expected = [decay * average + (1 - decay) * row for average, row in zip(expected, dense, strict=True)]
    average_(averages, weights, sums.logs, sums.moves, last, sums.moved)
    assert averages[:, 0].tolist() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("optimizer", "max_norm", "expected"),
    [
        (
            {"weight_decay": 0.1, "weight_decay_mode": "decoupled"},
            None,
            "tables.narrow.compute_kernel: .* weight_decay_mode",
        ),
        (
            {"type": "sgd"},
            1.0,
            "tables.middle.compute_kernel: .* tables.middle.max_norm; set it to fused, or to fused_uvm",
        ),
        ({}, None, "tables.narrow.compute_kernel: .* optimizers.average.tables touched; set it to fused"),
    ],
)
def test_a_cache_that_the_planner_takes_is_refused(
    tmp_path: Path, optimizer: dict[str, Any], max_norm: float | None, expected: str
) -> None:
    config = config_of(tmp_path, optimizer, max_norm, averaged=not optimizer)
    sharding_of = dict.fromkeys(DIMS, ParameterSharding("table_wise", "fused_uvm_caching", [0]))
    plan = ShardingPlan({POOLED: EmbeddingModuleShardingPlan(sharding_of)})
    with pytest.raises(ConfigError, match=expected):
        sharding._rows(build_ranker(config, seed=1), config, plan, torch.device("cpu"))


@pytest.mark.parametrize(
    ("optimizers", "told"),
    [
        ({"sparse": {"type": "sgd", "weight_decay": 0.1, "weight_decay_mode": "coupled"}}, "weight_decay_mode coupled"),
        ({"average": {"tables": "touched"}}, r"optimizers\.average\.tables touched"),
    ],
)
def test_a_cache_that_the_config_asks_for_is_refused(tmp_path: Path, optimizers: dict[str, Any], told: str) -> None:
    raw = config_of(tmp_path, {"type": "sgd"}).model_dump()
    raw["optimizers"] |= optimizers
    raw["tables"]["wide"]["compute_kernel"] = "fused_uvm_caching"
    with pytest.raises(ValueError, match=f"tables.wide.compute_kernel: fused_uvm_caching does not go with {told}"):
        Config.model_validate(raw)


def test_tables_on_a_gpu_and_its_host_in_one_module_are_refused() -> None:
    """Whose weights, as a table of either kernel has there, begin at 0 each."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(3, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)] * 2, optimizer=EmbOptimType.EXACT_SGD
    )
    module.weights_physical_placements = [EmbeddingLocation.MANAGED.value, EmbeddingLocation.DEVICE.value]
    pieces = [Piece("large", 0, 0, None), Piece("table-items", 0, 0, None)]
    plain, decays = SparseOptimizerConfig(type="sgd"), {"weight_decay": 0.5, "weight_decay_mode": "decoupled"}
    Rows([(module, pieces)], plain, {}, torch.device("cpu"))
    for config, max_norms in ((plain, {"large": 1.0}), (SparseOptimizerConfig(type="sgd", **decays), {})):
        with pytest.raises(
            ConfigError, match=r"tables\.large\.compute_kernel: fbgemm has large and items in one module"
        ):
            Rows([(module, pieces)], config, max_norms, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["adagrad", "rowwise_adagrad"])
def test_a_sweep_passes_over_a_table_of_which_a_rank_has_no_row(kind: str) -> None:
    """As of one row, by rows on two ranks."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, 4, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in (0, 3)],
        optimizer=EmbOptimType("exact_row_wise_adagrad" if kind == "rowwise_adagrad" else "exact_adagrad"),
    )
    weight = module.split_embedding_weights()[1]
    weight.data.fill_(2.0)
    config = SparseOptimizerConfig(type=kind, weight_decay=0.5, weight_decay_mode="coupled", eps=1.0)
    rows = Rows([(module, [Piece("small", 1, 0, None), Piece("large", 0, 0, None)])], config, {}, torch.device("cpu"))
    rows.begin_step(0.25)
    rows.settle()
    assert torch.equal(weight, torch.full((3, 4), 2.0 * (1 - 0.25 * 0.5 / (1.0 + 1.0))))
