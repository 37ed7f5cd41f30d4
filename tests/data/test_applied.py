"""Shards say by which mapping their rows were made, and no other is taken for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from reading import ids, read_first

from recsys.config import Config, ConfigError, load_config
from recsys.data.features import build_columns
from recsys.data.hashing import hash_ids
from recsys.data.kinds import read_kinds, write_kinds
from recsys.data.splits import open_splits
from recsys.data.storage import DataError
from recsys.data.vocabulary import save_vocabularies
from recsys.prepare.tabular import convert_text, load_schema

SCHEMA: dict[str, Any] = {
    "label": "clicked",
    "tables": {"item": {"ids": "vocabulary"}, "user": {"ids": "hash", "buckets": 50}, "kept": {"ids": "keep"}},
    "columns": {
        "clicked": {"type": "bool"},
        "item": {"type": "string", "table": "item"},
        "items": {"type": "strings", "table": "item"},
        "user": {"type": "int", "table": "user", "minimum": 2},
        "kept": {"type": "int", "table": "kept"},
    },
    "split": {"by": "order", "valid": 0.2, "test": 0.0},
}
REST = {
    "include": "out/dataset.yaml",
    "data": {"batch_size": 16},
    "model": {"tower": {"type": "mlp", "hidden": [8]}},
    "stages": {"joint": {"trains": "all", "steps": 2, "learning_rate": 1e-3, "sparse_learning_rate": 0.1}},
}


def convert(folder: Path, items: str, **table: Any) -> Path:
    """A data set in `folder/out` of a log of one item for each letter."""
    folder.mkdir()
    lines = [f"{row % 2},{item},{item}|{items[0]},{row},{row % 3}\n" for row, item in enumerate(items)]
    (folder / "log.csv").write_text("clicked,item,items,user,kept\n" + "".join(lines))
    schema = {**SCHEMA, "tables": {**SCHEMA["tables"], **table}}
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    convert_text([folder / "log.csv"], folder / "out", load_schema(folder / "schema.yaml"))
    (folder / "run.yaml").write_text(yaml.safe_dump({**REST, "output_dir": str(folder / "run")}))
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "run.yaml", overrides)


def test_the_shards_of_a_data_set_are_read_by_its_own_config_and_checkpoint(tmp_path: Path) -> None:
    config = config_of(convert(tmp_path / "one", "aabbccddee"))
    columns = open_splits(config, ["train", "valid"])["train"].columns
    save_vocabularies(columns.vocabularies, tmp_path / "saved")
    assert open_splits(config, ["train", "valid"], tmp_path / "saved")["valid"].layout.keys == tuple(columns.sparse)


def test_a_checkpoint_is_not_judged_on_shards_by_another_vocabulary(tmp_path: Path) -> None:
    one = config_of(convert(tmp_path / "one", "aabbccddee"))
    other = convert(tmp_path / "other", "ddaabbccee")
    save_vocabularies(build_columns(one).vocabularies, tmp_path / "saved")
    moved = one.model_copy(update={"data": config_of(other).data})
    with pytest.raises(DataError, match=r"part-00000\.parquet: column 'item' holds rows by .*vocabulary.* take ids"):
        open_splits(moved, ["valid"], tmp_path / "saved")


def test_raw_values_are_read_by_a_checkpoint_of_converted_shards(tmp_path: Path) -> None:
    config = config_of(convert(tmp_path / "one", "aabbccddee"))
    converted = open_splits(config, ["train"])["train"]
    save_vocabularies(converted.columns.vocabularies, tmp_path / "saved")
    (tmp_path / "saved/kinds").mkdir()
    write_kinds(converted.kinds.as_dict(), tmp_path / "saved/kinds")
    raw = {"item": ["a", "e", "?"], "items": ["a|b", "", "e"], "user": [0, 7, 9], "kept": [0, 1, 2]}
    pq.write_table(pa.table(raw), tmp_path / "raw.parquet")
    overrides = [f"features.sparse.{name}.ids.applied=false" for name in ("item", "items", "user")]
    asked = config_of(tmp_path / "one", *overrides, "data.label=null", f"data.test={tmp_path}/raw.parquet")
    shards = open_splits(asked, ["test"], tmp_path / "saved", read_kinds(tmp_path / "saved/kinds"))["test"]
    known = converted.columns.vocabularies["item"].lookup(pa.array(["a", "e", "b"])).tolist()
    found = ids(shards, read_first(shards))
    assert found["item"] == [[known[0]], [known[1]], [0]]
    assert found["items"] == [[known[0], known[2]], [], [known[1]]]
    (users,) = hash_ids(pa.array([2, 7, 9]), 50).reshape(1, -1).tolist()
    assert found["user"] == [[user] for user in users]


@pytest.mark.parametrize(
    ("override", "column"),
    [
        ("features.sparse.user.ids.salt=1", "user"),
        ("features.sparse.user.ids.buckets=49", "user"),
        ("features.sparse.user.minimum=3", "user"),
        ("features.sparse.user.ids={type: bucketize, boundaries: [1.0], applied: true}", "user"),
        ("features.sparse.user.ids={type: datetime, part: hour, applied: true}", "user"),
        ("features.sparse.items.ids.out_of_vocabulary=empty", "items"),
    ],
)
def test_another_mapping_is_refused(tmp_path: Path, override: str, column: str) -> None:
    convert(tmp_path / "one", "aabbccddee")
    with pytest.raises(
        DataError, match=rf"column '{column}' holds rows by .*, but features\.sparse\.{column}\.ids is "
    ):
        open_splits(config_of(tmp_path / "one", override), ["train"])


def test_rows_are_not_mapped_again(tmp_path: Path) -> None:
    config = config_of(convert(tmp_path / "one", "aabbccddee"), "features.sparse.user.ids={type: hash}")
    with pytest.raises(DataError, match=r"column 'user' holds rows of a table already, .* set applied to true"):
        open_splits(config, ["train"])
    # Neither where a model is asked about rows instead of raw values.
    columns = build_columns(config_of(tmp_path / "one"), raw=True)
    asked = pq.read_table(next((tmp_path / "one/out/valid").iterdir()))
    with pytest.raises(DataError, match=r"table: column 'user' holds rows of a table already"):
        columns.check_features(
            asked.select(["user", "kept"])
            .append_column("item", pa.array(["a"] * len(asked)))
            .append_column("items", pa.array(["a|b"] * len(asked)))
            .schema,
            "table",
        )


def test_rows_that_come_as_they_are_need_no_mapping(tmp_path: Path) -> None:
    convert(tmp_path / "one", "aabbccddee")
    config = config_of(tmp_path / "one", "features.sparse.user.ids=null", "features.sparse.user.minimum=null")
    assert open_splits(config, ["train"])["train"].row_counts == (8,)


def test_shards_that_say_nothing_are_believed(tmp_path: Path) -> None:
    convert(tmp_path / "one", "aabbccddee")
    for file in (tmp_path / "one/out").glob("*/*.parquet"):
        table = pq.read_table(file)
        schema = pa.schema([field.remove_metadata() for field in table.schema])
        pq.write_table(pa.table(table.columns, schema=schema), file)
    config = config_of(tmp_path / "one", "features.sparse.user.ids.salt=1")
    assert open_splits(config, ["train"])["train"].row_counts == (8,)


def test_every_file_is_asked(tmp_path: Path) -> None:
    convert(tmp_path / "one", "aabbccddee")
    (part,) = (tmp_path / "one/out/train").iterdir()
    table = pq.read_table(part)
    field = table.schema.field("user")
    told = field.metadata[b"hilorec.ids"].replace(b'"salt": 0', b'"salt": 7')
    salted = field.with_metadata({b"hilorec.ids": told})
    other = table.set_column(table.schema.get_field_index("user"), salted, table["user"])
    pq.write_table(other, part.with_name("part-00001.parquet"))
    with pytest.raises(DataError, match=r'part-00001\.parquet: column \'user\' holds rows by .*"salt": 7'):
        open_splits(config_of(tmp_path / "one"), ["train"])


def test_buckets_of_applied_hashes_are_named(tmp_path: Path) -> None:
    convert(tmp_path / "one", "aabbccddee")
    with pytest.raises(ConfigError, match=r"features\.sparse\.user\.ids.*applied needs buckets"):
        config_of(tmp_path / "one", "features.sparse.user.ids={type: hash, applied: true}")
