"""Parquet shards: footers, and decoding of row groups."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.data.columns import Columns
from recsys.data.location import THREADS, DataError, Place, find_files, naming
from recsys.data.rows import Rows, SparseLayout
from recsys.data.stream import RowSlice

FOOTER_BYTES = 256 << 20
"""Memory for parsed footers, for each split on each rank. What does not fit is parsed again at each read."""

_PARSED = 8
"""Bytes of a parsed footer for each that it takes in the file, measured."""


class _File(NamedTuple):
    place: Place
    version: str
    footer: pq.FileMetaData | None


class ParquetShards:
    """All row groups of a set of files, with their schemas checked.

    Directories `key=value` on a file's path are columns of it, of integers where every file's value is one, else of
    strings.

    Args:
        patterns: as in `find_files`.
        columns: what to read.
        source: config path of the patterns, for messages.

    Raises:
        DataError: as `find_files`; or a file is no Parquet, a column is missing, both in a file and on its path or of a
            type that cannot be read as what it is for, or there is no row at all.

    Attributes:
        columns: what is read.
        files: sorted.
        row_counts: rows of every row group, over all files.
        layout: of the rows of all files; a feature that is a list in one file is one in all.
    """

    def __init__(self, patterns: Sequence[str], columns: Columns, *, source: str) -> None:
        self.columns = columns
        places = find_files(patterns, source=source)
        self.files = [str(place) for place in places]
        self._partition_types = _partition_types(places, columns.names)
        self._checked: list[tuple[pa.Schema, frozenset[str]]] = []  # most files have the schema of another
        self._files: list[_File] = []
        self._row_groups: list[tuple[int, int]] = []  # file, row group within it
        row_counts: list[int] = []
        lists: set[str] = set()
        room = FOOTER_BYTES // _PARSED
        with ThreadPoolExecutor(THREADS) as pool:
            for number, (version, footer, found) in enumerate(pool.map(self._open, places)):
                room -= footer.serialized_size
                self._files.append(_File(places[number], version, footer if room >= 0 else None))
                groups = range(footer.num_row_groups)
                self._row_groups += [(number, group) for group in groups]
                row_counts += [footer.row_group(group).num_rows for group in groups]
                lists |= found
        self.row_counts = tuple(row_counts)
        if not sum(row_counts):
            raise DataError(f"{source}: the {len(places)} files matching {', '.join(patterns)} hold no rows")
        self.layout = SparseLayout(tuple(columns.sparse), frozenset(lists))

    def _open(self, place: Place) -> tuple[str, pq.FileMetaData, frozenset[str]]:
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
        lists = next((lists for known, lists in self._checked if schema.equals(known)), None)
        if lists is None:
            lists = self.columns.check_schema(schema, str(place))
            self._checked.append((schema, lists))
        return version, footer, lists

    def read(self, part: RowSlice, order: NDArray[np.int64] | None = None) -> Rows:
        """Decode and check the rows of a slice, and put them into an order; safe to call from several threads.

        Raises:
            DataError: as `Columns.decode`, or a file can no longer be read or was replaced by another.
        """
        number, group = self._row_groups[part.row_group]
        place, known, footer = self._files[number]
        where = f"{place}, row group {group}"
        partitions = {name: value for name, value in place.partitions.items() if name in self._partition_types}
        names = [name for name in self.columns.names if name not in partitions]
        with naming(f"{where}: cannot be read"):
            file, version = place.open()
            with file:
                if version != known:
                    raise DataError(
                        f"{place}: changed since the run began; start again, and write new shards under new names "
                        "instead of replacing those in use"
                    )
                # Ranges of a file far away are asked for together; a disk is read as it is decoded.
                parquet = pq.ParquetFile(
                    file, metadata=footer, pre_buffer=not place.is_local, page_checksum_verification=True
                )
                table = parquet.read_row_group(group, columns=names, use_threads=False)
        table = table.slice(part.start, part.num_rows)
        for name, value in partitions.items():
            kind = self._partition_types[name]
            table = table.append_column(name, pa.repeat(_scalar(value, kind), len(table)))
        return self.columns.decode(table, self.layout, where, order)


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
