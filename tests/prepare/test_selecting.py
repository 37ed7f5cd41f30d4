"""Labels by expressions, rows that a condition or a key leaves out, and splits by the places and values of rows."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.config import ConfigError
from recsys.data.storage import DataError
from recsys.prepare import __main__, selecting, writing
from recsys.prepare.splitting import SPLITS
from recsys.prepare.tabular import convert_text, load_schema
from recsys.prepare.text import TextFiles, TextFormat

ROWS = 300
SCHEMA: dict[str, Any] = {
    "label": "rating >= 4",
    "tables": {"item": {"ids": "keep"}},
    "columns": {
        "row": {"type": "int"},
        "rating": {"type": "int"},
        "user": {"type": "string"},
        "item": {"type": "int", "table": "item"},
        "clicked": {"type": "bool"},
        "part": {"type": "int"},
    },
    "split": {"by": "order", "valid": 0.0, "test": 0.0},
}


def raw() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [
        {
            "row": row,
            "rating": None if rng.random() < 0.1 else int(rng.integers(1, 6)),
            "user": None if rng.random() < 0.1 else f"u{rng.integers(8)}",
            "item": int(rng.integers(9)),
            "clicked": bool(rng.random() < 0.5),
            "part": int(rng.integers(4)),
        }
        for row in range(ROWS)
    ]


RAW = raw()
RATED = [row for row in RAW if row["rating"] is not None]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join("" if value is None else str(value).lower() for value in row.values()) for row in rows]
    path.write_text("\n".join([",".join(RAW[0]), *lines]) + "\n")
    return path


def convert(folder: Path, *sources: Path, block_bytes: int = 1 << 20, **changes: Any) -> dict[str, Any]:
    """Converts to `folder/out` under the schema with changes; returns dataset.json."""
    options = {key: changes.pop(key) for key in ("max_values", "skip_malformed") if key in changes}
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA | changes))
    schema = load_schema(folder / "schema.yaml")
    convert_text(sources, folder / "out", schema, block_bytes=block_bytes, overwrite=True, **options)
    summary = writing.read_summary(folder / "out")
    assert summary is not None and writing.is_complete(folder / "out", summary)
    return summary


def read(folder: Path, name: str = "row") -> dict[str, list[Any]]:
    out = folder / "out"
    return {split: pq.read_table(out / split)[name].to_pylist() for split in SPLITS if (out / split).exists()}


def test_a_label_is_what_its_expression_says_of_the_raw_values(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", RATED)
    summary = convert(tmp_path, path, label="rating >= 4 and not (clicked or user == 'u1')", where="user != 'u2'")
    rows = [row for row in RATED if row["user"] not in (None, "u2")]
    assert read(tmp_path)["train"] == [row["row"] for row in rows]
    labels = [int(row["rating"] >= 4 and not (row["clicked"] or row["user"] == "u1")) for row in rows]
    assert read(tmp_path, "label")["train"] == labels and 0 < sum(labels) < len(labels)
    assert yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())["data"]["label"] == "label"
    assert summary["columns"]["label"]["meaning"] == "rating >= 4 and not (clicked or user == 'u1')"
    assert summary["left_out"] == {"where": len(RATED) - len(rows)}
    unknown = next(number for number, row in enumerate(RAW, start=2) if row["rating"] is None)
    with pytest.raises(DataError, match=rf"log\.csv, line {unknown}: column 'label': no value"):
        convert(tmp_path, write(path, RAW))


def test_rows_that_are_left_out_need_neither_label_nor_domain(tmp_path: Path) -> None:
    path, domain = write(tmp_path / "log.csv", RAW), {"column": "user", "values": ["u3", "u0"]}
    told = convert(tmp_path, path, block_bytes=500, where="rating != 3 and user in ('u0', 'u3')", domain=domain)
    rows = [row for row in RAW if row["rating"] not in (None, 3) and row["user"] in ("u0", "u3")]
    assert read(tmp_path)["train"] == [row["row"] for row in rows]
    assert read(tmp_path, "user")["train"] == [row["user"] for row in rows]
    assert told["left_out"]["where"] == ROWS - len(rows)
    assert yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())["data"]["domain"]["values"] == ["u3", "u0"]
    line = 2 + next(row["row"] for row in RATED if row["user"] is None)
    with pytest.raises(DataError, match=rf"line {line}: column 'user': no value"):
        convert(tmp_path, path, where="rating > 0", domain=domain)
    convert(tmp_path, path, where="rating > 0", domain=domain | {"unseen": "backbone"})
    assert read(tmp_path)["train"] == [row["row"] for row in RATED]


@pytest.mark.parametrize(("block_bytes", "grouped_bytes"), [(400, 1 << 30), (1 << 20, 1 << 30), (400, 100)])
def test_of_equal_keys_the_last_row_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, grouped_bytes: int
) -> None:
    monkeypatch.setattr(selecting, "_MERGED_ROWS", 20)
    monkeypatch.setattr(selecting, "_GROUPED_BYTES", grouped_bytes)
    paths = [write(tmp_path / "b.csv", RAW[:170]), write(tmp_path / "a.csv", RAW[170:])]
    told = convert(tmp_path, *paths, block_bytes=block_bytes, where="rating > 1", keep_last_of=["user", "item"])
    rows = [row for row in RAW if (row["rating"] or 0) > 1]
    last = {(row["user"], row["item"]): row["row"] for row in rows}
    assert read(tmp_path)["train"] == sorted(last.values()) and any(user is None for user, _ in last)
    assert told["left_out"] == {"where": ROWS - len(rows), "keep_last_of": len(rows) - len(last)}
    with pytest.raises(DataError, match=r"more than 40 different keys of keep_last_of \(\d+ so far\); raise --max-val"):
        convert(tmp_path, *paths, where="rating > 1", keep_last_of=["user", "item"], max_values=40)


def test_keys_of_many_bytes_are_grouped_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow gives wrong keys, and reads where it may not, beyond 2 GiB of them."""
    monkeypatch.setattr(selecting, "_GROUPED_BYTES", 4000)
    rows = [(f"user {row % 300}", None if row % 3 else row % 7, "alike") for row in range(2000)]
    table = pa.table(dict(zip(("user", "part", "same"), zip(*rows, strict=True), strict=True)))
    table = pa.concat_tables([table.slice(0, 700), table.slice(700)])
    selection = selecting.Selection(TextFiles([], TextFormat({})), keys=table.column_names)
    found = selection._latest(table.append_column("its place", pa.array(range(2000))))
    assert found["user"].num_chunks > 10 and all(chunk.nbytes < 4000 for chunk in found["user"].chunks)
    last = {key: place for place, key in enumerate(rows)}
    assert len(found) == len(last) and {tuple(row.values())[:3]: row["its place"] for row in found.to_pylist()} == last


@pytest.mark.parametrize("by", ["order", "permutation"])
@pytest.mark.parametrize("block_bytes", [400, 1 << 20])
def test_shares_are_those_of_the_rows_that_are_kept(tmp_path: Path, by: str, block_bytes: int) -> None:
    split = {"by": by, "valid": 0.1, "test": 0.1, **({"seed": 2024} if by == "permutation" else {})}
    path = write(tmp_path / "log.csv", RAW)
    last = {(row["user"], row["item"]): row["row"] for row in RATED}
    for changes, kept in (
        ({"where": "rating > 0"}, [row["row"] for row in RATED]),
        ({"where": "rating > 0", "keep_last_of": ["user", "item"]}, sorted(last.values())),
        ({"label": "clicked"}, list(range(ROWS))),
    ):
        convert(tmp_path, path, split=split, block_bytes=block_bytes, **changes)
        rows, tenth = len(kept), round(len(kept) / 10)
        order = np.random.default_rng(2024).permutation(rows) if by == "permutation" else np.arange(rows)
        train = rows * 8 // 10 if by == "permutation" else rows - 2 * tenth
        parts = np.split(order, [train, train + (rows - train) // 2])
        assert list(read(tmp_path).values()) == [sorted(kept[place] for place in part) for part in parts]


def test_splits_by_the_values_of_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", RATED)
    split = {"by": "column", "column": "part", "values": {"train": [0, 3], "test": [2]}}
    convert(tmp_path, path, split=split, where="part != 1")
    assert read(tmp_path) == {
        "train": [row["row"] for row in RATED if row["part"] in (0, 3)],
        "test": [row["row"] for row in RATED if row["part"] == 2],
    }
    with pytest.raises(
        DataError, match=r"log\.csv: column 'part' holds '1', which split\.values gives to no split; na"
    ):
        convert(tmp_path, path, split=split)
    split = {"by": "column", "column": "user", "values": {"train": ["u0"], "valid": ["u1"], "test": ["u7"]}}
    convert(tmp_path, path, split=split, where="user in ('u0', 'u1', 'u7')")
    assert read(tmp_path, "user") == {
        part: [user] * sum(row["user"] == user for row in RATED)
        for part, user in (("train", "u0"), ("valid", "u1"), ("test", "u7"))
    }


def test_where_nothing_is_left_that_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", RAW)
    for by in ({"by": "order"}, {"by": "permutation"}, {"by": "time", "column": "row"}):
        with pytest.raises(DataError, match=rf"^no row is in the train split, of 0 in all; where left out {ROWS}$"):
            convert(tmp_path, path, where="rating > 5", split=by)


def test_the_command_tells_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, schema = write(tmp_path / "log.csv", RAW), tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(SCHEMA | {"where": "rating > 0", "keep_last_of": ["item"]}))
    with pytest.raises(SystemExit):
        __main__.main(["csv", "--source", str(path), "--schema", str(schema), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert f"where: {ROWS - len(RATED)} rows left out" in told
    assert f"keep_last_of: {len(RATED) - 9} rows left out" in told


DOMAIN = {"domain": {"column": "part", "num_domains": 4}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "rating >="}, "label: 'rating >=' is neither a column nor an expression"),
        ({"label": "stars > 3"}, "label: 'stars' is no column, or one of lists"),
        ({"label": "rating > 'a'"}, "label: column 'rating': "),
        ({"where": "rating"}, "where: 'rating' has type int64, which is no truth value; compare it"),
        ({"where": "f(rating) > 1"}, "where: 'f(rating) > 1': 'f(rating)' is not understood"),
        (
            {"columns": SCHEMA["columns"] | {"label": {"type": "int"}}},
            "label: the expression makes a column of this name; give columns.label another",
        ),
        ({"keep_last_of": ["users"]}, "keep_last_of: 'users' is no column of type bool, int, string or timestamp"),
        ({"split": {"by": "column"}}, "split: a split by column needs the column, and values with those of train"),
        (
            {"split": {"by": "column", "column": "part", "values": {"train": [1], "test": [1]}}},
            "split: values name one for two splits, or twice",
        ),
        (
            {"split": {"by": "column", "column": "part", "values": {"train": ["1"]}}},
            "split.values: they are not of the type of 'part'",
        ),
        ({"split": {"by": "permutation", "column": "part"}}, "split: column has no meaning with by permutation"),
        ({"domain": {"column": "part", "values": ["a"]}}, "domain.column: 'part' is no column of type string"),
        (
            {"columns": SCHEMA["columns"] | {"also": {"type": "string", "source": "part"}}},
            "columns.part: another column of the same source has another type",
        ),
    ],
)
def test_schemas_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"schema\.yaml:[\s\S]*{re.escape(message)}"):
        convert(tmp_path, write(tmp_path / "log.csv", RAW), **changes)
