"""Every type that is read, every value that is refused, with the file, row group, column and value it names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import dense_column, domain_column, ids, open_table, read_first, sparse_column

from recsys.data.features import Columns
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.shuffling import Shuffle
from recsys.data.storage import DataError


def test_features_may_share_a_column_and_be_dense_and_sparse_at_once(tmp_path: Path) -> None:
    columns = Columns(
        "label", None, {"n": dense_column("a", None)}, {"one": sparse_column("a", 9), "two": sparse_column("a", 9)}
    )
    shards = open_table(tmp_path, pa.table({"label": [0, 1], "a": [3, 5]}), columns)
    rows = read_first(shards)
    assert rows.dense.tolist() == [[3, 5]]
    assert ids(shards, rows) == {"one": [[3], [5]], "two": [[3], [5]]}
    assert len(rows.reference) == len(rows.domain) == 0


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
JUST_IDS = Columns("label", None, {}, {"tags": sparse_column("ids", 100)})


def ids_table(column: pa.Array) -> pa.Table:
    return pa.table({"label": np.zeros(len(column), np.int8), "ids": column})


def tags(shards: ParquetShards) -> list[list[int]]:
    """Of the first row group."""
    return ids(shards, read_first(shards))["tags"]


@pytest.mark.parametrize("kind", INTEGERS)
def test_ids_of_every_integer_type_and_lists_of_them_are_read(tmp_path: Path, kind: str) -> None:
    integer = getattr(pa, kind)()
    plain = open_table(tmp_path, ids_table(pa.array([99, None, 0], integer)), JUST_IDS)
    assert (tags(plain), plain.layout.lists) == ([[99], [], [0]], frozenset())
    for lists in (pa.list_, pa.large_list):
        shards = open_table(tmp_path, ids_table(pa.array([[99, 1], None, [], [2]], lists(integer))), JUST_IDS)
        assert (tags(shards), shards.layout.lists) == ([[99, 1], [], [], [2]], {"tags"})


def test_ids_that_fill_32_bits_and_more_are_read(tmp_path: Path) -> None:
    columns = Columns("label", None, {}, {"tags": sparse_column("ids", 2**40)})
    shards = open_table(tmp_path, ids_table(pa.array([2**40 - 1, 2**31, None])), columns)
    assert tags(shards) == [[2**40 - 1], [2**31], []]


def test_a_feature_may_be_single_in_one_file_and_a_list_in_another(tmp_path: Path) -> None:
    pq.write_table(ids_table(pa.array([5, None, 7], pa.int32())), tmp_path / "a.parquet")
    pq.write_table(ids_table(pa.array([[1, 2], None, [3]])), tmp_path / "b.parquet")
    shards = ParquetShards([f"{tmp_path}/*"], JUST_IDS, source="data.train")
    found = [ids(shards, shards.read(RowSlice(group, 0, 3)))["tags"] for group in range(2)]
    assert found == [[[5], [], [7]], [[1, 2], [], [3]]]


def test_dictionary_encoded_ids_are_read(tmp_path: Path) -> None:
    table = ids_table(pa.array([7, 7, None, 8]).dictionary_encode())
    assert tags(open_table(tmp_path, table, JUST_IDS)) == [[7], [7], [], [8]]


def test_parts_of_row_groups_of_lists_are_read(tmp_path: Path) -> None:
    lists = [[row] * (row % 3) if row % 4 else None for row in range(50)]
    shards = open_table(tmp_path, ids_table(pa.array(lists, pa.list_(pa.int64()))), JUST_IDS, row_group_rows=20)
    parts = [RowSlice(2, 3, 9), RowSlice(0, 19, 20), RowSlice(1, 5, 5)]
    found = [row for part in parts for row in ids(shards, shards.read(part))["tags"]]
    assert found == [lists[row] or [] for row in [*range(43, 49), 19]]


@pytest.mark.parametrize(
    "wrong",
    [
        pa.array([1.0, 2.0]),
        pa.array(["1", "2"]),
        pa.array([[1.0], [2.0]]),
        pa.array([[[1]], [[2]]]),
        pa.array([{"id": 1}, {"id": 2}]),
    ],
    ids=lambda array: str(array.type),
)
def test_ids_of_any_other_type_are_refused_on_opening(tmp_path: Path, wrong: pa.Array) -> None:
    with pytest.raises(DataError, match=r"part\.parquet: column 'ids' \(sparse feature tags\) has type") as error:
        open_table(tmp_path, ids_table(wrong), JUST_IDS)
    assert str(error.value).endswith("integers or lists of integers are needed; cast it when the shards are written")


NUMBERS = [*INTEGERS, "bool_", "float16", "float32", "float64"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_labels_and_dense_features_of_every_numeric_type_are_read(tmp_path: Path, kind: str) -> None:
    numbers = pa.array(np.array([0, 1, 1]).astype(kind.strip("_")))
    gaps = pa.array(np.array([0, 1, 1]).astype(kind.strip("_")), mask=np.array([False, True, False]))
    columns = Columns(
        "label", "label", {"a": dense_column("label", None), "b": dense_column("gaps", -2.5)}, JUST_IDS.sparse
    )
    table = pa.table({"label": numbers, "gaps": gaps, "ids": [1, 2, 3]})
    rows = read_first(open_table(tmp_path, table, columns))
    assert rows.labels.tolist() == rows.reference.tolist() == [0, 1, 1]
    assert rows.dense.T.tolist() == [[0, 0], [1, -2.5], [1, 1]]
    assert [array.dtype for array in (rows.labels, rows.reference, rows.dense)] == [np.float32, np.float64, np.float32]


@pytest.mark.parametrize("kind", INTEGERS)
def test_domains_of_every_integer_type_are_read_and_taken_along(tmp_path: Path, kind: str) -> None:
    columns = Columns("label", None, {}, JUST_IDS.sparse, domain_column("part", 100))
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "part": pa.array([99, 0, 5], getattr(pa, kind)())})
    rows = read_first(open_table(tmp_path, table, columns))
    assert (rows.domain.tolist(), rows.domain.dtype) == ([99, 0, 5], np.int64)
    ordered = open_table(tmp_path, table, columns).read(RowSlice(0, 0, 3), Shuffle(np.array([2, 0, 1])))
    assert ordered.domain.tolist() == [5, 99, 0]


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ([0, None, 2], "domain column 'part' has 1 nulls; give rows of no known domain a number of their own"),
        ([0, 3, 7], "domain column 'part' has 2 values out of range, such as 3; there are domains 0..2"),
        ([-1, 0, 1], "domain column 'part' has 1 value out of range, such as -1"),
        (pa.array([0, 1, 2**63], pa.uint64()), "such as 9223372036854775808"),
    ],
)
def test_bad_domain_names_file_row_group_and_column(tmp_path: Path, domain: Any, message: str) -> None:
    columns = Columns("label", None, {}, JUST_IDS.sparse, domain_column("part", 3))
    shards = open_table(tmp_path, pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "part": domain}), columns)
    with pytest.raises(DataError) as error:
        read_first(shards)
    assert str(error.value).startswith(f"{tmp_path / 'part.parquet'}, row group 0: {message}"[:60])
    assert message in str(error.value)


@pytest.mark.parametrize("domain", [[0.0, 1.0], ["a", "b"], [[0], [1]]], ids=str)
def test_domain_that_is_no_integer_is_refused_on_opening(tmp_path: Path, domain: Any) -> None:
    columns = Columns("label", None, {}, JUST_IDS.sparse, domain_column("part", 3))
    with pytest.raises(DataError, match=r"column 'part' \(domain\) has type .*; integers are needed"):
        open_table(tmp_path, pa.table({"label": [0, 1], "ids": [1, 2], "part": domain}), columns)


@pytest.mark.filterwarnings("error")
def test_dense_integers_beyond_float_precision_are_rounded_beside_nulls_too(tmp_path: Path) -> None:
    columns = Columns("label", None, {"big": dense_column("big", 0.0)}, JUST_IDS.sparse)
    table = pa.table({"label": [0, 1], "ids": [1, 1], "big": pa.array([2**60 + 1, None])})
    assert read_first(open_table(tmp_path, table, columns)).dense.tolist() == [[2.0**60, 0.0]]


@pytest.mark.parametrize("kind", NUMBERS)
def test_log1p_is_taken_in_full_precision_after_filling(tmp_path: Path, kind: str) -> None:
    values = np.array([0, 1, 100]).astype(kind.strip("_"))
    plain, numbers = pa.array(values), pa.array(values, mask=np.array([True, False, False]))
    columns = Columns(
        "label", None, {"a": dense_column("a", 9.0, True), "b": dense_column("b", None, True)}, JUST_IDS.sparse
    )
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "a": numbers, "b": plain})
    last = float(values[2])
    wanted = np.log1p([[9.0, 0.0], [1.0, 1.0], [last, last]]).astype(np.float32)
    assert read_first(open_table(tmp_path, table, columns)).dense.T.tolist() == wanted.tolist()


def test_log1p_of_values_of_minus_1_and_below_is_refused(tmp_path: Path) -> None:
    columns = Columns("label", None, {"a": dense_column("a", None, True)}, JUST_IDS.sparse)
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "a": [-1, -2, 0]})
    with pytest.raises(DataError, match=r"dense feature a .* has 2 values .* after log1p"):
        read_first(open_table(tmp_path, table, columns))


GOOD: dict[str, Any] = {"label": [0, 1, 1], "truth": [0.1, 0.2, 0.3], "x": [1.0, 2.0, 3.0], "ids": [1, 2, 3]}
CHECKED = Columns("label", "truth", {"score": dense_column("x", None)}, {"tags": sparse_column("ids", 10)})


def good_table(**changed: Any) -> pa.Table:
    return pa.table({**GOOD, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [0, 2, 1]}, "label column 'label' has 1 value other than 0 and 1, such as 2; make it binary"),
        ({"label": [0, -1, -1]}, "label column 'label' has 2 values other than 0 and 1, such as -1"),
        ({"label": [0, 0.5, 1]}, "such as 0.5"),
        ({"label": [0, 1 + 1e-9, 1]}, "such as 1.000000001"),
        ({"label": [0, float("nan"), 1]}, "label column 'label' has 1 value NaN; set data.label_null to skip"),
        ({"label": [0, None, 1]}, "column 'label' has 1 nulls"),
        ({"truth": [0.1, 1.1, 0.2]}, "reference column 'truth' has values outside 0..1"),
        ({"truth": [0.1, -0.1, 0.2]}, "reference column 'truth' has values outside 0..1"),
        ({"truth": [0.1, float("nan"), 0.2]}, "reference column 'truth' has values outside 0..1"),
        ({"truth": [0.1, None, 0.2]}, "column 'truth' has 1 nulls"),
        ({"x": [1.0, None, None]}, "column 'x' has 2 nulls; give a dense feature a fill"),
        ({"x": [1.0, float("nan"), 1.0]}, "dense feature score (column 'x') has 1 value NaN or infinite"),
        ({"x": [float("inf"), -float("inf"), 1.0]}, "dense feature score (column 'x') has 2 values"),
        ({"x": [1e300, 0.0, 1.0]}, "NaN or infinite in float32; write nulls and give the feature a fill"),
        ({"ids": [1, -1, 3]}, "sparse feature tags (column 'ids') has 1 value out of range, such as -1"),
        ({"ids": [1, 10, 11]}, "has 2 values out of range, such as 10; its table takes ids 0..9: raise num_embeddings"),
        ({"ids": pa.array([1, 2**63, 3], pa.uint64())}, "such as 9223372036854775808"),
        ({"ids": [[1], [2, 12], []]}, "has 1 value out of range, such as 12"),
        ({"ids": [[1], [2, None], None]}, "sparse feature tags (column 'ids') has 1 nulls inside lists; leave them"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_value_names_file_row_group_column_and_value(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    shards = open_table(tmp_path, good_table(**changed), CHECKED)
    with pytest.raises(DataError) as error:
        read_first(shards)
    assert str(error.value).startswith(f"{tmp_path / 'part.parquet'}, row group 0: ")
    assert message in str(error.value)


def test_bad_value_in_a_later_row_group_names_that_row_group(tmp_path: Path) -> None:
    shards = open_table(tmp_path, good_table(label=[0, 1, 7]), CHECKED, row_group_rows=2)
    assert len(shards.read(RowSlice(0, 0, 2))) == 2
    with pytest.raises(DataError, match=r"row group 1: label column 'label' has 1 value .* such as 7"):
        shards.read(RowSlice(1, 0, 1))


def test_pattern_without_files_is_named(tmp_path: Path) -> None:
    pq.write_table(good_table(), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"data\.valid: no file matches '.*absent"):
        ParquetShards([f"{tmp_path}/*.parquet", f"{tmp_path}/absent*"], CHECKED, source="data.valid")


def test_overlapping_patterns_read_each_file_once_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        pq.write_table(good_table(), tmp_path / f"{name}.parquet")
    shards = ParquetShards([f"{tmp_path}/b*", f"{tmp_path}/*"], CHECKED, source="data.train")
    assert [Path(file).stem for file in shards.files] == ["a", "b", "c"]
    assert shards.row_counts == (3, 3, 3)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train: the 1 files matching .* hold no rows"):
        open_table(tmp_path, good_table().slice(0, 0), CHECKED)


def write_text(path: Path) -> None:
    path.write_text("label,ids\n0,1\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_text, "not a readable Parquet file"),
        (Path.touch, "not a readable Parquet file"),
        (lambda path: path.symlink_to("nowhere"), "not a readable Parquet file"),
        (lambda path: pq.write_table(good_table().drop(["x"]), path), "no column 'x'; the file has label, truth, ids"),
        (lambda path: pq.write_table(good_table(x=list("abc")), path), r"\(dense feature score\) has type string"),
        (lambda path: pq.write_table(good_table(label=list("abc")), path), r"\(label\) has type string; numbers"),
        (lambda path: pq.write_table(good_table(truth=list("abc")), path), r"\(reference\) has type string; numbers"),
        (lambda path: pq.write_table(good_table(ids=[0.5] * 3), path), r"\(sparse feature tags\) has type double"),
        (
            lambda path: pq.write_table(good_table().append_column("ids", pa.array([1, 2, 3])), path),
            "2 columns are named 'ids'",
        ),
    ],
)
def test_one_bad_file_among_many_is_named_on_opening(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    for part in range(5):
        pq.write_table(good_table(), tmp_path / f"part-{part}.parquet")
    spoil(tmp_path / "part-2a.parquet")
    with pytest.raises(DataError, match=rf"part-2a\.parquet: .*{message}"):
        ParquetShards([f"{tmp_path}/*.parquet"], CHECKED, source="data.train")
