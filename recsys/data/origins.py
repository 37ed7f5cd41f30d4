"""Where a batch came from: its files, row groups and rows, and the batch itself, read again."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.batch import Batch, Part, build_batch
from recsys.data.order import Epoch, RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.shuffling import take

_NAMED = 4
"""Files, and row groups of each, that are named before the others are but counted."""


class Origin(NamedTuple):
    """Rows of a batch that come from one slice of a row group.

    Attributes:
        slice: what is decoded for them.
        rows: (N,) their numbers within the slice, in the order of the batch.
    """

    slice: RowSlice
    rows: NDArray[np.int64]


class Reread(NamedTuple):
    """A batch that was read again.

    Attributes:
        batch: as the loader had made it, but for its scale of the loss, which is 1.
        row_groups: (B,) row group of each row, numbered over all files.
        rows: (B,) number of each row within its row group.
    """

    batch: Batch
    row_groups: NDArray[np.int64]
    rows: NDArray[np.int64]


def origins(epoch: Epoch, rank: int, step: int) -> list[Origin]:
    """Which rows a rank's batch is made of, in the batch's order; none where its lane has ended.

    Args:
        epoch: the order, under the layout that the step belongs to.
        rank: whose batch.
        step: of the epoch under that layout, from 0.
    """
    there = replace(epoch, first_step=step)
    batch = next(there.batches(rank))
    last = batch[-1].window if batch else -1
    windows = [piece.window for piece in islice(there.pieces(rank), last + 1)]
    found = []
    for number, index, start, stop in batch:
        of = windows[number].slices[index]
        order = windows[number].permutation(index)
        found.append(Origin(of, (np.arange(of.num_rows) if order is None else order)[start:stop]))
    return found


def read_again(shards: ParquetShards, found: Sequence[Origin]) -> Reread:
    """The batch that is made of those rows, without those that have no label, as in training.

    Raises:
        DataError: as `ParquetShards.read`.
    """
    parts, groups, numbers = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for of, rows in found:
        taken = take(shards.read(of), rows)
        if len(taken.labels):
            kept = np.flatnonzero(~np.isnan(taken.labels))
            taken, rows = take(taken, kept), rows[kept]
        parts.append(Part(taken, 0, len(rows)))
        groups.append(np.full(len(rows), of.row_group))
        numbers.append(of.start + rows)
    batch = build_batch(parts, shards.layout, len(shards.columns.dense), loss_scale=1.0, pin_memory=False)
    return Reread(batch, np.concatenate(groups), np.concatenate(numbers))


def write_batch(path: Path, shards: ParquetShards, reread: Reread) -> None:
    """Write a batch for a person to look at: a Parquet file that appears when it is whole.

    Each row has `file`, `row_group` within the file and `row` within that, then what the model was given: `label`,
    `weight` if there is one, `dense/<feature>` as transformed, `sparse/<feature>`, the list of its rows of the table,
    and `weights/<feature>` where ids have weights.

    Raises:
        OSError: the file cannot be written.
    """
    batch, size = reread.batch, len(reread.rows)
    places = {group: shards.place_of(group) for group in np.unique(reread.row_groups).tolist()}
    of_rows = [places[group] for group in reread.row_groups.tolist()]
    columns: dict[str, pa.Array] = {
        "file": pa.array([file for file, _ in of_rows], pa.string()),
        "row_group": pa.array([group for _, group in of_rows], pa.int64()),
        "row": pa.array(reread.rows),
    }
    for name, values in (("label", batch.labels), ("weight", batch.weight)):
        if values is not None and len(values) == size:
            columns[name] = pa.array(values.numpy())
    for name, values in zip(shards.columns.dense, batch.dense_features.T, strict=True):
        columns[f"dense/{name}"] = pa.array(values.numpy())
    for name in shards.layout.keys:
        jagged = batch.sparse_features[name]
        columns[f"sparse/{name}"] = _lists(jagged.offsets(), jagged.values())
        if shards.layout.weighted:
            columns[f"weights/{name}"] = _lists(jagged.offsets(), jagged.weights())
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    partial.replace(path)


def in_words(shards: ParquetShards, found: Sequence[Origin]) -> str:
    """`a.parquet (row groups 0, 3) and b.parquet (row group 1)`; of many, the first and how many more."""
    places = sorted({shards.place_of(of.row_group) for of, _ in found})
    files = [
        f"{file} (row group{'s' if len(groups) > 1 else ''} {_enumerated(groups, 'more')})"
        for file, groups in ((file, [str(group) for _, group in of]) for file, of in groupby(places, lambda at: at[0]))
    ]
    return _enumerated(files, "more files") or "no file"


def _enumerated(names: Sequence[str], more: str) -> str:
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} {more}"
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _lists(offsets: Tensor, values: Tensor) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.numpy(), pa.int32()), pa.array(values.numpy()))
