"""The tables' optimizer state under one sharding, made that of another.

DCP cuts a table's weights, and what an optimizer keeps for each of them, anew for any plan. What it cannot cut is a sum
of squares that is kept for a row: row-wise Adagrad keeps one for each row and *column shard*, the mean over the shard's
columns, so that its shape depends on the plan. It is read here as a function of row and column that is constant within
a shard. A shard of another plan takes the mean of that function over its own columns, and a state that is kept for each
weight (Adagrad's) takes its value. The mean over a whole row is the same before and after, which is what row-wise
Adagrad keeps of a table that is not cut into columns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

Plan = Mapping[str, Mapping[str, Any]]
"""As `recsys.sharding.plan.plan_as_dict` tells it."""

Columns = list[tuple[int, int]]
"""First column and number of columns of each piece of a table."""


class SumOfSquares(NamedTuple):
    """Where a checkpoint has the accumulated squares of a table's gradients.

    Attributes:
        table: its name.
        name: of the tensor.
    """

    table: str
    name: str


def sum_of_squares(name: str) -> SumOfSquares | None:
    """What a tensor accumulates, if that is the squares of a table's gradients; by its name in a checkpoint."""
    parts = name.split(".")
    if parts[:2] == ["optimizer", "sparse"] and parts[-1] == "momentum1":
        return SumOfSquares(parts[-2], name)
    if parts[:2] == ["optimizer", "data_parallel"] and parts[-1] == "sum":
        return SumOfSquares(parts[-3], name)
    return None


def columns_of(plan: Plan, table: str, dim: int) -> Columns:
    """The pieces into which a plan cuts a table's columns, in the order in which its state has them."""
    pieces = [(column, width) for _, column, _, width in plan[table]["shards"]] or [(0, dim)]
    return list(dict.fromkeys(pieces))


def recut(saved: Tensor, saved_columns: Columns, columns: Columns) -> Tensor:
    """Sums of squares for each row and column shard, for other shards.

    Args:
        saved: (S, R), of S shards and R rows.
        saved_columns: of the S shards; together all of the table's columns.
        columns: of the T shards that are wanted.

    Returns:
        (T, R): of each shard the mean over its columns.
    """
    shares = torch.zeros(len(columns), len(saved_columns), dtype=torch.float64)
    for i, (first, width) in enumerate(columns):
        for j, (other, other_width) in enumerate(saved_columns):
            shares[i, j] = max(min(first + width, other + other_width) - max(first, other), 0) / width
    if bool((shares == shares.round()).all()):
        return saved[shares.argmax(1)]  # each lies within one of before: its very bits
    return (shares @ saved.double()).to(saved.dtype)


def fill(wanted: Tensor | ShardedTensor, saved: Tensor, saved_columns: Columns, columns: Columns) -> None:
    """Set the sums of squares of a table on this rank from those of a checkpoint.

    Args:
        wanted: state of this rank, filled in place: (T R,) of T column shards, or (R, D) for each weight.
        saved: (S R,) of S column shards, or (R, D).
        saved_columns: of the S shards.
        columns: of the T shards.
    """
    parts = (
        [(shard.tensor, shard.metadata.shard_offsets) for shard in wanted.local_shards()]
        if isinstance(wanted, ShardedTensor)
        else [(wanted, [0] * wanted.dim())]
    )
    for part, offsets in parts:
        whole = _whole(part.dim(), saved, saved_columns, columns)
        for axis, (first, length) in enumerate(zip(offsets, part.shape, strict=True)):
            whole = whole.narrow(axis, first, length)
        part.copy_(whole)


def _whole(dims: int, saved: Tensor, saved_columns: Columns, columns: Columns) -> Tensor:
    if saved.dim() == 2 and dims == 2:
        return saved
    if saved.dim() == 2:  # for each weight: to the mean over each shard's columns
        return torch.cat([saved[:, first : first + width].double().mean(1).float() for first, width in columns])
    by_shard = saved.view(len(saved_columns), -1)
    if dims == 1:
        return recut(by_shard, saved_columns, columns).flatten()
    return torch.cat(
        [row[:, None].expand(-1, width) for row, (_, width) in zip(by_shard, saved_columns, strict=True)], 1
    )
