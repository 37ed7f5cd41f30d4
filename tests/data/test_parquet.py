"""The reader yields every row once whatever the files look like, and names file, column and value of bad input."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import tiny_table, write_tiny_log

from recsys.data.batch import Batch
from recsys.data.parquet import (
    Columns,
    DataError,
    DenseColumn,
    DomainColumn,
    Jagged,
    Loader,
    ParquetShards,
    Rows,
    SparseColumn,
)
from recsys.data.stream import Epoch, RowSlice

COLUMNS = Columns(
    label="label",
    reference="truth",
    dense={"x": DenseColumn("x", 0.5), "scale": DenseColumn("z", None)},
    sparse={"user": SparseColumn("user", 40), "item": SparseColumn("item", 30), "tags": SparseColumn("tags", 12)},
    domain=DomainColumn("domain", 3),
)

Example = tuple[float, float, int, tuple[float, ...], tuple[tuple[int, ...], ...]]
"""Label, reference, domain, dense features, ids of each sparse feature."""


def open_table(directory: Path, table: pa.Table, columns: Columns, row_group_rows: int = 1000) -> ParquetShards:
    """Shards of one file that holds `table`."""
    pq.write_table(table, directory / "part.parquet", row_group_size=row_group_rows)
    return ParquetShards([str(directory / "*.parquet")], columns, source="data.train")


def read_all(shards: ParquetShards) -> Rows:
    return shards.read([RowSlice(index, 0, count) for index, count in enumerate(shards.row_counts)])


def bags(lists: Jagged) -> list[list[int]]:
    return [part.tolist() for part in np.split(lists.values, lists.offsets[1:-1])]


def examples_of_table(table: pa.Table) -> list[Example]:
    """The table's rows as the model should see them."""
    rows = table.to_pylist()
    return [
        (
            float(row["label"]),
            row["truth"],
            row["domain"],
            (0.5 if row["x"] is None else row["x"], float(np.float32(row["z"]))),
            ((row["user"],), () if row["item"] is None else (row["item"],), tuple(row["tags"] or ())),
        )
        for row in rows
    ]


def examples_of_batch(batch: Batch) -> list[Example]:
    columns = [
        bags(Jagged(feature.values().numpy(), feature.offsets().numpy()))
        for feature in (batch.sparse_features[name] for name in COLUMNS.sparse)
    ]
    return [
        (
            batch.labels[row].item(),
            batch.reference[row].item(),
            int(batch.domain[row]),
            tuple(batch.dense_features[row].tolist()),
            tuple(tuple(column[row]) for column in columns),
        )
        for row in range(len(batch.labels))
    ]


def load(shards: ParquetShards, epoch: Epoch) -> list[list[Batch]]:
    """Every rank's batches."""
    batches = []
    for rank in range(epoch.world_size):
        with Loader(shards, epoch, rank) as loader:
            batches.append(list(loader))
    return batches


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "decoder"))]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """207 rows in 3 files of row groups of 25, and a fourth file without rows."""
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory, {"train": 207}, row_group_rows=25)
    pq.write_table(tiny_table(207, 0).slice(0, 0), directory / "train" / "part-1a.parquet")
    return directory / "train"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 500])
def test_loader_yields_every_row_once_over_all_ranks(log: Path, world_size: int, batch_size: int) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    epoch = Epoch(shards.row_counts, world_size, batch_size, window_row_groups=2)
    ranks = load(shards, epoch)
    found = Counter(example for batches in ranks for batch in batches for example in examples_of_batch(batch))
    assert found == Counter(examples_of_table(tiny_table(207, 0)))
    for rank, batches in enumerate(ranks):
        assert [len(batch.labels) for batch in batches] == [epoch.batch_rows(rank, s) for s in range(epoch.num_steps)]
        for step, batch in enumerate(batches):
            assert batch.loss_scale == world_size / sum(len(other[step].labels) for other in ranks)
            assert batch.sparse_features.stride() == len(batch.dense_features) == len(batch.reference)
            assert batch.sparse_features.keys() == ["user", "item", "tags"]


def test_loader_keeps_the_epochs_order(log: Path) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    (batches,) = load(shards, Epoch(shards.row_counts, 1, 20, shuffle=False))
    assert [e for batch in batches for e in examples_of_batch(batch)] == examples_of_table(tiny_table(207, 0))
    one, again, other = (
        [batch.dense_features.tolist() for batch in load(shards, Epoch(shards.row_counts, 1, 20, seed=seed))[0]]
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_fewer_row_groups_and_rows_than_ranks_give_empty_batches(tmp_path: Path) -> None:
    shards = open_table(tmp_path, tiny_table(3, 0), COLUMNS)
    ranks = load(shards, Epoch(shards.row_counts, 5, 4))
    assert sorted(len(batches[0].labels) for batches in ranks) == [0, 0, 1, 1, 1]
    empty = next(batches[0] for batches in ranks if not len(batches[0].labels))
    assert empty.dense_features.shape == (0, 2)
    assert (empty.domain.shape, empty.domain.dtype) == ((0,), torch.int64)
    assert empty.sparse_features.stride() == 0
    assert empty.sparse_features.keys() == ["user", "item", "tags"]
    assert empty.loss_scale == 5 / 3


def test_features_may_share_a_column_and_be_dense_and_sparse_at_once(tmp_path: Path) -> None:
    columns = Columns(
        "label", None, {"n": DenseColumn("a", None)}, {"one": SparseColumn("a", 9), "two": SparseColumn("a", 9)}
    )
    rows = read_all(open_table(tmp_path, pa.table({"label": [0, 1], "a": [3, 5]}), columns))
    assert rows.dense.tolist() == [[3], [5]]
    assert [bags(jagged) for jagged in rows.sparse] == [[[3], [5]]] * 2
    assert len(rows.reference) == len(rows.domain) == 0


def test_a_loader_that_would_wait_for_ever_says_so(log: Path) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    loader = Loader(shards, Epoch(shards.row_counts, 1, 50), 0)
    with pytest.raises(RuntimeError, match="while it is entered"):
        next(iter(loader))
    with loader:
        assert sum(len(batch.labels) for batch in loader) == sum(shards.row_counts)
        with pytest.raises(RuntimeError, match="yields its batches once"):
            next(iter(loader))


def test_leaving_in_mid_epoch_stops_the_threads(log: Path) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    with Loader(shards, Epoch(shards.row_counts, 1, 1, window_row_groups=1), 0, prefetch_batches=2) as loader:
        next(iter(loader))
        assert loader_threads()
    assert not loader_threads()


def test_loader_reads_ahead_no_further_than_asked(log: Path) -> None:
    class Counting(ParquetShards):
        reads = 0

        def read(self, slices: Sequence[RowSlice]) -> Rows:
            self.reads += 1
            return super().read(slices)

    shards = Counting([f"{log}/*.parquet"], COLUMNS, source="data.train")
    with Loader(shards, Epoch(shards.row_counts, 1, 25, window_row_groups=1), 0, prefetch_batches=1) as loader:
        next(iter(loader))
        for _ in range(3):  # nothing more comes however long the consumer takes
            threading.Event().wait(0.1)
        assert shards.reads <= 6 < len(shards.row_counts)


def test_an_error_in_the_background_reaches_the_consumer(log: Path) -> None:
    class Broken(ParquetShards):
        def read(self, slices: Sequence[RowSlice]) -> Rows:
            if any(part.row_group == 4 for part in slices):
                raise MemoryError("no room")
            return super().read(slices)

    shards = Broken([f"{log}/*.parquet"], COLUMNS, source="data.train")
    epoch = Epoch(shards.row_counts, 1, 10, shuffle=False, window_row_groups=1)
    seen: list[Batch] = []
    with Loader(shards, epoch, 0) as loader, pytest.raises(MemoryError, match="no room"):
        seen.extend(loader)
    assert 0 < len(seen) < epoch.num_steps
    assert not loader_threads()


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
JUST_IDS = Columns("label", None, {}, {"tags": SparseColumn("ids", 100)})


def ids_table(ids: pa.Array) -> pa.Table:
    return pa.table({"label": np.zeros(len(ids), np.int8), "ids": ids})


@pytest.mark.parametrize("kind", INTEGERS)
def test_ids_of_every_integer_type_and_lists_of_them_are_read(tmp_path: Path, kind: str) -> None:
    integer = getattr(pa, kind)()
    plain = open_table(tmp_path, ids_table(pa.array([99, None, 0], integer)), JUST_IDS)
    assert bags(read_all(plain).sparse[0]) == [[99], [], [0]]
    for lists in (pa.list_, pa.large_list):
        shards = open_table(tmp_path, ids_table(pa.array([[99, 1], None, [], [2]], lists(integer))), JUST_IDS)
        found = read_all(shards).sparse[0]
        assert bags(found) == [[99, 1], [], [], [2]]
        assert (found.values.dtype, found.offsets.dtype) == (np.dtype("int64"),) * 2


def test_dictionary_encoded_ids_are_read(tmp_path: Path) -> None:
    table = ids_table(pa.array([7, 7, None, 8]).dictionary_encode())
    assert bags(read_all(open_table(tmp_path, table, JUST_IDS)).sparse[0]) == [[7], [7], [], [8]]


def test_parts_of_row_groups_of_lists_are_read(tmp_path: Path) -> None:
    ids = [[row] * (row % 3) if row % 4 else None for row in range(50)]
    shards = open_table(tmp_path, ids_table(pa.array(ids, pa.list_(pa.int64()))), JUST_IDS, row_group_rows=20)
    rows = shards.read([RowSlice(2, 3, 9), RowSlice(0, 19, 20), RowSlice(1, 5, 5)])
    assert bags(rows.sparse[0]) == [ids[row] or [] for row in [*range(43, 49), 19]]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1.0, 2.0]),
        pa.array(["1", "2"]),
        pa.array([True, False]),
        pa.nulls(2),
        pa.array([[1.0], [2.0]]),
        pa.array([[[1]], [[2]]]),
        pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
        pa.array([{"id": 1}, {"id": 2}]),
    ],
    ids=lambda array: str(array.type),
)
def test_ids_of_any_other_type_are_refused_on_opening(tmp_path: Path, ids: pa.Array) -> None:
    with pytest.raises(DataError, match=r"part\.parquet: column 'ids' \(sparse feature tags\) has type") as error:
        open_table(tmp_path, ids_table(ids), JUST_IDS)
    assert str(error.value).endswith("integers or lists of integers are needed")


NUMBERS = [*INTEGERS, "bool_", "float16", "float32", "float64"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_labels_and_dense_features_of_every_numeric_type_are_read(tmp_path: Path, kind: str) -> None:
    numbers = pa.array(np.array([0, 1, 1]).astype(kind.strip("_")))
    gaps = pa.array(np.array([0, 1, 1]).astype(kind.strip("_")), mask=np.array([False, True, False]))
    columns = Columns(
        "label", "label", {"a": DenseColumn("label", None), "b": DenseColumn("gaps", -2.5)}, JUST_IDS.sparse
    )
    table = pa.table({"label": numbers, "gaps": gaps, "ids": [1, 2, 3]})
    rows = read_all(open_table(tmp_path, table, columns))
    assert rows.labels.tolist() == rows.reference.tolist() == [0, 1, 1]
    assert rows.dense.tolist() == [[0, 0], [1, -2.5], [1, 1]]
    assert [array.dtype for array in (rows.labels, rows.reference, rows.dense)] == [np.float32, np.float64, np.float32]


@pytest.mark.parametrize("kind", INTEGERS)
def test_domains_of_every_integer_type_are_read_and_taken_along(tmp_path: Path, kind: str) -> None:
    columns = Columns("label", None, {}, JUST_IDS.sparse, DomainColumn("part", 100))
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "part": pa.array([99, 0, 5], getattr(pa, kind)())})
    rows = read_all(open_table(tmp_path, table, columns, row_group_rows=2))
    assert (rows.domain.tolist(), rows.domain.dtype) == ([99, 0, 5], np.int64)
    assert rows.take(np.array([2, 0])).slice(0, 1).domain.tolist() == [5]
    assert Rows.none(columns).domain.tolist() == []


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
    columns = Columns("label", None, {}, JUST_IDS.sparse, DomainColumn("part", 3))
    shards = open_table(tmp_path, pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "part": domain}), columns)
    with pytest.raises(DataError) as error:
        read_all(shards)
    assert str(error.value).startswith(f"{tmp_path / 'part.parquet'}, row group 0: {message}"[:60])
    assert message in str(error.value)


@pytest.mark.parametrize("domain", [[0.0, 1.0], ["a", "b"], [[0], [1]]], ids=str)
def test_domain_that_is_no_integer_is_refused_on_opening(tmp_path: Path, domain: Any) -> None:
    columns = Columns("label", None, {}, JUST_IDS.sparse, DomainColumn("part", 3))
    with pytest.raises(DataError, match=r"column 'part' \(domain\) has type .*; integers are needed"):
        open_table(tmp_path, pa.table({"label": [0, 1], "ids": [1, 2], "part": domain}), columns)


@pytest.mark.filterwarnings("error")
def test_dense_integers_beyond_float_precision_are_rounded_beside_nulls_too(tmp_path: Path) -> None:
    columns = Columns("label", None, {"big": DenseColumn("big", 0.0)}, JUST_IDS.sparse)
    table = pa.table({"label": [0, 1], "ids": [1, 1], "big": pa.array([2**60 + 1, None])})
    assert read_all(open_table(tmp_path, table, columns)).dense.tolist() == [[2.0**60], [0.0]]


@pytest.mark.parametrize("kind", NUMBERS)
def test_log1p_is_taken_in_full_precision_after_filling(tmp_path: Path, kind: str) -> None:
    values = np.array([0, 1, 100]).astype(kind.strip("_"))
    plain, numbers = pa.array(values), pa.array(values, mask=np.array([True, False, False]))
    columns = Columns(
        "label", None, {"a": DenseColumn("a", 9.0, True), "b": DenseColumn("b", None, True)}, JUST_IDS.sparse
    )
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "a": numbers, "b": plain})
    last = float(values[2])
    wanted = np.log1p([[9.0, 0.0], [1.0, 1.0], [last, last]]).astype(np.float32)
    assert read_all(open_table(tmp_path, table, columns)).dense.tolist() == wanted.tolist()


def test_log1p_of_values_of_minus_1_and_below_is_refused(tmp_path: Path) -> None:
    columns = Columns("label", None, {"a": DenseColumn("a", None, True)}, JUST_IDS.sparse)
    table = pa.table({"label": [0, 1, 1], "ids": [1, 2, 3], "a": [-1, -2, 0]})
    with pytest.raises(DataError, match=r"dense feature a .* has 2 values .* after log1p"):
        read_all(open_table(tmp_path, table, columns))


GOOD: dict[str, Any] = {"label": [0, 1, 1], "truth": [0.1, 0.2, 0.3], "x": [1.0, 2.0, 3.0], "ids": [1, 2, 3]}
CHECKED = Columns("label", "truth", {"score": DenseColumn("x", None)}, {"tags": SparseColumn("ids", 10)})


def good_table(**changed: Any) -> pa.Table:
    return pa.table({**GOOD, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [0, 2, 1]}, "label column 'label' has 1 value other than 0 and 1, such as 2; make it binary"),
        ({"label": [0, -1, -1]}, "label column 'label' has 2 values other than 0 and 1, such as -1"),
        ({"label": [0, 0.5, 1]}, "such as 0.5"),
        ({"label": [0, 1 + 1e-9, 1]}, "such as 1.000000001"),
        ({"label": [0, float("nan"), 1]}, "such as nan"),
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
        read_all(shards)
    assert str(error.value).startswith(f"{tmp_path / 'part.parquet'}, row group 0: ")
    assert message in str(error.value)


def test_bad_value_in_a_later_row_group_names_that_row_group(tmp_path: Path) -> None:
    shards = open_table(tmp_path, good_table(label=[0, 1, 7]), CHECKED, row_group_rows=2)
    assert len(shards.read([RowSlice(0, 0, 2)])) == 2
    with pytest.raises(DataError, match=r"row group 1: label column 'label' has 1 value .* such as 7"):
        shards.read([RowSlice(1, 0, 1)])


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
        (Path.mkdir, "not a readable Parquet file"),
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "cannot be read: .*No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read"),
        (lambda path: path.write_bytes(b"PAR1" + b"\xff" * 400 + path.read_bytes()[404:]), "cannot be read"),
        (lambda path: pq.write_table(good_table(), path, row_group_size=2), "has 2 rows, but had 3"),
        (lambda path: pq.write_table(good_table().drop(["ids"]), path), "no column 'ids'"),
        (lambda path: pq.write_table(good_table(ids=list("abc")), path), "has type string"),
    ],
)
def test_file_that_changes_after_opening_is_named_by_the_loader(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shards = open_table(tmp_path, good_table(), CHECKED)
    spoil(tmp_path / "part.parquet")
    with (
        Loader(shards, Epoch(shards.row_counts, 1, 2), 0) as loader,
        pytest.raises(DataError, match=rf"part\.parquet.*{message}"),
    ):
        list(loader)


LISTS = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8)


def jagged(lists: list[list[int]]) -> Jagged:
    offsets = np.cumsum([0, *map(len, lists)])
    return Jagged(np.array([i for ids in lists for i in ids], dtype=np.int64), offsets)


def rows_of(lists: list[list[int]]) -> Rows:
    numbers: NDArray[np.float32] = np.arange(len(lists), dtype=np.float32)
    return Rows(numbers % 2, np.empty(0), np.empty(0, np.int64), numbers[:, None], (jagged(lists), jagged(lists[::-1])))


@settings(deadline=None)
@given(LISTS.filter(len), st.data())
def test_taking_rows_equals_indexing_lists(lists: list[list[int]], data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1))), dtype=np.int64)
    taken = rows_of(lists).take(rows)
    wanted = jagged([lists[row] for row in rows])
    assert taken.sparse[0].values.tolist() == wanted.values.tolist()
    assert taken.sparse[0].offsets.tolist() == wanted.offsets.tolist()
    assert taken.dense[:, 0].tolist() == rows.tolist()
    assert taken.labels.tolist() == (rows % 2).tolist()


@settings(deadline=None)
@given(LISTS, st.integers(0, 8), st.integers(0, 8))
def test_slices_put_together_again_are_the_whole(lists: list[list[int]], one: int, other: int) -> None:
    low, high = sorted(min(cut, len(lists)) for cut in (one, other))
    whole = rows_of(lists)
    parts = [whole.slice(0, low), whole.slice(low, high), whole.slice(high, len(lists))]
    assert [len(part) for part in parts] == [low, high - low, len(lists) - high]
    together = Rows.concatenate(parts)
    for found, wanted in zip(together.sparse, whole.sparse, strict=True):
        assert found.values.tolist() == wanted.values.tolist()
        assert found.offsets.tolist() == wanted.offsets.tolist()
    assert together.dense.tolist() == whole.dense.tolist()
    assert together.labels.tolist() == whole.labels.tolist()


@settings(deadline=None)
@given(LISTS, LISTS)
def test_concatenating_equals_joining_lists(first: list[list[int]], second: list[list[int]]) -> None:
    together = Rows.concatenate([rows_of(first), rows_of(second)])
    wanted = jagged([*first, *second])
    assert together.sparse[0].values.tolist() == wanted.values.tolist()
    assert together.sparse[0].offsets.tolist() == wanted.offsets.tolist()
