"""Text comes as the rows that it holds, with their lines, whatever the size of a block; what is wrong is named."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.storage import DataError
from recsys.prepare.text import Malformed, TextFiles, TextFormat

NUMBERS = TextFormat({"a": pa.int64(), "b": pa.string()})


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(files: TextFiles) -> list[dict[str, Any]]:
    return [row for block in files.blocks("reading") for row in block.table.to_pylist()]


def lines(files: TextFiles) -> list[tuple[int, int]]:
    return [(block.file, int(line)) for block in files.blocks("reading") for line in block.lines]


@pytest.mark.parametrize("block_bytes", [12, 30, 1 << 20])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_and_lines_do_not_depend_on_blocks(tmp_path: Path, block_bytes: int, ending: str, last: bool) -> None:
    text = ending.join(["b,c,a", *(f"t{row},x,{row}" for row in range(50))]) + (ending if last else "")
    paths = [write(tmp_path / "one.csv", text), tmp_path / "two.csv.gz"]
    paths[1].write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.replace("b,c,a", "c,b,a").encode()))
    seen: list[tuple[str, int, int, int]] = []
    files = TextFiles(paths, NUMBERS, block_bytes=block_bytes, progress=lambda *told: seen.append(told))
    expected = [{"a": row, "b": f"t{row}"} for row in range(50)]
    assert rows(files) == expected + [{"a": row, "b": "x"} for row in range(50)]
    assert lines(files) == [(file, line) for file in (0, 1) for line in range(2, 52)]
    assert files.last_lines("counting") == [51, 51]
    size = sum(path.stat().st_size for path in paths)
    assert seen[-1] == ("counting", 102, size, size)
    assert [told for told in seen if told[0] == "reading"][-1] == ("reading", 100, size, size)
    assert [done for _, _, done, _ in seen[: len(seen) // 3]] == sorted(
        done for _, _, done, _ in seen[: len(seen) // 3]
    )


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.text(st.characters(codec="utf-8", exclude_characters="\0\r")))),
    st.integers(200, 4000),
)
def test_quoted_values_hold_whatever_they_like(tmp_path_factory: pytest.TempPathFactory, table: Any, size: int) -> None:
    path = tmp_path_factory.mktemp("text") / "quoted.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("a", "b"), *table])
    found = rows(TextFiles([path], NUMBERS, block_bytes=size))
    assert [(row["a"], row["b"]) for row in found] == [(a, b or None) for a, b in table]


def test_line_breaks_within_quotes_keep_the_count_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", 'a,b\n1,"x\ny"\n2,z\n' + "3,z\n" * 4 + "x,z\n")
    for block_bytes in (8, 1 << 20):
        with pytest.raises(DataError, match=r"f\.csv, line 9: column 'a': invalid value 'x' for int64; mend it, or"):
            rows(TextFiles([path], NUMBERS, block_bytes=block_bytes))
    files = TextFiles([path], NUMBERS, skip_malformed=True)
    assert [row["a"] for row in rows(files)] == [1, 2, 3, 3, 3, 3]
    assert files.skipped == [1]


WRONG = {
    "1": "Expected 2 columns, got 1: 1",
    "1,2,3": "Expected 2 columns, got 3",
    "1.5,x": "column 'a': invalid value '1.5' for int64",
    "7,x": "seven",
    "\udcff,x": "column 'a': invalid value",
    "1,\udcff": "column 'b': invalid UTF8 data for string",
}


def no_seven(table: pa.Table) -> pa.Table:
    if pc.any(pc.equal(table["a"], 7)).as_py():
        raise Malformed("seven")
    return table


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_a_wrong_row_is_named_or_left_out(tmp_path: Path, wrong: str, block_bytes: int) -> None:
    text = "a,b\n" + "1,x\n" * 20 + f"{wrong}\n" + "2,x\n" * 20 + f"{wrong}\n3,x"
    path = write(tmp_path / "f.csv", text.encode(errors="surrogateescape"))
    files = TextFiles([path, path], NUMBERS, no_seven, block_bytes=block_bytes)
    with pytest.raises(DataError) as error:
        rows(files)
    assert str(error.value).startswith(f"{path}, line 22: {WRONG[wrong]}")
    assert str(error.value).endswith("; mend it, or leave such rows out with --skip-malformed")
    files.skip_malformed = True
    assert [row["a"] for row in rows(files)] == [*[1] * 20, *[2] * 20, 3] * 2
    assert files.skipped == [2, 2]
    assert lines(files)[:41] == [(0, line) for line in (*range(2, 22), *range(23, 43), 44)]
    assert files.skipped == [2, 2]  # of the latest pass alone


def test_json_lines(tmp_path: Path) -> None:
    objects = [{"a": row, "b": [f"x{row}", "ä"], "c": {"no": "matter"}} for row in range(30)] + [{"b": []}, {"a": 3}]
    path = write(tmp_path / "f.jsonl", "\n".join(map(json.dumps, objects)))
    format_ = TextFormat({"a": pa.int64(), "b": pa.list_(pa.string())}, json=True)
    for block_bytes in (60, 1 << 20):
        files = TextFiles([path], format_, block_bytes=block_bytes)
        assert rows(files) == [{"a": one.get("a"), "b": one.get("b")} for one in objects]
        assert lines(files) == [(0, line) for line in range(1, 33)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('{"a": "x"}', r"Column\(/a\) changed from number to string"),
        ('{"a": 1.5}', "couldn't parse:1.5"),
        ('{"a": 1', "Missing a comma or '}' after an object member"),
        ("[1]", "changed from object to array"),
        ("", "not one JSON object a line"),
        ('{"a": 1} {"a": 2}', "not one JSON object a line"),
        ('{"b": "\udcff"}', "UTF8"),
    ],
)
def test_a_wrong_json_line_is_named_or_left_out(tmp_path: Path, wrong: str, message: str) -> None:
    text = '{"a": 1}\n' * 20 + f"{wrong}\n" + '{"a": 2}\n' * 5
    path = write(tmp_path / "f.jsonl", text.encode(errors="surrogateescape"))
    files = TextFiles([path], TextFormat({"a": pa.int64(), "b": pa.string()}, json=True))
    with pytest.raises(DataError, match=rf"f\.jsonl, line 21: .*{message}.*; mend it"):
        rows(files)
    files.skip_malformed = True
    assert [row["a"] for row in rows(files)] == [*[1] * 20, *[2] * 5]
    assert files.skipped == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,c\n1,x\n", "line 1: no column named 'b'; the file has a, c"),
        ("a,b,b\n1,x,y\n", "line 1: 2 columns named 'b'; the file has a, b, b"),
        ('a,b\n1,"x\n' + "2,y\n" * 100, "a row after line 1 has more than 100 bytes; is a quote not closed?"),
        ("a,b\n1," + "x" * 300, "a row after line 1 has more than 100 bytes; is a quote not closed?"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows(TextFiles([write(tmp_path / "f.csv", text)], NUMBERS, block_bytes=100))
    assert str(error.value).startswith(f"{tmp_path}/f.csv") and message in str(error.value)


def test_gzipped_files_that_are_cut_short_or_none(tmp_path: Path) -> None:
    whole = gzip.compress(b"a,b\n" + b"".join(b"%d,x\n" % row for row in range(5000)))
    for name, content in {
        "cut.gz": whole[:-2000],
        "text.gz": b"a,b\n1,2\n",
        "rot.gz": whole[:500] + b"\0" * 500,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be unpacked: .*; fetch it again"):
            rows(TextFiles([tmp_path / name], NUMBERS))


def test_other_delimiters_nulls_and_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", '5\t"x\t-\n-\t\ty\n')
    format_ = TextFormat(
        {"a": pa.int64(), "c": pa.string()}, names=["a", "b", "c"], delimiter="\t", quote=None, nulls=["-"]
    )
    assert rows(TextFiles([path], format_)) == [{"a": 5, "c": None}, {"a": None, "c": "y"}]
