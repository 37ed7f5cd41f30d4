"""Values of a column become the rows that they should, single or in lists, nulls staying what they are."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.ids import HashedIds, PlainIds, VocabularyIds
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary
from recsys.prepare.mapping import ANY_ROW, mapped


def vocabulary(values: list[str]) -> Vocabulary:
    return Vocabulary(pa.array(values, pa.large_string()), pa.array([1] * len(values), pa.int64()), "here")


def test_ids_of_values() -> None:
    values = pa.array(["b", None, "x", "a", "b"])
    ids = VocabularyIds(vocabulary(["b", "a"]))
    assert mapped(values, ids, "here").to_pylist() == [1, None, 0, 2, 1]
    assert ids.num_rows == 3
    assert mapped(values, VocabularyIds(vocabulary([])), "here").to_pylist() == [0, None, 0, 0, 0]
    kept = PlainIds(ANY_ROW)
    assert mapped(pa.array([4, None, 0]), kept, "here").to_pylist() == [4, None, 0]
    assert mapped(pa.array([None, 2**63 - 1], pa.int64()), kept, "here").to_pylist() == [None, 2**63 - 1]
    with pytest.raises(DataError, match="here has 1 value out of range, such as -1"):
        mapped(pa.array([-1]), kept, "here")


def test_ids_of_lists() -> None:
    values = pa.array([["x", "c"], ["b", "x", "a"], None, [], ["x"]])[1:]
    ids = mapped(values, VocabularyIds(vocabulary(["b", "a"])), "here")
    assert ids.type == pa.list_(pa.int64())
    assert ids.to_pylist() == [[1, 0, 2], None, [], [0]]
    ids = mapped(values, VocabularyIds(vocabulary(["b", "a"]), unknown_is_row_0=False), "here")
    assert ids.to_pylist() == [[0, 1], None, [], []]


def test_hashes_are_xxh3_of_the_bytes_and_stay_what_they_are() -> None:
    # The published value of XXH3-64 of no bytes; a served model must find the rows that training wrote.
    assert mapped(pa.array([""]), HashedIds(1 << 62), "here").to_pylist() == [0x2D06800538D394C2 % (1 << 62)]
    values = pa.array(["68fd1e64", None, "ü", "68fd1e64"])
    first, second = (mapped(values, HashedIds(1000, salt), "here").to_pylist() for salt in (0, 1))
    assert first[0] == first[3] and first[1] is None and first != second
    spread = mapped(pa.array([str(value) for value in range(20_000)]), HashedIds(100, 3), "here").to_numpy()
    counts = np.bincount(spread, minlength=100)
    assert len(counts) == 100 and counts.min() > 130 and counts.max() < 270  # five standard deviations of 14
