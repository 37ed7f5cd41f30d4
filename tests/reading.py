"""Shards of one table, and what was read from them in plain Python."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import DenseFeatureConfig, DomainConfig, SparseFeatureConfig, StandardizeConfig
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import IdMapping, PlainIds
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.rows import Jagged, Rows


def sparse_column(column: str, num_rows: int, ids: IdMapping | None = None, **settings: Any) -> SparseColumn:
    """A sparse feature of a table of its own, of plain ids unless others are given."""
    return SparseColumn(SparseFeatureConfig(table="of_it", column=column, **settings), ids or PlainIds(num_rows))


def dense_column(
    column: str,
    fill: float | None,
    log1p: bool = False,
    clip: tuple[float, float] | None = None,
    standardize: tuple[float, float] | None = None,
    not_finite: Any = "error",
) -> DenseFeatureConfig:
    """A dense feature."""
    scaled = standardize and StandardizeConfig(mean=standardize[0], std=standardize[1])
    return DenseFeatureConfig(
        column=column, fill=fill, log1p=log1p, clip=clip, standardize=scaled, not_finite=not_finite
    )


def domain_column(column: str, num_domains: int) -> DomainConfig:
    """A domain column."""
    return DomainConfig(column=column, num_domains=num_domains)


def open_table(directory: Path, table: pa.Table, columns: Columns, row_group_rows: int = 1000) -> ParquetShards:
    """Shards of one file that holds `table`."""
    pq.write_table(table, directory / "part.parquet", row_group_size=row_group_rows)
    return ParquetShards([str(directory / "*.parquet")], columns, source="data.train")


def read_first(shards: ParquetShards) -> Rows:
    """The rows of the first row group."""
    return shards.read(RowSlice(0, 0, shards.row_counts[0]))


def bags(jagged: Jagged) -> list[list[int]]:
    """Ids of each row."""
    return [jagged.values[start:stop].tolist() for start, stop in pairwise(jagged.offsets)]


def ids(shards: ParquetShards, rows: Rows) -> dict[str, list[list[int]]]:
    """Ids of each row, by feature."""
    single = {
        name: [[row] if row >= 0 else [] for row in of_feature.tolist()]
        for name, of_feature in zip(shards.layout.single, rows.single, strict=True)
    }
    lists = [name for name in shards.layout.keys if name in shards.layout.lists]
    return {**single, **{name: bags(jagged) for name, jagged in zip(lists, rows.lists, strict=True)}}
