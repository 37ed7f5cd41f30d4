"""What a column holds is decided once: over all files of all splits, and for whatever is read after training."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module, run_ranks
from reading import ids
from runs import as_config, train_on
from tiny import tiny_config, tiny_table

from recsys.config import Config
from recsys.data.hashing import hash_ids
from recsys.data.kinds import Kinds, read_kinds, write_kinds
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits
from recsys.data.storage import DataError
from recsys.prepare.validation import validate
from recsys.prepare.vocabularies import build_vocabularies

REGIONS = {"train": ("01001", "01002", "2A001"), "valid": ("01001", "01002"), "test": ("01002",)}


def write_regions(directory: Path, rows: int = 120) -> None:
    """Splits by a Hive key that looks like numbers in all splits but one."""
    for number, (split, regions) in enumerate(REGIONS.items()):
        for region in regions:
            folder = directory / split / f"region={region}"
            folder.mkdir(parents=True)
            table = tiny_table(rows, number).append_column("place", [np.arange(rows)])
            pq.write_table(table, folder / "part.parquet", row_group_size=70)


def config_of(directory: Path, feature: dict[str, Any], **data: Any) -> Config:
    """The tiny config with one more feature, `region`, of a table of 997 rows."""
    raw = tiny_config(directory, directory / "out")
    raw["data"] |= {**{split: f"{directory}/{split}/**/*.parquet" for split in REGIONS}, **data}
    raw["tables"]["region"] = {"num_embeddings": 997, "embedding_dim": 4}
    raw["features"]["sparse"]["region"] = {"table": "region", **feature}
    return as_config(raw, directory)


HASHED = {"ids": {"type": "hash"}}


def regions_of(shards: ParquetShards) -> set[int]:
    return {
        row
        for group in range(len(shards.row_counts))
        for rows in ids(shards, shards.read(RowSlice(group, 0, 1)))["region"]
        for row in rows
    }


def rows_of(*regions: str | int) -> set[int]:
    return set(hash_ids(pa.array(regions), 997).tolist())


def test_a_key_of_paths_has_one_type_over_all_splits(tmp_path: Path) -> None:
    write_regions(tmp_path)
    config = config_of(tmp_path, HASHED)
    splits = open_splits(config, config.data.splits)
    assert {name: regions_of(shards) for name, shards in splits.items()} == {
        name: rows_of(*regions) for name, regions in REGIONS.items()
    }
    assert splits["train"].kinds.as_dict()["region"] == "strings"
    # A split that is opened alone is read alike, as long as the others can be found.
    assert regions_of(open_splits(config, ["test"])["test"]) == rows_of("01002")
    report = validate(config)
    assert not [it for it in report.errors if "region" in it.of]
    assert report.splits["test"].sparse["region"].least in rows_of("01002")


def test_keys_that_are_numbers_everywhere_are_numbers(tmp_path: Path) -> None:
    write_regions(tmp_path)
    (tmp_path / "train/region=2A001").rename(tmp_path / "train/region=7")
    splits = open_splits(config_of(tmp_path, HASHED), list(REGIONS))
    assert regions_of(splits["train"]) == rows_of(1001, 1002, 7)
    assert regions_of(splits["test"]) == rows_of(1002)


def test_a_checkpoint_decides_for_whatever_is_read_with_it(tmp_path: Path) -> None:
    write_regions(tmp_path)
    alone = config_of(tmp_path, HASHED, train=f"{tmp_path}/gone/*", valid=None)
    assert regions_of(open_splits(alone, ["test"])["test"]) == rows_of(1002)
    text, numbers = Kinds({"region": "strings"}, "training"), Kinds({"region": "numbers"}, "training")
    assert regions_of(open_splits(alone, ["test"], kinds=text)["test"]) == rows_of("01002")
    assert regions_of(open_splits(alone, ["test"], kinds=numbers)["test"]) == rows_of(1002)
    of_train = config_of(tmp_path, HASHED, test=f"{tmp_path}/train/**/*.parquet")
    with pytest.raises(
        DataError, match=r"region=2A001/part.parquet: region=2A001 on its path is no integer, as it was"
    ):
        open_splits(of_train, ["test"], kinds=Kinds({"region": "numbers"}, "training"))


def test_the_vocabulary_of_a_key_is_counted_as_it_is_read(tmp_path: Path) -> None:
    write_regions(tmp_path)
    file = tmp_path / "regions.parquet"
    (tmp_path / "train/region=2A001").rename(tmp_path / "valid/region=2A001")
    config = config_of(tmp_path, {"ids": {"type": "vocabulary", "file": str(file)}})
    build_vocabularies(config)
    assert pq.read_table(file)["value"].to_pylist() == ["01001", "01002"]
    splits = open_splits(config, config.data.splits)
    assert [regions_of(splits[name]) for name in REGIONS] == [{1, 2}, {0, 1, 2}, {2}]


def rewritten(directory: Path, split: str, column: pa.Array | list[Any]) -> None:
    path = next((directory / split).rglob("*.parquet"))
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(table.schema.get_field_index("place"), "place", [column]), path)


TEXT = pa.array(["7"] * 120)


@pytest.mark.parametrize(
    "other", [TEXT, TEXT.dictionary_encode(), pa.array([["7"]] * 120)], ids=lambda it: str(it.type)
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_column_that_is_text_here_and_numbers_there_is_refused_by_name(
    tmp_path: Path, split: str, other: pa.Array
) -> None:
    write_regions(tmp_path)
    config = config_of(tmp_path, {**HASHED, "column": "place"})
    assert open_splits(config, list(REGIONS))["train"].kinds.as_dict()["region"] == "numbers"
    rewritten(tmp_path, split, other)
    with pytest.raises(DataError) as error:
        open_splits(config, list(REGIONS))
    message = str(error.value)
    assert "part.parquet: column 'place' (sparse feature region) holds " in message
    assert "strings" in message and "numbers" in message and str(tmp_path / "train") in message


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.list_(pa.int32())], ids=str)
def test_numbers_of_any_type_are_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    write_regions(tmp_path)
    values = pa.array([[7] if pa.types.is_list(kind) else 7] * 120, kind)
    rewritten(tmp_path, "test", values)
    splits = open_splits(config_of(tmp_path, {**HASHED, "column": "place"}), list(REGIONS))
    assert regions_of(splits["test"]) == rows_of(7)


def test_lists_of_numbers_may_be_text_in_one_file_alone(tmp_path: Path) -> None:
    write_regions(tmp_path)
    rewritten(tmp_path, "train", pa.array(["7|8"] * 120))
    feature = {**HASHED, "column": "place", "list_text": {"separator": "|", "items": "ints"}}
    splits = open_splits(config_of(tmp_path, feature), list(REGIONS))
    assert splits["train"].kinds.as_dict()["region"] == "numbers"
    as_texts = {**feature, "list_text": {"separator": "|", "items": "strings"}}
    with pytest.raises(DataError, match=r"holds (numbers, but strings|strings, but numbers) in"):
        open_splits(config_of(tmp_path, as_texts), list(REGIONS))


def test_kinds_are_kept(tmp_path: Path) -> None:
    write_kinds({"a": "strings"}, tmp_path)
    assert read_kinds(tmp_path).as_dict() == {"a": "strings"}
    assert read_kinds(tmp_path / "older").as_dict() == {}
    for damaged in ("", "[]", '{"a": 1}'):
        (tmp_path / "kinds.json").write_text(damaged)
        with pytest.raises(DataError, match=r"kinds.json .*; restore it"):
            read_kinds(tmp_path)


def test_an_evaluation_maps_other_data_as_training_did(tmp_path: Path) -> None:
    write_regions(tmp_path)
    config = config_of(tmp_path, HASHED)
    (summary,) = run_ranks(1, train_on, config)
    checkpoint = Path(summary["checkpoint"])
    assert json.loads((checkpoint / "kinds.json").read_text())["region"] == "strings"
    moved = tmp_path / "elsewhere"
    (tmp_path / "test").rename(moved)
    for split in ("train", "valid"):
        (tmp_path / split).rename(tmp_path / f"no-{split}")
    arguments = ("--checkpoint", str(checkpoint), "--json", f"data.test={moved}")
    (finished,) = run_module(1, "recsys.evaluate", *arguments)
    assert finished.code == 0, finished.stderr
    assert json.loads(finished.stdout)["model"]["log_loss"] == pytest.approx(summary["test"]["log_loss"], rel=1e-6)
    part = moved / "region=01002/part.parquet"
    pq.write_table(pq.read_table(part, partitioning=None).append_column("region", [np.arange(120)]), part)
    part.parent.rename(moved / "other")
    (finished,) = run_module(1, "recsys.evaluate", *arguments)
    assert finished.code == 2 and "holds numbers, but strings in the rows that" in finished.stderr


@pytest.mark.parametrize(
    "content", [b"[]", b"1", b'{"a": 1}', b'{"a": "numbers\\nno"}', b'{"a": null}', b"[" * 100_000]
)
def test_kinds_of_any_other_shape_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kinds.json").write_bytes(content)
    with pytest.raises(DataError, match=r"kinds\.json (does not say what features|cannot be read: .*;)"):
        read_kinds(tmp_path)


def test_a_pipe_or_a_link_in_place_of_kinds_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "kinds.json").symlink_to("/no/such/file")
    with pytest.raises(DataError, match=r"kinds\.json cannot be read: it is a link; restore it"):
        read_kinds(tmp_path)
    (tmp_path / "kinds.json").unlink()
    os.mkfifo(tmp_path / "kinds.json")
    with pytest.raises(DataError, match=r"kinds\.json cannot be read: it is no regular file; restore it"):
        read_kinds(tmp_path)
