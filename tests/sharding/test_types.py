"""Tables score and train the same however they are sharded: every type of TorchRec's, alone and mixed, on gloo."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import TYPES, plan_by
from ranks import run_ranks
from runs import as_config
from tiny import tiny_config
from torch import Tensor
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import comm_ops

from recsys.config import Config
from recsys.data.batch import Batch
from recsys.model.names import POOLED
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding import shard as sharding

ROWS = 40
KEYS = ("first", "second", "third")
POOLING = {"first": "mean", "second": "sum", "third": "mean"}


def config_of(folder: Path, embedding_dim: int = 8) -> Config:
    """Three tables of one feature each, two pooled by mean and one by sum, on dense weights that are SGD's."""
    raw = tiny_config(folder, folder / "out")
    raw["tables"] = {
        key: {"num_embeddings": ROWS, "embedding_dim": embedding_dim, "pooling": pooling}
        for key, pooling in POOLING.items()
    }
    raw["tables"]["second"]["init"] = {"type": "normal", "std": 0.3}
    raw["features"] = {"sparse": {key: {"table": key} for key in KEYS}, "dense": {}}
    raw["model"] = {"tower": {"type": "mlp", "hidden": [6]}}
    raw["optimizers"] = {"sparse": {"type": "sgd"}, "data_parallel": {"type": "sgd"}}
    raw["stages"] = {"joint": {"trains": "all", "steps": 1, "learning_rate": 0.1, "sparse_learning_rate": 0.5}}
    return as_config(raw, folder)


def batch_of(rows: range, world_size: int, total: int) -> Batch:
    """Rows of a fixed set, row r with lists of different lengths, some empty."""
    bags = [[[(7 * row + 3 * key + k) % ROWS for k in range((row + key) % 4)] for row in rows] for key in range(3)]
    flat = [number for feature in bags for bag in feature for number in bag]
    return Batch(
        dense_features=torch.empty(len(rows), 0),
        sparse_features=KeyedJaggedTensor(
            keys=list(KEYS),
            values=torch.tensor(flat, dtype=torch.int64),
            lengths=torch.tensor([len(bag) for feature in bags for bag in feature], dtype=torch.int32),
            stride=len(rows),
            length_per_key=[sum(map(len, feature)) for feature in bags],
        ),
        labels=torch.tensor([row % 2 for row in rows], dtype=torch.float32),
        reference=torch.empty(0, dtype=torch.float64),
        domain=torch.empty(0, dtype=torch.int64),
        loss_scale=world_size / total,
    )


def whole(value: Tensor | ShardedTensor) -> Tensor | None:
    """A table on the first rank, None on the others; a collective call for what is sharded."""
    if not isinstance(value, ShardedTensor):
        return value.detach()
    first = torch.distributed.get_rank() == 0
    out = torch.empty(value.size()) if first else None
    value.gather(0, out)
    return out


def _gather_of_any_size(outputs: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """`all_gather`, which NCCL does for tensors of different sizes and gloo does not."""
    for rank, output in enumerate(outputs):
        if rank == dist.get_rank(group):
            output.copy_(tensor)
        source = dist.get_global_rank(group, rank)
        dist.broadcast(output, source, group=group)
    return type("Done", (), {"wait": lambda self: None})() if async_op else None


def _train(ranks: Ranks, config: Config, kinds: dict[str, str], cuts: list[int], local: int) -> tuple[Any, Any]:
    """This rank's logits before a step, and the tables after it, on the first rank."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    ranks = Ranks(ranks.rank, ranks.world_size, ranks.rank % local, local, ranks.device)
    comm_ops.dist = type("Gloo", (), {**vars(dist), "all_gather": staticmethod(_gather_of_any_size)})
    plan_by(kinds)
    ranker = build_ranker(config, seed=1)
    replicated = {
        key: config.tables[key].model_copy(update={"sharding": ("data_parallel",)})
        for key, kind in kinds.items()
        if kind == "data_parallel"
    }
    config = config.model_copy(update={"tables": {**config.tables, **replicated}})
    sharded = sharding.shard(ranker, config, ranks, seed=2)
    for optimizer in (sharded.sparse_optimizer, sharded.data_parallel_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = 0.5
    sharded.sparse_optimizer.step()  # the fused optimizer takes the rate over
    bounds = [0, *cuts]
    batch = batch_of(range(bounds[ranks.rank], bounds[ranks.rank + 1]), ranks.world_size, cuts[-1])
    loss, output = ranker(batch)
    loss.backward()
    if sharded.data_parallel_optimizer is not None:
        sharded.data_parallel_optimizer.step()
    state = ranker.collections[POOLED].state_dict()
    tables = {name.split(".")[1]: whole(value) for name, value in state.items()}
    return output.logits.numpy(), {name: table.numpy() for name, table in tables.items() if table is not None}


def unsharded(config: Config, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all rows before an SGD step, and the tables after it."""
    ranker = build_ranker(config, seed=1, device=torch.device("cpu"))
    sharding._initialise_tables(ranker.collections[POOLED], config.tables, 2)
    loss, output = ranker(batch_of(range(rows), 1, rows))
    loss.backward()
    tables = {}
    for name, parameter in ranker.collections[POOLED].named_parameters():
        assert parameter.grad is not None
        tables[name.split(".")[1]] = (parameter - 0.5 * parameter.grad).detach()
    return output.logits, tables


MIXED = [
    {"first": "row_wise", "second": "table_wise", "third": "table_wise"},
    {"first": "table_wise", "second": "row_wise", "third": "column_wise"},
    {"first": "table_row_wise", "second": "column_wise", "third": "data_parallel"},
    {"first": "row_wise", "second": "data_parallel", "third": "table_row_wise"},
]


@pytest.mark.parametrize("cuts", [[5, 9], [9, 9]], ids=["uneven", "an empty batch"])
@pytest.mark.parametrize(
    "kinds", MIXED + [dict.fromkeys(KEYS, kind) for kind in TYPES if kind != "grid_shard"], ids=str
)
def test_two_ranks_score_and_train_as_one(tmp_path: Path, kinds: dict[str, str], cuts: list[int]) -> None:
    check(config_of(tmp_path), kinds, cuts, local=2)


@pytest.mark.parametrize("cuts", [[3, 5, 6, 9], [4, 4, 9, 9]], ids=["uneven", "empty batches"])
@pytest.mark.parametrize(
    "kinds",
    [dict.fromkeys(KEYS, "grid_shard"), {"first": "grid_shard", "second": "table_wise", "third": "row_wise"}],
    ids=str,
)
def test_two_machines_of_two_ranks_score_and_train_as_one(
    tmp_path: Path, kinds: dict[str, str], cuts: list[int]
) -> None:
    check(config_of(tmp_path, embedding_dim=256), kinds, cuts, local=2)


def check(config: Config, kinds: dict[str, str], cuts: list[int], local: int) -> None:
    wanted, tables = unsharded(config, cuts[-1])
    ranks = run_ranks(len(cuts), _train, config, kinds, cuts, local)
    np.testing.assert_allclose(np.concatenate([logits for logits, _ in ranks]), wanted, rtol=1e-5, atol=1e-6)
    for name, table in tables.items():
        np.testing.assert_allclose(ranks[0][1][name], table, rtol=1e-5, atol=1e-6, err_msg=name)
