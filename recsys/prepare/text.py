"""Rows of text files, CSV or JSON Lines, plain or packed, as Arrow tables: a block at a time, each row's line known.

Arrow parses. What it refuses is halved until single rows are left, so that one parser decides, and the row that is
wrong is named by its line.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from recsys.data.storage import DataError
from recsys.prepare.blocks import Block, Files, Malformed
from recsys.prepare.cutting import QUOTED_LINES, Cutter, TooManyLines, check_objects, line_count

BLOCK_BYTES = 32 << 20

_ARROW_BYTES = 1 << 20  # what Arrow gives each of its threads at a time, unless a row is larger
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PACKED = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".xz": b"\xfd7zXZ\x00",
    ".zip": b"PK\x03\x04",
}
"""How packed files begin."""


@dataclass(frozen=True)
class TextFormat:
    """How rows are written.

    Attributes:
        types: what each column that is read is parsed as, by its name in the files.
        names: of all columns in the files' order; None where each file's first line says them. CSV only.
        json: JSON Lines, one object a line, instead of CSV.
        delimiter: between the fields of a CSV row.
        quote: what encloses fields that hold delimiters or line breaks, doubled within; None if nothing does.
        nulls: texts that mean no value; CSV only.
        timestamp_format: as strptime reads it; None for ISO 8601. With `%z` in it, times have an offset and become UTC;
            `%z` alone stands for ISO 8601 with one.
    """

    types: Mapping[str, pa.DataType]
    names: Sequence[str] | None = None
    json: bool = False
    delimiter: str = ","
    quote: str | None = '"'
    nulls: Sequence[str] = ("",)
    timestamp_format: str | None = None


@dataclass
class TextFiles(Files):
    """Text files as `Files`; `.gz`, `.bz2` and `.zst` ones are unpacked on the way.

    Memory holds a block and its rows at a time, whatever the files' size.

    Attributes:
        format: of all of them.
        block_bytes: unpacked text that is parsed at once; also what a row may have at most.
    """

    format: TextFormat
    block_bytes: int = field(default=BLOCK_BYTES, kw_only=True)

    def blocks(self, what: str) -> Iterator[Block]:
        """Read all rows.

        Args:
            what: the pass is for, as `progress` is told.

        Raises:
            DataError: a file lacks a column, is cut short, or has a row that is wrong and not to be skipped; the
                message names file, line and column.
            OSError: a file cannot be read.
        """
        self.rows, self.skipped = [0] * len(self.paths), [0] * len(self.paths)
        for text in self._texts():
            for line, end, table in self._read(text, text.first, text.content, text.lines):
                self.rows[text.file] += len(table)
                lines = line + np.arange(len(table)) * (end - line) // max(1, len(table))
                yield Block(text.file, lines, table)
            self.progress(what, sum(self.rows), *text.bytes)

    def row_lines(self, what: str) -> list[tuple[int, int]]:
        """The lines of each file's first and last row, from 1; (1, 0) if it has none. `what` as for `blocks`.

        Raises:
            DataError: a file lacks a column or is cut short.
            OSError: a file cannot be read.
        """
        lines = [(1, 0)] * len(self.paths)
        for text in self._texts():
            first = lines[text.file][0] if lines[text.file][1] else text.first
            lines[text.file] = (first, text.first + text.lines - 1)
            self.progress(what, sum(last - first + 1 for first, last in lines), *text.bytes)
        return lines

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(None if self.format.json else self.format.quote, self.format.delimiter)

    def _texts(self) -> Iterator["_Text"]:
        """The files' text, cut between rows, without headers and without blank lines at a file's end."""
        sizes = [path.stat().st_size for path in self.paths]
        for file, path in enumerate(self.paths):
            with path.open("rb") as raw, _unpacked(raw, path) as stream:
                first, rest, names, final = 1, b"", self.format.names, False
                begun = names is not None or self.format.json
                while not final:
                    content = _filled(stream, self.block_bytes)
                    final = len(content) < self.block_bytes
                    if first == 1 and not rest:
                        content = _decodable(content, path)
                    content = rest + content
                    cut = self._cutter.last(content, final)
                    begin, end = 0, cut.end
                    if not begun and end:
                        try:
                            header = content[: self._cutter.first(content[:end])]
                        except TooManyLines as error:
                            raise DataError(_too_many(path, 1, content, error)) from None
                        names, begun = self._header(file, header), True
                        begin, first = len(header), 1 + line_count(header)
                    if begun and (names is None or len(names) > 1):  # in the only column, a blank is a value
                        end = _without_blanks(content, begin, end)
                    rest, opened = content[end:], cut.opened - end
                    if content := content[begin:end]:
                        lines, read = line_count(content), sum(sizes[:file]) + raw.tell()
                        yield _Text(file, first, lines, names, content, (read, sum(sizes)))
                        first += lines
                    self._check_rest(file, first, rest, opened, final)
                if not begun:
                    raise DataError(f"{path}, line 1: the file is empty, without a header of columns; leave it out")

    def _check_rest(self, file: int, first: int, rest: bytes, opened: int, final: bool) -> None:
        """Refuse a row that does not end, as far as it has been read; `opened` as `Cut` has it."""
        path, limit = self.paths[file], f"more than {self.block_bytes:,} bytes"
        blank = len(rest) - len(rest.lstrip(b"\r\n"))
        if max(blank, len(rest) - blank) <= self.block_bytes and not (final and opened >= 0):
            return
        if opened >= 0:
            fault = "is open at the file's end" if final else f"has {limit}"
            raise DataError(_not_closed(path, first, rest, opened, fault))
        if blank > self.block_bytes:
            raise DataError(f"{path}, line {first}: {limit} of blank lines; remove them")
        line = first + line_count(rest[: blank + 1]) - 1
        raise DataError(f"{path}, line {line}: the row has {limit}; is this a text file with one row a line?")

    def _header(self, file: int, header: bytes) -> list[str]:
        """The names in a file's first row, which must have all columns that are read, once each."""
        path = self.paths[file]
        if not header.strip(b"\r\n"):
            raise DataError(f"{path}, line 1: the line is blank, and no header of columns; remove it")
        try:
            names: list[str] = pa_csv.read_csv(
                io.BytesIO(header + b"\n"),
                read_options=pa_csv.ReadOptions(block_size=len(header) + 2),
                parse_options=self._csv_options(skip_blank=True),
            ).schema.names
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line 1: no header of columns: {error}") from None
        for name in self.format.types:
            if (found := names.count(name)) != 1:
                number = f"{found} columns" if found else "no column"
                raise DataError(f"{path}, line 1: {number} named {name!r}; the file has {', '.join(names)}")
        return names

    def _read(
        self, text: "_Text", first: int, content: bytes, lines: int, checked: bool = False
    ) -> Iterator[tuple[int, int, pa.Table]]:
        """Tables of the rows of whole lines, each with its first line and the one after its last.

        `checked`: each line is known to be one JSON object.
        """
        path = self.paths[text.file]
        try:
            try:
                if self.format.json and not checked:
                    _check_objects(content)
                    checked = True
                table = self._parse(content, lines, text.names)
            except Malformed as error:
                if not (cut := self._cutter.middle(content)):
                    if not self.skip_malformed:
                        raise DataError(
                            f"{path}, line {first}: {error}; mend it, or leave such rows out with --skip-malformed"
                        ) from None
                    self.skipped[text.file] += 1
                    return
            else:
                yield first, first + lines, table
                return
        except TooManyLines as error:
            raise DataError(_too_many(path, first, content, error)) from None
        before = line_count(content[:cut])
        yield from self._read(text, first, content[:cut], before, checked)
        yield from self._read(text, first + before, content[cut:], lines - before, checked)

    def _parse(self, text: bytes, lines: int, names: Sequence[str] | None) -> pa.Table:
        """The rows of whole lines.

        Raises:
            Malformed: a row is wrong.
            TooManyLines: a quote is not closed for long.
        """
        try:
            if self.format.json:
                table = self._parse_json(text, lines)
            else:
                assert names is not None
                table = self._parse_csv(text, lines, names)
            return self.convert(table.combine_chunks())
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise Malformed(_told(error, names)) from None

    def _parse_json(self, text: bytes, lines: int) -> pa.Table:
        def parse(block_bytes: int, types: Mapping[str, pa.DataType] = self.format.types) -> pa.Table:
            table = pa_json.read_json(
                io.BytesIO(text),
                read_options=pa_json.ReadOptions(block_size=block_bytes),
                parse_options=pa_json.ParseOptions(
                    explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"
                ),
            )
            table.validate(full=True)  # the parser takes any bytes for UTF-8
            return table

        try:
            table = _in_blocks(parse, len(text))
        except pa.ArrowInvalid as error:
            if lines > 1 or self.skip_malformed:
                raise
            for name, kind in self.format.types.items():
                try:
                    parse(len(text) + 1, {name: kind})
                except pa.ArrowInvalid as own:
                    raise Malformed(f"column {name!r}: {_told(own, None)}") from None
            raise Malformed(_told(error, None)) from None
        if len(table) != lines:
            raise Malformed("not one JSON object a line")
        return table

    def _parse_csv(self, text: bytes, lines: int, names: Sequence[str]) -> pa.Table:
        single = len(names) == 1  # a blank line is a value of the only column
        zoned = "%z" in (self.format.timestamp_format or "")
        types = {
            name: pa.timestamp(kind.unit, "UTC") if zoned and pa.types.is_timestamp(kind) else kind
            for name, kind in self.format.types.items()
        }
        if text.startswith(_BYTE_ORDER_MARK):
            text = _BYTE_ORDER_MARK + text  # Arrow takes one away, and the file's own is gone

        def parse(block_bytes: int, types: Mapping[str, pa.DataType] = types) -> pa.Table:
            form = self.format.timestamp_format
            return pa_csv.read_csv(
                io.BytesIO(text),
                read_options=pa_csv.ReadOptions(column_names=names, block_size=block_bytes),
                parse_options=self._csv_options(skip_blank=not single),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict(types),
                    include_columns=list(types),
                    null_values=list(self.format.nulls),
                    strings_can_be_null=True,
                    timestamp_parsers=[pa_csv.ISO8601 if form in (None, "%z") else form],
                ),
            )

        if lines == 1 and not single and not text.strip(b"\r\n"):
            raise Malformed("the line is blank")
        table = _in_blocks(parse, len(text))
        if len(table) != lines:
            # Quoted fields hold line breaks, or lines are blank, which the parser passes over.
            rows, blank = self._cutter.rows(text)
            if blank and not single:
                raise Malformed("a line is blank")
            if len(table) != rows:
                raise Malformed(f"{len(table):,} rows where {rows:,} should be")
        integers = {name: pa.string() for name, kind in types.items() if pa.types.is_integer(kind)}
        if integers and any(letter in text and b"0" + letter in text for letter in (b"x", b"X")):
            # Arrow would read hexadecimal integers, other readers of the same files would not.
            raw = _in_blocks(lambda block_bytes: parse(block_bytes, integers), len(text))
            for name in integers:
                if pc.any(pc.match_substring_regex(raw[name], r"^\s*0[xX]")).as_py():
                    raise Malformed(f"column {name!r}: an integer is hexadecimal; write decimal digits")
        for place, (name, kind) in enumerate(self.format.types.items()):
            if types[name] != kind:
                table = table.set_column(place, name, table[name].cast(kind))
        return table

    def _csv_options(self, *, skip_blank: bool) -> pa_csv.ParseOptions:
        return pa_csv.ParseOptions(
            delimiter=self.format.delimiter,
            quote_char=self.format.quote or False,
            newlines_in_values=self.format.quote is not None,
            ignore_empty_lines=skip_blank,
        )


@dataclass(frozen=True)
class _Text:
    """Whole rows of a file as text.

    Attributes:
        file: its number.
        first: the first row's line.
        lines: that the rows have.
        names: of the file's columns; None for JSON Lines.
        content: the text.
        bytes: read of all files so far, and in all.
    """

    file: int
    first: int
    lines: int
    names: Sequence[str] | None
    content: bytes
    bytes: tuple[int, int]


def _filled(stream: io.BufferedIOBase | pa.NativeFile, size: int) -> bytes:
    """The next `size` bytes of a stream; fewer only if it ends."""
    content: bytes = stream.read(size)
    while len(content) < size and (more := stream.read(size - len(content))):
        content += more
    return content


def _decodable(content: bytes, path: Path) -> bytes:
    """A file's first bytes without a byte order mark."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}, line 1: the text is UTF-16; convert it to UTF-8")
    return content.removeprefix(_BYTE_ORDER_MARK)


def _check_objects(text: bytes) -> None:
    try:
        check_objects(text)
    except ValueError as error:
        raise Malformed(str(error)) from None


def _without_blanks(content: bytes, begin: int, end: int) -> int:
    """Where rows end that begin at `begin` and end at `end`, without the blank lines after the last one."""
    size = 64
    while not (kept := content[max(begin, end - size) : end].rstrip(b"\r\n")) and begin < end - size:
        size *= 64
    if not kept:
        return begin
    kept_end = max(begin, end - size) + len(kept)
    return min(end, kept_end + (2 if content.startswith(b"\r\n", kept_end, end) else 1))


def _too_many(path: Path, first: int, content: bytes, error: TooManyLines) -> str:
    return _not_closed(path, first, content, error.opened, f"has more than {QUOTED_LINES:,} line breaks")


def _not_closed(path: Path, first: int, content: bytes, opened: int, fault: str) -> str:
    """What is wrong with a field that opens at a place in a text whose first line is `first`."""
    line = first + line_count(content[: opened + 1]) - 1
    return (
        f"{path}, line {line}: the quoted field that opens here {fault}; is the quote not closed? Mend it, or set "
        "quote: null if quotes are parts of values"
    )


def _in_blocks(parse: Callable[[int], pa.Table], size: int) -> pa.Table:
    """Parse a text of some size in small blocks, which threads share, or in one if a row does not fit these."""
    try:
        return parse(_ARROW_BYTES)
    except pa.ArrowInvalid as error:
        if size < _ARROW_BYTES or "straddling" not in str(error):
            raise
        return parse(size + 1)


def _told(error: Exception, names: Sequence[str] | None) -> str:
    """What Arrow says of a single row, with the column's name for its number and the way out where one is known."""
    text = re.sub(r"^(CSV|JSON) parse error: ", "", " ".join(str(error).split()))
    text = re.sub(r" in row 0$", "", text)
    text = re.sub(r"^Column\([^)]*\) changed from (\w+) to (\w+)$", r"found \2, not \1", text)
    text = re.sub(r"^Column\([^)]*\) (was specified twice)$", r"\1", text)
    text = re.sub(r"^Failed to convert JSON to ([^,]+), couldn't parse:(.*)", r"invalid value '\2' for \1", text)
    if (found := re.match(r"In CSV column #(\d+): CSV conversion error to ([^:]+): (.*)", text)) and names:
        fault = re.sub(r"\. If these timestamps .*", "", found[3])
        hint = next((hint for pattern, hint in _HINTS if re.search(pattern, f"{found[2]}: {fault}")), "")
        return f"column {names[int(found[1])]!r}: {fault} for {found[2]}{hint and f' ({hint})'}"
    return text if len(text) < 200 else f"{text[:200]} ..."


_HINTS = (
    (r"^u?int\d+: invalid value '\s*\+\d+\s*'$", "write whole numbers without a plus sign"),
    (r"^u?int\d+: invalid value '\s*[+-]?0[xX]", "write decimal digits, not hexadecimal ones"),
    (
        r"^(u?int\d+|double|float): invalid value '\s*[+-]?\d+([,'\u2019 _\u00a0\u202f]\d+)+([.,]\d+)?\s*'$",
        "write numbers without thousands separators and with a decimal point",
    ),
    (
        r"^(u?int\d+|double|float): invalid value '\s*[+-]?\d+(\.\d{3}){2,}(,\d+)?\s*'$",
        "write numbers without thousands separators and with a decimal point",
    ),
    (
        r"^timestamp.*: expected no zone offset",
        'with timestamp_format: "%z", all times have an offset and become UTC',
    ),
    (
        r"^timestamp.*: expected a zone offset",
        "timestamp_format says that all times have one",
    ),
)
"""What to say of a kind of value that Arrow refuses: a pattern of the type and Arrow's words, and the way out."""


@contextmanager
def _unpacked(raw: io.BufferedReader, path: Path) -> Iterator[io.BufferedIOBase | pa.NativeFile]:
    """The text behind a file that may be packed."""
    if path.suffix not in (".gz", ".bz2", ".zst"):
        head = raw.peek(16)
        if head.startswith(b"PAR1"):
            raise DataError(f"{path}, line 1: no text, but Parquet; set format: parquet in the schema")
        for suffix, begin in _PACKED.items():
            if head.startswith(begin) and (suffix != ".bz2" or head[4:10] == b"1AY&SY"):
                way = "unpack it" if suffix in (".xz", ".zip") else f"end its name in {suffix}, or unpack it"
                raise DataError(f"{path}, line 1: no text, but a packed file ({suffix.removeprefix('.')}); {way}")
        yield raw
        return
    try:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        else:
            kind = {".bz2": "bz2", ".zst": "zstd"}[path.suffix]
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), kind) as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; fetch it again") from None
