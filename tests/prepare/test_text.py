"""Text comes as the rows that it holds, with their lines, whatever the size of a block; what is wrong is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.storage import DataError
from recsys.prepare.blocks import Malformed
from recsys.prepare.cutting import QUOTED_LINES, Cutter, TooManyLines
from recsys.prepare.text import TextFiles, TextFormat

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
    assert files.row_lines("counting") == [(2, 51), (2, 51)]
    size = sum(path.stat().st_size for path in paths)
    assert seen[-1] == ("counting", 100, size, size)
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
    files = TextFiles([path, path], NUMBERS, convert=no_seven, block_bytes=block_bytes)
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
        ('{"a": "x"}', "column 'a': found string, not number"),
        ('{"a": 1.5}', "column 'a': invalid value '1.5' for int64"),
        ('{"b": "x", "a": 1e3}', "column 'a': invalid value '1e3' for int64"),
        ('{"a": 1', "not one JSON object a line: Expecting ',' delimiter at character 8"),
        ("[1]", r"not one JSON object a line: \[1\]"),
        ("", "the line is blank, not one JSON object"),
        (" \t", "the line is blank, not one JSON object"),
        ('{"a": 1, "a": 2}', "column 'a': was specified twice"),
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
        (
            'a,b\n1,"x\n' + "2,y\n" * 100,
            "line 2: the quoted field that opens here has more than 100 bytes; is the quote",
        ),
        ("a,b\n1," + "x" * 300, "line 2: the row has more than 100 bytes; is this a text file with one row a line?"),
        ("a,b\n1,x\n" + "\n" * 300 + "2,y\n", "line 3: more than 100 bytes of blank lines; remove them"),
        ("", "line 1: the file is empty, without a header of columns; leave it out"),
        ("\ufeff", "line 1: the file is empty, without a header of columns; leave it out"),
        ("\na,b\n1,x\n", "line 1: the line is blank, and no header of columns; remove it"),
        ('a,"b\n1,x\n', "line 1: the quoted field that opens here is open at the file's end; is the quote not closed?"),
        ('a,b\n1,x\n2,"y\n3,z\n', "line 3: the quoted field that opens here is open at the file's end; is the quote"),
        ('a,"b' + "\n" * 1200 + '"\n', "line 1: the quoted field that opens here has more than"),
        ('a,b\n1,x\n2,"', "line 3: the quoted field that opens here is open at the file's end; is the quote not"),
        ("a,b\n1,x\n".encode("utf-16"), "line 1: the text is UTF-16; convert it to UTF-8"),
        (gzip.compress(b"a\n", mtime=0), "line 1: no text, but a packed file (gz); end its name in .gz, or unpack it"),
        (bz2.compress(b"a,b\n"), "line 1: no text, but a packed file (bz2); end its name in .bz2, or unpack it"),
        (lzma.compress(b"a,b\n"), "line 1: no text, but a packed file (xz); unpack it"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows(TextFiles([write(tmp_path / "f.csv", text)], NUMBERS, block_bytes=100))
    assert str(error.value).startswith(f"{tmp_path}/f.csv") and message in str(error.value)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda text: pa.compress(text, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files(tmp_path: Path, suffix: str) -> None:
    """Several packed streams in one file are one text."""
    parts = b"a,b\n" + b"".join(b"%d,x\n" % row for row in range(5000)), b"".join(b"%d,y\n" % row for row in range(99))
    path = write(tmp_path / f"f.csv.{suffix}", b"".join(map(PACKERS[suffix], parts)))
    expected = [{"a": row, "b": "x"} for row in range(5000)] + [{"a": row, "b": "y"} for row in range(99)]
    seen: list[tuple[str, int, int, int]] = []
    for block_bytes in (100, 1 << 20):
        files = TextFiles([path], NUMBERS, block_bytes=block_bytes, progress=lambda *told: seen.append(told))
        assert rows(files) == expected
        assert files.row_lines("counting") == [(2, 5100)]
    assert seen[-1] == ("counting", 5099, path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_that_are_cut_short_or_none(tmp_path: Path, suffix: str) -> None:
    whole = PACKERS[suffix](b"a,b\n" + b"".join(b"%d,%d\n" % (row, row * 7919 % 1000) for row in range(5000)))
    for name, content in {
        f"cut.{suffix}": whole[:-2000],
        f"end.{suffix}": whole[:-1],
        f"text.{suffix}": b"a,b\n1,2\n",
        f"rot.{suffix}": whole[:3] + b"\xff" * 500 + whole[503:],
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


@pytest.mark.parametrize("block_bytes", [40, 200, 1 << 20])
def test_a_stray_quote_eats_no_rows(tmp_path: Path, block_bytes: int) -> None:
    lines = [f"{row},text {row}" for row in range(2012)]
    lines[10] = '10,5" disk'
    lines[1011] = "x,bad id"
    path = write(tmp_path / "f.csv", "\n".join(["a,b", *lines]) + "\n")
    with pytest.raises(DataError, match=r"f\.csv, line 1013: column 'a': invalid value 'x' for int64"):
        rows(TextFiles([path], NUMBERS, block_bytes=block_bytes))
    files = TextFiles([path], NUMBERS, skip_malformed=True, block_bytes=block_bytes)
    found = rows(files)
    assert files.skipped == [1] and files.rows == [2011]
    assert [row["a"] for row in found] == [row for row in range(2012) if row != 1011]
    assert found[10]["b"] == '5" disk'


def test_fields_of_many_lines_have_a_bound_that_names_where_they_open(tmp_path: Path) -> None:
    def text(breaks: int) -> str:
        return "a,b\n" + "1,x\n" * 10 + '2,"y' + "\n" * breaks + '"\n' + "3,z\n" * 5000 + '4,""\n'

    assert len(rows(TextFiles([write(tmp_path / "f.csv", text(QUOTED_LINES))], NUMBERS))) == 5012
    write(tmp_path / "f.csv", text(QUOTED_LINES + 1))
    for skip in (False, True):
        with pytest.raises(
            DataError, match="line 12: the quoted field that opens here has more than 1,000 line breaks"
        ):
            rows(TextFiles([tmp_path / "f.csv"], NUMBERS, skip_malformed=skip))
    # One stray quote opens a field and another closes it, far behind: not one malformed row, but no file to be read.
    lines = ["a,b", *(f"{row},x" for row in range(5000))]
    lines[12], lines[4000] = '12,"5 inch', '4000,a " b'
    write(tmp_path / "f.csv", "\n".join(lines))
    with pytest.raises(DataError, match=r"line 13: the quoted field that opens here has more than 1,000 line breaks"):
        rows(TextFiles([tmp_path / "f.csv"], NUMBERS, skip_malformed=True))


def by_python(text: str, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


PIECES = st.lists(st.sampled_from(['"', '"', '""', ",", "\n", "\r\n", "\r", "a", " ", "ä", "\ufeff"]), max_size=60)


@given(PIECES.map("".join), st.booleans())
def test_rows_end_where_those_of_other_parsers_do(text: str, final: bool) -> None:
    cutter, content = Cutter('"'), text.encode()
    cut = cutter.last(content, final)
    try:
        expected = by_python(text) if cut.opened < 0 or not final else None
    except csv.Error:  # a line break within quotes that the text's end splits, as Python sees it
        expected = None
    if final:
        assert (cut.end == len(content)) == (cut.opened < 0)
    if expected is not None and final:
        rows, blank = cutter.rows(content)
        assert (rows, blank) == (len(expected), sum(not row for row in expected))
    whole = content[: cut.end]
    ends = [int(end) for some in cutter.ends(whole) for end in some]
    starts = [0, *(end for end in ends if end < len(whole))]
    one_by_one = [by_python(whole[start:end].decode()) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert [row for part in one_by_one for row in part] == by_python(whole.decode())
    assert all(len(part) == 1 for part in one_by_one) or not whole
    assert cutter.middle(whole) in (starts if len(starts) > 1 else [0])
    assert (cutter.middle(whole) == 0) == (len(starts) < 2)


def test_quotes_at_the_borders_of_windows() -> None:
    """The cut does not depend on where the windows end, in which text is looked at."""
    rng = random.Random(3)
    cutter = Cutter('"')
    for _ in range(30):
        fill = "x" * ((1 << 17) - rng.randrange(12)) + "\n"
        tail = "".join(rng.choice(['"', ",", "\n", "\r", "y"]) for _ in range(30))
        text = (fill + tail).encode()
        small = ("x\n" + tail).encode()
        moved = len(text) - len(small)
        assert [int(it) - moved for some in cutter.ends(text) for it in some] == [
            int(it) for some in cutter.ends(small) for it in some
        ]
        assert cutter.last(text, False).end - moved == cutter.last(small, False).end
    for count in (300_000, 300_001):
        assert (cutter.last(b"a," + b'"' * count + b"\n", True).opened >= 0) == bool(count % 2)
    assert len(list(cutter.ends(b"a\n" * 200_000 + b'"' + b"b\n" * QUOTED_LINES))) > 1
    with pytest.raises(TooManyLines) as error:
        list(cutter.ends(b"a\n" * 200_000 + b'"' + b"b\n" * (QUOTED_LINES + 1)))
    assert error.value.opened == 400_000


FIELDS = st.text(st.sampled_from('ab"" ,\n\r7'), max_size=6)


@given(st.data(), st.lists(st.tuples(st.integers(0, 9), FIELDS), min_size=1, max_size=40), st.integers(60, 400))
def test_files_with_stray_quotes_are_read_as_python_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, table: list[tuple[int, str]], size: int
) -> None:
    """Rows that both accept are the same, and none is missing; where a field stays open, its line is named."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator=data.draw(st.sampled_from(["\n", "\r\n", "\r"]))).writerows([("a", "b"), *table])
    text = buffer.getvalue()
    for place in data.draw(st.lists(st.integers(4, len(text)), max_size=4)):
        text = text[:place] + '"' + text[place:]
    path = tmp_path_factory.mktemp("stray") / "f.csv"
    path.write_bytes(text.encode())
    files = TextFiles([path], NUMBERS, skip_malformed=True, block_bytes=size)
    opened = Cutter('"').last(text.encode(), True).opened
    if opened >= 0:
        line = len(text[: opened + 1].replace("\r\n", "\n").replace("\r", "\n").split("\n"))
        with pytest.raises(DataError, match=rf"f\.csv, line {line}: the quoted field that opens here is open at the"):
            rows(files)
        return
    expected = by_python(text)[1:]
    while expected and not expected[-1]:
        expected.pop()
    good = [row for row in expected if len(row) == 2 and (row[0].strip(" ").isdecimal() or not row[0])]
    found = rows(files)
    assert [(row["a"], row["b"]) for row in found] == [(int(a) if a else None, b or None) for a, b in good]
    assert files.skipped == [len(expected) - len(good)]


@pytest.mark.parametrize("size", [2_100_000, 5_000_000])
@pytest.mark.parametrize("quote", ['"', ""])
def test_rows_of_megabytes(tmp_path: Path, size: int, quote: str) -> None:
    """Whatever fits a block is read, though Arrow's own blocks are smaller."""
    long = ("x" * 99 + ("\n" if quote and size < 100 * QUOTED_LINES else "y")) * (size // 100)
    text = "a,b\n" + "1,s\n" * 1000 + f"2,{quote}{long}{quote}\n" + "3,s\n" * 1000
    found = rows(TextFiles([write(tmp_path / "f.csv", text)], NUMBERS))
    assert len(found) == 2001 and found[1000] == {"a": 2, "b": long}
    write(tmp_path / "f.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    assert rows(TextFiles([tmp_path / "f.jsonl"], TextFormat(NUMBERS.types, json=True))) == found
    with pytest.raises(
        DataError, match=r"line 1002: the (row|quoted field that opens here) has more than 1,000,000 bytes"
    ):
        rows(TextFiles([tmp_path / "f.csv"], NUMBERS, block_bytes=1_000_000))
    header = '"' + "h" * size + '",a,b\n1,2,3\n'
    assert rows(TextFiles([write(tmp_path / "h.csv", header)], NUMBERS)) == [{"a": 2, "b": "3"}]


@pytest.mark.parametrize("blank", ["\n", "\n\n\n", "\r\n", "\r", "\n" * 500])
@pytest.mark.parametrize("block_bytes", [24, 1 << 20])
def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path, blank: str, block_bytes: int) -> None:
    if len(blank) > 100 and block_bytes < 100:
        block_bytes = 600
    path = write(tmp_path / "f.csv", "a,b\n" + "1,x\n" * 20 + blank)
    files = TextFiles([path], NUMBERS, block_bytes=block_bytes)
    assert len(rows(files)) == 20 and files.row_lines("counting") == [(2, 21)]
    write(tmp_path / "f.jsonl", '{"a": 1}\n' * 20 + blank)
    files = TextFiles([tmp_path / "f.jsonl"], TextFormat(NUMBERS.types, json=True), block_bytes=block_bytes)
    assert len(rows(files)) == 20 and files.row_lines("counting") == [(1, 20)]


@pytest.mark.parametrize("block_bytes", [8, 24, 1 << 20])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("text", ["x", '"x\n\ny"'])
def test_a_blank_line_between_rows_is_named(tmp_path: Path, block_bytes: int, ending: str, text: str) -> None:
    """Arrow makes a row of nulls of it, or passes it over."""
    path = write(tmp_path / "f.csv", ending.join(["a,b", "1,x", f"2,{text}", "", "3,z", ""]))
    line = 4 + text.count("\n")
    with pytest.raises(DataError, match=rf"f\.csv, line {line}: the line is blank; mend it"):
        rows(TextFiles([path], NUMBERS, block_bytes=max(block_bytes, len(text) + 4)))
    files = TextFiles([path], NUMBERS, skip_malformed=True)
    assert [row["a"] for row in rows(files)] == [1, 2, 3] and files.skipped == [1]


def test_a_blank_line_is_a_value_of_an_only_column(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "a\n1\n\n2\n\n")
    assert rows(TextFiles([path], TextFormat({"a": pa.int64()}))) == [{"a": 1}, {"a": None}, {"a": 2}, {"a": None}]


@pytest.mark.parametrize("block_bytes", [12, 13, 14, 15, 1 << 20])
def test_carriage_returns_end_lines(tmp_path: Path, block_bytes: int) -> None:
    text = "\r".join(["a,b", *(f"{row},t" for row in range(100))])
    path = write(tmp_path / "f.csv", text + "\rx,y\r")
    with pytest.raises(DataError, match="line 102: column 'a': invalid value 'x'"):
        rows(TextFiles([path], NUMBERS, block_bytes=block_bytes))
    files = TextFiles([write(tmp_path / "f.csv", text)], NUMBERS, block_bytes=block_bytes)
    assert rows(files) == [{"a": row, "b": "t"} for row in range(100)]
    assert lines(files) == [(0, line) for line in range(2, 102)]
    write(tmp_path / "f.jsonl", "\r".join(f'{{"a": {row}}}' for row in range(100)))
    files = TextFiles([tmp_path / "f.jsonl"], TextFormat(NUMBERS.types, json=True), block_bytes=block_bytes)
    assert [row["a"] for row in rows(files)] == list(range(100))


@pytest.mark.parametrize("block_bytes", [40, 1 << 20])
def test_a_header_of_several_lines(tmp_path: Path, block_bytes: int) -> None:
    path = write(tmp_path / "f.csv", 'a,"b\nof\r\ntext, ""long"""\n' + "1,x\n" * 20 + "y,x\n")
    format_ = TextFormat({"a": pa.int64(), 'b\nof\r\ntext, "long"': pa.string()})
    with pytest.raises(DataError, match="line 24: column 'a': invalid value 'y'"):
        rows(TextFiles([path], format_, block_bytes=block_bytes))
    files = TextFiles([path], format_, block_bytes=block_bytes, skip_malformed=True)
    assert len(rows(files)) == 20 and lines(files)[0] == (0, 4)
    assert files.row_lines("counting") == [(4, 24)]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("+1", pa.int64(), "(write whole numbers without a plus sign)"),
        ("0x1F", pa.int64(), "column 'a': an integer is hexadecimal; write decimal digits"),
        (" 0Xa", pa.int64(), "column 'a': an integer is hexadecimal; write decimal digits"),
        ('"0x1"', pa.int64(), "column 'a': an integer is hexadecimal; write decimal digits"),
        ("-0x1F", pa.int64(), "(write decimal digits, not hexadecimal ones)"),
        ('"1,234"', pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1'234", pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1_234", pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1 234", pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1\u202f234", pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1.234.567", pa.int64(), "(write numbers without thousands separators and with a decimal point)"),
        ('"1,234.5"', pa.float64(), "(write numbers without thousands separators and with a decimal point)"),
        ('"1.234.567,5"', pa.float64(), "(write numbers without thousands separators and with a decimal point)"),
        ('"1,5"', pa.float64(), "(write numbers without thousands separators and with a decimal point)"),
        ("1,5", pa.float64(), "Expected 2 columns, got 3"),
        ("0x1F", pa.float64(), "invalid value '0x1F' for double"),
        (
            "2024-01-01T00:00:00Z",
            pa.timestamp("us"),
            '(with timestamp_format: "%z", all times have an offset and become',
        ),
        ("2024-01-01 00:00+02:00", pa.timestamp("us"), '(with timestamp_format: "%z", all times have an offset and'),
        ("99999999999999999999", pa.int64(), "invalid value '99999999999999999999' for int64"),
    ],
)
def test_numbers_and_times_that_are_written_otherwise(tmp_path: Path, value: str, kind: Any, message: str) -> None:
    path = write(tmp_path / "f.csv", "b,a\n" + "0x,\n" * 5 + f"x,{value}\n" + "0x,\n")
    files = TextFiles([path], TextFormat({"a": kind, "b": pa.string()}))
    with pytest.raises(DataError, match=r"f\.csv, line 7: ") as error:
        rows(files)
    assert message in str(error.value) and str(error.value).endswith("leave such rows out with --skip-malformed")
    files.skip_malformed = True
    assert len(rows(files)) == 6 and files.skipped == [1]


def test_a_plus_sign_before_a_decimal_number_and_hexadecimal_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "a,b\n+1.5,0x1F\n")
    assert rows(TextFiles([path], TextFormat({"a": pa.float64(), "b": pa.string()}))) == [{"a": 1.5, "b": "0x1F"}]


@pytest.mark.parametrize("form", ["%z", "%Y-%m-%dT%H:%M:%S%z"])
def test_times_with_an_offset_become_utc(tmp_path: Path, form: str) -> None:
    text = "a\n2024-01-01T00:00:00+02:00\n2024-01-01T00:00:00Z\n2024-06-01T00:00:00-0730\n"
    format_ = TextFormat({"a": pa.timestamp("us")}, timestamp_format=form)
    files = TextFiles([write(tmp_path / "f.csv", text)], format_)
    times = [datetime(2023, 12, 31, 22), datetime(2024, 1, 1), datetime(2024, 6, 1, 7, 30)]
    assert [row["a"] for row in rows(files)] == times
    assert next(files.blocks("reading")).table.schema.field("a").type == pa.timestamp("us")
    write(tmp_path / "f.csv", text + "2024-01-01T00:00:00\n")
    with pytest.raises(DataError, match=r"line 5: column 'a': (expected a zone offset in|invalid value) '2024-01-01T"):
        rows(files)
    write(tmp_path / "f.jsonl", "".join(json.dumps({"a": time}) + "\n" for time in text.split()[1:]))
    json_files = TextFiles([tmp_path / "f.jsonl"], TextFormat(format_.types, json=True))
    assert [row["a"] for row in rows(json_files)] == times


def test_a_byte_order_mark_within_a_file_is_text_wherever_blocks_end(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "\ufeffb,a\n" + "\ufeffx,1\n" * 9)
    for block_bytes in (8, 9, 16, 1 << 20):
        assert rows(TextFiles([path], NUMBERS, block_bytes=block_bytes)) == [{"a": 1, "b": "\ufeffx"}] * 9


BODIES = [
    "null", "1", "-0", "1.5e3", "true", "false", '"x"', "[]", "[null]", "{}", "", " ", "\t", "[1", '{"a"', '{"a":}',
    "nul", '{"a":1} null', 'null {"a":1}', '{"a":1}{"a":2}', '{"a":1},', ',{"a":1}', '{"a":1}]', '{"a":1}}',
    "}", "{", "]", '{"a":1,}', "{a:1}", "{'a':1}", '{"a":01}', '{"a":+1}', '{"a":0x1}', '{"a":1e400}', '{"a":NaN}',
    '{"a":Infinity}',
    '{"a":' + "9" * 5000 + "}", '{"b":"\\ud800"}', '{"b":"\\u0000"}', '{"b":"a\tb"}', '{"b":"\0"}', "\0", '{"a":1}\0',
    '{"a":1} // x', '/**/{"a":1}', '{"a":null}', '{"b":"} null {"}', '{"b":"x}"} 7', '{"c":{"d":[{}]} }', ' {"a":1} ',
    '{"c":' + "[" * 2000 + "]" * 2000 + "}", '{"c":' + '{"d":' * 2000 + "1" + "}" * 2000 + "}", "[" * 100_000,
    '{"c":{"d":1 }    null }', '{"a":1}' + " " * 20 + "null", "\ufeff", '\ufeff{"a":1}', '{"b":"\u2028"}',
    "NaN", "\u00e9",
]  # fmt: skip

CHILD = """
import json, sys
from pathlib import Path
import pyarrow as pa
from recsys.data.storage import DataError
from recsys.prepare.text import TextFiles, TextFormat

format_ = TextFormat({"a": pa.int64(), "b": pa.string()}, json=True)
for line in sys.stdin:
    path, size = json.loads(line)
    files = TextFiles([Path(path)], format_, skip_malformed=True, block_bytes=size)
    rows = [row for block in files.blocks("reading") for row in block.table.to_pylist()]
    files.skip_malformed = False
    try:
        error = None
        for block in files.blocks("reading"):
            pass
    except DataError as refused:
        error = str(refused)
    print(json.dumps([rows, files.row_lines("counting"), error]), flush=True)
"""


class Child:
    """Reads files in a process of its own, so that what ends the process, or does not end, fails a test."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path, size: int) -> tuple[list[dict[str, Any]], list[list[int]], str | None]:
        """A file's rows without those that are wrong, their lines, and the error where such rows are refused."""
        if self.process is None or self.process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, "-c", CHILD], **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(path), size]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        if not ready:
            self.process.kill()
        told = self.process.stdout.readline()
        assert told, (self.process.wait(), path.read_bytes()[:300])
        rows_, spans, error = json.loads(told)
        return rows_, spans, error


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    started = Child()
    yield started
    if started.process is not None:
        started.process.kill()
        started.process.communicate()


def good_line(line: str) -> dict[str, Any] | None:
    """The row of a line, by Python; None if it has none."""

    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        value = json.loads(line, parse_int=float if len(line) > 4000 else None, object_pairs_hook=strict)
        row = {"a": value.get("a"), "b": value.get("b")}
        json.dumps(row).encode().decode("unicode_escape").encode()
    except (ValueError, AttributeError):
        return None
    except RecursionError:  # Python's limit; Arrow has none
        return {"a": None, "b": None} if line.startswith("{") else None
    fits = type(row["a"]) in (int, type(None)) and type(row["b"]) in (str, type(None))
    return row if fits and abs(row["a"] or 0) < 2**63 else None


def check_json(child: Child, path: Path, body: list[str], size: int) -> None:
    """Compare what is read of some lines with what Python reads."""
    write(path, "\n".join(body).encode("utf-8", "surrogatepass"))
    found, spans, error = child(path, size)
    kept = "\n".join(body).removeprefix("\ufeff").rstrip("\n")
    expected = [good_line(line) for line in kept.split("\n")] if kept else []
    assert found == [row for row in expected if row is not None]
    assert spans == [[1, len(expected)]] if expected else [[1, 0]]
    wrong = next((line for line, row in enumerate(expected, start=1) if row is None), None)
    if wrong is None:
        assert error is None
    else:
        assert error is not None and error.startswith(f"{path}, line {wrong}: ")
        assert error.endswith("; mend it, or leave such rows out with --skip-malformed") and "\n" not in error


@pytest.mark.parametrize("body", BODIES, ids=lambda body: ascii(body[:20]))
@pytest.mark.parametrize("size", [120_000, 1 << 20])
def test_no_json_line_ends_the_process(tmp_path: Path, child: Child, body: str, size: int) -> None:
    good = '{"a": 5, "b": "x"}'
    for lines_ in (
        [body],
        [body, good],
        [good, body, good],
        [good, good, body],
        [body, body],
        [good, body, body, good],
    ):
        check_json(child, tmp_path / "f.jsonl", lines_, size)


TOKENS = [
    "{",
    "}",
    "[",
    "]",
    '"a"',
    ":",
    ",",
    "1",
    "null",
    '"x"',
    '"b"',
    " ",
    "true",
    '{"a":1}',
    '{"b":"y"}',
    '"',
    "\\",
]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(['{"a":7}', *(body for body in BODIES if len(body) < 60)])
        | st.lists(st.sampled_from(TOKENS), max_size=8).map("".join),
        min_size=1,
        max_size=6,
    ),
    st.integers(100, 400) | st.just(1 << 20),
)
def test_json_lines_end_in_rows_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, child: Child, body: list[str], size: int
) -> None:
    check_json(child, tmp_path_factory.getbasetemp() / "fuzz.jsonl", body, size)


def test_nesting_without_end(tmp_path: Path, child: Child) -> None:
    deep = '{"a": 1, "c": ' + "[" * 3_000_000 + "]" * 3_000_000 + "}"
    for text, rows_ in ((deep, [2, 1]), (deep[:3_000_000], [2]), (deep + " null", [2])):
        found, _, error = child(write(tmp_path / "f.jsonl", '{"a": 2}\n' + text + "\n"), 32 << 20)
        assert [row["a"] for row in found] == rows_
        assert (error is None) == (rows_ == [2, 1])
        assert error is None or "line 2: not one JSON object a line" in error


def test_arrows_own_blocks_end_anywhere(tmp_path: Path) -> None:
    """Stray quotes and fields of several lines are read as Python reads them, over many blocks of a megabyte."""
    rng = random.Random(5)
    for ending in ("\n", "\r\n", "\r"):
        values = ["plain", '5" disk', '"q,\n\r\n"', '"cl"osed "x', '""', 'a"', '"""\n"']
        text = "a,b\n" + "".join(f"{row},{rng.choice(values)}{ending}" for row in range(200_000))
        path = write(tmp_path / "f.csv", text)
        expected = [(int(a), b or None) for a, b in by_python(text)[1:]]
        for block_bytes in (100_000, 32 << 20):
            found = []
            for block in TextFiles([path], NUMBERS, block_bytes=block_bytes).blocks("reading"):
                found += zip(block.table["a"].to_pylist(), block.table["b"].to_pylist(), strict=True)
            assert found == expected
