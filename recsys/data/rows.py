"""Decoded rows: what a row group becomes, and how parts of several become one batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from recsys.data.batch import Batch

Counts = dict[tuple[str, str], NDArray[np.int32]]
"""By kind and feature, how often it happened in each row, (N,); only what happened at all."""


class Jagged(NamedTuple):
    """Lists of ids: row i has `values[offsets[i]:offsets[i + 1]]`, weighted by those of `weights` if any."""

    values: NDArray[np.int32 | np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def lengths(self, rows: slice = slice(None)) -> NDArray[np.int32]:
        """How many ids each of the rows has."""
        return np.subtract(self.offsets[1:][rows], self.offsets[:-1][rows], dtype=np.int32, casting="same_kind")

    def ids(self, rows: slice) -> slice:
        """Where the ids of rows start up to stop stand among `values`."""
        return slice(int(self.offsets[rows.start]), int(self.offsets[rows.stop]))

    def take(self, rows: NDArray[np.int64]) -> "Jagged":
        """The given rows, in the given order."""
        # fbgemm's kernel copies whole lists; numpy would need an index for each value.
        lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(rows.astype(np.int32)),
            torch.from_numpy(self.lengths()),
            _tensor(self.values),
            None if self.weights is None else _tensor(self.weights),
            None,
        )
        return Jagged(values.numpy(), offsets_of(lengths.numpy()), None if weights is None else weights.numpy())


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of (N,) lists starts among the values of all, and where the last ends, (N + 1,)."""
    # Faster than numpy's sum.
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.from_numpy(lengths.astype(np.int64)))
    found: NDArray[np.int64] = offsets.numpy()
    return found


def _tensor(values: NDArray[Any]) -> Tensor:
    """To read from alone: torch knows no memory that is read-only, as Arrow's is."""
    return torch.from_numpy(values) if values.flags.writeable else torch.from_dlpack(pa.array(values))


@dataclass(frozen=True)
class SparseLayout:
    """Which features have at most one id a row, and which have lists.

    Attributes:
        keys: sparse features, in the order of a batch.
        lists: those among them that have lists; a feature with weights is one.
        weighted: whether batches carry a weight for each id; ids of features without weights have weight 1.
    """

    keys: tuple[str, ...]
    lists: frozenset[str]
    weighted: bool = False

    @cached_property
    def single(self) -> tuple[str, ...]:
        """Features of at most one id a row, in the order of `keys`."""
        return tuple(key for key in self.keys if key not in self.lists)

    @cached_property
    def runs(self) -> tuple[tuple[bool, slice], ...]:
        """Neighbours in `keys` of one kind: whether they are lists, and where they stand among those of their kind."""
        runs, begun = [], {True: 0, False: 0}
        for lists, keys in groupby(self.keys, key=lambda key: key in self.lists):
            start = begun[lists]
            begun[lists] += len(list(keys))
            runs.append((lists, slice(start, begun[lists])))
        return tuple(runs)


@dataclass(frozen=True)
class Rows:
    """Decoded and checked rows.

    Attributes:
        labels: (N,) float32, NaN in rows that batches leave out; or (0,) where there are none.
        reference: (N,) float64, or (0,) where there is none.
        domain: (N,) int64, or (0,) where there is none.
        dense: (F_d, N) float32.
        single: (S, N) ids of the features with at most one a row, in the order of `SparseLayout.single`; -1 for none.
        lists: the other features.
        weight: (N,) float32, of the rows in the loss, or (0,) where there is none.
        counts: what was cut, replaced or left out.
        has_empty: False where all features of at most one id are known to have one in every row.
    """

    labels: NDArray[np.float32]
    reference: NDArray[np.float64]
    domain: NDArray[np.int64]
    dense: NDArray[np.float32]
    single: NDArray[np.int32 | np.int64]
    lists: tuple[Jagged, ...]
    weight: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    counts: Mapping[tuple[str, str], NDArray[np.int32]] = field(default_factory=dict)
    has_empty: bool = True

    def __len__(self) -> int:
        return int(self.dense.shape[1])

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """The given rows, in the given order."""
        # `clip` skips a check that numpy makes of every index in a pass of its own.
        return Rows(
            self.labels.take(rows, mode="clip") if len(self.labels) else self.labels,
            self.reference.take(rows, mode="clip") if len(self.reference) else self.reference,
            self.domain.take(rows, mode="clip") if len(self.domain) else self.domain,
            self.dense.take(rows, axis=1, mode="clip"),
            self.single.take(rows, axis=1, mode="clip"),
            tuple(jagged.take(rows) for jagged in self.lists),
            self.weight.take(rows, mode="clip") if len(self.weight) else self.weight,
            {key: happened.take(rows, mode="clip") for key, happened in self.counts.items()},
            self.has_empty,
        )


class Part(NamedTuple):
    """Rows `start` up to `stop` of some decoded rows."""

    rows: Rows
    start: int
    stop: int

    def labelled(self) -> "Part":
        """Without the rows whose label is NaN."""
        if not any(kind == "skipped" for kind, _ in self.rows.counts):
            return self
        kept = np.flatnonzero(~np.isnan(self.rows.labels[self.start : self.stop]))
        return Part(self.rows.take(kept + self.start), 0, len(kept))


def build_batch(
    parts: Sequence[Part], layout: SparseLayout, num_dense: int, *, loss_scale: float, pin_memory: bool
) -> Batch:
    """One batch of the given parts, one after another; of none, a batch of no rows.

    Every value is copied once, from where it was decoded to where the model, or the copy to the device, reads it.

    Rows whose label is NaN are left out. What happened to the rows is summed, theirs included.

    Args:
        parts: rows of the same layout.
        layout: of all parts.
        num_dense: number of dense features.
        loss_scale: as in `Batch`.
        pin_memory: build it in page-locked memory.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for rows, start, stop in parts:
        counts.update({key: int(happened[start:stop].sum()) for key, happened in rows.counts.items()})
    parts = [part.labelled() for part in parts]
    size = sum(part.stop - part.start for part in parts)
    placed = _placed(parts)

    def column(name: str, dtype: torch.dtype, pinned: bool, width: tuple[int, ...] = ()) -> Tensor:
        """The rows' values, none where none of the parts has any."""
        there = any(getattr(part.rows, name).shape[-1] for part in parts)
        target = torch.empty((size if there else 0, *width), dtype=dtype, pin_memory=pinned)
        values = target.numpy().T
        for rows, taken, place in placed if there else ():
            values[..., place] = getattr(rows, name)[..., taken]
        return target

    weight = column("weight", torch.float32, pin_memory)
    return Batch(
        dense_features=column("dense", torch.float32, pin_memory, (num_dense,)),
        sparse_features=_sparse(placed, layout, size, pin_memory),
        labels=column("labels", torch.float32, pin_memory),
        reference=column("reference", torch.float64, False),
        domain=column("domain", torch.int64, pin_memory),
        loss_scale=loss_scale,
        weight=weight if len(weight) else None,
        counts=+counts,
    )


class _Placed(NamedTuple):
    """A part of a batch: its rows, which of them are taken, and where these stand in the batch."""

    rows: Rows
    taken: slice
    place: slice


def _placed(parts: Sequence[Part]) -> list[_Placed]:
    ends = list(accumulate(part.stop - part.start for part in parts))
    return [
        _Placed(rows, slice(start, stop), slice(end - stop + start, end))
        for (rows, start, stop), end in zip(parts, ends, strict=True)
    ]


def _sparse(parts: Sequence[_Placed], layout: SparseLayout, size: int, pin_memory: bool) -> KeyedJaggedTensor:
    if not layout.lists and not any(rows.has_empty for rows, _, _ in parts):
        lengths = torch.ones((len(layout.keys), size), dtype=torch.int32, pin_memory=pin_memory)
        held = [size] * len(layout.keys)
    else:
        lengths = torch.empty((len(layout.keys), size), dtype=torch.int32, pin_memory=pin_memory)
        held = _fill_lengths(parts, layout, lengths.numpy())
    values = torch.empty(sum(held), dtype=torch.int64, pin_memory=pin_memory)
    weights = torch.ones(sum(held), pin_memory=pin_memory) if layout.weighted else None
    _fill_values(parts, layout, lengths.numpy(), values.numpy(), None if weights is None else weights.numpy())
    # Told how many ids each key has, TorchRec need not wait for the device to count them.
    return KeyedJaggedTensor(list(layout.keys), values, weights, lengths.view(-1), stride=size, length_per_key=held)


def _fill_lengths(parts: Sequence[_Placed], layout: SparseLayout, target: NDArray[np.int32]) -> list[int]:
    """Write how many ids each feature has in each row, (F, B); how many each has in all rows."""
    held: list[int] = []
    for lists, features in layout.runs:
        of_run = target[len(held) : len(held) + features.stop - features.start]
        for rows, taken, place in parts:
            if lists:
                for of_feature, jagged in zip(of_run[:, place], rows.lists[features], strict=True):
                    of_feature[:] = jagged.lengths(taken)
            else:
                of_run[:, place] = rows.single[features, taken] >= 0 if rows.has_empty else 1
        held += of_run.sum(1).tolist()
    return held


def _fill_values(
    parts: Sequence[_Placed],
    layout: SparseLayout,
    lengths: NDArray[np.int32],
    values: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
) -> None:
    """Write the ids of all rows of the first feature, then of the next, and the weights of those that are not 1."""
    begin = key = 0
    for lists, features in layout.runs:
        of_run = lengths[key : key + features.stop - features.start]
        key += len(of_run)
        if lists:
            for feature in range(features.start, features.stop):
                for rows, taken, _ in parts:
                    jagged = rows.lists[feature]
                    ids = jagged.ids(taken)
                    end = begin + ids.stop - ids.start
                    values[begin:end] = jagged.values[ids]
                    if weights is not None and jagged.weights is not None:
                        weights[begin:end] = jagged.weights[ids]
                    begin = end
        elif any(rows.has_empty for rows, _, _ in parts):
            block = np.concatenate([rows.single[features, taken] for rows, taken, _ in parts], axis=1)
            found = block[of_run != 0]
            values[begin : begin + len(found)] = found
            begin += len(found)
        else:
            block = values[begin : begin + of_run.size].reshape(of_run.shape)
            for rows, taken, place in parts:
                block[:, place] = rows.single[features, taken]
            begin += of_run.size
