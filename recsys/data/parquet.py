"""Parquet shards: footers, and decoding of row groups."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.data.columns import Columns
from recsys.data.location import DataError, find_files
from recsys.data.rows import Rows
from recsys.data.stream import RowSlice


@dataclass(frozen=True)
class _RowGroup:
    file: str
    index: int
    num_rows: int


class ParquetShards:
    """All row groups of a set of files, with their schemas checked.

    Args:
        patterns: globs or paths; the files of all, sorted and once each, are the data set.
        columns: what to read.
        source: config path of the patterns, for messages.

    Raises:
        DataError: a pattern matches no file, a file is no Parquet, a column is missing or of a type that cannot be
            read as what it is for, or there is no row at all.

    Attributes:
        columns: what is read.
        files: sorted.
        layout: of the rows of all files; a feature that is a list in one file is one in all.
    """

    def __init__(self, patterns: Sequence[str], columns: Columns, *, source: str) -> None:
        self.columns = columns
        self.files = find_files(patterns, source=source)
        with ThreadPoolExecutor(max_workers=16) as pool:
            opened = list(pool.map(self._open, self.files))
        self._row_groups = [
            _RowGroup(file, index, num_rows)
            for file, (row_counts, _) in zip(self.files, opened, strict=True)
            for index, num_rows in enumerate(row_counts)
        ]
        if not sum(self.row_counts):
            raise DataError(f"{source}: the {len(self.files)} files matching {', '.join(patterns)} hold no rows")
        self.layout = columns.layout(frozenset[str]().union(*(lists for _, lists in opened)))

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of every row group, over all files."""
        return tuple(group.num_rows for group in self._row_groups)

    def _open(self, file: str) -> tuple[list[int], frozenset[str]]:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {_first_line(error)}") from None
        row_counts = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        return row_counts, self.columns.check_schema(footer.schema.to_arrow_schema(), file)

    def read(self, part: RowSlice, order: NDArray[np.int64] | None = None) -> Rows:
        """Decode and check the rows of a slice, and put them into an order; safe to call from several threads.

        Raises:
            DataError: as `Columns.decode`, or a file can no longer be read or was replaced by another.
        """
        group = self._row_groups[part.row_group]
        where = f"{group.file}, row group {group.index}"
        try:
            footer = pq.read_metadata(group.file)
            encoded = self.columns.dictionary_paths(footer.schema)
            with pq.ParquetFile(
                group.file, metadata=footer, read_dictionary=encoded, page_checksum_verification=True
            ) as file:
                self.columns.check_schema(file.schema_arrow, group.file)
                table = file.read_row_group(group.index, columns=self.columns.names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{where}: cannot be read: {_first_line(error)}") from None
        if len(table) != group.num_rows:
            raise DataError(
                f"{where}: has {len(table)} rows, but had {group.num_rows} when the run began; "
                "write new shards under new names instead of replacing those in use"
            )
        return self.columns.decode(table.slice(part.start, part.num_rows), self.layout, where, order)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
