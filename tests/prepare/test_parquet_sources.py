"""Parquet as a source: every value of every type, and each fault named by file, row group, row and column."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from lying import ALL, COUNT, saying

from recsys.config import ConfigError
from recsys.data.storage import DataError
from recsys.prepare import writing
from recsys.prepare.parquet import ParquetFiles
from recsys.prepare.tabular import convert_text, load_schema

ROWS = 50
SCHEMA: dict[str, Any] = {
    "format": "parquet",
    "label": "clicked",
    "tables": {"user": {"ids": "vocabulary"}, "item": {"ids": "keep"}, "tag": {"ids": "vocabulary"}},
    "columns": {
        "clicked": {"type": "bool"},
        "user": {"type": "string", "source": "user id", "table": "user"},
        "item": {"type": "int", "table": "item"},
        "seen": {"type": "ints", "table": "item"},
        "tags": {"type": "strings", "table": "tag"},
        "price": {"type": "float", "dense": {"fill": 0.0}},
        "at": {"type": "timestamp"},
    },
    "split": {"by": "order", "valid": 0.2, "test": 0.2},
}


def raw() -> pa.Table:
    """Rows in the types that other writers choose."""
    rows = range(ROWS)
    return pa.table(
        {
            "unused": [None] * ROWS,
            "clicked": [row % 3 == 0 for row in rows],
            "user id": pa.array([f"u{row % 4}" for row in rows]).dictionary_encode(),
            "item": pa.array([None if row % 7 == 0 else row for row in rows], pa.uint8()),
            "seen": pa.array([None if row % 5 == 0 else [row] * (row % 3) for row in rows], pa.large_list(pa.int16())),
            "tags": pa.array([["a", "b"] for _ in rows], pa.list_(pa.string_view(), 2)),
            "price": pa.array([f"{row}.25" for row in rows]).cast(pa.decimal128(6, 2)),
            "at": pa.array([datetime(2024, 1, 1, row % 24) for row in rows], pa.timestamp("ms", "Europe/Berlin")),
        }
    )


def convert(folder: Path, *sources: Path, changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Converts to `folder/out` under the schema with changes; returns dataset.json."""
    (folder / "schema.yaml").write_text(yaml.safe_dump({**SCHEMA, **(changes or {})}))
    convert_text(sources, folder / "out", load_schema(folder / "schema.yaml"), overwrite=True, **options)
    summary = writing.read_summary(folder / "out")
    assert summary is not None and writing.is_complete(folder / "out", summary)
    return summary


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, row_group_size=20, **options)
    return path


def column(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    """The table with one value of a column changed."""
    values = table[name].to_pylist()
    values[row] = value
    kind = table.schema.field(name).type
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def test_every_value_of_every_type(tmp_path: Path) -> None:
    summary = convert(tmp_path, write(tmp_path / "a.parquet", raw().slice(0, 30)), write(tmp_path / "b", raw()[30:]))
    found = [row for split in ("train", "valid", "test") for row in pq.read_table(tmp_path / "out" / split).to_pylist()]
    assert [told["rows"] for told in summary["splits"].values()] == [30, 10, 10]
    users = pq.read_table(tmp_path / "out/vocabularies/user.parquet")["value"].to_pylist()
    for number, (row, told) in enumerate(zip(raw().to_pylist(), found, strict=True)):
        assert told == {
            "clicked": int(row["clicked"]),
            "user": 1 + users.index(row["user id"]),
            "item": row["item"],
            "seen": row["seen"],
            "tags": [1, 2],
            "price": number + 0.25,
            "at": datetime(2024, 1, 1, number % 24),  # moments are those of UTC
        }
    features = load_schema(tmp_path / "schema.yaml").sparse_features
    assert features["seen"].list_text is None and features["tags"].list_text is None


def values(path: Path, **types: pa.DataType) -> dict[str, list[Any]]:
    """All values of columns of a file."""
    tables = [block.table for block in ParquetFiles([path], types).blocks("reading")]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in types}


def test_types_that_other_writers_store_are_read_as_training_reads_them(tmp_path: Path) -> None:
    moments = [datetime(1, 1, 1), datetime(2024, 5, 1, 3, 4, 5, 678901), datetime(9999, 12, 31, 23, 59, 59), None]
    stored = {
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", None, "[]", "{}"])),
        "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, None, 1], pa.int8())),
        "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.int64(), "t", "v"), pa.array([3, 1, 2, None])),
        "at": pa.array(moments, pa.timestamp("us")),
    }
    path = tmp_path / "log"
    pq.write_table(pa.table(stored), path, use_deprecated_int96_timestamps=True)
    assert values(path, json=pa.string(), flag=pa.int64(), opaque=pa.int64(), at=pa.timestamp("us")) == {
        "json": ["1", None, "[]", "{}"],
        "flag": [0, 1, None, 1],
        "opaque": [3, 1, 2, None],
        "at": moments,
    }


def test_damage_that_can_still_be_decoded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    pq.write_table(raw(), path, compression="none", use_dictionary=False, write_page_checksum=True)
    content, place = path.read_bytes(), pq.read_metadata(path).row_group(0).column(3).data_page_offset
    assert values(path, item=pa.int64())["item"] == raw()["item"].to_pylist()
    path.write_bytes(content[: place + 60] + bytes([content[place + 60] ^ 1]) + content[place + 61 :])
    with pytest.raises(DataError, match=r"log, row group 0: cannot be read: .*checksum.*; write the file again"):
        values(path, item=pa.int64())
    path.write_bytes(content.replace(b"user id", b"user\xffid"))
    with pytest.raises(DataError, match=r"log is no Parquet file that can be read: .*codec can't decode.*; write it"):
        values(path, item=pa.int64())


@pytest.mark.parametrize(
    ("said", "places", "message"),
    [
        (1000, ALL, r", row group 0: has 777 rows, but the footer says 1000; write the file again"),
        (500, (0, COUNT + 1), r", row group 0: column 'label' has 777 values for 500 rows by its footer; write the"),
        (500, (0,), r": its footer is damaged: it counts 500 rows, its row groups hold 777; write the file again"),
    ],
)
def test_footers_that_count_other_rows_than_there_are(
    tmp_path: Path, said: int, places: tuple[int, ...], message: str
) -> None:
    (tmp_path / "log").write_bytes(saying(said, places))
    with pytest.raises(DataError, match=rf"log{message}"):
        values(tmp_path / "log", label=pa.int64(), tags=pa.list_(pa.int64()))


def test_memory_holds_some_rows_of_a_row_group(tmp_path: Path) -> None:
    seen: list[Any] = []
    files = ParquetFiles(
        [write(tmp_path / "a", raw()), write(tmp_path / "b", raw())],
        {"item": pa.int64()},
        batch_rows=8,
        progress=lambda *told: seen.append(told),
    )
    blocks = list(files.blocks("reading"))
    assert max(len(block.table) for block in blocks) == 8 and files.rows == [ROWS, ROWS]
    assert np.concatenate([block.lines for block in blocks]).tolist() == 2 * list(range(1, ROWS + 1))
    assert seen[-1] == ("reading", 2 * ROWS, 2 * ROWS, 2 * ROWS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clicked", None, "column 'clicked': no value"),
        ("item", 2**63, "column 'item': Integer value 9223372036854775808 not in range"),
        ("seen", [1, None], "column 'seen': an item of the list has no value"),
        ("seen", [-1], "column 'seen': the id -1 is negative"),
    ],
)
def test_wrong_values_are_named_or_counted(tmp_path: Path, name: str, value: Any, message: str) -> None:
    table = raw()
    wide = table["item"].cast(pa.uint64())
    path = write(tmp_path / "log", column(table.set_column(3, "item", wide), name, 43, value))
    with pytest.raises(DataError, match=rf"log, row group 2, row 3: {message}.*; mend it, or leave such rows out"):
        convert(tmp_path, path)
    summary = convert(tmp_path, path, skip_malformed=True)
    assert summary["skipped"] == {str(path): 1} and sum(it["rows"] for it in summary["splits"].values()) == ROWS - 1


def test_texts_that_are_no_utf_8_are_named(tmp_path: Path) -> None:
    texts = pa.array([b"\xff" if row == 21 else b"u" for row in range(ROWS)])
    texts = pa.Array.from_buffers(pa.string(), ROWS, texts.buffers())
    path = write(tmp_path / "log", raw().set_column(2, "user id", texts))
    with pytest.raises(DataError, match=r"log, row group 1, row 1: column 'user id': .*UTF8"):
        convert(tmp_path, path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("item", pa.array([1.0] * ROWS), "column 'item' has type double, not int64; correct its type in the schema"),
        ("item", pa.array(["1"] * ROWS), "column 'item' has type string, not int64"),
        ("seen", pa.array(["1"] * ROWS), "column 'seen' has type string, not list<item: int64>"),
        ("price", pa.array([[1.0]] * ROWS), "column 'price' has type list<element: double>, not double"),
        ("clicked", pa.array([1] * ROWS), "column 'clicked' has type int64, not bool"),
    ],
)
def test_columns_of_other_types_are_named_before_rows_are_read(
    tmp_path: Path, name: str, values: pa.Array, message: str
) -> None:
    table = raw()
    wrong = table.set_column(table.column_names.index(name), name, values)
    with pytest.raises(DataError, match=f"b: {message}"):
        convert(tmp_path, write(tmp_path / "a", column(table, "clicked", 0, None)), write(tmp_path / "b", wrong))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="log: no column named 'price'; the file has unused, clicked, user id"):
        convert(tmp_path, write(tmp_path / "log", raw().drop_columns("price")))
    pq.write_table(pa.table({f"name\n{number}": [1] for number in range(1000)}), tmp_path / "wide")
    with pytest.raises(DataError, match=r"the file has name 0, name 1, .* \(9888 characters\)$") as error:
        convert(tmp_path, tmp_path / "wide")
    assert "\n" not in str(error.value)
    (tmp_path / "text").write_text("clicked\n1\n")
    with pytest.raises(DataError, match=r"text is no Parquet file that can be read: .*; write it again"):
        convert(tmp_path, tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path, tmp_path / "missing")
    with pytest.raises(DataError, match=f"{tmp_path.name} is a directory; name the files in it"):
        convert(tmp_path, tmp_path)
    path = write(tmp_path / "torn", raw(), write_page_checksum=True, compression="zstd")
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(3).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"torn, row group 1: cannot be read: .*; write the file again"):
        convert(tmp_path, path)
    with pytest.raises(DataError, match="none: no rows"):
        convert(tmp_path, write(tmp_path / "none", raw().slice(0, 0)))
    with pytest.raises(DataError, match="torn, line 1: no text, but Parquet; set format: parquet in the schema"):
        convert(tmp_path, path, changes={"format": "csv"})
    with pytest.raises(ConfigError, match="nulls: Parquet has none; remove it"):
        convert(tmp_path, tmp_path / "none", changes={"nulls": ["NA"]})
