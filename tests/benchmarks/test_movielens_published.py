"""The rows that papers report on MovieLens-1M, worked out again line by line."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.movielens_published import convert, main
from recsys.config import load_config
from recsys.data.splits import open_splits

FIELDS = ["user_id", "gender", "age", "occupation", "movie_id", "year", "genres", "label"]
SPLITS = ("train", "valid", "test")
_REST = [
    "data.batch_size=1",
    "model.tower={type: mlp}",
    "stages.joint={trains: all, epochs: 1, learning_rate: 1.0, sparse_learning_rate: 1.0}",
]
AGES = ["1", "18", "25", "35", "45", "50", "56"]


def literal(source: Path) -> dict[str, list[list[Any]]]:
    """The rows of each split."""

    def lines(name: str, separator: str = "::") -> list[list[str]]:
        return [line.split(separator) for line in (source / name).read_text("latin-1").splitlines()]

    users = {user: (int(gender == "M"), AGES.index(age), int(job)) for user, gender, age, job, _ in lines("users.dat")}
    genres = sorted({genre for *_, told in lines("movies.dat") for genre in told.split("|")})
    movies = {}
    for movie, *title, told in lines("movies.dat"):
        year = int("::".join(title)[-5:-1])
        movies[movie] = max(year // 10 - 192, 0), [genres.index(genre) for genre in told.split("|")]
    kept = []
    for user, movie, rating in lines("ratings.csv", ",")[1:]:
        if rating != "3":
            kept.append([int(user), *users[user], int(movie), *movies[movie], int(rating > "3")])
    random.seed(2019)
    random.shuffle(kept)
    first, second = len(kept) * 8 // 10, len(kept) * 8 // 10 + len(kept) // 10
    return dict(zip(SPLITS, (kept[:first], kept[first:second], kept[second:]), strict=True))


def test_missing_files_and_an_output_in_use_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    for source, output, told in (
        ("absent", "out", "absent does not exist; take ml-1m.zip"),
        (".", "used", "--overwrite"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", "--source", str(tmp_path / source), "--output", str(tmp_path / output)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1)
        assert said.startswith("error: ") and told in said


@pytest.mark.slow
@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with ml-1m/")
def test_the_rows_are_those_of_the_protocol(tmp_path: Path) -> None:
    source, output = Path(os.environ["HILOREC_DATA"]) / "ml-1m", tmp_path / "out"
    convert(source, output)
    for split, rows in literal(source).items():
        found = pq.read_table(output / split).select(FIELDS)
        assert list(zip(*(found[field].to_pylist() for field in FIELDS), strict=True)) == [tuple(row) for row in rows]
    assert [pq.read_table(output / split).num_rows for split in SPLITS] == [591_209, 73_901, 73_902]

    data = {split: f"data.{split}={output}/{split}/*.parquet" for split in SPLITS}
    config = load_config("benchmarks/configs/movielens_1m_published.yaml", [*data.values()])
    assert sum(open_splits(config, SPLITS)["train"].row_counts) == 591_209
    written = load_config(output / "dataset.yaml", _REST)
    assert {name: table.num_embeddings for name, table in config.tables.items()} == {
        name: table.num_embeddings for name, table in written.tables.items()
    }
    assert list(config.features.sparse) == list(written.features.sparse)
    assert config.features.sparse["genres"].max_length == written.features.sparse["genres"].max_length == 5
