"""Values are counted as what they are, over any number of batches, and no more of them than may be counted."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.storage import DataError
from recsys.prepare import vocabularies
from recsys.prepare.vocabularies import ValueCounts, vocabulary_of


def content(counts: ValueCounts, name: str, min_count: int) -> list[tuple[Any, int]]:
    found = counts.vocabulary(name, min_count, "here")
    return list(zip(found.values.to_pylist(), found.counts.to_pylist(), strict=True))


def test_vocabulary_is_by_descending_count_then_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "_COMPACT_ROWS", 50)
    rng = np.random.default_rng(5)
    values = [f"v{int(value)}" for value in rng.geometric(0.03, 3000)]
    counts = ValueCounts({"a", "b"}, 1000)
    for start in range(0, len(values), 100):
        counts.add("a", pa.array([*values[start : start + 100], None]), "here")
    counts.add("b", pa.array(["ü", "z", "a", "a"]), "here")
    expected = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    for least in (1, 3):
        assert content(counts, "a", least) == [item for item in expected if item[1] >= least]
    assert counts.vocabulary("b", 1, "here").values.to_pylist() == ["a", "z", "ü"]
    assert len(counts.vocabulary("b", 3, "here")) == 0


def test_integers_are_ordered_by_number_and_keep_their_type() -> None:
    counts = ValueCounts(["n"])
    counts.add("n", pa.array([[10, 9], None, [], [9, -1]], pa.list_(pa.int32())), "here")
    counts.add("n", pa.array([10, 10, None, 100], pa.uint8()), "here")
    assert content(counts, "n", 1) == [(10, 3), (9, 2), (-1, 1), (100, 1)]
    assert counts.vocabulary("n", 9, "here").values.type == pa.int64()


def test_one_vocabulary_has_values_of_one_type() -> None:
    counts = ValueCounts(["a"])
    counts.add("a", pa.array([], pa.string()), "there")
    with pytest.raises(DataError, match="here has type int64, but others of its vocabulary have not; give it a voc"):
        counts.add("a", pa.array([7]), "here")
    with pytest.raises(DataError, match="here has type double; strings, integers or lists of them are needed"):
        counts.add("a", pa.array([0.5]), "here")


def test_too_many_values_are_refused_with_the_largest_table() -> None:
    counts = ValueCounts({"a", "b"}, 10)
    counts.add("a", pa.array(["x", "y"]), "here")
    counts.vocabulary("a", 1, "here")
    counts.add("b", pa.array([str(value) for value in range(9)]), "here")
    with pytest.raises(DataError, match=r"than 10 different values .*11 so far, 9 of them in table 'b'.*--max-val"):
        counts.vocabulary("b", 1, "here")


def test_values_that_are_known_beforehand_keep_their_order() -> None:
    vocabulary = vocabulary_of(["F", "M", "X"], pa.array([["M"], None, ["F", "M"]]), "here")
    assert vocabulary.values.to_pylist() == ["F", "M", "X"] and vocabulary.counts.to_pylist() == [1, 2, 0]
    years = vocabulary_of(range(1919, 1922), pa.array([1921, None, 1919, 1919]), "here")
    assert years.values.to_pylist() == [1919, 1920, 1921] and years.counts.to_pylist() == [2, 0, 1]
