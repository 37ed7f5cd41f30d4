"""Decoded rows: what a row group becomes, and how parts of several become one batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

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

    values: NDArray[np.int32 | np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.int64]) -> "Jagged":
        """The given rows, in the given order."""
        # fbgemm's kernel copies whole lists; numpy would need an index for each value.
        weights = None if self.weights is None else torch.from_numpy(self.weights)
        lengths, values, taken_weights = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(rows.astype(np.int32)),
            torch.from_numpy(np.diff(self.offsets).astype(np.int32)),
            torch.from_numpy(self.values),
            weights,
            None,
        )
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths.numpy(), out=offsets[1:])
        return Jagged(values.numpy(), offsets, None if weights is None else taken_weights.numpy())

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
        dense: (F_d, N) float32.
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
        return int(self.dense.shape[1])

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
            self.dense.take(rows, axis=1, mode="clip"),
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
        there = any(getattr(part.rows, name).shape[-1] for part in parts)
        target = torch.empty((size if there else 0, *width), dtype=dtype, pin_memory=pinned)
        at, values = 0, target.numpy().T
        for rows, start, stop in parts if there else ():
            values[..., at : at + stop - start] = getattr(rows, name)[..., start:stop]
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
    lengths: list[NDArray[np.int32]] = []
    values: list[NDArray[np.int32 | np.int64]] = []
    weights: list[NDArray[np.float32]] = []
    for lists, places in layout.runs:
        if not lists:
            ids, of_run = _single(parts, places, size)
            values.append(ids)
            lengths.append(of_run)
            if layout.weighted:
                weights.append(np.ones(len(ids), np.float32))
            continue
        for place in range(places.start, places.stop):
            for rows, start, stop in parts:
                jagged = rows.lists[place].slice(start, stop)
                values.append(jagged.values)
                lengths.append(np.diff(jagged.offsets).astype(np.int32))
                if layout.weighted:
                    given = jagged.weights
                    weights.append(np.ones(len(jagged.values), np.float32) if given is None else given)
    return KeyedJaggedTensor(
        keys=list(layout.keys),
        values=_joined(values, torch.int64, pin_memory, ours=not layout.lists),
        lengths=_joined(lengths, torch.int32, pin_memory, ours=True),
        weights=_joined(weights, torch.float32, pin_memory, ours=not layout.lists) if layout.weighted else None,
        stride=size,
    )


def _single(parts: Sequence[Part], places: slice, size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids of a run of features of at most one a row, all rows of the first, then of the next, and how many each has."""
    block = np.empty((places.stop - places.start, size), np.int64)
    at = 0
    for rows, start, stop in parts:
        block[:, at : at + stop - start] = rows.single[places, start:stop]
        at += stop - start
    if not any(part.rows.has_empty for part in parts):
        return block.reshape(-1), np.ones(block.size, np.int32)
    there = block >= 0
    return block[there], there.reshape(-1).astype(np.int32)


def _joined(parts: Sequence[NDArray[Any]], dtype: torch.dtype, pin_memory: bool, *, ours: bool) -> Tensor:
    """All parts as one tensor; a single one that is `ours`, shared with nobody, is not copied."""
    if ours and len(parts) == 1 and not pin_memory:
        return torch.from_numpy(parts[0])
    joined = torch.empty(sum(map(len, parts)), dtype=dtype, pin_memory=pin_memory)
    if parts:
        np.concatenate(parts, out=joined.numpy())
    return joined
