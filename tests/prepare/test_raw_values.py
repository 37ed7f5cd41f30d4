"""Raw rows through a checkpoint's own mapping get the ids and numbers that training read from converted shards."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ranks import run_module
from test_movielens import MOVIES, USERS, USERS_100K, write_100k, write_atomic, write_official

from benchmarks.conversion import generate
from recsys.config import Config, ConfigError, load_config
from recsys.data.features import Columns, build_columns
from recsys.data.hashing import hash_ids
from recsys.data.rows import Rows
from recsys.data.storage import DataError
from recsys.data.vocabulary import save_vocabularies
from recsys.prepare.criteo import CATEGORIES, INTEGERS, criteo_schema
from recsys.prepare.movielens import convert_movielens_1m, convert_movielens_100k
from recsys.prepare.tabular import convert_text, load_schema
from recsys.prepare.vocabularies import build_vocabularies

REST = {
    "include": "out/dataset.yaml",
    "data": {"batch_size": 16},
    "model": {"tower": {"type": "mlp", "hidden": [8]}},
    "stages": {"joint": {"trains": "all", "steps": 2, "learning_rate": 1e-3, "sparse_learning_rate": 0.1}},
}
"""What a config needs beside a data set."""

Raw = dict[str, Any]


def config_of(folder: Path, **changes: Any) -> Config:
    """A config on the data set in `folder/out`."""
    (folder / "run.yaml").write_text(yaml.safe_dump({**REST, "output_dir": str(folder / "run"), **changes}))
    return load_config(folder / "run.yaml")


def held_by_a_checkpoint(config: Config, folder: Path) -> Path:
    """The vocabularies that a checkpoint would hold; those of the data set are gone."""
    saved = folder / "saved"
    save_vocabularies(build_columns(config).vocabularies, saved)
    shutil.rmtree(folder / "out/vocabularies", ignore_errors=True)
    return saved


def features(columns: Columns, table: pa.Table, *, labelled: bool = False) -> dict[str, NDArray[Any] | list[Any]]:
    """What each feature reads of each row: an id or -1, a list of ids, a number."""
    layout = columns.layout((columns.check_schema if labelled else columns.check_features)(table.schema, "here"))
    decode = columns.decode if labelled else columns.decode_features
    rows: Rows = decode(table, layout, "here")
    found: dict[str, NDArray[Any] | list[Any]] = dict(zip(layout.single, rows.single, strict=True))
    lists = [name for name in layout.keys if name in layout.lists]
    found |= {
        name: [ids.tolist() for ids in np.split(jagged.values, jagged.offsets[1:-1])]
        for name, jagged in zip(lists, rows.lists, strict=True)
    }
    found |= {f"unknown {name}": counts for (kind, name), counts in rows.counts.items() if kind == "out_of_vocabulary"}
    return found | dict(zip(columns.dense, rows.dense, strict=True))


def shards(config: Config, *splits: str) -> pa.Table:
    """The rows of splits, in the order of their files."""
    folders = [Path(pattern).parent for split in splits for pattern in config.data.patterns(split)]
    return pa.concat_tables(pq.read_table(path) for folder in folders for path in sorted(folder.iterdir()))


def check(config: Config, saved: Path, table: pa.Table, raw: pa.Table) -> dict[str, NDArray[Any] | list[Any]]:
    """Compare raw rows with those of shards; what the raw rows gave."""
    stored, asked = build_columns(config, saved), build_columns(config, saved, raw=True)
    trained = features(stored, table, labelled=True)
    served = features(asked, raw)
    assert list(trained) == [name for name in served if not name.startswith("unknown ")]
    for name, expected in trained.items():
        found = served[name]
        assert type(found) is type(expected), name
        assert found == expected if isinstance(found, list) else np.array_equal(found, expected), name
    return served


COLUMNS: dict[str, pa.DataType] = {
    "clicked": pa.bool_(),
    "kept": pa.int64(),
    "kept_from": pa.int64(),
    "kept_list": pa.list_(pa.int64()),
    "hashed": pa.string(),
    "hashed_int": pa.int64(),
    "hashed_from": pa.int64(),
    "hashed_list": pa.list_(pa.string()),
    "hashed_ints": pa.list_(pa.int64()),
    "word": pa.string(),
    "words": pa.list_(pa.string()),
    "number": pa.int64(),
    "number_from": pa.int64(),
    "numbers": pa.list_(pa.int64()),
    "rare": pa.string(),
    "price": pa.float64(),
    "depth": pa.int64(),
    "flag": pa.bool_(),
}
"""What a parser of JSON Lines gives; one of CSV gives lists as texts."""

SCHEMA: Raw = {
    "name": "log",
    "nulls": ["NA"],
    "label": "clicked",
    "tables": {
        "kept": {"ids": "keep"},
        "floor": {"ids": "keep"},
        "hash": {"ids": "hash", "buckets": 97, "salt": 2**64 - 1},
        "seeded": {"ids": "hash", "buckets": 31, "seed": 5},
        "word": {"ids": "vocabulary", "min_count": 4},
        "number": {"ids": "vocabulary", "min_count": 12},
        "rare": {"ids": "vocabulary", "min_count": 10**6},
    },
    "columns": {
        "clicked": {"type": "bool"},
        "kept": {"type": "int", "table": "kept"},
        "kept_from": {"type": "int", "table": "floor", "minimum": 2.0},
        "kept_list": {"type": "ints", "table": "kept", "separator": ";;"},
        "hashed": {"type": "string", "table": "hash"},
        "hashed_int": {"type": "int", "table": "hash"},
        "hashed_from": {"type": "int", "table": "seeded", "minimum": -1.0},
        "hashed_list": {"type": "strings", "table": "hash"},
        "hashed_ints": {"type": "ints", "table": "seeded", "separator": " "},
        "word": {"type": "string", "table": "word"},
        "words": {"type": "strings", "table": "word", "separator": ";"},
        "number": {"type": "int", "table": "number"},
        "number_from": {"type": "int", "table": "number", "minimum": 3.0},
        "numbers": {"type": "ints", "table": "number"},
        "rare": {"type": "string", "table": "rare"},
        "price": {
            "type": "float",
            "minimum": 0.1,
            "dense": {"fill": 0.3, "log1p": True, "standardize": {"mean": 0.7, "std": 0.9}},
        },
        "depth": {"type": "int", "minimum": -2.0, "dense": {"fill": 1.5, "minimum": -1.0, "clip": [-1.0, 9.5]}},
        "flag": {"type": "bool", "dense": {"fill": 0.5}},
    },
    "split": {"by": "order", "valid": 0.2, "test": 0.1},
    "embedding_dim": 4,
}
ENDS = {"train": (0, 210), "valid": (210, 270), "test": (270, 300)}


def raw_rows() -> list[Raw]:
    """Rows of all that may come: nulls, empty lists, values that train lacks or has too rarely."""
    rng = np.random.default_rng(3)

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.1 else value

    def many(draw: Any) -> Any:
        return [draw() for _ in range(rng.integers(0, 4))]

    def word() -> str:
        return ("ü", "", "7", " b ", "NaN", "x,y")[rng.integers(6)] if rng.random() < 0.5 else f"w{rng.geometric(0.1)}"

    def number() -> int:
        return int(rng.geometric(0.2)) - 3

    return [
        {
            "clicked": bool(rng.random() < 0.4),
            "kept": maybe(int(rng.integers(6))),
            "kept_from": maybe(number()),
            "kept_list": maybe(many(lambda: int(rng.integers(9)))),
            "hashed": maybe(word()),
            "hashed_int": maybe(number() * 10**17),
            "hashed_from": maybe(number()),
            "hashed_list": maybe(many(word)),
            "hashed_ints": maybe(many(number)),
            "word": maybe(word()),
            "words": maybe(many(word)),
            "number": maybe(number()),
            "number_from": maybe(number()),
            "numbers": maybe(many(number)),
            "rare": maybe(word()),
            "price": maybe(float(rng.normal(1, 1))),
            "depth": maybe(number()),
            "flag": maybe(bool(rng.random() < 0.5)),
        }
        for _ in range(300)
    ]


def separator(name: str) -> str:
    found: str = SCHEMA["columns"][name].get("separator", "|")
    return found


def as_text(rows: list[Raw]) -> list[Raw]:
    """Rows as CSV can hold them: a list is a text, and no text is a list of one empty item."""
    return [
        {
            name: separator(name).join(map(str, value)) if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def csv_text(rows: list[Raw]) -> str:
    def cell(value: Any) -> str:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return "NA" if value is None else '"' + text.replace('"', '""') + '"'

    return "".join(",".join(line) + "\n" for line in [rows[0], *(map(cell, row.values()) for row in rows)])


def convert_log(folder: Path, form: str, rows: list[Raw], types: Mapping[str, pa.DataType] = COLUMNS) -> pa.Table:
    """Convert rows to `folder/out`; as Arrow's parser of the form gives them."""
    schema = {**SCHEMA, "columns": {name: SCHEMA["columns"][name] for name in types}}
    schema["tables"] = {
        name: table
        for name, table in SCHEMA["tables"].items()
        if name in {column.get("table") for column in schema["columns"].values()}
    }
    if form == "jsonl":
        schema |= {"format": "jsonl"}
        del schema["nulls"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        rows = as_text(rows)
        types = {name: pa.string() if pa.types.is_list(kind) else kind for name, kind in types.items()}
        text = csv_text(rows)
    (folder / "log.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    (folder / f"log.{form}").write_text(text, encoding="utf-8")
    convert_text([folder / f"log.{form}"], folder / "out", load_schema(folder / "log.yaml"), overwrite=True)
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_text_of_any_kind(tmp_path: Path, form: str) -> None:
    raw = convert_log(tmp_path, form, raw_rows())
    config = config_of(tmp_path)
    saved = held_by_a_checkpoint(config, tmp_path)
    summary = json.loads((tmp_path / "out/dataset.json").read_text())
    for split, (start, end) in ENDS.items():
        served = check(config, saved, shards(config, split), raw.slice(start, end - start).drop(["clicked"]))
        for name, told in summary["columns"].items():
            if "out_of_vocabulary" in told:
                unknown = served.get(f"unknown {name}", np.zeros(1))
                assert np.sum(unknown) == told["out_of_vocabulary"][split] > 0, (split, name)
    # Against one another: strings and integers are hashed as what they are, and values are raised first.
    served = check(config, saved, shards(config, "train"), raw.slice(0, 210))
    assert isinstance(served["hashed_int"], np.ndarray)
    number = raw["hashed_int"].combine_chunks().slice(0, 210)
    assert served["hashed_int"].tolist() == hash_ids(number, 97, 2**64 - 1).tolist()
    assert served["hashed_int"].tolist() != hash_ids(number.cast(pa.string()), 97, 2**64 - 1).tolist()
    lifted = pa.array([None if value is None else max(value, -1) for value in raw["hashed_from"].to_pylist()[:210]])
    assert isinstance(served["hashed_from"], np.ndarray)
    assert served["hashed_from"].tolist() == hash_ids(lifted, 31, 5).tolist()
    assert set(np.unique(served["rare"])) == {-1, 0}
    # What converts raw columns of other, equal types gets the same.
    dictionary = raw.set_column(raw.schema.get_field_index("word"), "word", raw["word"].dictionary_encode())
    narrow = dictionary.set_column(raw.schema.get_field_index("kept"), "kept", raw["kept"].cast(pa.uint8()))
    check(config, saved, shards(config, "train"), narrow.slice(0, 210))


def test_dataset_yaml_names_the_mapping_of_each_feature(tmp_path: Path) -> None:
    convert_log(tmp_path, "csv", raw_rows())
    told = yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())["features"]
    hashed = {"type": "hash", "salt": 2**64 - 1, "buckets": 97, "applied": True}
    counted = {"type": "vocabulary", "file": "${here}/vocabularies/word.parquet", "applied": True}
    assert told["sparse"]["kept"] == {"table": "kept"}
    assert told["sparse"]["kept_from"] == {"table": "floor", "minimum": 2}
    assert told["sparse"]["kept_list"] == {"table": "kept", "list_text": {"separator": ";;", "items": "ints"}}
    assert told["sparse"]["hashed"] == told["sparse"]["hashed_int"] == {"table": "hash", "ids": hashed}
    assert told["sparse"]["hashed_from"]["minimum"] == -1 and told["sparse"]["hashed_from"]["ids"]["salt"] == 5
    words = {"table": "word", "list_text": {"separator": ";", "items": "strings"}, "ids": counted}
    assert told["sparse"]["words"] == words
    assert told["dense"]["price"]["minimum"] == 0.1 and told["dense"]["depth"]["minimum"] == -1.0
    assert told["dense"]["flag"] == {"fill": 0.5}
    convert_log(tmp_path, "jsonl", raw_rows())
    told = yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())["features"]
    assert told["sparse"]["words"] == {"table": "word", "ids": counted}


def test_a_checkpoint_alone_maps_raw_rows(tmp_path: Path) -> None:
    raw = convert_log(tmp_path, "csv", raw_rows())
    config_of(tmp_path)
    (finished,) = run_module(1, "recsys.train", "--config", str(tmp_path / "run.yaml"), "device=cpu")
    assert finished.code == 0, finished.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    shutil.rmtree(tmp_path / "out/vocabularies")
    checkpoint = Path(summary["checkpoint"])
    config = load_config(checkpoint / "config.yaml")
    for split, (start, end) in ENDS.items():
        check(
            config, checkpoint / "vocabularies", shards(config, split), raw.slice(start, end - start).drop(["clicked"])
        )


SMALL = {name: COLUMNS[name] for name in ("clicked", "words", "numbers", "kept_list", "hashed_from", "number", "price")}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r;", exclude_categories=["Cs"]), max_size=3)
NUMBER = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 3)


def rows_of(draw_words: Any, draw_numbers: Any) -> Any:
    return st.lists(
        st.fixed_dictionaries(
            {
                "clicked": st.booleans(),
                "words": st.none() | st.lists(draw_words, max_size=3),
                "numbers": st.none() | st.lists(draw_numbers, max_size=3),
                "kept_list": st.none() | st.lists(st.integers(0, 2**40 - 1), max_size=3),
                "hashed_from": st.none() | draw_numbers,
                "number": st.none() | draw_numbers,
                "price": st.none() | st.floats(-1e30, 1e30, width=64),
            }
        ).map(lambda row: {name: row[name] for name in SMALL}),
        min_size=10,
        max_size=20,
    )


@settings(
    deadline=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],  # shrinking whole logs takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(rows_of(TEXT.filter(lambda text: text != "NA"), NUMBER))
def test_text_of_any_value(tmp_path_factory: pytest.TempPathFactory, rows: list[Raw]) -> None:
    folder = tmp_path_factory.mktemp("any")
    for form in ("csv", "jsonl"):
        raw = convert_log(folder, form, rows, SMALL)
        config = config_of(folder)
        saved = held_by_a_checkpoint(config, folder)
        # Of all splits in one: lines within quotes move their borders.
        check(config, saved, shards(config, *config.data.splits), raw)


@pytest.mark.parametrize("ids", ["vocabulary", "hash"])
def test_criteo(tmp_path: Path, ids: Any) -> None:
    source = tmp_path / "train.txt"
    generate(source, 2000)
    lines = source.read_text().splitlines()
    lines[:3] = ["\t".join([line.split("\t")[0], "-3", *line.split("\t")[2:]]) for line in lines[:3]]
    source.write_text("\n".join(lines) + "\n")
    options: Raw = {"min_count": 3} if ids == "vocabulary" else {"buckets": 1009}
    convert_text([source], tmp_path / "out", criteo_schema([source], ids=ids, **options))
    config = config_of(tmp_path)
    assert all(config.features.dense[name].minimum == 0.0 for name in INTEGERS)
    saved = held_by_a_checkpoint(config, tmp_path)
    fields = [[field or None for field in line.split("\t")[1:]] for line in lines]
    names, columns = (*INTEGERS, *CATEGORIES), list(zip(*fields, strict=True))
    raw = pa.table(
        {
            name: pa.array(column, pa.string()).cast(pa.int64() if name in INTEGERS else pa.string())
            for name, column in zip(names, columns, strict=True)
        }
    )
    assert raw["I1"].to_pylist()[:3] == [-3] * 3
    for split, (start, end) in {"train": (0, 1600), "valid": (1600, 1800), "test": (1800, 2000)}.items():
        served = check(config, saved, shards(config, split), raw.slice(start, end - start))
        assert np.isfinite(served["I1"]).all()
    # Raising once more, as the config now says, changes nothing that is read from the shards.
    bare = {name: dense.model_copy(update={"minimum": None}) for name, dense in config.features.dense.items()}
    before = config.model_copy(update={"features": config.features.model_copy(update={"dense": bare})})
    (table,) = (pq.read_table(path) for path in (tmp_path / "out/train").iterdir())
    with_minimum, without = (features(build_columns(one, saved), table, labelled=True) for one in (config, before))
    assert all(np.array_equal(with_minimum[name], without[name]) for name in INTEGERS)


def raw_movielens(users: dict[int, Raw], movies: dict[int, Raw], table: pa.Table) -> pa.Table:
    """What is known of the user and the movie of each row of shards."""
    columns: dict[str, pa.ChunkedArray] = {}
    for known, key in ((users, "user_id"), (movies, "movie_id")):
        rows = {one: row for row, one in enumerate(known)}
        found = pa.Table.from_pylist(list(known.values())).take(pa.array([rows[one] for one in table[key].to_pylist()]))
        columns |= dict(zip(found.column_names, found.columns, strict=True))
    return pa.table(columns)


def user_of(user: str, gender: str, age: str, occupation: Any, zip_code: str) -> Raw:
    return {
        "user_id": int(user),
        "gender": gender,
        "age": int(age),
        "occupation": occupation,
        "zip_prefix": zip_code[:3],
    }


def users_1m(lines: list[str]) -> dict[int, Raw]:
    known = (line.split("::") for line in lines)
    users = [user_of(user, gender, age, int(occupation), code) for user, gender, age, occupation, code in known]
    return {user["user_id"]: user for user in users}


def movies_1m(lines: list[str]) -> dict[int, Raw]:
    movies = {}
    for line in lines:
        movie, rest = line.split("::", 1)
        title, genres = rest.rsplit("::", 1)
        movies[int(movie)] = {"movie_id": int(movie), "genres": genres.split("|"), "year": int(title[-5:-1])}
    return movies


def users_100k(lines: list[str], mark: str) -> dict[int, Raw]:
    known = (line.split(mark) for line in lines)
    users = [user_of(user, gender, age, job, code) for user, age, gender, job, code in known]
    return {user["user_id"]: user for user in users}


def movies_100k(lines: list[str]) -> dict[int, Raw]:
    """Of RecBole's file."""
    movies = {}
    for line in lines:
        movie, title, year, genres = line.split("\t")
        found = re.findall(r"\((\d{4})\)", f"{title} ({year})")
        movies[int(movie)] = {
            "movie_id": int(movie),
            "genres": genres.split(),
            "year": int(found[-1]) if found else None,
        }
    return movies


def check_movielens(folder: Path, users: dict[int, Raw], movies: dict[int, Raw]) -> None:
    config = config_of(folder)
    train = pq.read_table(folder / "out/train")
    genders = pq.read_table(folder / "out/vocabularies/gender.parquet")
    assert genders["value"].to_pylist() == ["F", "M"]
    assert genders["count"].to_pylist() == np.bincount(train["gender"].to_numpy(), minlength=2).tolist()
    genres = pq.read_table(folder / "out/vocabularies/genres.parquet")
    found = train["genres"].combine_chunks().flatten().to_numpy()
    assert genres["count"].to_pylist() == np.bincount(found, minlength=len(genres)).tolist()
    saved = held_by_a_checkpoint(config, folder)
    for split in config.data.splits:
        table = shards(config, split)
        check(config, saved, table, raw_movielens(users, movies, table))
    # Values that no vocabulary holds are none, and ages that no user had fall in their bracket.
    strange = pa.Table.from_pylist([{**next(iter(users.values())), **next(iter(movies.values()))}])
    changes = {"gender": "x", "zip_prefix": "", "year": 1800, "genres": ["Drama", "Odd"], "age": 33}
    for name, value in changes.items():
        place = strange.schema.get_field_index(name)
        strange = strange.set_column(place, name, pa.array([value], strange.schema.field(name).type))
    served = features(build_columns(config, saved, raw=True), strange)
    assert {name: served[name][0] for name in ("gender", "zip_prefix", "year", "age")} == {
        "gender": -1,
        "zip_prefix": -1,
        "year": -1,
        "age": 2,
    }
    assert served["genres"] == [[genres["value"].to_pylist().index("Drama")]]


def test_movielens_1m(tmp_path: Path) -> None:
    convert_movielens_1m(write_official(tmp_path / "source"), tmp_path / "out")
    check_movielens(tmp_path, users_1m(USERS), movies_1m(MOVIES))


@pytest.mark.parametrize("write", [write_100k, write_atomic])
def test_movielens_100k(tmp_path: Path, write: Any) -> None:
    convert_movielens_100k(write(tmp_path / "source"), tmp_path / "out")
    lines = (write_atomic(tmp_path / "told") / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    check_movielens(tmp_path, users_100k(USERS_100K, "|"), movies_100k(lines))


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-1m/ and ml-100k/")
@pytest.mark.parametrize("name", ["ml-1m", "ml-100k"])
def test_movielens_as_it_is(tmp_path: Path, name: str) -> None:
    source = Path(os.environ["HILOREC_DATA"]) / name

    def lines(file: str, encoding: str, first: int) -> list[str]:
        return (source / file).read_bytes().decode(encoding).replace("\r", "").removesuffix("\n").split("\n")[first:]

    if name == "ml-1m":
        convert_movielens_1m(source, tmp_path / "out")
        users, movies = users_1m(lines("users.dat", "latin-1", 0)), movies_1m(lines("movies.dat", "latin-1", 0))
    else:
        convert_movielens_100k(source, tmp_path / "out")
        users = users_100k(lines("ml-100k.user", "utf-8", 1), "\t")
        movies = movies_100k(lines("ml-100k.item", "utf-8", 1))
    check_movielens(tmp_path, users, movies)


def test_buckets_and_dates_that_are_applied(tmp_path: Path) -> None:
    """Which no converter of text makes, but a user's own job may: shards of rows, raw values elsewhere."""
    rng = np.random.default_rng(8)
    seconds = rng.integers(0, 2 * 10**9, 200)
    moments = [datetime.fromtimestamp(int(second), UTC) for second in seconds]
    prices = np.round(rng.normal(1, 2, 200), 2)
    missing = rng.random(200) < 0.1
    lists = [prices[place : place + place % 3].tolist() for place in range(200)]
    raw = pa.table(
        {
            "price": pa.array(prices, mask=missing),
            "prices": pa.array([None if gap else one for gap, one in zip(missing, lists, strict=True)]),
            "hour": pa.array(seconds, pa.timestamp("s"), mask=missing),
            "weekday": pa.array(seconds, mask=missing),
        }
    )

    def bucket(price: float) -> int:
        return sum(price >= edge for edge in (0.0, 1.5))

    stored = pa.table(
        {
            "label": rng.integers(0, 2, 200),
            "price": pa.array([bucket(price) for price in prices], mask=missing),
            "prices": pa.array(
                [None if gap else list(map(bucket, one)) for gap, one in zip(missing, lists, strict=True)]
            ),
            "hour": pa.array([moment.hour for moment in moments], mask=missing),
            "weekday": pa.array([moment.weekday() for moment in moments], mask=missing),
        }
    )
    (tmp_path / "out/train").mkdir(parents=True)
    pq.write_table(stored, tmp_path / "out/train/0.parquet")
    buckets = {"table": "price", "ids": {"type": "bucketize", "boundaries": [0.0, 1.5], "applied": True}}
    dataset = {
        "data": {"train": "${here}/train/*.parquet"},
        "tables": {
            name: {"num_embeddings": rows, "embedding_dim": 4}
            for name, rows in {"price": 3, "hour": 24, "weekday": 7}.items()
        },
        "features": {
            "sparse": {
                "price": buckets,
                "prices": buckets,
                "hour": {"table": "hour", "ids": {"type": "datetime", "part": "hour", "applied": True}},
                "weekday": {"table": "weekday", "ids": {"type": "datetime", "part": "weekday", "applied": True}},
            }
        },
    }
    (tmp_path / "out/dataset.yaml").write_text(yaml.safe_dump(dataset))
    config = config_of(tmp_path)
    served = check(config, held_by_a_checkpoint(config, tmp_path), shards(config, "train"), raw)
    assert set(np.unique(served["price"])) == {-1, 0, 1, 2} and len(np.unique(served["hour"])) == 25


def test_a_vocabulary_that_was_applied_is_not_counted_anew(tmp_path: Path) -> None:
    convert_log(tmp_path, "csv", raw_rows())
    config = config_of(tmp_path)
    for names in ([], ["words"]):
        with pytest.raises(ConfigError, match=r"features\.sparse\.words?\.ids\.applied: its shards hold rows of the"):
            build_vocabularies(config, names, overwrite=True)
    own = config_of(
        tmp_path,
        tables={"own": {"num_embeddings": 9, "embedding_dim": 4}},
        features={
            "sparse": {
                "own": {"table": "own", "ids": {"type": "vocabulary", "file": "${here}/own.parquet"}, "column": "kept"}
            }
        },
    )
    (built,) = build_vocabularies(own)
    assert built.file == tmp_path / "own.parquet" and built.found == 6
    shared = {"type": "vocabulary", "file": "${here}/out/vocabularies/word.parquet"}
    with pytest.raises(ConfigError, match=r"features\.sparse\.word\.ids\.applied"):
        build_vocabularies(config_of(tmp_path, features={"sparse": {"kept": {"ids": shared}}}), overwrite=True)


def test_vocabularies_of_texts_and_raised_integers_count_what_ids_are_asked_for(tmp_path: Path) -> None:
    """Of raw shards, which `prepare vocabulary` counts, as of text, which a converter does."""
    rows = raw_rows()
    raw = convert_log(tmp_path, "csv", rows)
    converted = {name: pq.read_table(tmp_path / f"out/vocabularies/{name}.parquet") for name in ("word", "number")}
    told = yaml.safe_load((tmp_path / "out/dataset.yaml").read_text())
    for split, (start, end) in ENDS.items():
        for path in (tmp_path / "out" / split).iterdir():
            path.unlink()
        pq.write_table(raw.slice(start, end - start), tmp_path / "out" / split / "0.parquet", row_group_size=50)
    for feature in told["features"]["sparse"].values():
        if "ids" in feature:
            feature["ids"]["applied"] = False
    del told["features"]["sparse"]["rare"], told["tables"]["rare"]
    (tmp_path / "out/dataset.yaml").write_text(yaml.safe_dump(told))
    config = config_of(tmp_path)
    build_vocabularies(config, ["words"], min_count=4, overwrite=True)
    build_vocabularies(config, ["numbers"], min_count=12, overwrite=True)
    for name, expected in converted.items():
        assert pq.read_table(tmp_path / f"out/vocabularies/{name}.parquet").equals(expected), name


def test_numbers_that_are_none_are_not_raised_out_of_sight(tmp_path: Path) -> None:
    convert_log(tmp_path, "csv", raw_rows())
    config = config_of(tmp_path)
    columns = build_columns(config, raw=True)
    only = columns.parts["features.dense.price"]
    for value in (float("nan"), float("-inf"), float("inf")):
        with pytest.raises(DataError, match="NaN or infinite"):
            features(only, pa.table({"price": [0.5, value, None]}))
    assert features(only, pa.table({"price": pa.array([-3.0, None])}))["price"][0] == pytest.approx(
        (np.log1p(0.1) - 0.7) / 0.9
    )
