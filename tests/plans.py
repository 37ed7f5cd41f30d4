"""Plans as a test wants them: the CPU planner proposes no row-wise types, but TorchRec runs them if a plan asks."""

from collections.abc import Mapping
from typing import Any

from torchrec.distributed import sharding_plan
from torchrec.distributed.types import ShardingPlan

from recsys.config import Config
from recsys.model.names import POOLED
from recsys.model.ranker import Ranker
from recsys.runtime import Ranks
from recsys.sharding import shard as sharding

TYPES: dict[str, Any] = {
    "table_wise": lambda: sharding_plan.table_wise(rank=1),
    "column_wise": lambda: sharding_plan.column_wise(ranks=[0, 1]),
    "row_wise": sharding_plan.row_wise,
    "table_row_wise": lambda: sharding_plan.table_row_wise(host_index=0),
    "grid_shard": lambda: sharding_plan.grid_shard(host_indexes=[0, 1]),
    "data_parallel": sharding_plan.data_parallel,
}


def plan_by(kinds: Mapping[str, str]) -> None:
    """Have `shard` place tables by these of `TYPES`, in this process from here on."""
    plan_tables = sharding.plan_tables

    def planned(ranker: Ranker, config: Config, ranks: Ranks, *_: object) -> tuple[Any, ShardingPlan]:
        sharder, _ = plan_tables(ranker, config, ranks)
        plan = sharding_plan.construct_module_sharding_plan(
            ranker.collections[POOLED],
            {table: TYPES[kind]() for table, kind in kinds.items()},
            sharder=sharder,
            local_size=ranks.local_world_size,
            world_size=ranks.world_size,
            device_type="cpu",
        )
        for table, kind in kinds.items():
            plan[table].compute_kernel = "dense" if kind == "data_parallel" else "fused"
        return sharder, ShardingPlan({POOLED: plan})

    sharding.plan_tables = planned
