"""Label expressions and vocabularies that mean harm end in one error, soon and in little memory."""

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import EXPRESSIONS, run_bounded

from recsys.config import ConfigError
from recsys.data.labels import parse_expression
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary

PARSE_ALL = """
from hostile import EXPRESSIONS, outcomes
from recsys.data.labels import parse_expression
outcomes(lambda name: parse_expression(EXPRESSIONS[name][0], source="data.label"), EXPRESSIONS)
"""


def test_hostile_expressions_end_in_one_error_soon_and_in_little_memory() -> None:
    done = run_bounded("-c", PARSE_ALL, memory=2 << 30)
    assert done.code == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in ended] == list(EXPRESSIONS)
    for name, error, seconds, mebibytes in ended:
        assert error is not None and error.startswith("data.label: ") and EXPRESSIONS[name][1] in error, (name, error)
        assert len(error) < 1000 and seconds < 10 and mebibytes < 200, (name, seconds, mebibytes)


@pytest.mark.parametrize(
    "text",
    [
        f"a in ({', '.join(map(str, range(10_000)))})",
        "a > 1" + " and a > 1" * 5000,
        "not " * 40 + "a",
        f"a > {2**64} and b < -{10**300}",
    ],
    ids=["many values", "many comparisons", "40 deep", "large integers"],
)
def test_long_expressions_within_the_bounds_are_read(text: str) -> None:
    assert parse_expression(text, source="data.label").columns[0] == "a"


@pytest.mark.parametrize("text", ["a < -0x" + "f" * 60_000, "a < ~0x" + "f" * 60_000])
def test_an_integer_that_python_does_not_print_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="holds an integer beyond any column's"):
        parse_expression(text, source="data.label")


@pytest.mark.parametrize(
    "counts",
    [
        pa.array([1.5, 1.0]),
        pa.array([float("nan"), 1.0]),
        pa.array([float("inf"), 1.0]),
        pa.array([1e300, 1.0]),
        pa.array(["2", "1"]),
        pa.array(["many", "few"]),
        pa.array([[2], [1]]),
        pa.array([{"n": 2}, {"n": 1}]),
        pa.array([True, False]),
        pa.array([2**64 - 1, 1], pa.uint64()),
        pa.array([Decimal("1.5"), Decimal("1.0")]),
        pa.array([Decimal(10) ** 30, Decimal(1)]),
        pa.array([b"2", b"1"]),
        pa.array([2, 1], pa.timestamp("s")),
        pa.nulls(2),
    ],
    ids=lambda counts: str(counts.type)[:20],
)
def test_counts_that_are_no_whole_numbers_are_refused(tmp_path: Path, counts: pa.Array) -> None:
    pq.write_table(pa.table({"value": ["a", "b"], "count": counts}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"its counts are no whole numbers of 64 bits: .*; build it with") as error:
        Vocabulary.read(tmp_path / "v.parquet")
    assert str(tmp_path / "v.parquet") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float64(), pa.decimal128(38, 0)])
def test_counts_of_any_numeric_type_are_taken_where_they_are_whole(tmp_path: Path, kind: pa.DataType) -> None:
    counts = pa.array([2, 1]).cast(kind)
    pq.write_table(pa.table({"value": ["a", "b"], "count": counts}), tmp_path / "v.parquet")
    assert Vocabulary.read(tmp_path / "v.parquet").counts.to_pylist() == [2, 1]


def _spoilt(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        return Path("/dev/zero")
    elif kind == "NUL":
        return Path(f"{path}\0")
    elif kind == "half of a pair":
        return Path(f"{path}\ud800")
    elif kind == "text":
        path.write_text("no Parquet\n" * 1000)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        pq.write_table(pa.table({"value": ["a"], "count": [1]}), path)
        path.write_bytes(path.read_bytes()[:-20])
    return path


READ = """
import sys
from pathlib import Path
from hostile import outcomes
from recsys.data.vocabulary import Vocabulary
outcomes(lambda name: Vocabulary.read(Path(name)), [sys.stdin.read()])
"""


@pytest.mark.parametrize("kind", ["pipe", "device", "text", "empty", "cut"])
def test_what_is_no_file_of_parquet_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = _spoilt(tmp_path / "v.parquet", kind)
    done = run_bounded("-c", READ, memory=2 << 30, stdin=str(path))
    assert done.code == 0, done.stderr
    _, error, _, _ = json.loads(done.stdout)
    assert error is not None and error.startswith(f"vocabulary {path} cannot be read: ")
    assert "recsys.prepare vocabulary" in error


@pytest.mark.parametrize("kind", ["NUL", "half of a pair"])
def test_a_path_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read: .*; build it with"):
        Vocabulary.read(_spoilt(tmp_path / "v.parquet", kind))


def test_every_other_kind_of_file_is_no_vocabulary(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "lists": {"value": [["a"]], "count": [1]},
        "swapped": {"count": [1], "value": ["a"]},
        "more": {"value": ["a"], "count": [1], "other": [1]},
        "dates": {"value": pa.array([1], pa.date32()), "count": [1]},
        "nulls": {"value": pa.nulls(1), "count": [1]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=rf"{name}\.parquet is no vocabulary"):
            Vocabulary.read(tmp_path / f"{name}.parquet")
