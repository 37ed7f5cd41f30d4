"""A checkpoint predicts what evaluation does, over any number of ranks, or all of them end with one error."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plans import plan_by
from ranks import Finished, run_module, run_ranks
from runs import reseal
from test_scorer import export, train
from tiny import tiny_table, write_tiny_log

from recsys.checkpoint.layout import CheckpointError, read_meta
from recsys.config import load_checkpoint_config
from recsys.data.storage import DataError
from recsys.runtime import Ranks
from recsys.serving import Scorer
from recsys.serving.predicting import predict as predict_by
from recsys.training.scoring import ShardedScorer

PLANS = {
    "table": ["tables.item.sharding=[table_wise]", "tables.tag.sharding=[table_wise]"],
    "column": ["tables.item.sharding=[column_wise]", "tables.item.min_partition=4"],
    "replicated": [f"tables.{name}.sharding=[data_parallel]" for name in ("user", "item", "tag")],
}
UNLABELLED = ("data.label=null", "data.reference=null", "data.domain=null")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_checkpoint")
    write_tiny_log(folder / "log")
    return train(folder / "log", folder, 2, "column", "mlp", experts=True)


def raw(rows: int, seed: int) -> pa.Table:
    """Rows without labels, and with a column that no feature reads."""
    table = tiny_table(rows, seed).drop(["label", "truth", "domain"])
    return table.append_column("key", pa.array([f"{seed} {row}" for row in range(rows)], pa.string()))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, pa.Table]:
    """Three files: of row groups that are no multiple of a batch, of no rows, and with a row group of no rows."""
    tables = {"a.parquet": raw(150, 0), "b.parquet": raw(0, 1), "c.parquet": raw(77, 2)}
    (tmp_path / "in").mkdir()
    for name, table in tables.items():
        with pq.ParquetWriter(tmp_path / "in" / name, table.schema) as writer:
            for start in range(0, len(table), 40):
                writer.write_table(table.slice(start, 40))
                writer.write_table(table.slice(0, 0))
    return tables


def command(checkpoint: Path, tmp_path: Path, *options: str) -> tuple[str, ...]:
    return ("--checkpoint", str(checkpoint), "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", *options)


def predict(checkpoint: Path, tmp_path: Path, *options: str, world_size: int = 1) -> list[Finished]:
    finished = run_module(world_size, "recsys.predict", *command(checkpoint, tmp_path, *options))
    assert [one.code for one in finished] == [0] * world_size, finished
    return finished


def refused(checkpoint: Path, tmp_path: Path, *options: str, world_size: int = 1) -> str:
    """The one line that one of the ranks says, which ends with 2."""
    finished = run_module(world_size, "recsys.predict", *command(checkpoint, tmp_path, *options))
    (told,) = [one for one in finished if one.stderr]
    assert told.code == 2 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1, finished
    assert all(one.code for one in finished)
    return told.stderr


def evaluated(checkpoint: Path, tmp_path: Path, *overrides: str, world_size: int = 1) -> np.ndarray[Any, Any]:
    """Probabilities of all rows, in the order of the files, as evaluation gives them."""
    folder = tmp_path / "evaluated"
    arguments = ("--checkpoint", str(checkpoint), "--predictions", str(folder), f"data.test={tmp_path}/in/*.parquet")
    finished = run_module(world_size, "recsys.evaluate", *arguments, *UNLABELLED, *overrides)
    assert [one.code for one in finished] == [0] * world_size, finished
    probabilities: np.ndarray[Any, Any] = pq.read_table(folder)["probability"].to_numpy()
    return probabilities


def predicted(tmp_path: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet"))])


FIRST = [(1, "table"), (2, "replicated"), (3, "column"), (3, "table")]
REST = [(1, "column"), (1, "replicated"), (2, "table"), (2, "column"), (3, "replicated")]


@pytest.mark.parametrize(
    ("world_size", "plan"), [*FIRST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_raw_rows_have_the_probabilities_of_evaluation(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table], world_size: int, plan: str
) -> None:
    options = ("--keep", "key", "--keep", "tags", "--logit", *PLANS[plan])
    first, *others = predict(checkpoint, tmp_path, *options, world_size=world_size)
    assert "\n227 rows predicted\n" in first.stdout and not any("predicted" in other.stdout for other in others)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    for name, table in files.items():
        found = pq.read_table(tmp_path / "out" / name)
        assert found.column_names == ["key", "tags", "probability", "logit"]
        assert found["key"].equals(table["key"]) and found["tags"].equals(table["tags"])
    found = predicted(tmp_path)
    expected = evaluated(checkpoint, tmp_path)
    np.testing.assert_allclose(found["probability"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["logit"].to_numpy())), expected, rtol=0, atol=1e-6)
    assert np.ptp(expected) > 0.05


def _predict_row_wise(ranks: Ranks, checkpoint: Path, tmp_path: Path) -> int:
    """With a plan that TorchRec follows on a CPU, where its planner proposes none of the kind."""
    plan_by({"user": "row_wise", "item": "row_wise", "tag": "data_parallel"})
    scorer = ShardedScorer(checkpoint, read_meta(checkpoint), load_checkpoint_config(checkpoint), ranks)
    with pytest.raises(CheckpointError, match="--keep: probability is what the predictions are called"):
        scorer.predict([f"{tmp_path}/in"], f"{tmp_path}/out", keep=["probability"])
    rows = scorer.predict([f"{tmp_path}/in"], f"{tmp_path}/out")
    with pytest.raises(CheckpointError, match="--output names no folder"):  # and none waits for batches
        scorer.predict([f"{tmp_path}/in"], "")
    return rows


@pytest.mark.parametrize("world_size", [2, 3])
def test_tables_sharded_by_rows_give_the_probabilities_of_evaluation(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table], world_size: int
) -> None:
    assert run_ranks(world_size, _predict_row_wise, checkpoint, tmp_path) == [227] * world_size
    expected = evaluated(checkpoint, tmp_path)
    np.testing.assert_allclose(predicted(tmp_path)["probability"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_batches_on_as_many_ranks_have_the_same_bits(
    checkpoint: Path, tmp_path: Path, world_size: int
) -> None:
    (tmp_path / "in").mkdir()
    for part in range(2):
        pq.write_table(raw(128, part), tmp_path / f"in/{part}.parquet", row_group_size=64)
    predict(checkpoint, tmp_path, world_size=world_size)
    expected = evaluated(checkpoint, tmp_path, world_size=world_size)
    np.testing.assert_array_equal(predicted(tmp_path)["probability"], expected)


def test_ranks_without_a_file_take_part(checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]) -> None:
    for name in ("b.parquet", "c.parquet"):
        (tmp_path / "in" / name).unlink()
    finished = predict(checkpoint, tmp_path, *PLANS["table"], world_size=3)
    assert [len(one.stdout.splitlines()) for one in finished] == [2, 0, 0]
    expected = evaluated(checkpoint, tmp_path)
    np.testing.assert_allclose(predicted(tmp_path)["probability"], expected, rtol=0, atol=1e-6)


def test_strings_are_kept_as_they_stand(checkpoint: Path, tmp_path: Path) -> None:
    """Though features read them as dictionaries; overrides hold for predictions as for evaluation."""
    (tmp_path / "in").mkdir()
    table = raw(90, 0)
    users = pa.array([None if row % 7 == 0 else f"user {row % 5}" for row in range(90)])
    table = table.set_column(table.column_names.index("user"), "user", users)
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=50)
    (checkpoint := shutil.copytree(checkpoint, tmp_path / "step")).joinpath("kinds.json").unlink()
    reseal(checkpoint)
    hashed = "features.sparse.user.ids={type: hash}"
    predict(checkpoint, tmp_path, "--keep", "user", hashed)
    found = predicted(tmp_path)
    assert found["user"].equals(table["user"])
    expected = evaluated(checkpoint, tmp_path, hashed)
    np.testing.assert_allclose(found["probability"], expected, rtol=0, atol=1e-6)
    assert "has its 90 rows already" in predict(checkpoint, tmp_path, "--keep", "user", hashed)[0].stdout
    other = refused(checkpoint, tmp_path, "--keep", "user", "features.sparse.user.ids={type: hash, salt: 5}")
    assert "a.parquet is there and holds no predictions of this checkpoint" in other


def test_what_is_whole_is_left_on_any_number_of_ranks(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]
) -> None:
    predict(checkpoint, tmp_path, world_size=2)
    whole = predicted(tmp_path)
    (tmp_path / "out/a.parquet").unlink()
    kept = (tmp_path / "out/c.parquet").stat().st_mtime_ns
    first, _, third = predict(checkpoint, tmp_path, "data.batch_size=16", *PLANS["table"], world_size=3)
    assert "\n150 rows predicted\n" in first.stdout and "c.parquet has its 77 rows already" in third.stdout
    assert (tmp_path / "out/c.parquet").stat().st_mtime_ns == kept
    np.testing.assert_allclose(predicted(tmp_path)["probability"], whole["probability"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_what_was_killed_is_gone_on_with(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part in range(60):
        pq.write_table(raw(200, part), tmp_path / f"in/{part:02}.parquet")
    arguments = command(checkpoint, tmp_path, "data.batch_size=1")
    with subprocess.Popen([sys.executable, "-m", "recsys.predict", *arguments], stdout=subprocess.DEVNULL) as run:
        until = time.monotonic() + 100
        while len(list((tmp_path / "out").glob("*.parquet"))) < 3:
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    assert 3 <= len(before) < 60
    (done,) = predict(checkpoint, tmp_path)
    assert done.stdout.count("has its 200 rows already") == len(before)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in before.items())
    expected = evaluated(checkpoint, tmp_path)
    np.testing.assert_allclose(predicted(tmp_path)["probability"], expected, rtol=0, atol=1e-6)


def spoil(path: Path, row: int) -> None:
    table = pq.read_table(path)
    users = table["user"].to_pylist()
    users[row] = 4000
    spoilt = table.set_column(table.column_names.index("user"), "user", pa.array(users))
    pq.write_table(spoilt, path, row_group_size=40)


@pytest.mark.parametrize("bad", ["a.parquet", "c.parquet"])
def test_a_value_that_cannot_be_scored_ends_all_ranks(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table], bad: str
) -> None:
    """Of the rank with the most rows, and of one whose rows are over before."""
    spoil(tmp_path / "in" / bad, 60)
    told = refused(checkpoint, tmp_path, *PLANS["table"], world_size=3)
    assert f"{tmp_path}/in/{bad}, row group 1, row 20: sparse feature user" in told and "4000" in told
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == sorted(name for name in files if name != bad)


def test_ranks_that_have_much_to_do_stop_when_another_fails(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]
) -> None:
    spoil(tmp_path / "in/c.parquet", 0)
    told = refused(checkpoint, tmp_path, "data.batch_size=1", world_size=3)
    assert f"{tmp_path}/in/c.parquet, row group 0" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.parquet"]  # 150 batches of a were to come


@pytest.mark.slow
def test_a_rank_that_fails_before_its_first_batch_ends_all(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "in/b.parquet", tmp_path / "out/b.parquet")
    told = refused(checkpoint, tmp_path, world_size=2)
    assert told == (
        f"error: {tmp_path}/out/b.parquet is there and holds no predictions of this checkpoint; take it away, or name "
        "another --output\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.parquet"]
    assert "'absent'" in refused(checkpoint, tmp_path, "--keep", "absent", world_size=2)


def test_a_folder_that_cannot_be_made_ends_all_ranks(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a/one", "b/two"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        pq.write_table(raw(50, 0), tmp_path / f"in/{name}.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b").touch()
    assert f"{tmp_path}/out/b/two.parquet" in refused(checkpoint, tmp_path, world_size=2)


def test_a_disk_that_is_full_is_named_and_keeps_no_file(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]
) -> None:
    export(checkpoint, tmp_path / "artifact")
    scorer = Scorer(tmp_path / "artifact")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # past which a write fails, as on a full disk
    try:
        with pytest.raises(DataError, match=rf"{tmp_path}/out/a.parquet: .*File too large") as caught:
            predict_by(scorer, [f"{tmp_path}/in/a.parquet"], f"{tmp_path}/out", keep=["key"], say=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]) -> None:
    spoilt = shutil.copytree(checkpoint, tmp_path / "step")
    path = sorted(spoilt.glob("*.distcp"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    told = refused(spoilt, tmp_path, world_size=2)
    assert f"{path} is not what was written" in told
    assert "is no complete checkpoint" in refused(tmp_path / "nothing", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--checkpoint", "a", "--artifact", "b"), "argument --artifact: not allowed with argument --checkpoint"),
        ((), "one of the arguments --artifact --checkpoint is required"),
        (("--artifact", "b", "device=cpu"), "error: device=cpu: an artefact's config stands as it is"),
    ],
)
def test_one_model_predicts(options: tuple[str, ...], told: str) -> None:
    (done,) = run_module(1, "recsys.predict", *options, "--input", "in", "--output", "out")
    assert done.code == 2 and told in done.stderr


def test_the_artefact_predicts_what_the_checkpoint_does(
    checkpoint: Path, tmp_path: Path, files: dict[str, pa.Table]
) -> None:
    predict(checkpoint, tmp_path)
    expected = predicted(tmp_path)
    export(checkpoint, tmp_path / "artifact")
    shutil.rmtree(tmp_path / "out")
    scorer = Scorer(tmp_path / "artifact")
    scorer.batch_rows = 7
    asked: list[int] = []
    rows = predict_by(
        scorer,
        [f"{tmp_path}/in"],
        f"{tmp_path}/out",
        say=lambda line: None,
        begin=asked.append,
    )
    assert (rows, asked) == (227, [3 * 6 + 5 + 6 + 6])
    np.testing.assert_allclose(predicted(tmp_path)["probability"], expected["probability"], rtol=0, atol=1e-6)
