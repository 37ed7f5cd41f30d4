"""A batch is traced to its rows and read again as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import as_config
from tiny import tiny_config, write_tiny_log

from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.data.order import Epoch, RowSlice
from recsys.data.origins import Origin, in_words, origins, read_again, write_batch
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits


def opened(directory: Path, tmp_path: Path, **data: Any) -> ParquetShards:
    raw = tiny_config(directory, tmp_path / "out")
    raw["data"] |= data
    return open_splits(as_config(raw, tmp_path), ["train"])["train"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train split of which some rows have no label."""
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory, {"train": 400, "valid": 60, "test": 60})
    for path in (directory / "train").glob("*.parquet"):
        table = pq.read_table(path)
        missing = np.arange(len(table)) % 7 == 3
        label = pa.array(table["label"].to_numpy(), mask=missing)
        table = table.set_column(table.schema.get_field_index("label"), "label", label)
        table = table.append_column("weight", pa.array(np.arange(len(table)) % 5 / 2))
        pq.write_table(table, path, row_group_size=50)
    return directory


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("dense_features", "labels", "domain", "weight")]
    pairs += [(one.sparse_features.values(), other.sparse_features.values())]
    pairs += [(one.sparse_features.lengths(), other.sparse_features.lengths())]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 2])
def test_every_batch_is_read_again_as_the_loader_made_it(log: Path, tmp_path: Path, shuffle: bool, taken: int) -> None:
    shards = opened(log, tmp_path, label_null="skip", weight="weight")
    epoch = Epoch(shards.row_counts, 2, 30, seed=5, epoch=3, shuffle=shuffle, window_row_groups=3)
    if taken:  # and the rest goes on under another layout
        epoch = replace(epoch, world_size=3, batch_size=17).resumed(epoch.position(taken))
    seen: set[tuple[int, int]] = set()
    for rank in range(epoch.world_size):
        with Loader(shards, [epoch], rank) as loader:
            for step, batch in enumerate(loader):
                again = read_again(shards, origins(epoch, rank, step))
                assert same(batch, again.batch)
                places = list(zip(again.row_groups.tolist(), again.rows.tolist(), strict=True))
                assert seen.isdisjoint(places) and len(set(places)) == len(places) == len(batch.labels)
                seen.update(places)
        assert step + 1 == epoch.num_steps
    assert taken or len(seen) == 400 - 3 * 19  # all that have a label


def test_what_is_written_are_the_rows_of_the_files(log: Path, tmp_path: Path) -> None:
    shards = opened(log, tmp_path, label_null="skip", weight="weight")
    epoch = Epoch(shards.row_counts, 2, 32, seed=1, epoch=0, window_row_groups=3)
    write_batch(tmp_path / "batch.parquet", shards, read_again(shards, origins(epoch, 1, 4)))
    assert not list(tmp_path.glob("*.partial"))
    found = pq.read_table(tmp_path / "batch.parquet").to_pylist()
    assert 20 < len(found) <= 32 and len({(row["file"], row["row_group"]) for row in found}) > 1
    for row in found:
        source = pq.ParquetFile(row["file"]).read_row_group(row["row_group"]).slice(row["row"], 1).to_pylist()[0]
        assert (row["label"], row["weight"]) == (source["label"], source["weight"])
        assert row["dense/x"] == np.float32(source["x"] or 0.0) and row["dense/scale"] == np.float32(source["z"])
        assert row["sparse/user"] == [source["user"]]
        assert row["sparse/item"] == ([] if source["item"] is None else [source["item"]])
        assert row["sparse/tags"] == (source["tags"] or [])


def test_a_lane_that_has_ended_leaves_a_file_without_rows(log: Path, tmp_path: Path) -> None:
    shards = opened(log, tmp_path, label_null="skip")
    epoch = Epoch(shards.row_counts, 3, 133, seed=1)
    assert epoch.batch_rows(0, 1) == 0 and epoch.num_steps == 2
    assert origins(epoch, 0, 1) == [] and in_words(shards, []) == "no file"
    write_batch(tmp_path / "batch.parquet", shards, read_again(shards, []))
    assert len(pq.read_table(tmp_path / "batch.parquet")) == 0


def test_many_files_are_counted_after_the_first(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log", files=7, row_group_rows=10)
    shards = opened(tmp_path / "log", tmp_path)
    all_rows = [Origin(RowSlice(group, 0, 1), np.zeros(1, np.int64)) for group in range(len(shards.row_counts))]
    part = f"{tmp_path}/log/train/part-"
    groups = "(row groups 0, 1, 2, 3 and 9 more)"
    named = ", ".join(f"{part}{number}.parquet {groups}" for number in range(4))
    assert in_words(shards, all_rows) == f"{named} and 3 more files"
    assert in_words(shards, all_rows[1:2]) == f"{part}0.parquet (row group 1)"
    assert (
        in_words(shards, all_rows[11:14]) == f"{part}0.parquet (row groups 11 and 12) and {part}1.parquet (row group 0)"
    )
