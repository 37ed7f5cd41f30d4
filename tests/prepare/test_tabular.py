"""What a schema says is what becomes of the files: every value, every split, every vocabulary, every refusal."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.config import ConfigError, load_config
from recsys.data.storage import DataError
from recsys.prepare import splitting, writing
from recsys.prepare.splitting import SPLITS, SplitSchema
from recsys.prepare.tabular import ColumnSchema, Schema, TableSchema, convert_text, load_schema

ROWS = 400
SCHEMA: dict[str, Any] = {
    "name": "clicks",
    "nulls": ["", "NA"],
    "label": "clicked",
    "domain": {"column": "page", "num_domains": 3},
    "tables": {
        "user": {"ids": "hash", "buckets": 50, "seed": 3},
        "item": {"ids": "vocabulary", "min_count": 4},
        "device": {"ids": "keep"},
    },
    "columns": {
        "clicked": {"type": "bool"},
        "user": {"type": "string", "source": "user id", "table": "user"},
        "item": {"type": "string", "table": "item"},
        "seen": {"type": "strings", "separator": ";", "table": "item"},
        "device": {"type": "int", "table": "device"},
        "price": {"type": "float", "dense": {"fill": 0.0, "log1p": True}, "minimum": 0.5},
        "page": {"type": "int"},
        "at": {"type": "timestamp"},
    },
    "split": {"by": "order", "valid": 0.2, "test": 0.1},
    "embedding_dim": 8,
}


def raw_rows() -> list[dict[str, Any]]:
    """Rows as a program would know them; None where nothing is."""
    rng = np.random.default_rng(11)
    rows = []
    for row in range(ROWS):
        seen = [f"i{int(one)}" for one in rng.geometric(0.1, rng.integers(1, 4))]
        rows.append(
            {
                "clicked": bool(rng.random() < 0.3),
                "user": f"u{rng.integers(100)}",
                "item": None if rng.random() < 0.1 else f"i{rng.geometric(0.1)}",
                "seen": None if rng.random() < 0.2 else seen,
                "device": int(rng.integers(5)),
                "price": None if rng.random() < 0.1 else round(float(rng.normal(2, 2)), 3),
                "page": int(rng.integers(3)),
                "at": f"2024-01-{1 + row * 20 // ROWS:02d} {row % 24:02d}:00:00",
            }
        )
    return rows


RAW = raw_rows()


def csv_text(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "NA"
        if isinstance(value, list):
            return ";".join(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    names = ["user id" if name == "user" else name for name in rows[0]]
    lines = [["unused", *names], *(["?", *map(cell, row.values())] for row in rows)]
    return "".join(delimiter.join(line) + "\n" for line in lines)


def convert(folder: Path, *sources: Path, changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Converts to `folder/out` under the schema with changes; returns dataset.json."""
    raw = {**SCHEMA, **(changes or {})}
    (folder / "schema.yaml").write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
    convert_text(sources, folder / "out", load_schema(folder / "schema.yaml"), **options)
    summary = writing.read_summary(folder / "out")
    assert summary is not None and writing.is_complete(folder / "out", summary)
    return summary


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    out = folder / "out"
    return {split: pq.read_table(out / split).to_pylist() for split in SPLITS if (out / split).exists()}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["csv", "tsv.gz", "jsonl"])
@pytest.mark.parametrize("block_bytes", [700, 1 << 20])
def test_every_value(tmp_path: Path, form: str, block_bytes: int) -> None:
    changes: dict[str, Any] = {}
    path = tmp_path / f"log.{form}"
    if form == "csv":
        write(path, csv_text(RAW))
    elif form == "tsv.gz":
        path.write_bytes(gzip.compress(csv_text(RAW, "\t").encode()))
        changes["delimiter"] = "\t"
    else:
        lines = [json.dumps({"user id" if key == "user" else key: row[key] for key in row}) for row in RAW]
        write(path, "\n".join(lines))
        changes |= {"format": "jsonl", "nulls": None}
    summary = convert(tmp_path, path, changes=changes, block_bytes=block_bytes)

    splits = {"train": RAW[:280], "valid": RAW[280:360], "test": RAW[360:]}
    found = read(tmp_path)
    counts = Counter(one for row in splits["train"] for one in [row["item"], *(row["seen"] or [])] if one)
    kept = sorted((one for one in counts if counts[one] >= 4), key=lambda one: (-counts[one], one))
    place = {value: number for number, value in enumerate(kept, start=1)}
    vocabulary = pq.read_table(tmp_path / "out/vocabularies/item.parquet").to_pylist()
    assert vocabulary == [{"value": one, "count": counts[one]} for one in kept]
    users: dict[str, set[int]] = {}
    for split, rows in splits.items():
        for row, told in zip(rows, found[split], strict=True):
            users.setdefault(row["user"], set()).add(told["user"])
            assert told.pop("at").isoformat(" ") == row["at"]
            price = None if row["price"] is None else pytest.approx(max(row["price"], 0.5), rel=1e-6)
            assert told == {
                "clicked": int(row["clicked"]),
                "user": told["user"],
                "item": None if row["item"] is None else place.get(row["item"], 0),
                "seen": None if row["seen"] is None else [place.get(one, 0) for one in row["seen"]],
                "device": row["device"],
                "price": price,
                "page": row["page"],
            }
    assert all(len(one) == 1 for one in users.values()) and len(set.union(*users.values())) > 35

    assert {name: told["size"] for name, told in summary["columns"].items() if "size" in told} == {
        "user": 50,
        "item": len(kept) + 1,
        "seen": len(kept) + 1,
        "device": 5,
    }
    unknown = {split: sum(row["item"] not in (None, *kept) for row in rows) for split, rows in splits.items()}
    assert summary["columns"]["item"]["out_of_vocabulary"] == unknown and min(unknown.values()) > 0
    unknown = {
        split: sum(one not in kept for row in rows for one in row["seen"] or []) for split, rows in splits.items()
    }
    assert summary["columns"]["seen"]["out_of_vocabulary"] == unknown
    rates = [sum(row["clicked"] for row in rows) / len(rows) for rows in splits.values()]
    assert [told["label_rate"] for told in summary["splits"].values()] == rates
    assert summary["skipped"] == {}


def test_dataset_yaml_is_the_rest_of_a_config(tmp_path: Path) -> None:
    convert(tmp_path, write(tmp_path / "log.csv", csv_text(RAW)))
    (tmp_path / "run.yaml").write_text(
        "include: out/dataset.yaml\ndata: {batch_size: 8}\nmodel: {tower: {type: mlp}}\n"
        "stages: {joint: {trains: all, steps: 1, learning_rate: 1e-3, sparse_learning_rate: 0.1}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert (config.data.label, config.data.train) == ("clicked", f"{tmp_path}/out/train/*.parquet")
    assert config.data.domain is not None and config.data.domain.num_domains == 3
    assert {name: (one.num_embeddings, one.embedding_dim) for name, one in config.tables.items()} == {
        "user": (50, 8),
        "item": (len(pq.read_table(tmp_path / "out/vocabularies/item.parquet")) + 1, 8),
        "device": (5, 8),
    }
    assert {name: one.table for name, one in config.features.sparse.items()} == {
        "user": "user",
        "item": "item",
        "seen": "item",
        "device": "device",
    }
    assert list(config.features.dense) == ["price"] and config.features.dense["price"].log1p


def days(rows: list[dict[str, Any]]) -> set[int]:
    return {row["at"].day for row in rows}


@pytest.mark.parametrize(
    "split",
    [
        {"by": "time", "column": "at", "boundaries": ["2024-01-15", "2024-01-18T00:00:00"]},
        {"by": "time", "column": "at", "valid": 0.15, "test": 0.15},
    ],
)
def test_split_by_time_goes_by_the_clock_and_not_by_the_line(tmp_path: Path, split: dict[str, Any]) -> None:
    rows = [RAW[place] for place in np.random.default_rng(2).permutation(ROWS)]
    convert(tmp_path, write(tmp_path / "log.csv", csv_text(rows)), changes={"split": split}, block_bytes=1000)
    found = read(tmp_path)
    assert days(found["train"]) == set(range(1, 15))
    if "boundaries" in split:
        assert days(found["valid"]) == {15, 16, 17} and days(found["test"]) == {18, 19, 20}
    times = {part: [row["at"] for row in rows] for part, rows in found.items()}
    assert max(times["train"]) < min(times["valid"]) and max(times["valid"]) < min(times["test"])
    assert [len(part) for part in times.values()] == [280, 60, 60]


def test_quantiles_of_a_thinned_sample_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "_SAMPLE_ROWS", 100)
    rows = [RAW[place] for place in np.random.default_rng(2).permutation(ROWS)]
    split = {"by": "time", "column": "at", "valid": 0.25, "test": 0.25}
    convert(tmp_path, write(tmp_path / "log.csv", csv_text(rows)), changes={"split": split}, block_bytes=1000)
    sizes = [len(part) for part in read(tmp_path).values()]
    assert sum(sizes) == ROWS and abs(sizes[1] - 100) < 40 and abs(sizes[2] - 100) < 40


def test_split_at_random_is_drawn_row_by_row_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", csv_text(RAW))
    found = []
    for seed, block_bytes in ((1, 500), (1, 1 << 20), (2, 1 << 20)):
        split = {"by": "random", "valid": 0.2, "test": 0.2, "seed": seed}
        convert(tmp_path, path, changes={"split": split}, block_bytes=block_bytes, overwrite=True)
        found.append(read(tmp_path))
    assert found[0] == found[1] != found[2]
    assert 50 < len(found[0]["valid"]) < 110 and 50 < len(found[0]["test"]) < 110


def test_split_by_order_runs_through_all_files(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{name}.csv", csv_text(RAW[first:end]))
        for name, first, end in (("b", 0, 350), ("a", 350, 400))
    ]
    convert(tmp_path, *paths, block_bytes=900)
    found = read(tmp_path)
    at = {part: [row["at"].isoformat(" ") for row in rows] for part, rows in found.items()}
    assert [at["train"], at["valid"], at["test"]] == [
        [row["at"] for row in RAW[first:end]] for first, end in ((0, 280), (280, 360), (360, 400))
    ]


def test_split_by_file(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"day_{day}.csv", csv_text(RAW[day * 100 : day * 100 + 100])) for day in range(4)]
    for split, sizes in (
        ({"valid_files": ["day_2*"], "test_files": ["day_3.csv"]}, {"train": 200, "valid": 100, "test": 100}),
        ({"valid_files": ["day_3*"], "test_files": ["day_3*"]}, {"train": 300, "valid": 50, "test": 50}),
        ({"test_files": ["day_[03].csv"]}, {"train": 200, "test": 200}),
    ):
        convert(tmp_path, *paths, changes={"split": {"by": "file", **split}}, overwrite=True)
        assert {part: len(rows) for part, rows in read(tmp_path).items()} == sizes
    assert "valid" not in yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())["data"]
    with pytest.raises(DataError, match=r"split\.test_files: no source is named 'day_9\*'"):
        convert(tmp_path, *paths, changes={"split": {"by": "file", "test_files": ["day_9*"]}}, overwrite=True)


def test_files_without_a_header_go_by_the_order_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "".join(f"{row % 2},skip,{row % 7}\n" for row in range(100)))
    changes = {
        "header": False,
        "domain": None,
        "tables": {"x": {"ids": "keep"}},
        "columns": {"clicked": {"type": "int"}, "junk": None, "x": {"type": "int", "table": "x"}},
    }
    assert convert(tmp_path, path, changes=changes)["columns"]["x"]["size"] == 7
    assert read(tmp_path)["test"][-1] == {"clicked": 1, "x": 1}


WRONG = [
    ("clicked", "", "no value"),
    ("device", "-1", "the id -1 is negative; ids that are kept count from 0"),
    ("device", f"{2**40}", f"the id {2**40} is beyond the rows of any table; set its ids to hash"),
    ("price", "nan", "the value is not finite in float32"),
    ("seen", "i1;;i2", "an item of the list has no value"),
    ("page", "NA", "no value"),
    ("at", "yesterday", "invalid value 'yesterday' for timestamp"),
]


@pytest.mark.parametrize(("column", "text", "message"), WRONG)
def test_wrong_values_are_named_or_counted(tmp_path: Path, column: str, text: str, message: str) -> None:
    rows = [dict(row) for row in RAW]
    rows[41][column] = rows[399][column] = text
    path = write(tmp_path / "log.csv", csv_text(rows))
    with pytest.raises(DataError, match=rf"log\.csv, line 43: column '{column}': {message}"):
        convert(tmp_path, path, block_bytes=900)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.csv", "schema.yaml"]
    summary = convert(tmp_path, path, skip_malformed=True, block_bytes=900)
    assert summary["skipped"] == {str(path): 2}
    assert [told["rows"] for told in summary["splits"].values()] == [279, 80, 39]


def test_labels_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    columns = {**SCHEMA["columns"], "clicked": {"type": "int"}}
    path = write(tmp_path / "log.csv", csv_text([{**row, "clicked": row["page"]} for row in RAW]))
    first = next(number for number, row in enumerate(RAW, start=2) if row["page"] == 2)
    with pytest.raises(DataError, match=rf"line {first}: column 'clicked': the label is neither 0 nor 1"):
        convert(tmp_path, path, changes={"columns": columns})


def test_too_many_values_and_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", csv_text(RAW))
    with pytest.raises(DataError, match="more than 5 different values to count"):
        convert(tmp_path, path, max_values=5)
    with pytest.raises(DataError, match=r"none\.csv: no rows"):
        convert(tmp_path, write(tmp_path / "none.csv", csv_text(RAW[:1]).splitlines()[0] + "\n"))
    with pytest.raises(FileNotFoundError):
        convert(tmp_path, tmp_path / "missing.csv")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.csv", "none.csv", "schema.yaml"]


@pytest.mark.parametrize("by", ["random", "order", "time", "file"])
def test_sources_without_rows_are_named(tmp_path: Path, by: str) -> None:
    split: dict[str, Any] = {"by": by}
    if by == "time":
        split["column"] = "at"
    elif by == "file":
        split |= {"valid_files": ["c.csv"], "test_files": ["c.csv"]}
    header = csv_text(RAW).splitlines(keepends=True)[0]
    paths = [
        write(tmp_path / "a.csv", header),
        write(tmp_path / "b.csv", csv_text(RAW)),
        write(tmp_path / "c.csv", header + "\n\n" if by != "file" else csv_text(RAW[:2])),
    ]
    summary = convert(tmp_path, *paths, changes={"split": split}, overwrite=True)
    assert summary["empty"] == [str(paths[0])] if by == "file" else [str(paths[0]), str(paths[2])]
    assert sum(len(rows) for rows in read(tmp_path).values()) == ROWS + 2 * (by == "file")
    sources, split_of_none = (paths[:1], {"by": "random"}) if by == "file" else (paths[::2], split)
    with pytest.raises(DataError, match=r"a\.csv(, .*c\.csv)?: no rows"):
        convert(tmp_path, *sources, changes={"split": split_of_none}, overwrite=True)
    write(tmp_path / "a.csv", "")
    with pytest.raises(DataError, match=r"a\.csv, line 1: the file is empty, without a header of columns"):
        convert(tmp_path, *paths, changes={"split": split}, overwrite=True)


def test_splits_by_order_know_no_headers_and_no_blank_lines(tmp_path: Path) -> None:
    text = csv_text(RAW).replace("unused", '"un\nused"', 1)
    convert(tmp_path, write(tmp_path / "log.csv", text + "\n" * 9))
    assert [len(rows) for rows in read(tmp_path).values()] == [280, 80, 40]


def test_items_of_lists_are_no_hexadecimal_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "clicked,seen\n" + "1,1|2\n" * 10 + "0,3|0x1F\n")
    changes = {
        "domain": None,
        "tables": {"item": {"ids": "keep"}},
        "columns": {"clicked": {"type": "int"}, "seen": {"type": "ints", "table": "item"}},
    }
    with pytest.raises(DataError, match="line 12: column 'seen': an item of the list is hexadecimal; write decimal"):
        convert(tmp_path, path, changes=changes)


def test_row_groups_and_files_are_of_one_size(tmp_path: Path) -> None:
    with writing.SplitWriter(tmp_path, "train", "clicked", row_group_rows=30, file_row_groups=4) as writer:
        table = pa.table({"clicked": [0, 1] * 200, "row": range(400)})
        for start, end in ((0, 7), (7, 200), (200, 200), (200, 400)):
            writer.write(table.slice(start, end - start))
    files = [pq.read_metadata(path) for path in sorted((tmp_path / "train").iterdir())]
    sizes = [[one.row_group(group).num_rows for group in range(one.num_row_groups)] for one in files]
    assert sizes == [[30] * 4, [30] * 4, [30] * 4, [30, 10]]
    assert pq.read_table(tmp_path / "train")["row"].to_pylist() == list(range(400))
    assert writer.told == {"rows": 400, "files": 4, "label_rate": 0.5}


def with_column(**column: Any) -> dict[str, Any]:
    return {"columns": {**SCHEMA["columns"], "item": column}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "click"}, "label: 'click' is no column of type bool or int, or its values change"),
        ({"label": "price"}, "label: 'price' is no column of type bool or int, or its values change"),
        (
            {"domain": {"column": "user", "num_domains": 3}},
            "domain.column: 'user' is no column of type int, or its",
        ),
        ({"labels": "x"}, "labels: unknown key; did you mean 'label'?"),
        (with_column(type="text"), "columns.item.type: Input should be 'bool', 'int'"),
        (
            with_column(type="string", table="items"),
            "no table 'items'; tables has device, item, user",
        ),
        (with_column(type="float", table="item"), "columns.item: a column of type float cannot have a table"),
        (with_column(type="strings"), "columns.item: a list needs a table"),
        (with_column(type="string", dense={}), "columns.item: dense is for bool, int and float"),
        (with_column(type="int", dense={"column": "x"}), "columns.item: dense is for .* use source"),
        (with_column(type="string", minimum=0.0), "columns.item: minimum is for int and float, not for string"),
        (with_column(type="int", minimum=1e30), "columns.item: minimum of an int must fit 64 bits, unlike 1e\\+30"),
        (
            with_column(type="int", table="item"),
            "columns.seen: one vocabulary cannot hold strings and the ints of 'item'; give it a table of its own, or",
        ),
        (with_column(type="int", minimum=0.5), "columns.item: minimum of an int must be whole, not 0.5"),
        (with_column(type="string", table="device"), "columns.item: ids of string cannot be kept; hash them"),
        ({"tables": {**SCHEMA["tables"], "x": {"ids": "keep"}}}, "tables.x: no column uses this table"),
        ({"tables": {"user": {"ids": "hash"}}}, "tables.user: ids hash needs buckets"),
        ({"tables": {"user": {"ids": "hash", "buckets": 2, "salt": -1}}}, "tables.user.salt: Input should be greater"),
        (
            {"tables": {"user": {"ids": "hash", "buckets": 2, "salt": 1, "seed": 1}}},
            "tables.user: seed is the former name of salt; remove it",
        ),
        ({"tables": {"user": {"ids": "keep", "seed": 2}}}, "tables.user: salt has no meaning with ids keep; remove it"),
        ({"tables": {"user": {"ids": "keep", "min_count": 2}}}, "tables.user: min_count has no meaning with ids keep"),
        ({"split": {"by": "time"}}, "split: a split by time needs the column"),
        ({"split": {"by": "file"}}, "split: a split by file needs valid_files or test_files"),
        ({"split": {"by": "order", "seed": 3}}, "split: seed has no meaning with by order; remove it"),
        ({"split": {"valid": 0.5, "test": 0.5}}, "split: valid 0.5 and test 0.5 leave nothing to train on"),
        ({"split": {"by": "time", "column": "item"}}, "split.column: 'item' is no column of type int or timestamp"),
        (
            {"split": {"by": "time", "column": "page", "boundaries": ["a", "b"]}},
            "split.boundaries: 'a' is not of the type of 'page'",
        ),
        ({"split": {"by": "time", "column": "at", "boundaries": ["a", "b"]}}, "'a'"),
        (
            {"split": {"by": "time", "column": "page", "boundaries": [2, 1]}},
            "split.boundaries: test begins before valid",
        ),
        ({"delimiter": "§"}, "delimiter: must be one ASCII character and no line break, not '§'"),
        ({"delimiter": "\n"}, r"delimiter: must be one ASCII character and no line break, not '\\n'"),
        ({"quote": "“"}, "quote: must be one ASCII character and no line break, not '“'"),
        ({"delimiter": '"'}, "quote: '\"' is the delimiter; quote: null if nothing encloses fields"),
        ({"format": "jsonl"}, "nulls: JSON Lines have none; remove it"),
        ({"header": False}, "columns: without a header, columns have no source"),
    ],
)
def test_schemas_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"schema\.yaml:[\s\S]*{message}"):
        convert(tmp_path, write(tmp_path / "log.csv", csv_text(RAW)), changes=changes)


def test_a_schema_is_named_by_its_file(tmp_path: Path) -> None:
    raw = {key: value for key, value in SCHEMA.items() if key != "name"}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(raw))
    assert load_schema(tmp_path / "shop.yaml").name == "shop"
    with pytest.raises(ConfigError, match=r"cannot read schema .*missing\.yaml: .*; give one with --schema"):
        load_schema(tmp_path / "missing.yaml")


def test_the_docs_schema_loads_and_names_every_key(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    text = text[text.index("### The schema") :]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "docs.yaml").write_text(block)
    schema = load_schema(tmp_path / "docs.yaml")
    assert schema.sparse["viewed"] == schema.sparse["item_id"] == "item"
    for model in (Schema, TableSchema, ColumnSchema, SplitSchema):
        for key in model.model_fields:
            assert re.search(rf"\b{key}\b", text), key
