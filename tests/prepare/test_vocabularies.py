"""Values become the ids that they should, counted over any number of batches, and no more than may be counted."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.storage import DataError
from recsys.prepare import encoding
from recsys.prepare.encoding import HashedIds, KeptIds, ValueCounts, VocabularyIds


def test_vocabulary_is_by_descending_count_then_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_COMPACT_ROWS", 50)
    rng = np.random.default_rng(5)
    values = [f"v{int(value)}" for value in rng.geometric(0.03, 3000)]
    counts = ValueCounts({"a", "b"}, 1000)
    for start in range(0, len(values), 100):
        counts.add("a", pa.array([*values[start : start + 100], None]))
    counts.add("b", pa.array(["ü", "z", "a", "a"]))
    expected = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    for least in (1, 3):
        found = counts.vocabulary("a", least)
        assert list(zip(*found.to_pydict().values(), strict=True)) == [item for item in expected if item[1] >= least]
    assert counts.vocabulary("b", 1)["value"].to_pylist() == ["a", "z", "ü"]
    assert counts.vocabulary("b", 3).num_rows == 0


def test_too_many_values_are_refused_with_the_largest_table() -> None:
    counts = ValueCounts({"a", "b"}, 10)
    counts.add("a", pa.array(["x", "y"]))
    counts.vocabulary("a", 1)
    counts.add("b", pa.array([str(value) for value in range(9)]))
    with pytest.raises(DataError, match=r"than 10 different values .*11 so far, 9 of them in table 'b'.*--max-val"):
        counts.vocabulary("b", 1)


def test_ids_of_values() -> None:
    values = pa.array(["b", None, "x", "a", "b"])
    vocabulary = VocabularyIds(pa.array(["b", "a"], pa.large_string()))
    assert vocabulary.of(values).to_pylist() == [1, None, 0, 2, 1]
    assert vocabulary.size == 3
    assert VocabularyIds(pa.array([], pa.large_string())).of(values).to_pylist() == [0, None, 0, 0, 0]
    kept = KeptIds()
    assert kept.of(pa.array([4, None, 0])).to_pylist() == [4, None, 0]
    assert kept.of(pa.array([None, 2], pa.int64())).to_pylist() == [None, 2]
    assert kept.size == 5


def test_hashes_are_xxh3_of_the_bytes_and_stay_what_they_are() -> None:
    # The published value of XXH3-64 of no bytes; a served model must find the rows that training wrote.
    assert HashedIds(1 << 62, 0).of(pa.array([""])).to_pylist() == [0x2D06800538D394C2 % (1 << 62)]
    values = pa.array(["68fd1e64", None, "ü", "68fd1e64"])
    first, second = HashedIds(1000, 0).of(values).to_pylist(), HashedIds(1000, 1).of(values).to_pylist()
    assert first[0] == first[3] and first[1] is None and first != second
    spread = HashedIds(100, 3).of(pa.array([str(value) for value in range(20_000)])).to_numpy()
    counts = np.bincount(spread, minlength=100)
    assert len(counts) == 100 and counts.min() > 130 and counts.max() < 270  # five standard deviations of 14
