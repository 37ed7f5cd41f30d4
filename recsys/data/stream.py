"""Which row is read when, by which rank: pure arithmetic on the row counts of the footers, no I/O.

The order of an epoch is defined in three steps:

1. The row groups of all files, in the order of the sorted file list, are shuffled by (seed, epoch).
2. Their rows, laid end to end, are cut into one span a rank, whose lengths differ by at most one row. A row group on a
   border is split; both ranks decode it and keep their own part. There may be fewer row groups than ranks.
3. Each span is cut into windows of `window_row_groups` (parts of) row groups; the rows of a window are shuffled by
   (seed, epoch, first row of the window), and the windows follow one another.

Every rank then takes batches of `batch_size` rows along its span, the last one short, and all take `num_steps` batches,
some perhaps empty: nothing is dropped, nothing repeated, and no rank waits for a batch that another does not have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` up to `stop` of the row group numbered `row_group` over all files."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are in memory together.

    Attributes:
        slices: what to decode, in this order.
        permutation: order in which the concatenated rows are used, None for as they stand.
    """

    slices: tuple[RowSlice, ...]
    permutation: NDArray[np.int64] | None

    @property
    def num_rows(self) -> int:
        """Rows of all slices."""
        return sum(part.stop - part.start for part in self.slices)


@dataclass(frozen=True)
class Epoch:
    """The order of one epoch.

    Args:
        row_counts: rows of every row group, over all files.
        world_size: number of ranks.
        batch_size: rows a rank takes in a step.
        seed: of the order.
        epoch: which epoch, from 0; each has an order of its own.
        shuffle: False keeps the order of the files, for evaluation.
        window_row_groups: row groups in a window, the reach of the row shuffle.
    """

    row_counts: tuple[int, ...]
    world_size: int
    batch_size: int
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    window_row_groups: int = 8

    @cached_property
    def num_rows(self) -> int:
        """Rows of the epoch over all ranks."""
        return sum(self.row_counts)

    @cached_property
    def num_steps(self) -> int:
        """Steps that every rank takes."""
        return max(-(-self.rank_rows(rank) // self.batch_size) for rank in range(self.world_size))

    def rank_rows(self, rank: int) -> int:
        """Rows of a rank's span."""
        start, stop = self._span(rank)
        return stop - start

    def batch_rows(self, rank: int, step: int) -> int:
        """Rows of a rank's batch at a step; 0 where its span has ended."""
        return min(max(self.rank_rows(rank) - step * self.batch_size, 0), self.batch_size)

    def global_batch_rows(self, step: int) -> int:
        """Rows of all ranks' batches at a step."""
        return sum(self.batch_rows(rank, step) for rank in range(self.world_size))

    def windows(self, rank: int) -> Iterator[Window]:
        """The windows of a rank's span, in order."""
        start, stop = self._span(rank)
        slices: list[RowSlice] = []
        window_start = start
        for position, row_group in enumerate(self._order):
            group_start, group_stop = int(self._bounds[position]), int(self._bounds[position + 1])
            low, high = max(start, group_start), min(stop, group_stop)
            if low >= high:
                continue
            slices.append(RowSlice(int(row_group), low - group_start, high - group_start))
            if len(slices) == self.window_row_groups or high == stop:
                yield self._window(slices, window_start)
                slices, window_start = [], high

    def _window(self, slices: Sequence[RowSlice], first_row: int) -> Window:
        window = Window(tuple(slices), None)
        if not self.shuffle:
            return window
        generator = np.random.default_rng((self.seed, self.epoch, 1, first_row))
        return Window(window.slices, generator.permutation(window.num_rows))

    def _span(self, rank: int) -> tuple[int, int]:
        return self.num_rows * rank // self.world_size, self.num_rows * (rank + 1) // self.world_size

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        count = len(self.row_counts)
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng((self.seed, self.epoch, 0)).permutation(count)

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Position in the shuffled sequence of rows at which each row group of `_order` starts, and the end."""
        return np.concatenate(([0], np.cumsum(np.asarray(self.row_counts, dtype=np.int64)[self._order])))
