"""Raw rows of what a converter wrote are answered by an artefact as evaluation answers the converted ones."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module
from test_movielens import MOVIES, USERS, USERS_100K, write_100k, write_atomic, write_official
from test_raw_values import (
    ENDS,
    config_of,
    convert_log,
    movies_1m,
    movies_100k,
    raw_movielens,
    raw_rows,
    shards,
    users_1m,
    users_100k,
)

from benchmarks.conversion import generate
from recsys.data.storage import DataError
from recsys.prepare.criteo import CATEGORIES, INTEGERS, criteo_schema
from recsys.prepare.movielens import convert_movielens_1m, convert_movielens_100k
from recsys.prepare.tabular import convert_text
from recsys.serving import Scorer

REAL = Path(os.environ.get("HILOREC_DATA", "")) / "criteo_10k/train_examples.txt"
STAGES = {"joint": {"trains": "all", "steps": 8, "learning_rate": 0.02, "sparse_learning_rate": 0.5}}


def run(module: str, *arguments: str) -> None:
    (done,) = run_module(1, f"recsys.{module}", *arguments)
    assert done.code == 0, done.stderr


def served(folder: Path, raw: pa.Table, split: str = "test") -> Scorer:
    """An artefact of a short run on `folder/out`, whose probabilities of raw rows are those of the split's shards."""
    config = config_of(folder, stages=STAGES)
    assert len(shards(config, split)) == len(raw)
    run("train", "--config", str(folder / "run.yaml"), "device=cpu")
    checkpoint = str(folder / "run/checkpoints/step-8")
    predictions = folder / "predictions"
    run("evaluate", "--checkpoint", checkpoint, "--split", split, "--predictions", str(predictions))
    run("export", "--checkpoint", checkpoint, "--split", split, "--output", str(folder / "artifact"))
    scorer = Scorer(folder / "artifact")
    found = scorer.score(raw)
    np.testing.assert_allclose(found, pq.read_table(predictions)["probability"].to_numpy(), rtol=0, atol=1e-6)
    assert np.ptp(found) > 0.01
    rows = raw.select(scorer.columns).to_pylist()
    np.testing.assert_allclose([scorer.score([row])[0] for row in rows[:20]], found[:20], rtol=0, atol=1e-6)
    return scorer


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_text_of_any_kind_is_served(tmp_path: Path, form: str) -> None:
    raw = convert_log(tmp_path, form, raw_rows())
    start, end = ENDS["test"]
    served(tmp_path, raw.slice(start, end - start).drop(["clicked"]))


@pytest.mark.parametrize("ids", ["vocabulary", "hash"])
def test_criteos_lines_are_served(tmp_path: Path, ids: Any) -> None:
    source = tmp_path / "train.txt"
    if REAL.is_file():
        shutil.copyfile(REAL, source)
    else:
        generate(source, 2000)
    options = {"min_count": 3} if ids == "vocabulary" else {"buckets": 1009}
    convert_text([source], tmp_path / "out", criteo_schema([source], ids=ids, **options))
    lines = source.read_text().splitlines()
    fields = [[field or None for field in line.split("\t")[1:]] for line in lines[len(lines) * 9 // 10 :]]
    columns = dict(zip((*INTEGERS, *CATEGORIES), zip(*fields, strict=True), strict=True))
    kinds = {name: pa.int64() if name in INTEGERS else pa.string() for name in columns}
    raw = pa.table({name: pa.array(values, pa.string()).cast(kinds[name]) for name, values in columns.items()})
    scorer = served(tmp_path, raw)
    # Shards say what their ids were, so that a number in the place of a text does not find another row.
    with pytest.raises(DataError, match=r"'C1' .* (holds numbers, but strings|has type int64; strings)"):
        scorer.score(raw.set_column(raw.schema.get_field_index("C1"), "C1", pa.array(range(len(raw)))))


def test_movielens_1m_is_served(tmp_path: Path) -> None:
    convert_movielens_1m(write_official(tmp_path / "source"), tmp_path / "out")
    table = shards(config_of(tmp_path), "train")
    served(tmp_path, raw_movielens(users_1m(USERS), movies_1m(MOVIES), table), "train")


@pytest.mark.parametrize("write", [write_atomic, pytest.param(write_100k, marks=pytest.mark.slow)])
def test_movielens_100k_is_served(tmp_path: Path, write: Any) -> None:
    convert_movielens_100k(write(tmp_path / "source"), tmp_path / "out")
    lines = (write_atomic(tmp_path / "told") / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    table = shards(config_of(tmp_path), "train")
    scorer = served(tmp_path, raw_movielens(users_100k(USERS_100K, "|"), movies_100k(lines), table), "train")
    row = {"user_id": 1, "movie_id": 1, "gender": 0, "age": 30, "occupation": "none", "zip_prefix": "1", "genres": []}
    with pytest.raises(DataError, match=r"'gender' .* has type int64; strings"):
        scorer.score([{**row, "year": 1990}])
