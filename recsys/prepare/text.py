"""Rows of text files, CSV or JSON Lines, plain or gzipped, as Arrow tables: a block at a time, each row's line known.

Arrow parses. What it refuses is halved until single rows are left, so that one parser decides, and the row that is
wrong is named by its line.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
from numpy.typing import NDArray

from recsys.data.storage import DataError

BLOCK_BYTES = 32 << 20

Progress = Callable[[str, int, int, int], None]
"""Called as (what is being done, rows so far, bytes so far, bytes in all); compressed bytes where files are."""


def quietly(what: str, rows: int, done: int, total: int) -> None:
    """The progress that nobody watches."""


class Malformed(ValueError):
    """Some row of a block does not say what it should."""


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
        timestamp_format: as strptime reads it; None for ISO 8601.
    """

    types: Mapping[str, pa.DataType]
    names: Sequence[str] | None = None
    json: bool = False
    delimiter: str = ","
    quote: str | None = '"'
    nulls: Sequence[str] = ("",)
    timestamp_format: str | None = None


@dataclass(frozen=True)
class Block:
    """Some rows of one file, in its order.

    Attributes:
        file: which of the files, from 0.
        lines: each row's line in it, from 1, of shape (rows,). Exact where every row is a line; where quoted values
            hold line breaks, spread evenly over the block's lines.
        table: the rows.
    """

    file: int
    lines: NDArray[np.int64]
    table: pa.Table


@dataclass
class TextFiles:
    """Text files that are read in one order, as often as needed.

    Memory holds a block and its rows at a time, whatever the files' size.

    Attributes:
        paths: the files; `.gz` ones are unpacked on the way.
        format: of all of them.
        convert: makes of a parsed table, whose columns are named as in the files, the one that is handed out; raises
            `Malformed` for a row that is wrong.
        skip_malformed: count rows that are wrong instead of refusing them.
        progress: told after each block.
        block_bytes: unpacked text that is parsed at once; also what a row may have at most.
        skipped: rows left out of each file in the latest pass.
    """

    paths: Sequence[Path]
    format: TextFormat
    convert: Callable[[pa.Table], pa.Table] = lambda table: table
    skip_malformed: bool = False
    progress: Progress = quietly
    block_bytes: int = BLOCK_BYTES
    skipped: list[int] = field(default_factory=list)

    def blocks(self, what: str) -> Iterator[Block]:
        """Read all rows.

        Args:
            what: the pass is for, as `progress` is told.

        Raises:
            DataError: a file lacks a column, is cut short, or has a row that is wrong and not to be skipped; the
                message names file, line and column.
            OSError: a file cannot be read.
        """
        self.skipped = [0] * len(self.paths)
        rows, names = 0, self.format.names
        for text in self._texts():
            first, content = text.first, text.content
            if first == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if self.first_line == 2:
                    header, _, content = content.partition(b"\n")
                    names, first = self._header(text.file, header), 2
            for line, end, table in self._read(text.file, first, content, names):
                rows += len(table)
                lines = line + np.arange(len(table)) * (end - line) // max(1, len(table))
                yield Block(text.file, lines, table)
            self.progress(what, rows, *text.bytes)

    @property
    def first_line(self) -> int:
        """The line of each file's first row."""
        return 2 if self.format.names is None and not self.format.json else 1

    def last_lines(self, what: str) -> list[int]:
        """The line of each file's last row; `what` as for `blocks`.

        Raises:
            DataError: a file is cut short.
            OSError: a file cannot be read.
        """
        lines = [0] * len(self.paths)
        for text in self._texts():
            lines[text.file] += _line_count(text.content)
            self.progress(what, sum(lines), *text.bytes)
        return lines

    def _texts(self) -> Iterator["_Text"]:
        """The files' text, cut between rows."""
        quote = self.format.quote.encode() if self.format.quote and not self.format.json else None
        sizes = [path.stat().st_size for path in self.paths]
        for file, path in enumerate(self.paths):
            first = 1
            with path.open("rb") as raw, _unpacked(raw, path) as stream:
                while content := _whole_rows(stream, self.block_bytes, quote):
                    if len(content) > 2 * self.block_bytes:
                        raise DataError(
                            f"{path}: a row after line {first} has more than {self.block_bytes:,} bytes; "
                            + ("is a quote not closed? Set quote: null if quotes are parts of values" if quote else "")
                            + ("" if quote else "is it a text file?")
                        )
                    yield _Text(file, first, content, (sum(sizes[:file]) + raw.tell(), sum(sizes)))
                    first += content.count(b"\n")

    def _header(self, file: int, header: bytes) -> list[str]:
        """The names in a file's first line, which must have all columns that are read, once each."""
        path, quote = self.paths[file], self.format.quote
        try:
            names = next(
                csv.reader(
                    [header.decode().rstrip("\r")],
                    delimiter=self.format.delimiter,
                    quotechar=quote,
                    quoting=csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL,
                )
            )
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line 1: no header of columns: {error}") from None
        for name in self.format.types:
            if (found := names.count(name)) != 1:
                number = f"{found} columns" if found else "no column"
                raise DataError(f"{path}, line 1: {number} named {name!r}; the file has {', '.join(names)}")
        return names

    def _read(
        self, file: int, first: int, text: bytes, names: Sequence[str] | None
    ) -> Iterator[tuple[int, int, pa.Table]]:
        """Tables of the rows of whole lines, each with its first line and the one after its last."""
        if not text:
            return
        lines = _line_count(text)
        try:
            table = self._parse(text, lines, names)
        except Malformed as error:
            if cut := _middle(text, None if self.format.json else self.format.quote):
                yield from self._read(file, first, text[:cut], names)
                yield from self._read(file, first + _line_count(text[:cut]), text[cut:], names)
            elif self.skip_malformed:
                self.skipped[file] += 1
            else:
                raise DataError(
                    f"{self.paths[file]}, line {first}: {error}; mend it, or leave such rows out with --skip-malformed"
                ) from None
        else:
            yield first, first + lines, table

    def _parse(self, text: bytes, lines: int, names: Sequence[str] | None) -> pa.Table:
        try:
            if self.format.json:
                table = pa_json.read_json(
                    io.BytesIO(text),
                    parse_options=pa_json.ParseOptions(
                        explicit_schema=pa.schema(list(self.format.types.items())), unexpected_field_behavior="ignore"
                    ),
                )
                table.validate(full=True)  # the parser takes any bytes for UTF-8
                if len(table) != lines:
                    raise Malformed("not one JSON object a line")
            else:
                parsers = [self.format.timestamp_format or pa_csv.ISO8601]
                table = pa_csv.read_csv(
                    io.BytesIO(text),
                    read_options=pa_csv.ReadOptions(column_names=names),
                    parse_options=pa_csv.ParseOptions(
                        delimiter=self.format.delimiter,
                        quote_char=self.format.quote or False,
                        newlines_in_values=self.format.quote is not None,
                        ignore_empty_lines=False,
                    ),
                    convert_options=pa_csv.ConvertOptions(
                        column_types=dict(self.format.types),
                        include_columns=list(self.format.types),
                        null_values=list(self.format.nulls),
                        strings_can_be_null=True,
                        timestamp_parsers=parsers,
                    ),
                )
            return self.convert(table.combine_chunks())
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise Malformed(_told(error, names)) from None


@dataclass(frozen=True)
class _Text:
    """Whole rows of a file as text: its number, the first row's line, and bytes read of all files so far and in all."""

    file: int
    first: int
    content: bytes
    bytes: tuple[int, int]


def _whole_rows(stream: io.BufferedIOBase, size: int, quote: bytes | None) -> bytes:
    """The next `size` bytes up to the end of a row; more than twice as many if that row does not end."""
    content = [stream.read(size), stream.readline(size + 1)]
    if quote is not None:
        # A line break within quotes ends no row.
        odd = sum(text.count(quote) for text in content) % 2
        while odd and sum(map(len, content)) <= 2 * size and (text := stream.readline(size + 1)):
            odd ^= text.count(quote) % 2
            content.append(text)
    return b"".join(content)


def _line_count(text: bytes) -> int:
    return text.count(b"\n") + (not text.endswith(b"\n"))


def _middle(text: bytes, quote: str | None) -> int:
    """Where the row that is nearest to the middle of a text of whole rows begins; 0 if there is one row only."""
    characters = np.frombuffer(text, np.uint8)
    starts = np.flatnonzero(characters[:-1] == ord("\n")) + 1
    if quote is not None:
        starts = starts[np.cumsum(characters == ord(quote))[starts - 1] % 2 == 0]
    return int(starts[np.abs(starts - len(text) // 2).argmin()]) if len(starts) else 0


def _told(error: Exception, names: Sequence[str] | None) -> str:
    """What Arrow says of a single row, with the column's name for its number."""
    text = re.sub(r"^(CSV|JSON) parse error: ", "", " ".join(str(error).split()))
    text = re.sub(r" in row 0$", "", text)
    if (found := re.match(r"In CSV column #(\d+): CSV conversion error to ([^:]+): (.*)", text)) and names:
        return f"column {names[int(found[1])]!r}: {found[3]} for {found[2]}"
    return text if len(text) < 200 else f"{text[:200]} ..."


@contextmanager
def _unpacked(raw: io.BufferedIOBase, path: Path) -> Iterator[io.BufferedIOBase]:
    """The text behind a file that may be compressed."""
    if path.suffix != ".gz":
        yield raw
        return
    try:
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; fetch it again") from None
