"""What of a grid trains when, under which command; and that it ends with what started it."""

import fcntl
import signal
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from grids import BACKBONE, leave, write_grid

from benchmarks.quality import training
from benchmarks.quality.figures import Figures
from benchmarks.quality.grid import Run, cases_of
from recsys.config import load_config
from recsys.errors import UserError


def test_at_most_so_many_runs_train_at_once_and_closing_ends_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = cases_of(write_grid(folder, {"tiny": {}}, seeds=[1, 2, 3, 4]), Path("runs"))
    started: list[subprocess.Popen[bytes]] = []

    def stand_in(run: Run, nproc: int, threads: int) -> subprocess.Popen[bytes]:
        assert sum(process.poll() is None for process in started) < 2
        started.append(subprocess.Popen(["sleep", "600" if run.seed == 4 else "0"]))
        return started[-1]

    monkeypatch.setattr(training, "start", stand_in)
    with closing(training.train(case.runs, nproc=1, jobs=2)) as ends:
        assert {next(ends)[:2] for _ in range(3)} == {(run, 0) for run in case.runs[:3]}
        assert started[3].poll() is None
    assert [process.returncode for process in started] == [0, 0, 0, -signal.SIGTERM]


@pytest.mark.parametrize(
    ("given", "nproc", "threads", "launcher"),
    [(None, 1, "3", ["-m", "recsys.train"]), ("5", 2, "5", ["-m", "torch.distributed.run"])],
)
def test_a_run_has_its_launcher_its_threads_and_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, nproc: int, threads: str, launcher: list[str]
) -> None:
    run = cases_of(write_grid(folder, {"tiny": {}}), Path("runs"))[0].runs[0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    started: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(training.subprocess, "Popen", lambda command, **how: started.append((command, how)))
    training.start(run, nproc=nproc, threads=3)
    ((command, how),) = started
    assert command[1:3] == launcher
    assert ("--nproc-per-node" in command) == (nproc > 1)
    assert command[-2:] == ["seed=17", 'output_dir="runs/tiny/seed-17"']
    assert how["env"]["OMP_NUM_THREADS"] == threads
    assert how["stdout"].name == "runs/tiny/seed-17.log"


def test_a_run_of_other_settings_makes_way_and_one_of_the_same_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off or complete; what began so anew is then the same, and counts once it is complete."""
    commands: list[list[str]] = []
    monkeypatch.setattr(training.subprocess, "Popen", lambda command, **_: commands.append(command))
    (run,) = cases_of(write_grid(folder, {"tiny": {}}, seeds=[17]), Path("runs"))[0].runs
    leave(run, auc=0.7)
    training.start(run, nproc=1, threads=1)
    grid = write_grid(folder, {"tiny": {}}, seeds=[17], overrides=[*BACKBONE, "model.dense_dim=8"])
    cases = cases_of(grid, Path("runs"))
    (changed,) = cases[0].runs
    training.start(changed, nproc=1, threads=1)
    assert not Figures(grid, cases).of["tiny"]
    anew = [argument for argument in commands[1] if argument not in commands[0]]
    assert anew == ["model.dense_dim=8", "resume=never"]
    told = load_config(changed.path, commands[1][commands[1].index(changed.path) + 1 :])
    changed.config_there.write_text(told.to_yaml())
    training.start(changed, nproc=1, threads=1)
    assert "resume=never" not in commands[0] + commands[2]
    assert list(Figures(grid, cases).of["tiny"]) == [17]


def test_a_run_from_before_a_key_of_the_config_came_is_there(folder: Path) -> None:
    """If the key is at its default now; and what no version of the config has, or nothing reads, is not."""
    (run,) = cases_of(write_grid(folder, {"tiny": {}}, seeds=[17]), Path("runs"))[0].runs
    leave(run, auc=0.7)
    text = run.config_there.read_text()
    assert run.is_there and "  domain_experts: null\n" in text
    run.config_there.write_text(text.replace("  domain_experts: null\n", ""))
    assert run.is_there
    for other in (text.replace("dense_dim: 4", "dense_dim: 5"), text + "of_old: 1\n", "{"):
        run.config_there.write_text(other)
        assert other != text and not run.is_there


def test_a_run_that_another_process_still_trains_is_not_started_again(folder: Path) -> None:
    run = cases_of(write_grid(folder, {"tiny": {}}), Path("runs"))[0].runs[0]
    run.log.parent.mkdir(parents=True)
    with run.log.open("w") as log:
        log.write("what it says")
        log.flush()
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"tiny/seed-17\.log: an earlier process still trains this run"):
            training.start(run, nproc=1, threads=1)
    assert run.log.read_text() == "what it says"


def test_every_case_has_its_turn_before_the_next_seed(folder: Path) -> None:
    grid = write_grid(folder, {"a": {}, "b": {"seeds": [1]}, "c": {"seeds": [5, 6, 7]}})
    order = [(run.case, run.seed) for run in training.in_turns(cases_of(grid, Path("runs")))]
    assert order == [("a", 17), ("b", 1), ("c", 5), ("a", 18), ("c", 6), ("c", 7)]
