"""A row group of a footer that was taken apart is what the whole footer says of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import dense_column

from recsys.data import parquet
from recsys.data.features import Columns
from recsys.data.footers import FileEnd, SplitFooter, split_footer
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards


def table_of(rows: int) -> pa.Table:
    random = np.random.default_rng(rows)
    return pa.table(
        {
            "label": random.integers(0, 2, rows).astype(np.int8),
            "x": pa.array(random.normal(size=rows), mask=random.random(rows) < 0.2),
            "text": random.choice(["", "ü" * 40, "\x16\x16\x19\x1c\x00", "plain"], rows),
            "lists": [list(range(row % 5)) for row in range(rows)],
            "deep": [{"a": [{"b": row}], "c": str(row)} for row in range(rows)],
            "flag": random.random(rows) < 0.5,
            "at": pa.array(random.integers(0, 2**40, rows), pa.timestamp("ms", "UTC")),
            "cost": pa.array([None] * rows, pa.decimal128(20, 3)),
            **{f"c{number}": random.integers(0, 9, rows) for number in range(20)},
        }
    ).replace_schema_metadata({"note": "\x19\x1c" * 200})


WRITERS: dict[str, dict[str, Any]] = {
    "default": {},
    "bare": {"write_statistics": False, "store_schema": False, "use_dictionary": False},
    "full": {"write_page_index": True, "write_page_checksum": True, "compression": "zstd", "version": "1.0"},
    "sorted": {"sorting_columns": [pq.SortingColumn(0), pq.SortingColumn(1, descending=True)]},
    "old": {"data_page_version": "2.0", "use_compliant_nested_type": False, "use_deprecated_int96_timestamps": True},
}


def taken_apart(path: Path) -> tuple[SplitFooter | None, pq.FileMetaData]:
    with pa.OSFile(str(path)) as file:
        raw = FileEnd.read(file).footer(file)
    return split_footer(raw, pq.read_metadata(path)), pq.read_metadata(path)


@pytest.mark.parametrize("groups", [1, 2, 14, 15, 16, 200])
@pytest.mark.parametrize("writer", WRITERS)
def test_each_row_group_is_what_the_whole_footer_says(tmp_path: Path, writer: str, groups: int) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(table_of(7 * groups - 3), path, row_group_size=7, **WRITERS[writer])
    split, whole = taken_apart(path)
    assert split is not None and whole.num_row_groups == groups
    with pa.OSFile(str(path)) as file:
        for group in range(groups):
            part = split.read(file, group)
            assert part.num_row_groups == 1
            assert part.row_group(0).to_dict() == whole.row_group(group).to_dict()
            assert part.schema.equals(whole.schema) and part.metadata == whole.metadata
            read, wanted = (
                pq.ParquetFile(file, metadata=footer).read_row_group(number)
                for footer, number in ((part, 0), (whole, group))
            )
            assert read.equals(wanted)


def test_a_footer_without_row_groups_is_taken_apart(tmp_path: Path) -> None:
    pq.ParquetWriter(tmp_path / "part.parquet", table_of(1).schema).close()
    split, _ = taken_apart(tmp_path / "part.parquet")
    assert split is not None and len(split.bounds) == 1


def test_a_damaged_footer_is_taken_apart_rightly_or_not_at_all(tmp_path: Path) -> None:
    path, damaged = tmp_path / "part.parquet", tmp_path / "damaged.parquet"
    pq.write_table(table_of(40), path, row_group_size=10)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    random, apart = np.random.default_rng(3), 0
    for _ in range(300):
        changed = bytearray(content)
        for place in random.integers(len(content) - 8 - length, len(content) - 8, 2):
            changed[place] ^= int(random.integers(1, 256))
        damaged.write_bytes(changed)
        try:
            split, whole = taken_apart(damaged)
        except (OSError, pa.ArrowException):
            continue
        if split is not None:
            apart += 1
            with pa.OSFile(str(damaged)) as file:
                for group in range(whole.num_row_groups):
                    try:
                        assert split.read(file, group).row_group(0).num_rows == whole.row_group(group).num_rows
                    except (OSError, pa.ArrowException):
                        continue
    assert apart > 10


COLUMNS = Columns("label", None, {"x": dense_column("x", 0.0)}, {})


def xs(shards: ParquetShards) -> list[float]:
    return [
        x
        for group, rows in enumerate(shards.row_counts)
        for x in shards.read(RowSlice(group, 0, rows)).dense[0].tolist()
    ]


@pytest.mark.parametrize("how", ["apart", "wrongly", "not at all"])
def test_rows_are_the_same_whatever_becomes_of_the_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for part in range(2):
        pq.write_table(table_of(50 + part), tmp_path / f"{part}.parquet", row_group_size=5)
    wanted = xs(ParquetShards([str(tmp_path)], COLUMNS, source="data.train"))

    def wrongly(*arguments: Any) -> SplitFooter | None:
        split = split_footer(*arguments)
        assert split is not None
        return split._replace(bounds=split.bounds + 1) if how == "wrongly" else None

    monkeypatch.setattr(parquet, "FOOTER_BYTES", 0)
    if how != "apart":
        monkeypatch.setattr(parquet, "split_footer", wrongly)
    shards = ParquetShards([str(tmp_path)], COLUMNS, source="data.train")
    read_metadata, whole = pq.read_metadata, []

    def spy(file: Any) -> pq.FileMetaData:
        footer = read_metadata(file)
        whole.extend([footer] if footer.num_row_groups > 1 else [])
        return footer

    monkeypatch.setattr(pq, "read_metadata", spy)
    assert xs(shards) == wanted
    assert len(whole) == (0 if how == "apart" else 2)  # once for each file, not for each row group
