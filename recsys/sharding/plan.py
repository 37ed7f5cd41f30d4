"""Which table lives where: TorchRec's planner under the config's constraints, and the plan as a report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan

from recsys.config import WHOLE_ROWS, ConfigError, TableConfig
from recsys.model.names import table_key, table_name
from recsys.runtime import Ranks
from recsys.sharding.machine import Machine, this_machine
from recsys.sharding.memory import ON_HOST, Beside, Options, by_table, memory_by_rank, why_nothing_fits

_CPU_SHARDING = ("table_wise", "column_wise")
_GPU_SHARDING = (*_CPU_SHARDING, "row_wise", "table_row_wise", "table_column_wise")
PLAN_TEXTS = ("table", "rows x dim", "sharding", "kernel", "ranks", "shards")
"""Columns of `plan_rows` that are texts; the last is a size."""

_GPU_COLUMNS = 1024
"""Of the widest shard that a GPU looks up. fbgemm has kernels for up to 2,048, which gave zeros for those beyond it
(https://github.com/meta-pytorch/torchrec/issues/3673).
"""
_ON_CPU = {*_CPU_SHARDING, "data_parallel"}
_CONSTRAINTS = ("sharding", "compute_kernel", "min_partition", "max_norm")


@dataclass
class Plan(ShardingPlan):
    """Where each table is.

    Attributes:
        memory: bytes that tables are estimated to take on each rank, by rank: of its GPU (`hbm`) and of the host
            (`ddr`), with all that training has beside their weights.
    """

    memory: list[Storage]


def make_plan(
    model: nn.Module,
    sharder: ModuleSharder[nn.Module],
    tables: Mapping[str, TableConfig],
    ranks: Ranks,
    *,
    batch_size: int,
    beside: Callable[[TableConfig], Beside],
    lengths: Mapping[str, Sequence[float]],
    machine: Machine | None = None,
) -> Plan:
    """Plan a model's tables over all ranks; a collective call, with the same result on each, in a process group.

    Without one it plans for ranks that need not exist.

    Args:
        model: holds collections of tables, on the meta device.
        sharder: says how that collection can be sharded.
        tables: the config's tables, whose constraints bind the planner.
        ranks: this process among all, or one of those to plan for.
        batch_size: rows of a rank's step, from which the planner estimates the cost of a lookup.
        beside: what training has beside a table's weights.
        lengths: mean number of ids in an example, of each feature of each table; counts on the first rank.
        machine: what each machine has; None for what this one has.

    Raises:
        ConfigError: a constraint that this device cannot meet, or tables that do not fit.
    """
    _check_constraints(tables, on_cpu=ranks.device.type == "cpu")
    topology = (machine or this_machine(ranks)).topology(ranks)

    def enumerator(tables: Mapping[str, TableConfig], beside: Callable[[TableConfig], Beside]) -> _Enumerator:
        return _Enumerator(
            topology, batch_size, tables, {name: beside(table) for name, table in tables.items()}, lengths
        )

    ours = enumerator(tables, beside)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=ours,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # what is kept from tables is not in the topology
        constraints=ours.constraints,
    )
    try:
        if dist.is_initialized():
            plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
        else:
            plan = planner.plan(model, [sharder])
    except PlannerError:
        options = by_table(ours.enumerate(model, [sharder]))

        def then(changed: Mapping[str, TableConfig], beside: Callable[[TableConfig], Beside]) -> Options:
            return by_table(enumerator(changed, beside).enumerate(model, [sharder]))

        why = why_nothing_fits(options, topology, _ways_out(tables, beside, then))
        raise ConfigError(f"tables: the planner found no placement on {ranks.world_size} ranks: {why}") from None
    if ranks.device.type == "cuda":
        _check_widths(plan, tables)
    options = by_table(ours.enumerate(model, [sharder]))
    return Plan(plan.plan, memory_by_rank(plan, options, ranks.world_size))


def _ways_out(
    tables: Mapping[str, TableConfig],
    beside: Callable[[TableConfig], Beside],
    then: Callable[[Mapping[str, TableConfig], Callable[[TableConfig], Beside]], Options],
) -> Callable[[str], Iterator[tuple[str, Options]]]:
    """What might be changed for a table, the least first, in words, with how tables could be sharded then."""

    def of(name: str) -> Iterator[tuple[str, Options]]:
        table = tables[name]

        def changed(said: str, **update: object) -> tuple[str, Options]:
            return said, then({**tables, name: table.model_copy(update=update)}, beside)

        bound = [key for key in _CONSTRAINTS if getattr(table, key) is not None]
        for keys in (keys for count in range(1, len(bound) + 1) for keys in combinations(bound, count)):
            loose = " and ".join(f"tables.{name}.{key}" for key in keys)
            yield changed(f"set {loose} to null", **dict.fromkeys(keys))
        if table.max_norm is None and not table.data_parallel:
            # TorchRec cuts no column shard narrower than 128 unless it is told to.
            kinds = None if table.sharding is None else tuple(dict.fromkeys((*table.sharding, "column_wise")))
            also = f" and have column_wise in tables.{name}.sharding" if kinds != table.sharding else ""
            for width in _widths(table.embedding_dim):
                said = f"set tables.{name}.min_partition to {width}{also}"
                yield changed(said, min_partition=width, sharding=kinds)
        if beside(table).is_copied:
            without = then(tables, lambda one: replace(beside(one), is_copied=False))
            yield "set checkpoints.asynchronous to false", without

    return of


def _widths(columns: int) -> Iterator[int]:
    """Widths to cut columns into, ever narrower."""
    while columns % 8 == 0:
        columns //= 2
        yield columns


def _check_constraints(tables: Mapping[str, TableConfig], *, on_cpu: bool) -> None:
    for name, table in tables.items() if on_cpu else ():
        if lacking := sorted(set(table.sharding or ()) - _ON_CPU):
            raise ConfigError(
                f"tables.{name}.sharding: {', '.join(lacking)} needs GPUs; "
                f"on a CPU there are {', '.join(_CPU_SHARDING)}, data_parallel"
            )
        if table.compute_kernel in ON_HOST:
            raise ConfigError(
                f"tables.{name}.compute_kernel: {table.compute_kernel} needs GPUs; on a CPU there are dense and fused"
            )


def _check_widths(plan: ShardingPlan, tables: Mapping[str, TableConfig]) -> None:
    """Refuse shards that a GPU would look up wrongly."""
    for name, planned in plan_as_dict(plan, tables).items():
        table = tables[name]
        widest = max((columns for *_, columns in planned["shards"]), default=table.embedding_dim)
        if widest <= _GPU_COLUMNS:
            continue
        way_out = "make it smaller"
        if table.max_norm is None and not table.data_parallel:
            width = next(width for width in range(_GPU_COLUMNS, 0, -4) if table.embedding_dim % width == 0)
            way_out += f", or set tables.{name}.sharding to [column_wise] and min_partition to {width}"
        raise ConfigError(
            f"tables.{name}.embedding_dim: a GPU would have {widest:,} columns of each row, and fbgemm looks up "
            f"{_GPU_COLUMNS:,} at most rightly; {way_out}"
        )


def possible_on_cpu(table: TableConfig) -> TableConfig:
    """A table without what only GPUs can do."""
    sharding = tuple(kind for kind in table.sharding or () if kind in _ON_CPU)
    kernel = None if table.compute_kernel in ON_HOST else table.compute_kernel
    return table.model_copy(update={"sharding": sharding or None, "compute_kernel": kernel})


class _Enumerator(EmbeddingEnumerator):
    """Enumerates in a fixed order, plainest sharding first, with all that tables take of memory.

    TorchRec's own order is that of a set of strings, which differs from process to process, so that between options of
    equal cost the same config would get one plan today and another tomorrow.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        tables: Mapping[str, TableConfig],
        beside: Mapping[str, Beside],
        lengths: Mapping[str, Sequence[float]],
    ) -> None:
        self._device, self._beside = topology.compute_device, beside
        # Rows that lie on one GPU are not divided: the planner would, as it costs nothing by its estimates, and a step
        # then takes longer.
        kinds = _GPU_SHARDING if self._device == "cuda" and topology.world_size > 1 else _CPU_SHARDING
        self.constraints = {table_key(name): _constraint(table, lengths[name], kinds) for name, table in tables.items()}
        super().__init__(topology, batch_size, self.constraints)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        def place(option: ShardingOption) -> tuple[str, int, str]:
            kind = option.sharding_type
            return option.fqn, _GPU_SHARDING.index(kind) if kind in _GPU_SHARDING else -1, option.compute_kernel

        return sorted(super().enumerate(module, sharders), key=place)

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        super().populate_estimates(sharding_options)
        for option in sharding_options:
            self._beside[table_name(option.name)].add_to(option, self._device)


def _constraint(table: TableConfig, lengths: Sequence[float], kinds: Sequence[str]) -> ParameterConstraints:
    kernel = table.compute_kernel
    if kernel is None and table.data_parallel:
        kernel = EmbeddingComputeKernel.DENSE.value
    # Data-parallel tables have an optimizer of their own, so they are never the planner's choice.
    sharding: Sequence[str] = table.sharding or kinds
    if table.max_norm is not None:  # of which the config has seen to it
        sharding = tuple(kind for kind in sharding if kind in WHOLE_ROWS)
    return ParameterConstraints(
        sharding_types=list(sharding),
        compute_kernels=[kernel] if kernel else None,
        min_partition=table.min_partition,
        pooling_factors=list(lengths),
    )


def plan_as_dict(plan: ShardingPlan, tables: Mapping[str, TableConfig]) -> dict[str, Any]:
    """By table: sharding, kernel, ranks, and where its shards are, each as [row, column, rows, columns]; for JSON.

    A table that every rank has has no shards.
    """
    shardings = {name: sharding for collection in plan.plan.values() for name, sharding in collection.items()}
    told = {}
    for name in tables:
        sharding: ParameterSharding = shardings[table_key(name)]
        shards = getattr(sharding.sharding_spec, "shards", None) or []
        told[name] = {
            "sharding": sharding.sharding_type,
            "kernel": sharding.compute_kernel,
            "ranks": list(sharding.ranks or []),
            "shards": [[*shard.shard_offsets, *shard.shard_sizes] for shard in shards],
        }
    return told


def plan_rows(plan: ShardingPlan, tables: Mapping[str, TableConfig]) -> list[dict[str, str]]:
    """One row for each table: sharding, kernel, ranks, shards, size in MiB of the weights over all ranks."""
    shardings = {name: sharding for collection in plan.plan.values() for name, sharding in collection.items()}
    rows = []
    for name, table in tables.items():
        sharding: ParameterSharding = shardings[table_key(name)]
        shards = getattr(sharding.sharding_spec, "shards", None)
        replicas = 1 if shards else len(sharding.ranks or [])
        mebibytes = table.num_embeddings * table.embedding_dim * table.itemsize * replicas / 2**20
        rows.append(
            {
                "table": name,
                "rows x dim": f"{table.num_embeddings} x {table.embedding_dim}",
                "sharding": sharding.sharding_type,
                "kernel": sharding.compute_kernel,
                "ranks": " ".join(map(str, sharding.ranks or [])),
                "shards": " ".join("x".join(map(str, shard.shard_sizes)) for shard in shards)
                if shards
                else "replicated",
                "MiB": f"{mebibytes:.2f}",
            }
        )
    return rows


def plan_moves(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One row for each table that lies elsewhere, or otherwise, in `after` than in `before`; both as of `plan_rows`."""
    places = [{row["table"]: _place(row) for row in rows} for rows in (before, after)]
    moves = ((table, *(of.get(table, "-") for of in places)) for table in {**places[0], **places[1]})
    return [{"table": table, "from": old, "to": new} for table, old, new in moves if old != new]


def _place(row: Mapping[str, str]) -> str:
    return f"{row['sharding']} {row['kernel']} on {row['ranks']}: {row['shards']}"
