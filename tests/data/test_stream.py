"""Whatever the layout, an epoch reads every row once, keeps all ranks in step and depends on its seed only."""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recsys.data.stream import Epoch

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


def rank_order(epoch: Epoch, rank: int) -> NDArray[np.int64]:
    """Rows of a rank in the order of use, numbered over all files."""
    starts = np.concatenate(([0], np.cumsum(epoch.row_counts, dtype=np.int64)))
    used = [np.zeros(0, np.int64)]
    for window in epoch.windows(rank):
        rows = np.concatenate([np.arange(s.start, s.stop) + starts[s.row_group] for s in window.slices])
        assert len(rows) == window.num_rows
        used.append(rows if window.permutation is None else rows[window.permutation])
    return np.concatenate(used)


def order(epoch: Epoch) -> list[list[int]]:
    return [rank_order(epoch, rank).tolist() for rank in range(epoch.world_size)]


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
        for window in epoch.windows(rank):
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
        frozenset(s.row_group for s in next(Epoch((10,) * 8, 1, 5, epoch=epoch, window_row_groups=2).windows(0)).slices)
        for epoch in range(20)
    }
    assert len(firsts) > 5


def test_neighbouring_windows_are_shuffled_differently() -> None:
    epoch = Epoch((50,) * 4, 1, 10, window_row_groups=1)
    permutations = [window.permutation for window in epoch.windows(0)]
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
