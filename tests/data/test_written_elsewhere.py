"""Files as other programs write them, and as none should: read right, or refused with file, row group and column."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lying import COUNT, FEW, ROWS, saying
from reading import dense_column, ids, read_first, sparse_column
from test_fuzz import outcomes

from recsys.data import parquet
from recsys.data.features import Columns, RowOrder
from recsys.data.hashing import hash_ids
from recsys.data.ids import DatetimeIds, HashedIds, VocabularyIds
from recsys.data.order import RowSlice
from recsys.data.parquet import ColumnError, ParquetShards, ShardTables
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary, canonical

WORDS = ["a", "bb", None, "a", "", "ü"]
LISTS = [["a", "bb"], None, [], ["ü", "a", ""], ["c"], ["a"]]


def open_file(path: Path, columns: Columns) -> ParquetShards:
    return ParquetShards([str(path)], columns, source="data.train")


def of_words(mapping: Any) -> Columns:
    return Columns("label", None, {}, {name: sparse_column(name, 100, mapping) for name in ("one", "many")})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_strings_of_every_encoding_are_mapped(tmp_path: Path, encoding: str, kind: pa.DataType) -> None:
    path = tmp_path / "part.parquet"
    words = pa.array(WORDS, kind)
    table = pa.table({"label": [0, 1] * 3, "one": words, "many": pa.array(LISTS, pa.list_(kind))})
    encodings = {"one": encoding, "many.list.element": encoding}
    pq.write_table(table, path, use_dictionary=False, column_encoding=encodings, row_group_size=4)
    hashed = open_file(path, of_words(HashedIds(100, 3)))
    first, second = (hashed.read(RowSlice(group, 0, rows)) for group, rows in enumerate(hashed.row_counts))
    assert [*first.single[0], *second.single[0]] == hash_ids(words, 100, 3).tolist()
    wanted = [hash_ids(pa.array(words or [], pa.string()), 100, 3).tolist() for words in LISTS]
    assert ids(hashed, first)["many"] + ids(hashed, second)["many"] == wanted
    known = Vocabulary(canonical(pa.array(["ü", "a"])), pa.array([2, 1]), "here")
    found = ids(mapped := open_file(path, of_words(VocabularyIds(known))), read_first(mapped))
    assert found == {"one": [[2], [0], [], [2]], "many": [[2, 0], [], [], [1, 2, 0]]}


def test_one_row_group_may_be_encoded_as_another_is_not(tmp_path: Path) -> None:
    parts = []
    for number, options in enumerate(({}, {"use_dictionary": False, "column_encoding": {"one": "DELTA_BYTE_ARRAY"}})):
        path = tmp_path / f"part-{number}.parquet"
        pq.write_table(pa.table({"label": [0, 1], "one": ["a", "b"]}), path, **options)
        parts.append(path)
    columns = Columns("label", None, {}, {"one": sparse_column("one", 50, HashedIds(50))})
    shards = ParquetShards([str(tmp_path)], columns, source="data.train")
    found = [shards.read(RowSlice(group, 0, 2)).single[0].tolist() for group in range(2)]
    assert found[0] == found[1] == hash_ids(pa.array(["a", "b"]), 50).tolist()
    kinds = [shards.table(group, ("one",), ("one",)).schema.types[0] for group in range(2)]
    assert kinds == [pa.dictionary(pa.int32(), pa.string()), pa.string()]


JSONS = ['{"a":1}', None, "2", "[]"]


@pytest.mark.parametrize("stored", [True, False], ids=["with Arrow's schema", "without"])
def test_extension_types_are_read_as_what_they_are_checked_as(tmp_path: Path, stored: bool) -> None:
    path = tmp_path / "part.parquet"
    json_ = pa.ExtensionArray.from_storage(pa.json_(), pa.array(JSONS))
    table = pa.table(
        {
            "label": [0, 1, 1, 0],
            "json": json_,
            "jsons": pa.ListArray.from_arrays(pa.array([0, 1, 1, 3, 4], pa.int32()), json_.take([0, 2, 2, 3])),
            "number": pa.ExtensionArray.from_storage(pa.opaque(pa.int64(), "t", "v"), pa.array([3, 1, 2, None])),
            "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 1, 1], pa.int8())),
            "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16))] * 4, pa.binary(16))),
        }
    )
    pq.write_table(table, path, store_schema=stored)
    sparse = {name: sparse_column(name, 99, HashedIds(99)) for name in ("json", "jsons", "number")}
    shards = open_file(path, Columns("label", None, {"flag": dense_column("flag", None)}, sparse))
    assert shards.schemas[0].types[1:] == [
        *(pa.string(), pa.list_(pa.string()), pa.int64(), pa.int8(), pa.binary(16)),
    ]
    read = shards.table(0, tuple(shards.schemas[0].names))
    assert read.schema.types == shards.schemas[0].types
    rows = read_first(shards)
    assert rows.dense.tolist() == [[1, 0, 1, 1]]
    assert rows.single.tolist() == [
        hash_ids(pa.array(JSONS), 99).tolist(),
        hash_ids(pa.array([3, 1, 2, None]), 99).tolist(),
    ]
    lists = [hash_ids(pa.array(one, pa.string()), 99).tolist() for one in ([JSONS[0]], [], ["2", "2"], ["[]"])]
    assert ids(shards, rows)["jsons"] == lists
    with pytest.raises(DataError, match=r"column 'uuid' \(sparse feature uuid\) has type fixed_size_binary\[16\];"):
        open_file(path, Columns("label", None, {}, {"uuid": sparse_column("uuid", 9, HashedIds(9))}))


def test_times_of_the_older_kind_are_read_in_every_year(tmp_path: Path) -> None:
    """INT96, as Hive, Impala and older Sparks write it, is days and nanoseconds."""
    moments = [datetime(1, 1, 1, 5), datetime(1500, 2, 28, 23), datetime(1969, 12, 31, 1), datetime(9999, 12, 31, 22)]
    values = pa.array([*moments, None], pa.timestamp("us"))
    pq.write_table(pa.table({"hour": values}), tmp_path / "x.parquet", use_deprecated_int96_timestamps=True)
    assert pq.read_metadata(tmp_path / "x.parquet").schema.column(0).physical_type == "INT96"
    columns = Columns(None, None, {}, {"hour": sparse_column("hour", 24, DatetimeIds("hour"))})
    assert read_first(open_file(tmp_path / "x.parquet", columns)).single.tolist() == [[5, 23, 1, 22, -1]]


def test_a_footer_that_says_what_the_pages_do_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    options = {"plain": {"use_dictionary": False}, "v2": {"data_page_version": "2.0"}, "encoded": {}}
    for name, option in options.items():
        for said in (ROWS + 1, 1000, 100_000, 2**31 - 1, 2**31, 2**40, 2**62):
            (folder / f"{name}-all-{said}.parquet").write_bytes(saying(said, **option))
            (folder / f"{name}-rows-{said}.parquet").write_bytes(saying(said, (0, COUNT + 1), **option))
        (folder / f"{name}-fewer.parquet").write_bytes(saying(500, (0, COUNT + 1), **option))
        (folder / f"{name}-same.parquet").write_bytes(saying(ROWS, **option))
        for column in range(COUNT):
            for said in (0, 500, 1000):
                content = saying(said, (column + 1,), **option)
                (folder / f"{name}-column-{column}-{said}.parquet").write_bytes(content)
    found = outcomes(folder)
    assert len(found) == len(list(folder.iterdir()))
    whole = found["plain-same.parquet"]["rows"]
    assert len(whole) == ROWS and [row[4] for row in whole] == [[row] for row in range(ROWS)]
    for name, outcome in found.items():
        assert "unnamed" not in outcome, (name, outcome)
        if "-column-" in name or "-same" in name:  # whatever is said of values: all rows, or none
            assert outcome.get("rows", whole) == whole, name
        else:
            assert "rows" not in outcome, name
        if "error" in outcome:
            assert f"{name}, row group 0: " in outcome["error"], outcome
            assert "write the file again" in outcome["error"], outcome
            assert "column '" in outcome["error"] or "2147483647 can be read" in outcome["error"].replace(",", "")


def test_more_rows_than_the_pages_hold_are_named_by_column(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(saying(1000))
    tables = ShardTables([str(tmp_path)], list(FEW), source="data.train")
    with pytest.raises(ColumnError) as error:
        tables.table(0, ("tags", "x"))
    assert str(error.value).endswith(
        "part.parquet, row group 0: column 'tags' has 777 rows, but the footer says 1000; write the file again"
    )
    assert error.value.column == "tags"


def test_no_order_is_made_for_rows_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(saying(2**20))
    shards = open_file(tmp_path / "part.parquet", Columns("label", None, {"x": dense_column("x", None)}, {}))

    def order() -> RowOrder:
        pytest.fail("memory for the order of rows that a footer made up")

    with pytest.raises(ColumnError, match="has 777 rows, but the footer says 1048576"):
        shards.read(RowSlice(0, 0, 2**20), order)


def test_a_column_of_the_path_alone_has_the_rows_of_the_footer(tmp_path: Path) -> None:
    (tmp_path / "day=7").mkdir()
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "day=7" / "part.parquet")
    tables = ShardTables([str(tmp_path)], ["day"], source="data.train")
    assert tables.table(0, ("day",)).to_pydict() == {"day": [7, 7, 7]}


def test_names_with_dots_are_no_structs(tmp_path: Path) -> None:
    table = pa.table({"c": [{"d": 1}], "c.d": [5], "a": ["x"], "a.b": ["y"]})
    pq.write_table(table, tmp_path / "part.parquet")
    tables = ShardTables([str(tmp_path)], ["c.d", "a"], source="data.train")
    assert tables.table(0, ("c.d", "a"), ("a",)).to_pydict() == {"c.d": [5], "a": ["x"]}


def test_a_column_that_cannot_be_decoded_is_named_among_many(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table(FEW), path, row_group_size=300, write_page_checksum=True)
    chunk = pq.read_metadata(path).row_group(1).column(4)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 4
    content[middle] ^= 0xFF
    path.write_bytes(content)
    tables = ShardTables([str(path)], list(FEW), source="data.train")
    assert len(tables.table(0, tuple(FEW))) == 300
    with pytest.raises(ColumnError, match=r"part.parquet, row group 1: column 'user' cannot be read: .*; write the fi"):
        tables.table(1, tuple(FEW))


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("Nested data conversions not implemented for chunked array outputs", "write smaller row groups"),
        ("array cannot contain more than 2147483646 bytes, have 2147495936", "write smaller row groups"),
        ("Unexpected end of stream", "write the file again"),
    ],
)
def test_the_way_out_is_said_with_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, way_out: str
) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"x": [1], "s": ["a"]}), path)
    tables = ShardTables([str(path)], ["x", "s"], source="data.train")
    read = pq.ParquetFile.read_row_group

    def fails(parquet: pq.ParquetFile, group: int, columns: list[str], **options: Any) -> pa.Table:
        if "s" in columns:
            raise pa.ArrowNotImplementedError(said)
        return read(parquet, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(ColumnError, match=rf"part.parquet, row group 0: column 's' cannot be read: {said}; {way_out}"):
        tables.table(0, ("x", "s"), ("s",))


def test_strings_that_no_dictionary_can_hold_are_read_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"x": [1, 2], "s": ["a", "b"]}), path)
    tables = ShardTables([str(path)], ["x", "s"], source="data.train")
    opened = parquet.opened

    def without(file: Any, footer: Any, as_dictionaries: Any = (), **options: Any) -> pq.ParquetFile:
        if as_dictionaries:
            raise OSError("Not yet implemented: DecodeArrow of DictAccumulator for another decoder")
        return opened(file, footer, as_dictionaries, **options)

    monkeypatch.setattr(parquet, "opened", without)
    assert tables.table(0, ("x", "s"), ("s",)).to_pydict() == {"x": [1, 2], "s": ["a", "b"]}
