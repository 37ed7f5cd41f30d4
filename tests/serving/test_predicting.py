"""Predictions are those of the model, one file for each, in the order of the rows, whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module
from tiny import tiny_table

from recsys.config import ConfigError
from recsys.serving import Scorer
from recsys.serving.predicting import share_of_this_process


@pytest.fixture(scope="module")
def artifact(trained: tuple[Path, Path]) -> Path:
    return trained[1]


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, pa.Table]:
    """Three files in two folders, without labels; one of no rows."""
    tables = {}
    for number, name in enumerate(("a/one.parquet", "b/one.parquet", "b/two.parquet")):
        table = tiny_table((150, 0, 77)[number], number).drop(["label", "truth", "domain"])
        tables[name] = table.append_column("key", pa.array([f"{name} {row}" for row in range(len(table))], pa.string()))
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(tables[name], tmp_path / "in" / name, row_group_size=40)
    return tables


def predict(artifact: Path, tmp_path: Path, *options: str, world_size: int = 1, code: int = 0) -> list[Any]:
    arguments = ("--artifact", str(artifact), "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", *options)
    finished = run_module(world_size, "recsys.predict", *arguments)
    assert max(one.code for one in finished) == code, finished
    return finished


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_file_has_its_rows_probabilities_in_order(
    artifact: Path, tmp_path: Path, rows: dict[str, pa.Table], world_size: int
) -> None:
    predict(artifact, tmp_path, "--keep", "key", "--keep", "tags", "--logit", world_size=world_size)
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == sorted(rows)
    scorer = Scorer(artifact)
    for name, table in rows.items():
        found = pq.read_table(tmp_path / "out" / name)
        assert found.column_names == ["key", "tags", "probability", "logit"]
        assert found["key"].equals(table["key"]) and found["tags"].equals(table["tags"])
        if not len(table):
            continue
        np.testing.assert_allclose(found["probability"], scorer.score(table), rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            1 / (1 + np.exp(-found["logit"].to_numpy())), found["probability"], rtol=0, atol=1e-6
        )


def test_what_is_whole_is_left_and_what_is_missing_is_written(
    artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]
) -> None:
    predict(artifact, tmp_path)
    (tmp_path / "out/b/two.parquet").unlink()
    kept = (tmp_path / "out/a/one.parquet").stat().st_mtime_ns
    (done,) = predict(artifact, tmp_path)
    assert "a/one.parquet has its 150 rows already" in done.stdout and "77 rows predicted" in done.stdout
    assert (tmp_path / "out/a/one.parquet").stat().st_mtime_ns == kept
    pq.write_table(pq.read_table(tmp_path / "out/b/two.parquet").slice(1), tmp_path / "out/b/two.parquet")
    (done,) = predict(artifact, tmp_path, code=2)
    assert "two.parquet is there with 76 rows instead of 77; take it away" in done.stderr


def test_a_value_that_cannot_be_scored_is_named_and_leaves_no_file(
    artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]
) -> None:
    table = rows["a/one.parquet"]
    users = table["user"].to_pylist()
    users[100] = 4000
    spoilt = table.set_column(table.column_names.index("user"), "user", pa.array(users))
    pq.write_table(spoilt, tmp_path / "in/a/one.parquet", row_group_size=40)
    (done,) = predict(artifact, tmp_path, code=2)
    assert (
        f"{tmp_path}/in/a/one.parquet, row group 2, row 20: sparse feature user" in done.stderr
        and "4000" in done.stderr
    )
    assert not (tmp_path / "out/a/one.parquet").exists()


def test_a_column_that_is_missing_or_taken_is_named(artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]) -> None:
    assert "absent" in predict(artifact, tmp_path, "--keep", "absent", code=2)[0].stderr
    assert "--keep: probability is what" in predict(artifact, tmp_path, "--keep", "probability", code=2)[0].stderr
    for name, table in rows.items():
        pq.write_table(table.drop(["x"]), tmp_path / "in" / name)
    (done,) = predict(artifact, tmp_path, code=2)
    assert "'x'" in done.stderr and done.stderr.count("\n") == 1


def test_files_that_are_no_such_predictions_are_refused(
    artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]
) -> None:
    """Not taken for done, by their numbers of rows alone, and not waited for."""
    (done,) = predict(artifact, tmp_path, "--output", f"{tmp_path}/in", code=2)
    assert "in/a/one.parquet is there and holds no predictions of this artefact" in done.stderr
    predict(artifact, tmp_path)
    (done,) = predict(artifact, tmp_path, "--logit", code=2)
    assert "a/one.parquet is there with probability instead of probability, logit; take it away" in done.stderr
    other = shutil.copytree(artifact, tmp_path / "other")
    told = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**told, "step": told["step"] + 1}))
    (done,) = predict(other, tmp_path, code=2)
    assert "a/one.parquet is there and holds no predictions of this artefact" in done.stderr
    (tmp_path / "out/a/one.parquet").unlink()
    os.mkfifo(tmp_path / "out/a/one.parquet")
    (done,) = predict(artifact, tmp_path, code=2)
    assert "a/one.parquet is there and is no file" in done.stderr


def test_no_file_leads_out_of_the_folder(artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]) -> None:
    """However the inputs are written: by detours, relative or not, one column kept twice."""
    relative = os.path.relpath(tmp_path)
    arguments = ("--artifact", str(artifact), "--output", f"{tmp_path}/out", "--keep", "key", "--keep", "key")
    inputs = ("--input", f"{relative}/in/a", "--input", f"{tmp_path}/in/a/../b")
    (done,) = run_module(1, "recsys.predict", *arguments, *inputs)
    assert done.code == 0, done.stderr
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == sorted(rows)
    assert pq.read_schema(tmp_path / "out/b/two.parquet").names == ["key", "probability"]


def test_an_output_of_no_name_is_refused(artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]) -> None:
    (done,) = predict(artifact, tmp_path, "--output", "", code=2)
    assert done.stderr == "error: --output names no folder\n"


@pytest.mark.parametrize(("rank", "world_size"), [("a", "2"), ("5", "2"), ("0", "0")])
def test_a_share_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=f"RANK={rank} and WORLD_SIZE={world_size} are no process"):
        share_of_this_process()
