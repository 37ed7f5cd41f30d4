"""Parquet shards: footers, and decoding of row groups."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.features import AS_THEY_STAND, Columns, RowOrder
from recsys.data.order import RowSlice
from recsys.data.rows import Rows
from recsys.data.storage import THREADS, DataError, Place, find_files, naming

FOOTER_BYTES = 256 << 20
"""Memory for parsed footers, for each split on each rank. What does not fit is parsed again at each read."""

_PARSED = 8
"""Bytes of a parsed footer for each that it takes in the file, measured."""


class _File(NamedTuple):
    place: Place
    version: str
    footer: pq.FileMetaData | None
    partitions: Mapping[str, str | None]
    """Those on its path that are columns to be read."""


class ShardTables:
    """All row groups of a set of files, as tables.

    Directories `key=value` on a file's path are columns of it, of integers where every file's value is one, else of
    strings.

    Args:
        patterns: as in `find_files`.
        names: columns that will be read.
        source: config path of the patterns, for messages.
        on_unreadable: told why a file cannot be opened, which is then left out; without it, that is raised.

    Raises:
        DataError: as `find_files`; or a file is no Parquet, or has a column that is on its path as well, or there is no
            row at all.

    Attributes:
        files: sorted.
        schemas: of each file, columns on its path included.
        row_counts: rows of every row group, over all files.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        names: Sequence[str],
        *,
        source: str,
        on_unreadable: Callable[[DataError], None] | None = None,
    ) -> None:
        places = find_files(patterns, source=source)
        self.files: list[str] = []
        self.schemas: list[pa.Schema] = []
        self._partition_types = _partition_types(places, names)
        self._files: list[_File] = []
        self._row_groups: list[tuple[int, int]] = []  # file, row group within it
        row_counts: list[int] = []
        known: list[pa.Schema] = []  # most files have the schema of another
        room = FOOTER_BYTES // _PARSED
        with ThreadPoolExecutor(THREADS) as pool:
            for place, opened in zip(places, pool.map(self._open, places), strict=True):
                if isinstance(opened, DataError):
                    if on_unreadable is None:
                        raise opened
                    on_unreadable(opened)
                    continue
                version, footer, schema = opened
                room -= footer.serialized_size
                groups = range(footer.num_row_groups)
                self._row_groups += [(len(self.files), group) for group in groups]
                self.files.append(str(place))
                partitions = {name: it for name, it in place.partitions.items() if name in self._partition_types}
                self._files.append(_File(place, version, footer if room >= 0 else None, partitions))
                row_counts += [footer.row_group(group).num_rows for group in groups]
                same = next((one for one in known if schema.equals(one)), None)
                if same is None:
                    known.append(schema)
                self.schemas.append(schema if same is None else same)
        self.row_counts = tuple(row_counts)
        if not sum(row_counts):
            raise DataError(f"{source}: the {len(places)} files matching {', '.join(patterns)} hold no rows")

    def where(self, row_group: int) -> str:
        """File and row group, for messages."""
        number, group = self._row_groups[row_group]
        return f"{self.files[number]}, row group {group}"

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
        """
        number, group = self._row_groups[row_group]
        place, known, footer, partitions = self._files[number]
        with naming(f"{self.where(row_group)}: cannot be read"):
            file, version = place.open()
            with file:
                if version != known:
                    raise DataError(
                        f"{place}: changed since the run began; start again, and write new shards under new names "
                        "instead of replacing those in use"
                    )
                footer = footer or pq.read_metadata(file)
                # Ranges of a file far away are asked for together; a disk is read as it is decoded.
                parquet = pq.ParquetFile(
                    file,
                    metadata=footer,
                    read_dictionary=_string_leaves(footer.schema, dictionaries) if dictionaries else None,
                    pre_buffer=not place.is_local,
                    page_checksum_verification=True,
                )
                in_file = [name for name in names if name not in partitions]
                table = parquet.read_row_group(group, columns=in_file, use_threads=False)
        for name in names:
            if name in partitions:
                kind = self._partition_types[name]
                table = table.append_column(name, pa.repeat(_scalar(partitions[name], kind), len(table)))
        return table

    def _open(self, place: Place) -> tuple[str, pq.FileMetaData, pa.Schema] | DataError:
        """A file's version, footer and schema, columns on its path included; or why there are none."""
        try:
            return self._footer(place)
        except DataError as error:
            return error

    def _footer(self, place: Place) -> tuple[str, pq.FileMetaData, pa.Schema]:
        with naming(f"{place}: not a readable Parquet file"):
            file, version = place.open()
            with file:
                footer = pq.read_metadata(file)
                schema = footer.schema.to_arrow_schema()
        row_groups = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        if row_groups != footer.num_rows:
            raise DataError(
                f"{place}: its footer is damaged: it counts {footer.num_rows} rows, its row groups hold {row_groups}; "
                "write the file again"
            )
        for name in place.partitions.keys() & self._partition_types:
            if name in schema.names:
                raise DataError(
                    f"{place}: column {name!r} is in the file and is on its path as well; rename the directories, or "
                    "write the files without it"
                )
            schema = schema.append(pa.field(name, self._partition_types[name]))
        return version, footer, schema


class ParquetShards(ShardTables):
    """All row groups of a set of files, with their schemas checked and their rows decoded.

    Args:
        patterns: as in `find_files`.
        columns: what to read.
        source: config path of the patterns, for messages.

    Raises:
        DataError: as `ShardTables`; or a column is missing, or of a type that cannot be read as what it is for.

    Attributes:
        columns: what is read.
        layout: of the rows of all files; a feature that is a list in one file is one in all.
    """

    def __init__(self, patterns: Sequence[str], columns: Columns, *, source: str) -> None:
        super().__init__(patterns, columns.names, source=source)
        self.columns, self._dictionaries = columns, columns.dictionary_names
        checked: dict[int, frozenset[str]] = {}
        for file, schema in zip(self.files, self.schemas, strict=True):
            if id(schema) not in checked:
                checked[id(schema)] = columns.check_schema(schema, file)
        self.layout = columns.layout(frozenset[str]().union(*checked.values()))

    def read(self, part: RowSlice, order: RowOrder = AS_THEY_STAND) -> Rows:
        """Decode and check the rows of a slice, and put them into an order; safe to call from several threads.

        Raises:
            DataError: as `Columns.decode` and `ShardTables.table`.
        """
        table = self.table(part.row_group, self.columns.names, self._dictionaries)
        return self.columns.decode(
            table.slice(part.start, part.stop - part.start), self.layout, self.where(part.row_group), order
        )


def _string_leaves(schema: pq.ParquetSchema, columns: Collection[str]) -> list[str]:
    """Paths of the leaves of strings in some columns, which may be lists."""
    leaves = [schema.column(index) for index in range(len(schema))]
    return [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and any(f"{leaf.path}.".startswith(f"{name}.") for name in columns)
    ]


def _partition_types(places: Iterable[Place], names: Sequence[str]) -> Mapping[str, pa.DataType]:
    """The type of each column that is read from paths."""
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
