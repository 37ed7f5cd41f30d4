"""Parquet shards: footers, and decoding of row groups."""

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from recsys.data.arrow import usual_table
from recsys.data.features import AS_THEY_STAND, Columns, RowOrder
from recsys.data.footers import FileEnd, SplitFooter, split_footer
from recsys.data.kinds import Kinds
from recsys.data.order import RowSlice
from recsys.data.rows import Rows
from recsys.data.storage import THREADS, DataError, Place, explain, find_files, is_of_storage, naming

FOOTER_BYTES = 256 << 20
"""Memory for parsed footers, for each split on each rank. Of others, a row group's part is parsed as it is read."""

_PARSED = 10
"""Bytes of a parsed footer for each that it takes in the file, measured."""

_LARGE = 1 << 20
"""Bytes of a footer beyond which no two are parsed at a time."""


_ASKED = 256
"""Row groups that are asked, or up to twice as many, for what holds of most."""

MOST_ROWS = (1 << 31) - 1
"""Of a row group: what 32-bit offsets count. A footer that says more is damaged, or its rows fit no memory."""

_WITHOUT_DICTIONARIES = frozenset({"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"})
"""Encodings of strings that Arrow cannot read as dictionaries."""

_Leaf = tuple[str, bool]
"""Of a column in the file: its path, whose first part is the column's name, and whether it is of strings."""


class ColumnError(DataError):
    """One column of a row group cannot be read.

    Attributes:
        column: its name.
    """

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


class _File(NamedTuple):
    place: Place
    version: str
    has_extensions: bool
    leaves: tuple[_Leaf, ...]
    footer: pq.FileMetaData | SplitFooter | None
    partitions: Mapping[str, str | None]
    """Those on its path that are columns to be read."""


class Found(NamedTuple):
    """The files of a split, and what is to be said of them."""

    places: list[Place]
    warnings: list[str]


def find(patterns: Sequence[str], *, source: str) -> Found:
    """As `find_files`."""
    warnings: list[str] = []
    return Found(find_files(patterns, source=source, on_repeated=warnings.append), warnings)


class ShardTables:
    """All row groups of a set of files, as tables.

    Directories `key=value` on a file's path are columns of it, of integers where every file's value is one, else of
    strings.

    Args:
        patterns: as in `find_files`.
        names: columns that will be read.
        source: config path of the patterns, for messages.
        found: the files, where they were looked for already.
        path_types: of columns on paths, as `partition_types` decides them, where more files than these have a say.
        on_unreadable: told why a file cannot be opened, which is then left out; without it, that is raised.
        may_be_empty: whether there may be no row at all.

    Raises:
        DataError: as `find_files`; or a file is no Parquet, or has a column that is on its path as well, or there is no
            row at all.

    Attributes:
        files: sorted.
        digests: of each file's footer, which tells the files of other rows from it.
        schemas: of each file, columns on its path included.
        row_counts: rows of every row group, over all files.
        warnings: what the user should know of the files, a line each.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        names: Sequence[str],
        *,
        source: str,
        found: Found | None = None,
        path_types: Mapping[str, pa.DataType] | None = None,
        on_unreadable: Callable[[DataError], None] | None = None,
        may_be_empty: bool = False,
    ) -> None:
        places, self.warnings = found or find(patterns, source=source)
        self.files: list[str] = []
        self.schemas: list[pa.Schema] = []
        self.digests: list[str] = []
        self._partition_types = {**partition_types(places, names), **(path_types or {})}
        self._files: list[_File] = []
        self._row_groups: list[tuple[int, int]] = []  # file, row group within it
        self._room = FOOTER_BYTES // _PARSED
        self._lock, self._parsing = threading.Lock(), threading.Lock()
        self._last: tuple[int, pq.FileMetaData] | None = None
        row_counts: list[int] = []
        known: list[pa.Schema] = []  # most files have the schema of another
        known_leaves: dict[tuple[_Leaf, ...], tuple[_Leaf, ...]] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for place, opened in zip(places, pool.map(self._open, places), strict=True):
                if isinstance(opened, DataError):
                    if on_unreadable is None:
                        raise opened
                    on_unreadable(opened)
                    continue
                self._row_groups += [(len(self.files), group) for group in range(len(opened.counts))]
                row_counts += opened.counts
                self.files.append(str(place))
                self.digests.append(opened.digest)
                schema = next((one for one in known if opened.schema.equals(one, check_metadata=True)), None)
                if schema is None:
                    known.append(schema := opened.schema)
                self.schemas.append(schema)
                leaves = known_leaves.setdefault(opened.leaves, opened.leaves)
                self._files.append(
                    _File(place, opened.version, opened.has_extensions, leaves, opened.footer, opened.partitions)
                )
        self.row_counts = self._in_files = tuple(row_counts)
        if not may_be_empty and not sum(row_counts):
            raise DataError(f"{source}: the {len(places)} files matching {', '.join(patterns)} hold no rows")

    def where(self, row_group: int) -> str:
        """File and row group, for messages."""
        file, group = self.place_of(row_group)
        return f"{file}, row group {group}"

    def place_of(self, row_group: int) -> tuple[str, int]:
        """The file that a row group, numbered over all files, is in, and its number there."""
        number, group = self._row_groups[row_group]
        return self.files[number], group

    def file_of(self, row_group: int) -> int:
        """Number of the file in `files` that a row group is in."""
        return self._row_groups[row_group][0]

    def table(self, row_group: int, names: Sequence[str], dictionaries: Collection[str] = ()) -> pa.Table:
        """Decode columns of a row group; safe to call from several threads.

        Args:
            row_group: number over all files.
            names: of the columns.
            dictionaries: columns whose strings are read as dictionaries.

        Raises:
            DataError: the file can no longer be read, or was replaced by another.
            ColumnError: a column cannot be decoded, or the file holds other than its footer says.
        """
        number, group = self._row_groups[row_group]
        of, where = self._files[number], self.where(row_group)
        with naming(f"{where}: cannot be read"):
            file, version = of.place.open()
            with file:
                if version != of.version:
                    raise DataError(
                        f"{of.place}: changed since the run began; start again, and write new shards under new names "
                        "instead of replacing those in use"
                    )
                footer, place = self._footer_of(number, group, file)
                reading = _Reading(file, of, footer, place, where)
                in_file = tuple(name for name in names if name not in of.partitions)
                table = reading.table(in_file, tuple(dictionaries), self._in_files[row_group])
        for name in names:
            if name in of.partitions:
                kind = self._partition_types[name]
                values = pa.repeat(_scalar(of.partitions[name], kind), self._in_files[row_group])
                table = table.append_column(name, values)
        return table

    def values_per_row(self, names: tuple[str, ...]) -> dict[str, float]:
        """How many values columns have in the mean row by the footers; an empty or null list counts as one.

        Of row groups, 511 at most are asked, which lie evenly among all.

        Raises:
            ColumnError: a footer counts what no row group can hold.
            DataError: a footer that did not fit into memory can no longer be read.
        """
        filled = [number for number, rows in enumerate(self._in_files) if rows]
        asked = filled[:: max(1, len(filled) // _ASKED)]
        totals = dict.fromkeys(names, 0)
        for row_group in asked if names else ():
            number, group = self._row_groups[row_group]
            of = self._files[number]
            with naming(f"{self.where(row_group)}: cannot be read"):
                is_kept = isinstance(of.footer, pq.FileMetaData)
                with nullcontext() if is_kept else of.place.open()[0] as file:
                    footer, place = self._footer_of(number, group, file)
                found = footer.row_group(place)
            values = {name: found.column(index).num_values for index, _, name, _ in _leaves_of(of.leaves, names)}
            for name, count in values.items():
                if not 0 <= count <= MOST_ROWS:
                    raise ColumnError(
                        f"{self.where(row_group)}: column {name!r} has {count} values by its footer, where 0 to "
                        f"{MOST_ROWS:,} can be read; {_AGAIN}, in smaller row groups",
                        name,
                    )
            for name in names:
                totals[name] += values.get(name, self._in_files[row_group])  # a column on the path is in no footer
        rows = sum(self._in_files[row_group] for row_group in asked)
        return {name: total / rows for name, total in totals.items()}

    def _open(self, place: Place) -> "_Opened | DataError":
        """What there is to know of a file; or why it cannot be known."""
        try:
            return self._footer(place)
        except DataError as error:
            return error

    def _footer_of(self, number: int, group: int, file: pa.NativeFile | None) -> tuple[pq.FileMetaData, int]:
        """A footer that has a row group of a file, and its number there; no file is needed if the footer is kept."""
        of = self._files[number]
        if isinstance(of.footer, pq.FileMetaData):
            return of.footer, group
        if of.footer is not None:
            with suppress(*FAILURES):
                footer = of.footer.read(file, group)
                found = footer.row_group(0)
                if footer.num_row_groups == 1 and found.num_columns == len(of.leaves):
                    return footer, 0
        # By one thread for all, as the next row group is likely of the same file.
        with self._parsing:
            if self._last is None or self._last[0] != number:
                self._last = None
                self._last = number, pq.read_metadata(file)
            return self._last[1], group

    def _footer(self, place: Place) -> "_Opened":
        with naming(f"{place}: not a readable Parquet file"):
            file, version = place.open()
            with file:
                end = FileEnd.read(file)
                with self._parsing if end.footer_bytes > _LARGE else nullcontext():
                    return self._understood(place, version, file, end)

    def _understood(self, place: Place, version: str, file: pa.NativeFile, end: FileEnd) -> "_Opened":
        """What there is to know of an open file."""
        raw = end.footer(file) if end.footer_bytes else None
        footer = raw.parsed() if raw else pq.read_metadata(file)
        # As rows are read, so that the types that are checked are those that come.
        given = opened(file, footer).schema_arrow
        # Without what is said of the file as a whole, such as pandas says, which differs from one to the next.
        schema = plain_schema(given).remove_metadata()
        counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        if sum(counts) != footer.num_rows:
            raise DataError(
                f"{place}: its footer is damaged: it counts {footer.num_rows} rows, its row groups hold {sum(counts)}; "
                "write the file again"
            )
        for group, rows in enumerate(counts):
            if not 0 <= rows <= MOST_ROWS:
                raise DataError(
                    f"{place}, row group {group}: its footer says that it has {rows} rows, where 0 to {MOST_ROWS:,} "
                    "can be read; write the file again, in smaller row groups"
                )
        has_extensions = not schema.equals(given)
        schema, partitions = self._with_partitions(place, schema)
        with self._lock:
            is_kept = footer.serialized_size <= self._room
            self._room -= footer.serialized_size if is_kept else 0
        kept = footer if is_kept else split_footer(raw, footer) if raw else None
        digest = xxhash.xxh3_128_hexdigest(raw.content) if raw else version
        return _Opened(version, kept, schema, has_extensions, counts, _leaves(footer), partitions, digest)

    def _with_partitions(self, place: Place, schema: pa.Schema) -> tuple[pa.Schema, Mapping[str, str | None]]:
        """A file's schema with the columns on its path, and those."""
        partitions = {name: value for name, value in place.partitions.items() if name in self._partition_types}
        for name, value in list(partitions.items()):
            kind = self._partition_types[name]
            if name in schema.names and name in place.written_out:
                del partitions[name]  # it merely lies there
            elif name in schema.names:
                raise DataError(
                    f"{place}: column {name!r} is in the file and is on its path as well; rename the directories, or "
                    "write the files without it"
                )
            elif kind == pa.int64() and value is not None and not _is_integer(value):
                raise DataError(
                    f"{place}: {name}={value} on its path is no integer, as it was where the model was trained; rename "
                    "the directory, or train again on all of these files"
                )
            else:
                schema = schema.append(pa.field(name, kind))
        return schema, partitions


class _Opened(NamedTuple):
    version: str
    footer: pq.FileMetaData | SplitFooter | None
    schema: pa.Schema
    has_extensions: bool
    counts: list[int]
    leaves: tuple[_Leaf, ...]
    partitions: Mapping[str, str | None]
    digest: str


class ParquetShards(ShardTables):
    """All row groups of a set of files, with their schemas checked and their rows decoded.

    Args:
        patterns: as in `find_files`.
        columns: what to read.
        source: config path of the patterns, for messages.
        kinds: what features hold, as other splits or a checkpoint have it; what these files say is added.
        found: as for `ShardTables`.
        path_types: as for `ShardTables`.

    Raises:
        DataError: as `ShardTables`; or a column is missing, or of a type that cannot be read as what it is for, or
            holds something else in one file than in another.

    Attributes:
        columns: what is read.
        kinds: what features hold.
        layout: of the rows of all files; a feature that is a list in one file is one in all.
        of: which rows there are alone, in words; empty for all.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        columns: Columns,
        *,
        source: str,
        kinds: Kinds | None = None,
        found: Found | None = None,
        path_types: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        super().__init__(patterns, columns.names, source=source, found=found, path_types=path_types)
        self.columns, self._dictionaries = columns, columns.dictionary_names
        self.of = ""
        self._only: tuple[int, Columns] | None = None  # a domain, and what tells it
        self.kinds = Kinds() if kinds is None else kinds
        checked: dict[int, frozenset[str]] = {}
        for file, schema in zip(self.files, self.schemas, strict=True):
            if id(schema) not in checked:
                checked[id(schema)] = columns.check_schema(schema, file)
                self.kinds.check(columns, schema, file)
        self.layout = columns.layout(frozenset[str]().union(*checked.values()))

    def of_domain(self, domain: int, row_counts: Sequence[int]) -> "ParquetShards":
        """The rows of one domain alone, as if there were no others.

        Args:
            domain: of the column that `columns.domain` names.
            row_counts: how many each row group has, as `recsys.data.domains.count_domains` finds.
        """
        only = copy(self)
        only.row_counts, only.of = tuple(row_counts), f"domain {domain}"
        only._only = domain, self.columns.parts["data.domain"]
        return only

    def read(self, part: RowSlice, order: RowOrder | Callable[[], RowOrder] = AS_THEY_STAND) -> Rows:
        """Decode and check the rows of a slice, and put them into an order; safe to call from several threads.

        Args:
            part: of a row group.
            order: of the rows, or what makes one, which is asked when as many rows are there as the footer says.

        Raises:
            DataError: as `Columns.decode` and `ShardTables.table`.
        """
        table = self.table(part.row_group, self.columns.names, self._dictionaries)
        if self._only is not None:
            domain, told = self._only
            found = told.decode(table.select(told.names), told.layout(frozenset()), self.where(part.row_group))
            table = usual_table(table).filter(pa.array(found.domain == domain))
        return self.columns.decode(
            table.slice(part.start, part.stop - part.start),
            self.layout,
            self.where(part.row_group),
            order() if callable(order) else order,
        )


class _Reading:
    """Columns of one row group, decoded together, or one by one where that fails."""

    def __init__(self, file: pa.NativeFile, of: _File, footer: pq.FileMetaData, group: int, where: str) -> None:
        self._file, self._of, self._footer, self._group, self._where = file, of, footer, group, where

    def table(self, names: tuple[str, ...], dictionaries: tuple[str, ...], num_rows: int) -> pa.Table:
        """Columns of the types and the length that the footer promises, each in one piece."""
        found = self._footer.row_group(self._group)
        as_dictionaries = []
        for index, path, name, is_string in _leaves_of(self._of.leaves, names):
            chunk = found.column(index)
            # What is no list has just one value for each row; were there more, the rest would be left out.
            if path == name and chunk.num_values > num_rows:
                raise self._error(name, f"has {chunk.num_values} values for {num_rows} rows by its footer; {_AGAIN}")
            if is_string and name in dictionaries and _WITHOUT_DICTIONARIES.isdisjoint(chunk.encodings):
                as_dictionaries.append(path)
        table = self._decoded(names, as_dictionaries)
        for place, (name, column) in enumerate(zip(names, table.columns, strict=True)):
            if len(column) != num_rows:
                raise self._error(name, f"has {len(column)} rows, but the footer says {num_rows}; {_AGAIN}")
            if column.num_chunks > 1 or self._of.has_extensions:
                plain = self._in_one_piece(name, column.cast(plain_type(column.type)))
                table = table.set_column(place, name, plain)
        return table

    def _decoded(self, names: tuple[str, ...], as_dictionaries: list[str]) -> pa.Table:
        try:
            return self._read(names, as_dictionaries)
        except FAILURES as error:
            if is_of_storage(error):
                raise
        # Which column it is, Arrow does not say.
        columns = [self._column(name, as_dictionaries) for name in names]
        for name, column in zip(names, columns, strict=True):
            if len(column) != len(columns[0]):
                raise self._error(name, f"has {len(column)} rows, but others have {len(columns[0])}; {_AGAIN}")
        return pa.table(columns, list(names))

    def _column(self, name: str, as_dictionaries: list[str]) -> pa.ChunkedArray:
        """One column, plainly where it cannot be read as a dictionary: too large for one, or of an odd encoding."""
        for attempt in (as_dictionaries, []):
            try:
                return self._read((name,), attempt).column(0)
            except FAILURES as error:
                if is_of_storage(error):
                    raise
                cause = explain(error)
        raise self._error(name, f"cannot be read: {cause}; {_SMALLER if _IS_TOO_LARGE.search(cause) else _AGAIN}")

    def _read(self, names: tuple[str, ...], as_dictionaries: list[str]) -> pa.Table:
        parquet = opened(self._file, self._footer, as_dictionaries, pre_buffer=not self._of.place.is_local)
        # Select, for a struct's "a.b" is read beside a column of that name.
        return parquet.read_row_group(self._group, columns=list(names), use_threads=False).select(names)

    def _in_one_piece(self, name: str, column: pa.ChunkedArray) -> pa.Array:
        """A column whose values may be more than 32-bit offsets reach."""
        try:
            if pa.types.is_string(column.type) and column.nbytes > MOST_ROWS:
                column = column.cast(pa.large_string())
            return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        except FAILURES as error:
            raise self._error(name, f"is too large: {explain(error)}; {_SMALLER}") from None

    def _error(self, name: str, what: str) -> ColumnError:
        return ColumnError(f"{self._where}: column {name!r} {what}", name)


FAILURES = (pa.ArrowException, OSError, ValueError)
"""What a file that is damaged raises, wherever it is; `is_of_storage` tells which of these are of another cause."""

_AGAIN = "write the file again"
_SMALLER = "write smaller row groups"
_IS_TOO_LARGE = re.compile(r"chunked array outputs|cannot contain more than|[Cc]apacity|overflow")


def opened(
    file: pa.NativeFile | Path,
    footer: pq.FileMetaData | None = None,
    as_dictionaries: Sequence[str] = (),
    *,
    pre_buffer: bool = False,
) -> pq.ParquetFile:
    """Open a file as all are read here: checksums verified, times of all years, extensions as what they are stored as.

    Args:
        file: to read.
        footer: of it, where it was read already.
        as_dictionaries: paths of leaves whose strings are read as dictionaries.
        pre_buffer: read what is asked for ahead, in few requests.

    Raises:
        FAILURES: the file is damaged, or cannot be read.
    """
    # Ranges of a file far away are asked for together; a disk is read as it is decoded.
    return pq.ParquetFile(
        file,
        metadata=footer,
        read_dictionary=as_dictionaries or None,
        pre_buffer=pre_buffer,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
        coerce_int96_timestamp_unit="us",  # of nanoseconds, int64 holds only the years 1677 to 2262
    )


def _leaves(footer: pq.FileMetaData) -> tuple[_Leaf, ...]:
    """The leaves of a file, in its order."""
    if not footer.num_row_groups:
        return ()
    # By a row group, as `footer.schema` and the footer hold each other until the garbage collector comes.
    group = footer.row_group(0)
    columns = map(group.column, range(group.num_columns))
    return tuple((column.path_in_schema, column.physical_type == "BYTE_ARRAY") for column in columns)


@lru_cache(maxsize=256)
def _leaves_of(leaves: tuple[_Leaf, ...], names: tuple[str, ...]) -> tuple[tuple[int, str, str, bool], ...]:
    """Index and path of each leaf of some columns, the column, and whether it is of strings that may be encoded."""
    return tuple(
        (index, path, name, is_string)
        for index, (path, is_string) in enumerate(leaves)
        for name in names
        if f"{path}.".startswith(f"{name}.")
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type without the names that extensions give it."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    for is_kind, list_of in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind):
            field = kind.value_field
            plain = plain_type(field.type)
            return kind if plain == field.type else list_of(field.with_type(plain))
    return kind


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """A schema of `plain_type` of its types.

    Raises:
        UnicodeDecodeError: a name is no UTF-8.
    """
    for place, field in enumerate(schema):
        plain = plain_type(field.type)
        if plain != field.type:
            schema = schema.set(place, field.with_type(plain))
    return schema


def partition_types(places: Iterable[Place], names: Collection[str]) -> dict[str, pa.DataType]:
    """The type of each column that is read from paths: integers where every value is one, else strings."""
    values: dict[str, set[str]] = {}
    for place in places:
        for name, value in place.partitions.items():
            if name in names:
                values.setdefault(name, set()).update([value] if value is not None else [])
    return {name: pa.int64() if all(map(_is_integer, found)) else pa.string() for name, found in values.items()}


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii() and -(1 << 63) <= int(text) < 1 << 63


def _scalar(value: str | None, kind: pa.DataType) -> pa.Scalar:
    return pa.scalar(value if value is None or kind != pa.int64() else int(value), kind)
