"""Decoded rows: what a row group becomes, and how parts of several become one batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from recsys.data.batch import Batch

Counts = dict[tuple[str, str], NDArray[np.int32]]
"""By kind and feature, how often it happened in each row, (N,); only what happened at all."""


class Jagged(NamedTuple):
    """Lists of ids: row i has `values[offsets[i]:offsets[i + 1]]`, weighted by those of `weights` if any."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.int64]) -> "Jagged":
        """The given rows, in the given order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = _offsets(lengths)
        # Position within the result, moved by how far each row's values moved.
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Jagged(self.values[index], offsets, None if self.weights is None else self.weights[index])

    def slice(self, start: int, stop: int) -> "Jagged":
        """Rows start up to stop, sharing memory."""
        offsets = self.offsets[start : stop + 1]
        within = slice(offsets[0], offsets[-1])
        return Jagged(self.values[within], offsets - offsets[0], None if self.weights is None else self.weights[within])


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
        dense: (N, F_d) float32.
        single: (S, N) ids of the features with at most one a row, in the order of `SparseLayout.single`; -1 for none.
        lists: the other features.
        weight: (N,) float32, of the rows in the loss, or (0,) where there is none.
        counts: what was cut, replaced or left out.
    """

    labels: NDArray[np.float32]
    reference: NDArray[np.float64]
    domain: NDArray[np.int64]
    dense: NDArray[np.float32]
    single: NDArray[np.int32 | np.int64]
    lists: tuple[Jagged, ...]
    weight: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    counts: Mapping[tuple[str, str], NDArray[np.int32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dense)

    @cached_property
    def has_empty(self) -> bool:
        """Whether a feature of at most one id has none in some row."""
        return bool(self.single.size) and bool(self.single.min() < 0)

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """The given rows, in the given order."""
        # `clip` skips a check that numpy makes of every index in a pass of its own.
        return Rows(
            self.labels.take(rows, mode="clip") if len(self.labels) else self.labels,
            self.reference.take(rows, mode="clip") if len(self.reference) else self.reference,
            self.domain.take(rows, mode="clip") if len(self.domain) else self.domain,
            self.dense.take(rows, axis=0, mode="clip"),
            self.single.take(rows, axis=1, mode="clip"),
            tuple(jagged.take(rows) for jagged in self.lists),
            self.weight.take(rows, mode="clip") if len(self.weight) else self.weight,
            {key: happened.take(rows, mode="clip") for key, happened in self.counts.items()},
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

    def column(name: str, dtype: torch.dtype, pinned: bool, width: tuple[int, ...] = ()) -> Tensor:
        """The rows' values, none where none of the parts has any."""
        there = any(len(getattr(part.rows, name)) for part in parts)
        target = torch.empty((size if there else 0, *width), dtype=dtype, pin_memory=pinned)
        at, values = 0, target.numpy()
        for rows, start, stop in parts if there else ():
            values[at : at + stop - start] = getattr(rows, name)[start:stop]
            at += stop - start
        return target

    weight = column("weight", torch.float32, pin_memory)
    return Batch(
        dense_features=column("dense", torch.float32, pin_memory, (num_dense,)),
        sparse_features=_sparse(parts, layout, size, pin_memory),
        labels=column("labels", torch.float32, pin_memory),
        reference=column("reference", torch.float64, False),
        domain=column("domain", torch.int64, pin_memory),
        loss_scale=loss_scale,
        weight=weight if len(weight) else None,
        counts=+counts,
    )


def _sparse(parts: Sequence[Part], layout: SparseLayout, size: int, pin_memory: bool) -> KeyedJaggedTensor:
    lengths = np.ones((len(layout.keys), size), np.int32)
    values: list[NDArray[np.int64]] = []
    weights: list[NDArray[np.float32]] = []
    feature = 0
    for lists, places in layout.runs:
        of_run = lengths[feature : feature + places.stop - places.start]
        feature += len(of_run)
        if not lists:
            values.append(_single(parts, places, of_run))
            if layout.weighted:
                weights.append(np.ones(len(values[-1]), np.float32))
            continue
        for place, of_feature in zip(range(places.start, places.stop), of_run, strict=True):
            at = 0
            for rows, start, stop in parts:
                jagged = rows.lists[place].slice(start, stop)
                values.append(jagged.values)
                if layout.weighted:
                    given = jagged.weights
                    weights.append(np.ones(len(jagged.values), np.float32) if given is None else given)
                np.subtract(
                    jagged.offsets[1:], jagged.offsets[:-1], out=of_feature[at : at + stop - start], casting="unsafe"
                )
                at += stop - start
    return KeyedJaggedTensor(
        keys=list(layout.keys),
        values=_joined(values, torch.int64, pin_memory),
        lengths=_joined([lengths.reshape(-1)], torch.int32, pin_memory),
        weights=_joined(weights, torch.float32, pin_memory) if layout.weighted else None,
        stride=size,
    )


def _single(parts: Sequence[Part], places: slice, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Ids of a run of features of at most one a row, all rows of the first, then of the next; writes their number."""
    block = np.empty(lengths.shape, np.int64)
    at = 0
    for rows, start, stop in parts:
        block[:, at : at + stop - start] = rows.single[places, start:stop]
        at += stop - start
    if not any(part.rows.has_empty for part in parts):
        return block.reshape(-1)
    there = block >= 0
    lengths[:] = there
    return block[there]


def _joined(parts: Sequence[NDArray[np.generic]], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    if len(parts) == 1 and not pin_memory:
        return torch.from_numpy(parts[0])
    joined = torch.empty(sum(map(len, parts)), dtype=dtype, pin_memory=pin_memory)
    if parts:
        np.concatenate(parts, out=joined.numpy())
    return joined


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
