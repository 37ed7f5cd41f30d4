"""Whatever the layout, an epoch reads every row once, keeps all ranks in step and depends on its seed only."""

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recsys.data.order import Epoch, Position, PositionError, RowSlice, Window

ROW_COUNTS = st.lists(st.integers(0, 40), max_size=12).map(tuple)


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    return Epoch(
        row_counts=draw(ROW_COUNTS),
        world_size=draw(st.integers(1, 7)),
        batch_size=draw(st.integers(1, 50)),
        seed=draw(st.integers(0, 2**63)),
        epoch=draw(st.integers(0, 9)),
        shuffle=draw(st.booleans()),
        window_row_groups=draw(st.integers(1, 6)),
    )


def batches(epoch: Epoch, rank: int) -> list[NDArray[np.int64]]:
    """Rows of a rank's batches from `first_step` on, numbered over all files."""
    starts = np.concatenate(([0], np.cumsum(epoch.row_counts, dtype=np.int64)))
    places: dict[tuple[int, int], NDArray[np.int64]] = {}
    for number, piece in enumerate(epoch.pieces(rank)):
        assert 0 <= piece.start < piece.stop <= piece.window.num_rows
        for index, part in enumerate(piece.window.slices):
            rows = np.arange(part.start, part.stop) + starts[part.row_group]
            permutation = piece.window.permutation(index)
            places[number, index] = rows if permutation is None else rows[permutation]
    return [
        np.concatenate([np.zeros(0, np.int64), *(places[window, index][i:j] for window, index, i, j in parts)])
        for parts in epoch.batches(rank)
    ]


def rank_order(epoch: Epoch, rank: int) -> NDArray[np.int64]:
    """Rows of a rank in the order of use, numbered over all files."""
    return np.concatenate([np.zeros(0, np.int64), *batches(epoch, rank)])


def order(epoch: Epoch) -> list[list[int]]:
    return [rank_order(epoch, rank).tolist() for rank in range(epoch.world_size)]


def windows(epoch: Epoch, rank: int) -> list[Window]:
    return [piece.window for piece in epoch.pieces(rank)]


@settings(max_examples=1000, deadline=None)
@given(epochs())
def test_every_row_is_read_exactly_once_in_spans_that_differ_by_one_row_at_most(epoch: Epoch) -> None:
    rows = order(epoch)
    assert sorted(chain(*rows)) == list(range(epoch.num_rows))
    lengths = [len(span) for span in rows]
    assert lengths == [epoch.rank_rows(rank) for rank in range(epoch.world_size)]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=1000, deadline=None)
@given(epochs())
def test_all_ranks_take_the_same_steps_and_none_is_empty_on_all(epoch: Epoch) -> None:
    steps = range(epoch.num_steps)
    for rank in range(epoch.world_size):
        sizes = [epoch.batch_rows(rank, step) for step in steps]
        assert [len(rows) for rows in batches(epoch, rank)] == sizes
        assert sum(sizes) == epoch.rank_rows(rank)
        assert all(size <= epoch.batch_size for size in sizes)
        assert sizes == sorted(sizes, reverse=True)  # only the last batches fall short
        assert epoch.batch_rows(rank, epoch.num_steps) == 0
    for step in steps:
        total = epoch.global_batch_rows(step)
        assert total == sum(epoch.batch_rows(rank, step) for rank in range(epoch.world_size))
        assert total > 0


@settings(max_examples=200, deadline=None)
@given(epochs())
def test_windows_hold_no_more_row_groups_than_asked_and_no_empty_parts(epoch: Epoch) -> None:
    for rank in range(epoch.world_size):
        for window in windows(epoch, rank):
            assert 1 <= len(window.slices) <= epoch.window_row_groups
            assert all(0 <= s.start < s.stop <= epoch.row_counts[s.row_group] for s in window.slices)


@settings(max_examples=200, deadline=None)
@given(epochs())
def test_same_seed_gives_the_same_stream(epoch: Epoch) -> None:
    again = Epoch(**{name: getattr(epoch, name) for name in epoch.__dataclass_fields__})
    assert order(again) == order(epoch)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(30, 60), min_size=3, max_size=6).map(tuple), st.integers(1, 3), st.integers(0, 99))
def test_another_epoch_or_seed_gives_another_order(row_counts: tuple[int, ...], world_size: int, seed: int) -> None:
    base = order(Epoch(row_counts, world_size, 8, seed=seed, epoch=0))
    assert order(Epoch(row_counts, world_size, 8, seed=seed, epoch=1)) != base
    assert order(Epoch(row_counts, world_size, 8, seed=seed + 1, epoch=0)) != base


@settings(max_examples=200, deadline=None)
@given(ROW_COUNTS, st.integers(1, 7), st.integers(1, 6))
def test_without_shuffle_the_files_order_is_kept(row_counts: tuple[int, ...], world_size: int, window: int) -> None:
    epoch = Epoch(row_counts, world_size, 8, shuffle=False, window_row_groups=window)
    assert list(chain(*order(epoch))) == list(range(epoch.num_rows))


def test_shuffle_mixes_the_rows_of_all_row_groups_of_a_window() -> None:
    epoch = Epoch((100,) * 8, 1, 50, window_row_groups=4)
    rows = rank_order(epoch, 0)
    for window in rows.reshape(2, 400):
        groups = set(window // 100)
        assert len(groups) == 4
        for batch in window.reshape(8, 50):
            assert set(batch // 100) == groups


def test_shuffle_moves_row_groups_between_windows() -> None:
    firsts = {
        frozenset(s.row_group for s in windows(Epoch((10,) * 8, 1, 5, epoch=epoch, window_row_groups=2), 0)[0].slices)
        for epoch in range(20)
    }
    assert len(firsts) > 5


def test_neighbouring_windows_are_shuffled_differently() -> None:
    epoch = Epoch((50,) * 4, 1, 10, window_row_groups=1)
    permutations = [window.permutation(0) for window in windows(epoch, 0)]
    assert len({tuple(p.tolist()) for p in permutations if p is not None}) == 4


def test_more_ranks_than_row_groups_and_rows() -> None:
    one_group = Epoch((10,), 4, 2)
    assert [one_group.rank_rows(rank) for rank in range(4)] == [2, 3, 2, 3]
    two_rows = Epoch((1, 1), 5, 3)
    assert two_rows.num_steps == 1
    assert sorted(two_rows.batch_rows(rank, 0) for rank in range(5)) == [0, 0, 0, 1, 1]


def test_no_rows_take_no_steps() -> None:
    assert Epoch((), 3, 4).num_steps == 0
    assert Epoch((0, 0), 3, 4).num_steps == 0


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_a_window_is_dealt_in_proportion(counts: list[int], data: st.DataObject) -> None:
    window = Window(tuple(RowSlice(number, 0, count) for number, count in enumerate(counts)), (7,))
    total = sum(counts)
    places = np.array([window.places(rows) for rows in range(total + 1)])
    assert (places.sum(1) == np.arange(total + 1)).all()
    assert ((np.diff(places, axis=0) >= 0).all()) and places[-1].tolist() == counts
    start, stop = sorted((data.draw(st.integers(0, total)), data.draw(st.integers(0, total))))
    share = np.array(counts) * (stop - start) / total
    # Half a row for where it begins, half for where it ends, and as much as other slices at the same places take.
    assert (np.abs(places[stop] - places[start] - share) < 1 + np.array(counts) * len(counts) / total + 1e-9).all()


def test_the_rows_of_a_slice_are_as_likely_at_any_place() -> None:
    seeds, rows = 4000, 6
    seen = np.zeros((rows, rows), np.int64)
    neighbours_in_order = 0
    for seed in range(seeds):
        found = rank_order(Epoch((rows,), 1, 1, seed=seed), 0)
        place = np.argsort(found)
        seen[found, np.arange(rows)] += 1
        neighbours_in_order += place[2] < place[3]
    assert np.abs(seen - seeds / rows).max() / np.sqrt(seeds / rows * (1 - 1 / rows)) < 4.5
    assert abs(neighbours_in_order - seeds / 2) < 4.5 * np.sqrt(seeds) / 2


@st.composite
def interruptions(draw: st.DrawFn) -> list[tuple[int, int, float]]:
    """World size, batch size and how far each of some readers goes, as a part of the steps it has."""
    reader = st.tuples(st.integers(1, 7), st.integers(1, 50), st.floats(0, 1))
    return draw(st.lists(reader, min_size=1, max_size=4))


@settings(max_examples=2000, deadline=None)
@given(epochs(), interruptions())
def test_a_position_leaves_exactly_the_rows_not_yet_read_whoever_reads_on(
    epoch: Epoch, readers: list[tuple[int, int, float]]
) -> None:
    read: list[int] = []
    for world_size, batch_size, part in readers:
        done = round(epoch.first_step + (epoch.num_steps - epoch.first_step) * part)
        for rank in range(epoch.world_size):
            read += chain(*(rows.tolist() for rows in batches(epoch, rank)[: done - epoch.first_step]))
        position = Position.from_json(epoch.position(done).to_json())
        epoch = replace(epoch, world_size=world_size, batch_size=batch_size, before=(), first_step=0).resumed(position)
    lengths = [epoch.rank_rows(rank) for rank in range(epoch.world_size)]
    assert max(lengths) - min(lengths) <= 1
    left = list(chain(*order(epoch)))
    assert sorted(read + left) == list(range(sum(epoch.row_counts)))


@settings(max_examples=500, deadline=None)
@given(epochs(), st.floats(0, 1))
def test_the_same_readers_go_on_with_the_very_batches_that_were_to_come(epoch: Epoch, part: float) -> None:
    done = round(epoch.num_steps * part)
    resumed = epoch.resumed(epoch.position(done))
    assert resumed.num_steps == epoch.num_steps
    for rank in range(epoch.world_size):
        going_on, whole = batches(resumed, rank), batches(epoch, rank)
        assert [rows.tolist() for rows in going_on] == [rows.tolist() for rows in whole[done:]]


def test_a_position_stays_small_and_names_no_rows() -> None:
    epoch = Epoch((50_000,) * 40_000, 64, 4096, window_row_groups=16)  # two billion rows
    for world_size in (32, 16, 48, 8):
        done = epoch.first_step + 500
        epoch = replace(epoch, world_size=world_size, before=(), first_step=0).resumed(epoch.position(done))
    text = epoch.position(7).to_json()
    assert len(text) < 500
    assert epoch.num_rows == sum(epoch.row_counts) - 500 * 4096 * (64 + 32 + 16 + 48)
    assert sum(1 for _ in zip(epoch.batches(3), range(20), strict=False)) == 20


def test_an_epoch_that_is_read_to_its_end_leaves_nothing() -> None:
    epoch = Epoch((10, 3), 2, 4)
    position = epoch.position(epoch.num_steps)
    assert list(chain(*order(epoch.resumed(position)))) == []
    other = Epoch((10, 3), 3, 5).resumed(position)
    assert (other.num_rows, other.num_steps) == (0, 0)


@pytest.mark.parametrize(
    "changed",
    [{"row_counts": (10, 4)}, {"row_counts": (3, 10)}, {"seed": 1}, {"shuffle": False}, {"window_row_groups": 2}],
)
def test_a_position_of_another_order_is_refused(changed: dict[str, Any]) -> None:
    epoch = Epoch((10, 3), 2, 4)
    with pytest.raises(PositionError, match="belongs to another order of rows: the shards"):
        replace(epoch, **changed).resumed(epoch.position(1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"epoch": -1, "data": "x", "taken": []}',
        '{"epoch": true, "data": "x", "taken": []}',
        '{"epoch": 0, "data": "x", "taken": [{"world_size": 0, "batch_size": 1, "steps": 1}]}',
        '{"epoch": 0, "data": "x", "taken": [{"world_size": 1, "batch_size": 1, "steps": "1"}]}',
        '{"epoch": 0, "data": "x", "taken": [{"world_size": 1}]}',
    ],
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(PositionError, match="not a position of the reading order"):
        Position.from_json(text)
