"""What tables take of memory while they are trained, and why there is no place for them where there is none."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.types import ShardingPlan

from recsys.config import Config, TableConfig
from recsys.model.names import table_key, table_name
from recsys.runtime import Ranks
from recsys.sharding.machine import Machine

ON_HOST = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
"""Kernels of a GPU whose tables are in host memory."""

_STATE = {"rowwise_adagrad": 0, "adagrad": 1, "sgd": 0, "adam": 2}
_ROW_BYTES = 4  # of rowwise Adagrad's sum, and of the step that a row has had

Options = Mapping[str, list[ShardingOption]]
"""How each table may be sharded, by its name in the config."""


@dataclass(frozen=True)
class Beside:
    """What is beside a table's weights, of which TorchRec's estimate knows nothing where optimizers are fused.

    Attributes:
        kept: optimizer state and averages as multiples of the weights, were they float32.
        row_bytes: more of these for each row of a shard, however wide it is.
        gradients: as multiples of the weights.
        itemsize: bytes of a weight.
        is_copied: whether host memory holds weights and what is kept of them once more, while a checkpoint is written.
    """

    kept: int
    row_bytes: int
    gradients: int
    is_copied: bool
    itemsize: int = torch.float32.itemsize

    @classmethod
    def of(cls, table: TableConfig, config: Config) -> "Beside":
        """Of a table in a run."""
        optimizers, average = config.optimizers, config.optimizers.average
        averaged = average is not None and (table.data_parallel or average.tables != "none")
        optimizer = optimizers.data_parallel.type if table.data_parallel else optimizers.sparse.type
        row_bytes = 0
        if not table.data_parallel:
            keeps_steps = optimizers.changes_rows or any(one.max_norm is not None for one in config.tables.values())
            row_bytes = _ROW_BYTES * ((optimizer == "rowwise_adagrad") + bool(keeps_steps))
        kept, gradients = _STATE[optimizer] + averaged, int(table.data_parallel)
        return cls(kept, row_bytes, gradients, config.checkpoints.asynchronous, table.itemsize)

    def add_to(self, option: ShardingOption, device: str) -> None:
        """Add it to the estimate of each shard."""
        for shard in option.shards:
            rows, columns = shard.size
            weights = rows * columns * self.itemsize
            kept = self.kept * rows * columns * torch.float32.itemsize
            by_row = self.row_bytes * rows
            more = Storage(hbm=0, ddr=weights + kept + by_row if self.is_copied else 0)
            here = kept + self.gradients * weights
            if device == "cpu":
                more.ddr += here + by_row
            elif option.compute_kernel in ON_HOST:
                more.ddr += here
                more.hbm += by_row  # a number for each row is on the GPU, wherever the rows are
            else:
                more.hbm += here + by_row
            shard.storage = more if shard.storage is None else shard.storage + more


def by_table(options: Iterable[ShardingOption]) -> dict[str, list[ShardingOption]]:
    """Options by the names that tables have in the config."""
    found: dict[str, list[ShardingOption]] = {}
    for option in options:
        found.setdefault(table_name(option.name), []).append(option)
    return found


def memory_by_rank(plan: ShardingPlan, options: Options, world_size: int) -> list[Storage]:
    """Bytes that the tables of a plan take of devices and hosts, by rank."""
    memory = [Storage(hbm=0, ddr=0) for _ in range(world_size)]
    shardings = {name: sharding for collection in plan.plan.values() for name, sharding in collection.items()}
    for table, of_table in options.items():
        sharding = shardings[table_key(table)]
        kind = sharding.sharding_type, sharding.compute_kernel
        option = next(one for one in of_table if (one.sharding_type, one.compute_kernel) == kind)
        for shard, rank in zip(option.shards, sharding.ranks or [], strict=True):
            memory[rank] += _storage(shard.storage)
    return memory


def memory_rows(memory: Sequence[Storage], machine: Machine, ranks: Ranks) -> list[dict[str, str]]:
    """One row for ranks that follow each other and are alike: what tables take of each, and what there is for them."""
    capacity = machine.topology(ranks).devices[0].storage
    rows = []
    numbered = groupby(enumerate(memory), key=lambda one: [_gib(need) for need, _, _ in _tiers(one[1], capacity)])
    for _, alike in numbered:
        numbers, storages = zip(*alike, strict=True)
        told = {f"{tier} GiB": (need, have) for need, have, tier in _tiers(storages[0], capacity) if have}
        rank = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} - {numbers[-1]}"
        rows.append({"rank": rank, **{tier: f"{_gib(need)} of {_gib(have)}" for tier, (need, have) in told.items()}})
    return rows


def why_nothing_fits(
    options: Options, topology: Topology, ways_out: Callable[[str], Iterable[tuple[str, Options]]]
) -> str:
    """Which table there is no place for, how much it needs of how much there is, and what to change; one line.

    Args:
        options: how each table may be sharded.
        topology: what each rank has for tables.
        ways_out: of a table: what might be changed, in words, with how tables could be sharded then.
    """
    rank, world_size = topology.devices[0].storage, topology.world_size

    def fullness(option: ShardingOption) -> float:
        return max(_ratio(need, have) for need, have, _ in _tiers(_on_one_rank(option, world_size), rank))

    best = {table: min(of_table, key=fullness) for table, of_table in options.items()}
    table = max(best, key=lambda name: fullness(best[name]))
    if fullness(option := best[table]) <= 1:
        return _why_not_together(best, topology)
    tiers = _tiers(_on_one_rank(option, world_size), rank)
    need, have, tier = max(tiers, key=lambda one: _ratio(*one[:2]))
    told = (
        f"tables.{table} needs {_gib(need)} GiB of {tier} memory on one rank ({option.sharding_type}, "
        f"{option.compute_kernel}), and each has {_gib(have)} for tables"
    )
    for change, then in ways_out(table):
        if min(map(fullness, then[table])) <= 1:
            return f"{told}; {change}, or give ranks more memory"
    return f"{told}; make it smaller, or take more ranks or ranks with more memory"


def _why_not_together(best: Mapping[str, ShardingOption], topology: Topology) -> str:
    needs = {table: sum(_size(shard.storage) for shard in option.shards) for table, option in best.items()}
    there = sum(_size(device.storage) for device in topology.devices)
    largest = max(needs, key=lambda table: needs[table])
    return (
        f"each table would fit alone, but together they need {_gib(sum(needs.values()))} GiB in "
        f"{sum(len(option.shards) for option in best.values())} shards, which do not go into the {_gib(there)} that "
        f"all ranks have for tables; the largest is tables.{largest} ({_gib(needs[largest])}, "
        f"{best[largest].sharding_type}): make it smaller, loosen its sharding or kernel, or take more ranks or ranks "
        "with more memory"
    )


def _on_one_rank(option: ShardingOption, world_size: int) -> Storage:
    """What a rank has at least of a table that is spread over all ranks as evenly as its shards can be."""
    number = -(-len(option.shards) // world_size)
    storages = [_storage(shard.storage) for shard in option.shards]
    return Storage(hbm=number * max(one.hbm for one in storages), ddr=number * max(one.ddr for one in storages))


def _size(storage: Storage | None) -> int:
    return int(_storage(storage).hbm + _storage(storage).ddr)


def _storage(storage: Storage | None) -> Storage:
    assert storage is not None  # as an enumerator leaves none out
    return storage


def _tiers(storage: Storage, capacity: Storage) -> list[tuple[int, int, str]]:
    return [(storage.hbm, capacity.hbm, "GPU"), (storage.ddr, capacity.ddr, "host")]


def _ratio(need: int, have: int) -> float:
    return need / have if have > 0 else inf if need else 0.0


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
