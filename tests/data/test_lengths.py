"""Mean lengths of lists, told without reading them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import as_config
from tiny import tiny_config, write_tiny_log

from recsys.data import parquet
from recsys.data.lengths import mean_lengths
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits
from recsys.data.storage import DataError


def opened(directory: Path, **tags: Any) -> ParquetShards:
    raw = tiny_config(directory / "log", directory / "out")
    raw["features"]["sparse"]["tags"] |= tags
    return open_splits(as_config(raw, directory), ["train"])["train"]


def lengths(directory: Path, **tags: Any) -> dict[str, float]:
    return mean_lengths(opened(directory, **tags))


def counted(directory: Path) -> float:
    """Of the tags, each empty or null list as one."""
    tags = [
        row for file in sorted((directory / "log/train").iterdir()) for row in pq.read_table(file)["tags"].to_pylist()
    ]
    return sum(max(1, len(row or ())) for row in tags) / len(tags)


@pytest.mark.parametrize("room", [parquet.FOOTER_BYTES, 0])
def test_footers_tell_the_mean_length_of_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(parquet, "FOOTER_BYTES", room)
    write_tiny_log(tmp_path / "log")
    assert lengths(tmp_path) == {"user": 1.0, "item": 1.0, "tags": pytest.approx(counted(tmp_path))}
    assert lengths(tmp_path, max_length=1)["tags"] == 1.0


def test_many_row_groups_are_asked_evenly(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log", {"train": 3000}, files=2, row_group_rows=2)  # 1,500 row groups
    mean = lengths(tmp_path)["tags"]
    assert mean != counted(tmp_path)
    assert mean == pytest.approx(counted(tmp_path), rel=0.1)


def test_lists_that_are_texts_are_read(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    for file in (tmp_path / "log/train").iterdir():
        table = pq.read_table(file)
        texts = pa.array(["1|2|3", "", None, "4|5"] * (len(table) // 4 + 1))[: len(table)]
        pq.write_table(table.set_column(table.schema.get_field_index("tags"), "tags", texts), file, row_group_size=40)
    assert lengths(tmp_path, list_text={"separator": "|", "items": "ints"})["tags"] == 5 / 4


def test_a_footer_that_counts_more_than_can_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_log(tmp_path / "log")
    shards = opened(tmp_path)
    monkeypatch.setattr(parquet, "MOST_ROWS", 100)
    with pytest.raises(
        DataError, match=r"part-0.parquet, row group 0: column 'tags' has \d+ values by its footer, where 0"
    ):
        mean_lengths(shards)
