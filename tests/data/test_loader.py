"""The loader yields every row once whatever the files look like, keeps to the order, and fails where it must."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from reading import bags, dense_column, domain_column, open_table, sparse_column
from tiny import tiny_table, write_tiny_log

from recsys.data.batch import Batch
from recsys.data.features import Columns
from recsys.data.loader import Loader
from recsys.data.order import Epoch, Position, RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.rows import Jagged, Rows
from recsys.data.storage import DataError

COLUMNS = Columns(
    label="label",
    reference="truth",
    dense={"x": dense_column("x", 0.5), "scale": dense_column("z", None)},
    sparse={"user": sparse_column("user", 40), "item": sparse_column("item", 30), "tags": sparse_column("tags", 12)},
    domain=domain_column("domain", 3),
)

Example = tuple[float, float, int, tuple[float, ...], tuple[tuple[int, ...], ...]]
"""Label, reference, domain, dense features, ids of each sparse feature."""


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
        with Loader(shards, [epoch], rank) as loader:
            batches.append(list(loader))
    return batches


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "reader"))]


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


@pytest.mark.parametrize("reader_threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(log: Path, reader_threads: int) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    epochs = [Epoch(shards.row_counts, 2, 16, seed=3, epoch=number, window_row_groups=2) for number in range(2)]
    for rank in range(2):
        with Loader(shards, epochs, rank, reader_threads=reader_threads) as loader:
            found = [[examples_of_batch(batch) for batch in loader] for _ in epochs]
        assert found == [[examples_of_batch(batch) for batch in load(shards, epoch)[rank]] for epoch in epochs]


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 10), (1, 10), (3, 7), (4, 64)])
def test_loaders_go_on_from_a_position_with_the_rows_that_are_left(log: Path, world_size: int, batch_size: int) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    first = Epoch(shards.row_counts, 2, 10, seed=5, epoch=2, window_row_groups=3)
    read = [example for batches in load(shards, first) for batch in batches[:4] for example in examples_of_batch(batch)]
    assert len(read) == 80
    position = Position.from_json(first.position(4).to_json())
    resumed = Epoch(shards.row_counts, world_size, batch_size, seed=5, window_row_groups=3).resumed(position)
    ranks = load(shards, resumed)
    left = [example for batches in ranks for batch in batches for example in examples_of_batch(batch)]
    assert Counter(read + left) == Counter(examples_of_table(tiny_table(207, 0)))
    for step, batches in enumerate(zip(*ranks, strict=True), start=resumed.first_step):
        assert {batch.loss_scale for batch in batches} == {world_size / resumed.global_batch_rows(step)}
    if (world_size, batch_size) == (2, 10):
        assert [len(batches) for batches in ranks] == [first.num_steps - 4] * 2


def test_the_next_epoch_is_read_before_the_last_has_ended(log: Path) -> None:
    class Recording(ParquetShards):
        reads = 0

        def read(self, part: RowSlice, order: NDArray[np.int64] | None = None) -> Rows:
            self.reads += 1
            return super().read(part, order)

    shards = Recording([f"{log}/*.parquet"], COLUMNS, source="data.train")
    order = Epoch(shards.row_counts, 1, 207, window_row_groups=len(shards.row_counts))
    once = sum(len(piece.window.slices) for piece in order.pieces(0))
    with Loader(shards, [order, replace(order, epoch=1), replace(order, epoch=2)], 0, prefetch_batches=1) as loader:
        batches = iter(loader)
        next(batches)
        for _ in range(100):  # the last batch of the first epoch has not been followed by its end yet
            if shards.reads >= 2 * once:
                break
            threading.Event().wait(0.1)
        assert shards.reads >= 2 * once


def test_a_loader_that_would_wait_for_ever_says_so(log: Path) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    loader = Loader(shards, [Epoch(shards.row_counts, 1, 50)] * 2, 0)
    with pytest.raises(RuntimeError, match="while it is entered"):
        next(iter(loader))
    with loader:
        for _ in range(2):
            assert sum(len(batch.labels) for batch in loader) == sum(shards.row_counts)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="epochs have ended"):
                next(iter(loader))


def test_leaving_in_mid_epoch_stops_the_threads(log: Path) -> None:
    shards = ParquetShards([f"{log}/*.parquet"], COLUMNS, source="data.train")
    with Loader(shards, [Epoch(shards.row_counts, 1, 1, window_row_groups=1)], 0, prefetch_batches=2) as loader:
        next(iter(loader))
        assert loader_threads()
    assert not loader_threads()


def test_loader_reads_ahead_no_further_than_asked(log: Path) -> None:
    class Counting(ParquetShards):
        reads = 0

        def read(self, part: RowSlice, order: NDArray[np.int64] | None = None) -> Rows:
            self.reads += 1
            return super().read(part, order)

    shards = Counting([f"{log}/*.parquet"], COLUMNS, source="data.train")
    with Loader(shards, [Epoch(shards.row_counts, 1, 25, window_row_groups=1)], 0, prefetch_batches=1) as loader:
        next(iter(loader))
        for _ in range(3):  # nothing more comes however long the consumer takes
            threading.Event().wait(0.1)
        assert shards.reads <= 6 < len(shards.row_counts)


def test_an_error_in_the_background_reaches_the_consumer(log: Path) -> None:
    class Broken(ParquetShards):
        def read(self, part: RowSlice, order: NDArray[np.int64] | None = None) -> Rows:
            if part.row_group == 4:
                raise MemoryError("no room")
            return super().read(part, order)

    shards = Broken([f"{log}/*.parquet"], COLUMNS, source="data.train")
    epoch = Epoch(shards.row_counts, 1, 10, shuffle=False, window_row_groups=1)
    seen: list[Batch] = []
    with Loader(shards, [epoch], 0) as loader, pytest.raises(MemoryError, match="no room"):
        seen.extend(loader)
    assert 0 < len(seen) < epoch.num_steps
    assert not loader_threads()


JUST_IDS = Columns("label", None, {}, {"tags": sparse_column("ids", 10)})


def id_table(ids: Sequence[Any] = (1, 2, 3)) -> pa.Table:
    return pa.table({"label": [0, 1, 1], "ids": list(ids)})


REPLACED = "changed since the run began"


def same_to_look_at(path: Path, content: bytes) -> None:
    """Replace a file's content in a way that neither its size nor its time tells of."""
    before = path.stat()
    assert before.st_size == len(content)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "row group 0: cannot be read: there is no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), REPLACED),
        (lambda path: pq.write_table(id_table(), path, row_group_size=2), REPLACED),
        (lambda path: pq.write_table(id_table().drop(["ids"]), path), REPLACED),
        (lambda path: same_to_look_at(path, b"PAR1" + b"\xff" * 100 + path.read_bytes()[104:]), "row group 0: column"),
    ],
)
def test_file_that_changes_after_opening_is_named_by_the_loader(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shards = open_table(tmp_path, id_table(), JUST_IDS)
    spoil(tmp_path / "part.parquet")
    with (
        Loader(shards, [Epoch(shards.row_counts, 1, 2)], 0) as loader,
        pytest.raises(DataError, match=rf"part\.parquet.*{message}"),
    ):
        list(loader)
