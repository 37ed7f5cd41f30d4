"""The training command: what it prints, how bad input ends it, on one rank and on several."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ranks import Finished, run_module
from tiny import tiny_config, tiny_table, write_tiny_log
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from recsys.versions import SUPPORTED

WORLD_SIZE = 2


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A config of one short stage on a log of its own, which the test may spoil."""
    write_tiny_log(tmp_path / "log")
    raw = tiny_config(tmp_path / "log", tmp_path / "out")
    raw["stages"] = {"joint": {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}}
    return raw


def run_train(raw: dict[str, Any], folder: Path, *overrides: str, world_size: int = WORLD_SIZE) -> list[Finished]:
    path = folder / "spoilt.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return run_module(world_size, "recsys.train", "--config", str(path), *overrides)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, row_group_size=70)


def with_column(name: str, values: Callable[[pa.Table], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array(values(table)))

    return change


def put(values: pa.ChunkedArray, row: int, value: Any) -> list[Any]:
    listed = values.to_pylist()
    listed[row] = value
    return listed


def test_a_run_prints_stages_figures_and_where_its_outputs_are(raw: dict[str, Any], tmp_path: Path) -> None:
    first, second = run_train(raw, tmp_path)
    assert (first.code, second.code) == (0, 0), first.stderr
    assert first.stderr == ""  # no warning of a library reaches the user
    assert (second.stdout, second.stderr) == ("", "")
    assert "tiny: 2 ranks on cpu" in first.stdout
    assert (
        "An example costs 1,880 FLOPs (embedding 20, projection 16, tower 1,024, experts 768, routing 36, head 16)"
        in first.stdout
    )
    assert "hilomoe mlp 16x8 L2 K3 against mlp 16x8: FLOPs of tower and experts +" in first.stdout
    assert "joint: 15 steps, training all" in first.stdout
    assert "test, truth" in first.stdout
    assert f"Outputs in {tmp_path}/out" in first.stdout
    assert max(len(line.replace(str(tmp_path), "runs")) for line in first.stdout.splitlines()) <= 150
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 15


def test_an_output_directory_that_is_a_file_is_an_error(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (told,) = [rank for rank in run_train(raw, tmp_path, f"output_dir={tmp_path}/taken") if rank.stderr]
    assert told.code == 2
    assert told.stderr.startswith(f"error: output_dir: {tmp_path}/taken cannot be a directory: File exists")


def test_a_train_split_without_any_label_is_an_error(raw: dict[str, Any], tmp_path: Path) -> None:
    for path in (tmp_path / "log/train").glob("*.parquet"):
        rewrite(path, with_column("label", lambda table: pa.nulls(len(table), pa.int8())))
    raw["data"]["label_null"] = "skip"
    (told,) = [rank for rank in run_train(raw, tmp_path) if rank.stderr]
    assert told.code == 2
    assert told.stderr.startswith("error: data.train: no row has a label")
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


def test_a_terminal_gets_a_live_bar_in_place_of_lines(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "recsys.train", "--config", str(tmp_path / "live.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "150"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its last process has ended
        while part := os.read(screen, 1 << 16):
            shown += part
    os.close(screen)
    assert process.wait(60) == 0
    text = shown.decode()
    # 900 rows in batches of 32 on one rank.
    assert "29/29" in text
    assert "step  5/29" not in text
    assert "Warning" not in text


def test_an_earlier_run_of_the_same_name_is_kept(raw: dict[str, Any], tmp_path: Path) -> None:
    run_train(raw, tmp_path, world_size=1)
    (again,) = run_train(raw, tmp_path, world_size=1)
    assert again.code == 0
    assert "An earlier run was in" in again.stdout
    assert len(list(tmp_path.glob("out*/summary.json"))) == 2


def spoil_key(raw: dict[str, Any], log: Path) -> None:
    raw["data"]["bach_size"] = 3


def spoil_type(raw: dict[str, Any], log: Path) -> None:
    raw["data"]["batch_size"] = "many"


def spoil_glob(raw: dict[str, Any], log: Path) -> None:
    raw["data"]["valid"] = str(log / "nothing" / "*.parquet")


def spoil_file(raw: dict[str, Any], log: Path) -> None:
    (log / "train" / "part-1.parquet").write_text("no Parquet")


def spoil_column(raw: dict[str, Any], log: Path) -> None:
    rewrite(log / "valid" / "part-2.parquet", lambda table: table.drop_columns(["tags"]))


def spoil_column_type(raw: dict[str, Any], log: Path) -> None:
    rewrite(
        log / "train" / "part-2.parquet", with_column("user", lambda table: [str(x) for x in table["user"].to_pylist()])
    )


def spoil_label(raw: dict[str, Any], log: Path) -> None:
    rewrite(log / "train" / "part-2.parquet", with_column("label", lambda table: put(table["label"], 100, 5)))


def spoil_id(raw: dict[str, Any], log: Path) -> None:
    rewrite(log / "train" / "part-0.parquet", with_column("item", lambda table: put(table["item"], 75, 30)))


def spoil_test_id(raw: dict[str, Any], log: Path) -> None:
    rewrite(log / "test" / "part-2.parquet", with_column("user", lambda table: put(table["user"], 0, -4)))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_key, ["data.bach_size", "unknown key", "did you mean 'batch_size'"]),
        (spoil_type, ["data.batch_size", "valid integer", '"many"']),
        (spoil_glob, ["data.valid", "no file matches", "nothing"]),
        (spoil_file, ["train/part-1.parquet", "not a readable Parquet file"]),
        (spoil_column, ["valid/part-2.parquet", "no column 'tags'"]),
        (spoil_column_type, ["train/part-2.parquet", "'user'", "string", "integers"]),
        (spoil_label, ["train/part-2.parquet, row group 1", "'label'", "such as 5"]),
        (spoil_id, ["train/part-0.parquet, row group 1", "item", "such as 30", "0..29"]),
        (spoil_test_id, ["test/part-2.parquet, row group 0", "user", "such as -4", "0..39"]),
    ],
)
def test_bad_input_ends_every_rank_with_one_error(
    raw: dict[str, Any], tmp_path: Path, spoil: Callable[[dict[str, Any], Path], None], expected: list[str]
) -> None:
    spoil(raw, tmp_path / "log")
    finished = run_train(raw, tmp_path)
    # A rank that the failing one left behind may be ended by a signal, which shows as a negative code.
    assert all(rank.code != 0 for rank in finished), finished
    assert 2 in {rank.code for rank in finished}
    errors = "".join(rank.stderr for rank in finished)
    assert errors.count("error: ") == 1, errors
    assert "Traceback" not in errors
    for text in expected:
        assert text in errors


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    first, second = run_module(2, "recsys.train", "--config", str(tmp_path / "none.yaml"))
    assert first.code == 2
    assert "none.yaml" in first.stderr
    assert second.code != 0
    assert second.stderr == ""


def test_a_mismatched_trio_is_explained_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torchrec-1.5.0.dist-info").mkdir()
    (tmp_path / "torchrec-1.5.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchrec\nVersion: 1.5.0\n"
    )
    (tmp_path / "torch.py").write_text("raise ImportError('what a mismatch would end in')")
    finished = subprocess.run(
        [sys.executable, "-m", "recsys.train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert "torchrec 1.5.0" in finished.stderr
    (matching,) = (trio.torchrec for trio in SUPPORTED if metadata.version("torch").startswith(trio.torch))
    assert f"pip install --no-deps torchrec=={matching}" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_launchers_report_gets_the_cause(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "recsys.train", "data.batch_size=-1"],
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    failure = ProcessFailure(0, 1, finished.returncode, str(tmp_path / "error.json"))
    assert isinstance(failure.message, dict)
    assert failure.message["message"] == finished.stderr.rstrip()
    assert "data.batch_size" in finished.stderr


def test_fewer_row_groups_than_ranks_an_empty_shard_and_a_huge_batch_work(raw: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "log" / "train")
    (tmp_path / "log" / "train").mkdir()
    table = tiny_table(101, seed=5)
    pq.write_table(table, tmp_path / "log" / "train" / "part-0.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "log" / "train" / "part-1.parquet")
    raw["data"]["batch_size"] = 5000
    finished = run_train(raw, tmp_path, world_size=3)
    assert [rank.code for rank in finished] == [0, 0, 0], finished[0].stderr
    stage = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]["joint"]
    assert (stage["steps"], stage["examples"]) == (1, 101)


def test_more_ranks_than_rows_works(raw: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "log" / "train")
    (tmp_path / "log" / "train").mkdir()
    pq.write_table(tiny_table(2, seed=5), tmp_path / "log" / "train" / "part-0.parquet")
    finished = run_train(raw, tmp_path, world_size=3)
    assert [rank.code for rank in finished] == [0, 0, 0], finished[0].stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stages"]["joint"]["examples"] == 2
    assert np.isfinite(summary["test"]["log_loss"])


@pytest.mark.parametrize(
    "stdout",
    ["full", pytest.param("closed pipe", marks=pytest.mark.slow), pytest.param("closed", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_when_nobody_takes_what_it_prints(tmp_path: Path, raw: dict[str, Any], stdout: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    redirection = {"full": ">/dev/full", "closed pipe": "| true", "closed": ">&-"}[stdout]
    command = f'{{ "$0" -m recsys.train --config "$1"; echo "ended with $?" >&2; }} {redirection}'
    run = subprocess.run(
        ["bash", "-c", command, sys.executable, str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "ended with 0" in run.stderr and "Traceback" not in run.stderr
    assert run.stderr.count("warning: stdout takes no more (") == (stdout != "closed")
    assert (Path(raw["output_dir"]) / "summary.json").exists()
