"""Decoded rows: what a row group becomes, as plain arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = dict[tuple[str, str], NDArray[np.int32]]
"""By kind and feature, how often it happened in each row, (N,); only what happened at all."""


class Jagged(NamedTuple):
    """Lists of ids: row i has `values[offsets[i]:offsets[i + 1]]`, weighted by those of `weights` if any."""

    values: NDArray[np.int32 | np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def lengths(self) -> NDArray[np.int32]:
        """How many ids each row has."""
        return np.diff(self.offsets).astype(np.int32)

    def part(self, start: int, stop: int) -> "Jagged":
        """The lists of rows `start` up to `stop`; their values are views."""
        offsets = self.offsets[start : stop + 1]
        ids = slice(int(offsets[0]), int(offsets[-1]))
        return Jagged(self.values[ids], offsets - ids.start, None if self.weights is None else self.weights[ids])


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of (N,) lists starts among the values of all, and where the last ends, (N + 1,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class SparseLayout:
    """Which features have at most one id per row, and which have lists.

    Attributes:
        keys: sparse features, in the order of a batch.
        lists: those among them that have lists; a feature with weights is one.
        weighted: whether batches carry a weight for each id; ids of features without weights have weight 1.
        id_type: of the rows' ids, narrow where it can be: ids are shuffled in memory, and half the bytes fit the cache
            twice as well.
        single: features of at most one id per row, in the order of `keys`.
        runs: neighbours in `keys` of one kind: whether they are lists, and where they stand among those of their kind.
    """

    keys: tuple[str, ...]
    lists: frozenset[str]
    weighted: bool = False
    id_type: type[np.int32 | np.int64] = np.int64
    single: tuple[str, ...] = field(init=False)
    runs: tuple[tuple[bool, slice], ...] = field(init=False)

    def __post_init__(self) -> None:
        runs, begun = [], {True: 0, False: 0}
        for lists, keys in groupby(self.keys, key=lambda key: key in self.lists):
            start = begun[lists]
            begun[lists] += len(list(keys))
            runs.append((lists, slice(start, begun[lists])))
        object.__setattr__(self, "single", tuple(key for key in self.keys if key not in self.lists))
        object.__setattr__(self, "runs", tuple(runs))


@dataclass(frozen=True)
class Rows:
    """Decoded and checked rows.

    Attributes:
        labels: (N,) float32, NaN in rows that batches leave out; or (0,) where there are none.
        reference: (N,) float64, or (0,) where there is none.
        domain: (N,) int64, or (0,) where there is none.
        dense: (F_d, N) float32.
        single: (S, N) ids of the features with at most one per row, in the order of `SparseLayout.single`; -1 for none.
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

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `start` up to `stop`; their values are views."""
        rows = slice(start, stop)
        return Rows(
            labels=self.labels[rows],
            reference=self.reference[rows],
            domain=self.domain[rows],
            dense=self.dense[:, rows],
            single=self.single[:, rows],
            lists=tuple(lists.part(start, stop) for lists in self.lists),
            weight=self.weight[rows],
            counts={key: happened[rows] for key, happened in self.counts.items()},
            has_empty=self.has_empty,
        )
