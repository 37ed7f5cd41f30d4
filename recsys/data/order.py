"""Which row is read when, by which rank: pure arithmetic on the row counts of the footers, no I/O.

An epoch's order is defined in four steps:

1. The row groups of all files, in the order of the sorted file list, are shuffled by (seed, epoch).
2. Their rows, laid end to end, are cut into one lane a rank, whose lengths differ by at most one row. A row group on a
   border is split; both ranks decode it and keep their own part. There may be fewer row groups than ranks.
3. Each lane is cut into windows of `window_row_groups` slices, which are (parts of) row groups. Within a window the
   rows of each slice are shuffled, and the slices are dealt in proportion: any batch has of each slice its fair share.
4. Every rank takes `batch_size` rows per step along its lane, the last batch short, and all take `num_steps` batches,
   some perhaps empty: nothing is dropped, nothing repeated, and no rank waits for a batch that another does not have.

A `Position` says how far an epoch has been read: the steps taken, and by how many ranks with which batch size. Where
it is continued under the same layout the lanes go on. Under another, what is left of all lanes is laid end to end, in
the order of the ranks, and cut anew into one lane a rank; windows that are cut keep their permutation, and each rank
that has part of one decodes it. An epoch can be interrupted any number of times: the position holds one entry for each
layout under which steps were taken, and nothing that grows with the data.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from recsys.errors import UserError


class PositionError(UserError):
    """A position does not belong to the data, or is none; the message says what differs."""


class RowSlice(NamedTuple):
    """Rows `start` up to `stop` of the row group numbered `row_group` over all files."""

    row_group: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the slice."""
        return self.stop - self.start


class BatchPart(NamedTuple):
    """What a batch takes of a slice of a window: places `start` up to `stop` in the slice's shuffled order.

    Attributes:
        window: number of the window along the rank's lane, from 0 at the first that the lane reads.
        slice: number of the slice within the window.
        start: first place.
        stop: place after the last.
    """

    window: int
    slice: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are in memory together, in an order of their own.

    Attributes:
        slices: what to decode.
        seed: of the shuffles, None to take the slices one after another as they stand.
    """

    slices: tuple[RowSlice, ...]
    seed: tuple[int, ...] | None

    @property
    def num_rows(self) -> int:
        """Rows of all slices."""
        return sum(part.num_rows for part in self.slices)

    def permutation(self, index: int) -> NDArray[np.int64] | None:
        """Order in which the rows of a slice are taken, None for as they stand."""
        if self.seed is None:
            return None
        return np.random.default_rng((*self.seed, index)).permutation(
            self.slices[index].stop - self.slices[index].start
        )

    def places(self, rows: int) -> tuple[int, ...]:
        """How many rows of each slice are among the first `rows` of the window.

        Slices that are shuffled are dealt in proportion: row k of a slice of n stands in the window of N at
        (k + 1/2) N / n, rounded down, and where several stand at one place the first slice comes first. Others follow
        one another.
        """
        counts = [part.stop - part.start for part in self.slices]
        if self.seed is None or len(counts) == 1:
            before = accumulate(counts, initial=0)
            return tuple(min(max(rows - first, 0), n) for first, n in zip(before, counts, strict=False))
        total = sum(counts)

        def standing(place: int) -> list[int]:
            """Of each slice those before a place: k with (2 k + 1) total < 2 n place."""
            return [min((2 * n * place + total - 1) // (2 * total), n) for n in counts]

        # The sum over all slices is off from the place by half a row a slice at most, so the one looked for is near.
        near = range(max(rows - len(counts), 0), rows + len(counts) + 1)
        at = near[bisect_right(near, rows, key=lambda place: sum(standing(place))) - 1]
        found, further = standing(at), standing(at + 1)
        missing = rows - sum(found)
        for index, (here, there) in enumerate(zip(found, further, strict=True)):
            if missing and there > here:
                found[index] += 1
                missing -= 1
        return tuple(found)


class Piece(NamedTuple):
    """Places `start` up to `stop` of a window's order."""

    window: Window
    start: int
    stop: int


class Layout(NamedTuple):
    """Among whom an epoch's rows are dealt: how many ranks, how many rows each takes per step."""

    world_size: int
    batch_size: int


@dataclass(frozen=True)
class Position:
    """How far an epoch has been read.

    Attributes:
        epoch: which.
        data: digest of what the order depends on beside the layout: row counts, seed, shuffling, which rows are read.
        taken: layout and number of steps taken under it, for each layout in turn.
    """

    epoch: int
    data: str
    taken: tuple[tuple[Layout, int], ...]

    def to_json(self) -> str:
        """As JSON, which `from_json` reads back to an equal position."""
        taken = [{**layout._asdict(), "steps": steps} for layout, steps in self.taken]
        return json.dumps({"epoch": self.epoch, "data": self.data, "taken": taken})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            PositionError: the text is something else.
        """
        try:
            read = json.loads(text)
            taken = tuple(
                (Layout(_count(entry["world_size"]), _count(entry["batch_size"])), _count(entry["steps"]))
                for entry in read["taken"]
            )
            return cls(_count(read["epoch"], least=0), str(read["data"]), taken)
        except (ValueError, TypeError, KeyError) as error:
            raise PositionError(f"not a position of the reading order ({type(error).__name__}: {error})") from None


def _count(value: object, *, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no whole number of at least {least}")
    return value


@dataclass(frozen=True)
class Epoch:
    """The order of one epoch, or of what a position leaves of it.

    Args:
        row_counts: rows of every row group, over all files.
        world_size: number of ranks.
        batch_size: rows that a rank takes in a step.
        seed: of the order.
        epoch: which epoch, from 0; each has an order of its own.
        shuffle: False keeps the order of the files, for evaluation.
        window_row_groups: slices in a window, the reach of the row shuffle.
        of: which rows of the row groups there are alone, in words; empty for all.
        before: layouts under which the epoch was read before, and the steps taken; see `resumed`.
        first_step: step at which to go on under this layout.
    """

    row_counts: tuple[int, ...]
    world_size: int
    batch_size: int
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    window_row_groups: int = 8
    of: str = ""
    before: tuple[tuple[Layout, int], ...] = ()
    first_step: int = 0

    def resumed(self, position: Position) -> "Epoch":
        """The order of exactly the rows that the position leaves, on any number of ranks and batch size.

        Raises:
            PositionError: the position is of other row counts, another seed or another way to shuffle.
        """
        if position.data != self.data:
            raise PositionError(
                "the position belongs to another order of rows: the shards (their row counts, or the order of their "
                "names), the seed, data.shuffle or data.window_row_groups have changed since it was saved; restore "
                "them, or begin the epoch anew"
            )
        before, first_step = position.taken, 0
        if before and before[-1][0] == self.layout:
            *kept, (_, first_step) = before
            before = tuple(kept)
        return replace(self, epoch=position.epoch, before=before, first_step=first_step)

    def position(self, step: int) -> Position:
        """How far the epoch has been read when `step` steps (`first_step` among them) are done under this layout."""
        return Position(self.epoch, self.data, (*self.before, *([(self.layout, step)] if step else [])))

    @property
    def layout(self) -> Layout:
        """How the rows are dealt."""
        return Layout(self.world_size, self.batch_size)

    @cached_property
    def data(self) -> str:
        """Digest of what the order depends on beside epoch and layout."""
        settings = (self.seed, self.shuffle, self.window_row_groups, len(self.row_counts))
        digest = hashlib.sha256(repr((*settings, self.of) if self.of else settings).encode())
        digest.update(np.asarray(self.row_counts, "<i8").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def num_rows(self) -> int:
        """Rows that are dealt under this layout, over all ranks: all, or what was left before its first step."""
        if not self.before:
            return sum(self.row_counts)
        return sum(self._previous.rank_rows(rank) - self._previous._taken(rank) for rank in self._previous._ranks)

    @cached_property
    def num_steps(self) -> int:
        """Steps that every rank takes under this layout, those before `first_step` included."""
        return max(-(-(stop - start) // self.batch_size) for start, stop in self._lanes)

    def rank_rows(self, rank: int) -> int:
        """Rows of a rank's lane."""
        start, stop = self._lanes[rank]
        return stop - start

    def batch_rows(self, rank: int, step: int) -> int:
        """Rows of a rank's batch at a step; 0 where its lane has ended."""
        return min(max(self.rank_rows(rank) - step * self.batch_size, 0), self.batch_size)

    def global_batch_rows(self, step: int) -> int:
        """Rows of all ranks' batches at a step."""
        first = step * self.batch_size
        return sum(min(max(stop - start - first, 0), self.batch_size) for start, stop in self._lanes)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What a rank's lane has from `first_step` on, in order."""
        lane = self._lane(rank)
        return _dropped(lane, self._taken(rank)) if self.first_step else lane

    def batches(self, rank: int) -> Iterator[tuple[BatchPart, ...]]:
        """What a rank reads at each step from `first_step` on, with the windows numbered as in `pieces`."""
        batch: list[BatchPart] = []
        room = self.batch_size
        steps = 0
        for number, (window, start, stop) in enumerate(self.pieces(rank)):
            first = window.places(start)
            while start < stop:
                end = min(stop, start + room)
                last = window.places(end)
                batch += [
                    BatchPart(number, index, i, j)
                    for index, (i, j) in enumerate(zip(first, last, strict=True))
                    if i < j
                ]
                first = last
                room -= end - start
                start = end
                if not room:
                    yield tuple(batch)
                    batch, room, steps = [], self.batch_size, steps + 1
        if batch:
            yield tuple(batch)
            steps += 1
        for _ in range(self.first_step + steps, self.num_steps):
            yield ()

    def _lane(self, rank: int) -> Iterator[Piece]:
        start, stop = self._lanes[rank]
        if not self.before:
            yield from self._windows(start, stop)
            return
        at = 0
        for before in self._previous._ranks:
            left = self._previous.rank_rows(before) - self._previous._taken(before)
            if at < stop and start < at + left:
                pieces = _dropped(self._previous._lane(before), self._previous._taken(before) + max(start - at, 0))
                yield from _kept(pieces, min(stop, at + left) - max(start, at))
            at += left

    def _windows(self, start: int, stop: int) -> Iterator[Piece]:
        """The windows of a span of the shuffled row groups' rows, each as a whole."""
        slices: list[RowSlice] = []
        order, bounds = self._sequence
        first = start
        begin = int(np.searchsorted(bounds, start, side="right")) - 1 if start < stop else 0
        for place in range(begin, len(order)):
            group_start, group_stop = int(bounds[place]), int(bounds[place + 1])
            low, high = max(start, group_start), min(stop, group_stop)
            if group_start >= stop:
                break
            if low >= high:
                continue
            slices.append(RowSlice(int(order[place]), low - group_start, high - group_start))
            if len(slices) == self.window_row_groups or high == stop:
                seed = (self.seed, self.epoch, 1, first) if self.shuffle else None
                yield Piece(Window(tuple(slices), seed), 0, high - first)
                slices, first = [], high

    def _taken(self, rank: int) -> int:
        """Rows of a rank's lane that the steps before `first_step` took."""
        return min(self.first_step * self.batch_size, self.rank_rows(rank))

    @property
    def _ranks(self) -> range:
        return range(self.world_size)

    @cached_property
    def _lanes(self) -> tuple[tuple[int, int], ...]:
        """Where each rank's lane begins and ends in the sequence of all rows that are dealt."""
        rows = self.num_rows
        return tuple((rows * r // self.world_size, rows * (r + 1) // self.world_size) for r in range(self.world_size))

    @cached_property
    def _previous(self) -> "Epoch":
        """The order under the layout before this one, of which there must be one, standing where that one ended."""
        *before, (layout, steps) = self.before
        return replace(self, **layout._asdict(), before=tuple(before), first_step=steps)

    @cached_property
    def _sequence(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row groups as they follow one another, and the place of the first row of each, and the end."""
        counts = np.asarray(self.row_counts, dtype=np.int64)
        order = np.arange(len(counts))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(counts))
        return order, np.concatenate(([0], np.cumsum(counts[order])))


def _dropped(pieces: Iterator[Piece], rows: int) -> Iterator[Piece]:
    """All but the first rows."""
    for piece in pieces:
        left = piece.stop - piece.start - rows
        if left > 0:
            yield piece._replace(start=piece.start + max(rows, 0))
        rows -= piece.stop - piece.start


def _kept(pieces: Iterator[Piece], rows: int) -> Iterator[Piece]:
    """The first rows alone."""
    for piece in pieces:
        if rows <= 0:
            return
        yield piece._replace(stop=min(piece.stop, piece.start + rows))
        rows -= piece.stop - piece.start
