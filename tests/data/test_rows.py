"""Decoded rows in any order, and batches of parts of them, hold what plain Python lists would."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import bags
from torchrec import KeyedJaggedTensor

from recsys.data.batch import Part, build_batch
from recsys.data.rows import Jagged, Rows, SparseLayout
from recsys.data.shuffling import Shuffle

Bags = list[list[int]]

KEYS = ("a", "b", "c", "d", "e")


def jagged(lists: Bags, weighted: bool) -> Jagged:
    offsets = np.cumsum([0, *map(len, lists)])
    values = np.array([i for ids in lists for i in ids], dtype=np.int64)
    return Jagged(values, offsets, values.astype(np.float32) / 2 if weighted else None)


@st.composite
def tables(draw: st.DrawFn, lists: frozenset[str], rows: int) -> dict[str, Bags]:
    """Ids of each row by feature; those of `KEYS` that are no lists have one or none, or one each."""
    ids, least = st.integers(0, 2**40), draw(st.sampled_from((0, 1)))
    of_row = {True: st.lists(ids, max_size=4), False: st.lists(ids, min_size=least, max_size=1)}
    return {key: draw(st.lists(of_row[key in lists], min_size=rows, max_size=rows)) for key in KEYS}


def rows_of(table: dict[str, Bags], lists: frozenset[str], first: int, weighted: frozenset[str]) -> Rows:
    """The table as decoded rows; their other columns number them from `first`."""
    count = len(table["a"])
    numbers = np.arange(first, first + count)
    single = [[row[0] if row else -1 for row in table[key]] for key in KEYS if key not in lists]
    return Rows(
        labels=(numbers % 2).astype(np.float32),
        reference=numbers / 1e9,
        domain=numbers,
        dense=np.stack([numbers, -numbers]).astype(np.float32),
        single=np.array(single, np.int64).reshape(len(KEYS) - len(lists), count),
        lists=tuple(jagged(table[key], key in weighted) for key in KEYS if key in lists),
        has_empty=any(-1 in ids for ids in single),
    )


def bags_of(batch: KeyedJaggedTensor, key: str) -> Bags:
    feature = batch[key]
    return bags(Jagged(feature.values().numpy(), feature.offsets().numpy()))


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sets(st.sampled_from(KEYS)).map(frozenset), st.booleans())
def test_a_batch_holds_its_parts_one_after_another(data: st.DataObject, lists: frozenset[str], weighted: bool) -> None:
    layout = SparseLayout(KEYS, lists, weighted)
    with_weights = frozenset(data.draw(st.sets(st.sampled_from(sorted(lists))))) if weighted and lists else frozenset()
    whole: dict[str, Bags] = {key: [] for key in KEYS}
    numbers: list[int] = []
    parts = []
    for first in (0, 100, 200)[: data.draw(st.integers(0, 3))]:
        count = data.draw(st.integers(0, 6))
        table = data.draw(tables(lists, count))
        start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
        parts.append(Part(rows_of(table, lists, first, with_weights), start, stop))
        numbers += range(first + start, first + stop)
        for key in KEYS:
            whole[key] += table[key][start:stop]
    batch = build_batch(parts, layout, 2, loss_scale=1.5, pin_memory=False)
    assert batch.loss_scale == 1.5
    assert batch.labels.tolist() == [number % 2 for number in numbers]
    assert batch.dense_features.tolist() == [[number, -number] for number in numbers]
    assert batch.domain.tolist() == (numbers if parts else [])
    assert torch.equal(batch.reference, torch.tensor(numbers, dtype=torch.float64) / 1e9)
    sparse = batch.sparse_features
    assert (sparse.keys(), sparse.stride()) == (list(KEYS), len(numbers))
    assert {key: bags_of(sparse, key) for key in KEYS} == whole
    assert sparse.length_per_key_or_none() == [sum(map(len, whole[key])) for key in KEYS]
    wanted = [i / 2 if key in with_weights else 1.0 for key in KEYS for ids in whole[key] for i in ids]
    assert (sparse.weights().tolist() if weighted else sparse.weights_or_none()) == (
        torch.tensor(wanted).tolist() if weighted else None
    )


def test_ids_of_32_bits_make_the_same_batch() -> None:
    layout = SparseLayout(("a",), frozenset())
    rows = [
        Rows(np.zeros(3, np.float32), np.empty(0), np.empty(0, np.int64), np.empty((0, 3), np.float32), ids, ())
        for ids in (np.array([[4, -1, 6]], np.int32), np.array([[4, -1, 6]], np.int64))
    ]
    for one in rows:
        sparse = build_batch([Part(one, 0, 3)], layout, 0, loss_scale=1, pin_memory=False).sparse_features
        assert (sparse.values().dtype, sparse.lengths().dtype) == (torch.int64, torch.int32)
        assert (sparse.values().tolist(), sparse.lengths().tolist()) == ([4, 6], [1, 0, 1])


@pytest.mark.parametrize("lists", [frozenset(), frozenset({"b", "c"}), frozenset(KEYS)], ids=["none", "some", "all"])
def test_runs_are_neighbours_of_one_kind(lists: frozenset[str]) -> None:
    layout = SparseLayout(KEYS, lists)
    named = [(layout.single, [key for key in KEYS if key in lists])[kind][places] for kind, places in layout.runs]
    assert [key for run in named for key in run] == list(KEYS)
    assert all(one[0] != other[0] for one, other in zip(layout.runs, layout.runs[1:], strict=False))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**40), max_size=4), min_size=1, max_size=8), st.booleans(), st.data())
def test_taking_rows_equals_indexing_lists(lists: Bags, weighted: bool, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(lists))))
    taken = Shuffle(np.array(order, np.int64)).lists(jagged(lists, weighted))
    wanted = jagged([lists[row] for row in order], weighted)
    assert bags(taken) == bags(wanted)
    assert (taken.weights is None) == (wanted.weights is None)
    assert taken.weights is None or taken.weights.tolist() == wanted.weights.tolist()


@settings(deadline=None)
@given(st.data(), st.sets(st.sampled_from(KEYS)).map(frozenset), st.integers(1, 8), st.booleans())
def test_a_part_of_rows_is_what_a_batch_takes_of_them(
    data: st.DataObject, lists: frozenset[str], count: int, weighted: bool
) -> None:
    table = data.draw(tables(lists, count))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    rows = rows_of(table, lists, 5, frozenset(lists if weighted else ()))
    part = rows.part(start, stop)
    assert len(part) == stop - start
    layout = SparseLayout(KEYS, lists, weighted)
    options = {"loss_scale": 1.0, "pin_memory": False}
    num_dense = rows.dense.shape[0]
    found = build_batch([Part(part, 0, stop - start)], layout, num_dense, **options)
    expected = build_batch([Part(rows, start, stop)], layout, num_dense, **options)
    for key in KEYS:
        assert bags_of(found.sparse_features, key) == bags_of(expected.sparse_features, key) == table[key][start:stop]
    for name in ("dense_features", "labels", "reference", "domain"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if weighted:
        assert torch.equal(found.sparse_features.weights(), expected.sparse_features.weights())
    assert found.counts == expected.counts
