"""Which table lives where: TorchRec's planner under the config's constraints, and the plan as a report."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan

from recsys.config import WHOLE_ROWS, ConfigError, TableConfig
from recsys.model.names import table_key
from recsys.runtime import Ranks

_CPU_SHARDING = ("table_wise", "column_wise")
_GPU_SHARDING = (*_CPU_SHARDING, "row_wise", "table_row_wise", "table_column_wise")
PLAN_TEXTS = ("table", "rows x dim", "sharding", "kernel", "ranks", "shards")
"""Columns of `plan_rows` that are texts; the last is a size."""

_ON_CPU = {*_CPU_SHARDING, "data_parallel"}
_GPU_KERNELS = ("fused_uvm", "fused_uvm_caching")
_RESERVED = 0.15
"""Share of a device's memory kept from the planner, for activations, the dense arch and the allocator."""


def make_plan(
    model: nn.Module,
    sharder: ModuleSharder[nn.Module],
    tables: Mapping[str, TableConfig],
    ranks: Ranks,
    *,
    batch_size: int,
) -> ShardingPlan:
    """Plan a model's tables over all ranks; a collective call, with the same result on each, in a process group.

    Without one it plans for ranks that need not exist.

    Args:
        model: holds collections of tables, on the meta device.
        sharder: says how that collection can be sharded.
        tables: the config's tables, whose constraints bind the planner.
        ranks: this process among all, or one of those to plan for.
        batch_size: rows of a rank's step, from which the planner estimates the cost of a lookup.

    Raises:
        ConfigError: a constraint that this device cannot meet, or tables that do not fit.
    """
    on_cpu = ranks.device.type == "cpu"
    for name, table in tables.items():
        lacking = sorted(set(table.sharding or ()) - _ON_CPU) if on_cpu else []
        if lacking:
            raise ConfigError(
                f"tables.{name}.sharding: {', '.join(lacking)} needs GPUs; "
                f"on a CPU there are {', '.join(_CPU_SHARDING)}, data_parallel"
            )
        if on_cpu and table.compute_kernel in _GPU_KERNELS:
            raise ConfigError(
                f"tables.{name}.compute_kernel: {table.compute_kernel} needs GPUs; on a CPU there are dense and fused"
            )
    topology = Topology(
        world_size=ranks.world_size, local_world_size=ranks.local_world_size, compute_device=ranks.device.type
    )
    constraints = {table_key(name): _constraint(table, on_cpu=on_cpu) for name, table in tables.items()}
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=_OrderedEnumerator(topology, batch_size, constraints),
        storage_reservation=FixedPercentageStorageReservation(_RESERVED),
        constraints=constraints,
    )
    try:
        if dist.is_initialized():
            return planner.collective_plan(model, [sharder], dist.group.WORLD)
        return planner.plan(model, [sharder])
    except PlannerError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no plan found")
        raise ConfigError(
            f"tables: the planner found no placement on {ranks.world_size} ranks ({reason.strip()}); "
            "loosen tables.*.sharding, shrink tables or add ranks"
        ) from None


def possible_on_cpu(table: TableConfig) -> TableConfig:
    """A table without those of its constraints that only GPUs can meet."""
    sharding = tuple(kind for kind in table.sharding or () if kind in _ON_CPU)
    kernel = None if table.compute_kernel in _GPU_KERNELS else table.compute_kernel
    return table.model_copy(update={"sharding": sharding or None, "compute_kernel": kernel})


class _OrderedEnumerator(EmbeddingEnumerator):
    """Enumerates in a fixed order, plainest sharding first.

    TorchRec's own order is that of a set of strings, which differs from process to process, so that between options of
    equal cost the same config would get one plan today and another tomorrow.
    """

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        def place(option: ShardingOption) -> tuple[str, int, str]:
            kind = option.sharding_type
            return option.fqn, _GPU_SHARDING.index(kind) if kind in _GPU_SHARDING else -1, option.compute_kernel

        return sorted(super().enumerate(module, sharders), key=place)


def _constraint(table: TableConfig, *, on_cpu: bool) -> ParameterConstraints:
    kernel = table.compute_kernel
    if kernel is None and table.data_parallel:
        kernel = EmbeddingComputeKernel.DENSE.value
    # Data-parallel tables have an optimizer of their own, so they are never the planner's choice.
    sharding: Sequence[str] = table.sharding or (_CPU_SHARDING if on_cpu else _GPU_SHARDING)
    if table.max_norm is not None:  # of which the config has seen to it
        sharding = tuple(kind for kind in sharding if kind in WHOLE_ROWS)
    return ParameterConstraints(
        sharding_types=list(sharding),
        compute_kernels=[kernel] if kernel else None,
        min_partition=table.min_partition,
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
        mebibytes = table.num_embeddings * table.embedding_dim * torch.float32.itemsize * replicas / 2**20
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
