"""Rows of Parquet files as Arrow tables: some of a row group at a time, each row's place known, typed as is asked."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import shortened
from recsys.data.arrow import flat, floats, is_countable, is_list, is_number, is_string, plain, usual, usual_type
from recsys.data.parquet import FAILURES, opened, plain_schema, plain_type
from recsys.data.rows import offsets_of
from recsys.data.storage import DataError, is_of_storage
from recsys.prepare.blocks import Block, Files, Malformed

BATCH_ROWS = 1 << 16


@dataclass
class ParquetFiles(Files):
    """Parquet files as `Files`, whose lines are the rows' places in their file; `progress` counts rows, not bytes.

    Memory holds the packed columns of one row group and `batch_rows` rows of it.

    Attributes:
        types: what each column that is read is handed out as, by its name in the files.
        batch_rows: rows that are decoded at once.
    """

    types: Mapping[str, pa.DataType]
    batch_rows: int = field(default=BATCH_ROWS, kw_only=True)

    def blocks(self, what: str) -> Iterator[Block]:
        """Read all rows; the lines of a block are its rows' places in their file, from 1.

        Args:
            what: the pass is for, as `progress` is told.

        Raises:
            DataError: a file is damaged, lacks a column, has one of another type, or has a row that is wrong and not to
                be skipped; the message names file, row group, row (from 0 in its group) and column.
            OSError: a file cannot be opened.
        """
        self.rows, self.skipped = [0] * len(self.paths), [0] * len(self.paths)
        total = sum(last for _, last in self.row_lines(what))  # which also refuses wrong types before any row is read
        done = 0
        for number, path in enumerate(self.paths):
            place = 1
            file, _ = _opened(path)
            with file:
                for group in range(file.num_row_groups):
                    start = place
                    for batch in self._batches(file, path, group):
                        for first, table in self._read(batch, number, group, place - start):
                            self.rows[number] += len(table)
                            yield Block(number, start + first + np.arange(len(table)), table)
                        place, done = place + len(batch), done + len(batch)
                        self.progress(what, sum(self.rows), done, total)

    def row_lines(self, what: str) -> list[tuple[int, int]]:
        """The places of each file's first and last row, from 1, by its footer; (1, 0) if it has none.

        Raises:
            DataError: a file is damaged, lacks a column, or has one of another type.
            OSError: a file cannot be opened.
        """
        lines = []
        for path in self.paths:
            file, schema = _opened(path)
            with file:
                _check_types(schema, self.types, path)
                lines.append((1, file.metadata.num_rows))
        return lines

    def _batches(self, file: pq.ParquetFile, path: Path, group: int) -> Iterator[pa.RecordBatch]:
        promised, rows = _rows_of(file.metadata.row_group(group), self.types, f"{path}, row group {group}"), 0
        try:
            for batch in file.iter_batches(self.batch_rows, row_groups=[group], columns=list(self.types)):
                rows += len(batch)
                if len(batch):
                    yield batch
        except FAILURES as error:
            if is_of_storage(error):
                raise
            raise DataError(
                f"{path}, row group {group}: cannot be read: {_line(error)}; write the file again"
            ) from None
        if rows != promised:
            raise DataError(
                f"{path}, row group {group}: has {rows} rows, but the footer says {promised}; write the file again"
            )

    def _read(self, batch: pa.RecordBatch, number: int, group: int, first: int) -> Iterator[tuple[int, pa.Table]]:
        """Tables of rows, each with the place of its first row in the row group, from 0."""
        try:
            table = self.convert(_typed(batch, self.types))
        except (Malformed, pa.ArrowException) as error:
            if len(batch) == 1:
                if not self.skip_malformed:
                    raise DataError(
                        f"{self.paths[number]}, row group {group}, row {first}: {_line(error)}; mend it, or leave such "
                        "rows out with --skip-malformed"
                    ) from None
                self.skipped[number] += 1
                return
        else:
            yield first, table
            return
        half = len(batch) // 2
        yield from self._read(batch.slice(0, half), number, group, first)
        yield from self._read(batch.slice(half), number, group, first + half)


def _opened(path: Path) -> tuple[pq.ParquetFile, pa.Schema]:
    """A file, and what its columns are read as."""
    if path.is_dir():
        raise DataError(f"{path} is a directory; name the files in it")
    try:
        file = opened(path)
        schema = plain_schema(file.schema_arrow)
    except FAILURES as error:
        if is_of_storage(error):
            raise
        raise DataError(f"{path} is no Parquet file that can be read: {_line(error)}; write it again") from None
    footer = file.metadata
    rows = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    if rows != footer.num_rows:
        raise DataError(
            f"{path}: its footer is damaged: it counts {footer.num_rows} rows, its row groups hold {rows}; "
            "write the file again"
        )
    return file, schema


def _rows_of(group: pq.RowGroupMetaData, names: Collection[str], where: str) -> int:
    """The rows of a row group by its footer."""
    rows: int = group.num_rows
    for column in map(group.column, range(group.num_columns)):
        # What is no list has just one value for each row; were there more, the rest would be left out.
        if (name := column.path_in_schema) in names and column.num_values > rows:
            raise DataError(
                f"{where}: column {name!r} has {column.num_values} values for {rows} rows by its footer; write the "
                "file again"
            )
    return rows


def _line(told: object) -> str:
    return " ".join(str(told).split())


def _check_types(found: pa.Schema, types: Mapping[str, pa.DataType], path: Path) -> None:
    for name, wanted in types.items():
        if (times := found.names.count(name)) != 1:
            number = f"{times} columns" if times else "no column"
            names = shortened(_line(", ".join(found.names)), 400)  # which any tool may have written, and any number
            raise DataError(f"{path}: {number} named {name!r}; the file has {names}")
        if not _fits(kind := found.field(name).type, wanted):
            raise DataError(
                f"{path}: column {name!r} has type {kind}, not {wanted}; correct its type in the schema, or cast it "
                "where the file is written"
            )


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether all values of a type are what is asked for, or nulls, but for their size."""
    kind = usual_type(kind)
    if pa.types.is_null(kind):
        return True
    if is_list(wanted) or is_list(kind):
        return is_list(wanted) and is_list(kind) and _fits(kind.value_type, wanted.value_type)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_boolean(wanted):
        return bool(pa.types.is_boolean(kind))
    if pa.types.is_integer(wanted):
        return is_countable(kind)
    if pa.types.is_floating(wanted):
        return is_number(kind)
    if pa.types.is_timestamp(wanted):
        return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))
    return is_string(kind)


def _typed(batch: pa.RecordBatch, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Columns of these types.

    Raises:
        Malformed: a value does not fit its column's type.
    """
    columns = {}
    for name, wanted in types.items():
        try:
            values = batch[name]
            values.validate(full=True)  # the reader takes any bytes for UTF-8
            if (kind := plain_type(values.type)) != values.type:
                values = values.cast(kind)
            columns[name] = _cast(usual(values), wanted)
        except pa.ArrowException as error:
            raise Malformed(f"column {name!r}: {error}") from None
    return pa.table(columns)


def _cast(values: pa.Array, wanted: pa.DataType) -> pa.Array:
    if is_list(values.type):
        lengths, items = flat(values)
        offsets = pa.array(offsets_of(lengths), pa.int32())
        return pa.ListArray.from_arrays(offsets, _cast(items, wanted.value_type), mask=values.is_null())
    values = plain(values)
    return (floats(values) if pa.types.is_floating(wanted) else values).cast(wanted)
