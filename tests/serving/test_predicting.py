"""Predictions are those of the model, one file for each, in the order of the rows, whole or not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module
from test_candidates import make
from test_scorer import TOWERS
from tiny import tiny_table

from recsys.config import ConfigError
from recsys.data.storage import DataError
from recsys.serving import Scorer, predicting
from recsys.serving.predicting import processes_here, share_of_this_process
from recsys.serving.scorer import RequestError


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


def test_all_files_are_predicted_where_nobody_takes_what_is_printed(
    artifact: Path, tmp_path: Path, rows: dict[str, pa.Table]
) -> None:
    command = [sys.executable, "-m", "recsys.predict", "--artifact", str(artifact)]
    command += ["--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("warning: stdout takes no more (")) == (0, 1)
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == sorted(rows)


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
    shutil.copytree(tmp_path / "in", tmp_path / "out")
    (done,) = predict(artifact, tmp_path, code=2)
    assert "out/a/one.parquet is there and holds no predictions of this artefact" in done.stderr
    shutil.rmtree(tmp_path / "out")
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


def test_predictions_of_rows_that_were_replaced_are_not_taken_for_done(artifact: Path, tmp_path: Path) -> None:
    """As many rows came under the same name, as of the next day; a copy of the file is the file."""
    scorer, path = Scorer(artifact), tmp_path / "in/day.parquet"
    path.parent.mkdir()
    pq.write_table(tiny_table(50, 1), path)
    assert predicting.predict(scorer, [str(path)], f"{tmp_path}/out") == 50
    shutil.copyfile(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    assert predicting.predict(scorer, [str(path)], f"{tmp_path}/out") == 0
    pq.write_table(tiny_table(50, 2), path)
    with pytest.raises(DataError, match=r"out/day\.parquet is there with predictions of what .* was before; take"):
        predicting.predict(scorer, [str(path)], f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("pattern", "output", "is_among"),
    [
        ("in", "in/out", True),
        ("in", "in", True),
        ("in/one.parquet", "in/../in", True),
        ("in/**", "in/out", True),
        ("*/one.parquet", "out", True),
        ("@list.txt", "in/out", True),
        ("in/*.parquet", "in/out", False),
        ("in", "in/_out", False),
        ("in", "out", False),
    ],
)
def test_no_prediction_becomes_an_input(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, output: str, is_among: bool
) -> None:
    """So that the command can be called again; however the two are written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "list.txt").write_text("in  # all of it\n")
    pq.write_table(tiny_table(20, 1), tmp_path / "in/one.parquet")
    monkeypatch.chdir(tmp_path)
    if is_among:
        with pytest.raises(DataError, match=r"--output: .*one\.parquet is where --input looks for files"):
            predicting.predict(Scorer(artifact), [pattern], output)
        assert [path.name for path in tmp_path.rglob("*.parquet")] == ["one.parquet"]
        return
    for rows in (20, 0):
        assert predicting.predict(Scorer(artifact), [pattern], output) == rows


def test_rows_of_which_the_model_makes_nan_have_no_answer(tmp_path: Path) -> None:
    scorer = Scorer(make(tmp_path, TOWERS["dcn_v2"]))
    table = tiny_table(50, 1)
    for name in ("x", "z"):
        huge = table[name].to_pylist()
        huge[45] = 3e38
        table = table.set_column(table.column_names.index(name), name, pa.array(huge))
    row = table.select(scorer.columns).to_pylist()[45]
    with pytest.raises(DataError, match="rows to score: row 45 has no probability, as its numbers are too large"):
        scorer.score(table)
    with pytest.raises(DataError, match="candidates: row 0 has no probability"):
        scorer.score_candidates({"z": row.pop("z")}, [row])
    pq.write_table(table, tmp_path / "day.parquet", row_group_size=40)
    with pytest.raises(DataError, match=r"day\.parquet, row group 1: row 5 has no probability"):
        predicting.predict(scorer, [f"{tmp_path}/day.parquet"], f"{tmp_path}/out")
    assert not list(tmp_path.glob("out/*"))


def test_an_hour_without_rows_has_an_empty_file(artifact: Path, tmp_path: Path) -> None:
    pq.write_table(tiny_table(0, 1), tmp_path / "hour.parquet")
    for _ in range(2):
        assert predicting.predict(Scorer(artifact), [f"{tmp_path}/hour.parquet"], f"{tmp_path}/out") == 0
        assert pq.read_table(tmp_path / "out/hour.parquet").schema.names == ["probability"]


def test_columns_on_paths_stay_there(artifact: Path, tmp_path: Path) -> None:
    """In the files as well, no reader could read the predictions; where no path is left, they are columns."""
    for day in (1, 2):
        (tmp_path / f"in/day={day}").mkdir(parents=True)
        pq.write_table(tiny_table(20, day), tmp_path / f"in/day={day}/one.parquet")
    scorer = Scorer(artifact)
    with pytest.raises(RequestError, match=r"--keep: day is on the path of .*out/day=1/one\.parquet as well; leave it"):
        predicting.predict(scorer, [f"{tmp_path}/in/*"], f"{tmp_path}/out", keep=["day"])
    assert predicting.predict(scorer, [f"{tmp_path}/in/*"], f"{tmp_path}/out") == 40
    assert set(pq.read_table(tmp_path / "out")["day"].to_pylist()) == {1, 2}
    predicting.predict(scorer, [f"{tmp_path}/in/*=1"], f"{tmp_path}/first", keep=["day"])
    assert set(pq.read_table(tmp_path / "first")["day"].to_pylist()) == {1}


def test_names_that_are_left_out_are_told(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(tiny_table(20, 1), tmp_path / "in/one.parquet")
    (tmp_path / "in/two.parquet").symlink_to("one.parquet")
    told: list[Any] = []
    predicting.predict(Scorer(artifact), [f"{tmp_path}/in"], f"{tmp_path}/out", say=told.append)
    assert len(told) == 2 and "left out: " in told[0] and "in/two.parquet (as " in told[0]
    predicting.predict(Scorer(artifact), [f"{tmp_path}/in"], f"{tmp_path}/out", say=told.append, share=(1, 2))
    assert len(told) == 2


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


@pytest.mark.parametrize(("rank", "world_size"), [("a", "2"), ("5", "2"), ("0", "0"), ("0", "9" * 5000)])
def test_a_share_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=f"RANK={rank} and WORLD_SIZE={world_size} are no process"):
        share_of_this_process()


def test_variables_that_are_empty_are_as_those_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert (share_of_this_process(), processes_here()) == ((0, 1), 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes_here() == 3
    for wrong in ("0", "many"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", wrong)
        with pytest.raises(ConfigError, match=f"LOCAL_WORLD_SIZE={wrong} is no number of processes"):
            processes_here()
