"""Vocabularies: what is looked up, kept in a file and refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.location import DataError
from recsys.data.vocabulary import Vocabulary, canonical


def vocabulary(values: list[Any]) -> Vocabulary:
    array = canonical(pa.array(values))
    return Vocabulary(array, pa.array(range(len(values), 0, -1), pa.int64()), "here")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True), st.lists(st.integers()))
def test_an_integer_has_the_row_after_its_place(values: list[int], others: list[int]) -> None:
    rows = {value: place for place, value in enumerate(values, start=1)}
    asked = values + [value for value in others if -(2**63) <= value < 2**63]
    found = vocabulary(values).lookup(pa.array(asked, pa.int64()))
    assert found.tolist() == [rows.get(value, 0) for value in asked]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), st.lists(st.sampled_from([*"abcxyz", None])))
def test_a_string_has_the_row_after_its_place_and_null_none(values: list[str], asked: list[str | None]) -> None:
    rows = {value: place for place, value in enumerate(values, start=1)}
    expected = [-1 if value is None else rows.get(value, 0) for value in asked]
    array = pa.array(asked, pa.string())
    for encoded in (array, array.cast(pa.large_string()), array.dictionary_encode()):
        assert vocabulary(values).lookup(encoded).tolist() == expected


def test_strings_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    known = vocabulary(["a"])
    assert known.lookup(pa.array(["b"])).tolist() == [0]
    keys = known._sorted[0]
    monkeypatch.setattr("recsys.data.vocabulary.hash_values", lambda values: keys.repeat(len(values)))
    assert known.lookup(pa.array(["b", "a"])).tolist() == [0, 1]


@pytest.mark.parametrize("values", [["ü", "", "b"], [5, -1, 2**62]])
def test_a_file_gives_back_what_was_written(tmp_path: Path, values: list[Any]) -> None:
    written = vocabulary(values)
    written.write(tmp_path / "deep" / "v.parquet")
    read = Vocabulary.read(tmp_path / "deep" / "v.parquet")
    assert read.values.to_pylist() == values and read.counts.to_pylist() == [3, 2, 1]
    assert read.digest == written.digest
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["v.parquet"]


def test_the_digest_tells_order_values_and_their_borders() -> None:
    digests = [vocabulary(values).digest for values in (["a", "b"], ["b", "a"], ["ab", ""], ["a", "b", "c"], [1, 2])]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"value": ["a"]}), "is no vocabulary"),
        (pa.table({"value": [0.5], "count": [1]}), "is no vocabulary"),
        (pa.table({"value": ["a", "a"], "count": [1, 1]}), "a value twice"),
        (pa.table({"value": ["a", None], "count": [1, 1]}), "or a null"),
        (pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())}), "holds nothing"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_vocabulary_is_refused_by_name(tmp_path: Path, table: pa.Table | None, message: str) -> None:
    if table is not None:
        pq.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(DataError, match=message) as error:
        Vocabulary.read(tmp_path / "v.parquet")
    assert str(tmp_path / "v.parquet") in str(error.value)
    assert "recsys.prepare vocabulary" in str(error.value)
