"""Searches as a user runs them, trained on the tiny config: several processes, kills, pruning, and what is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from commands import run, start
from studies import RATE, write_study
from tiny import write_tiny_log

from benchmarks.quality.grid import cases_of, load_grid
from benchmarks.report import Line, read

SEARCH = ("search", "study.yaml")
ROWS = {"train": 300, "valid": 60}  # no test split: a search must not miss it


def read_result(folder: Path) -> tuple[str, list[Line]]:
    page = (folder / "results" / "quality_search_try.md").read_text()
    result = read(folder / "results" / "quality_search_try.jsonl")
    assert str(folder) not in page + json.dumps(result)
    assert {"command", "commit", "hardware", "objective"} <= result["about"][0].keys()
    return page, result.get("trial", [])


def evaluations(folder: Path, trial: int) -> list[dict[str, Any]]:
    path = folder / f"outputs/quality/search_try/trial-{trial}/seed-17/evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_two_processes_search_together_and_the_winner_is_a_grid(folder: Path) -> None:
    write_tiny_log(folder / "log", rows=ROWS)
    towers = [{"type": "mlp", "hidden": [8]}, {"type": "dcn_v2", "num_cross_layers": 1, "hidden": [8]}]
    space = {"stages.backbone.learning_rate": RATE, "model.tower": {"choices": towers}}
    write_study(folder, space, seeds=[17, 18], trials=3, pruning=None)
    processes = [start(folder, *SEARCH), start(folder, *SEARCH)]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for output, _ in said:
        assert "valid AUC 0." in output  # each has done its part
    page, trials = read_result(folder)
    assert sorted(trial["trial"] for trial in trials) == [0, 1, 2]
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    values = [trial["value"] for trial in trials]
    assert values == sorted(values, reverse=True)
    assert len({json.dumps(trial["parameters"]) for trial in trials}) == 3
    for trial in trials:
        by_seed = trial["seeds"]
        assert trial["value"] == (by_seed["17"]["value"] + by_seed["18"]["value"]) / 2
        assert trial["evaluations"] == [told["auc"] for told in evaluations(folder, trial["trial"])]
        assert all(told["split"] == "valid" for told in evaluations(folder, trial["trial"]))
    assert "3 of 3 trials have ended; 3 complete; 0 pruned; 0 failed" in page
    assert "the mean over seeds 17, 18;" in page
    assert not list(folder.glob("outputs/**/checkpoints"))

    code, output, errors = run(folder, *SEARCH, "--freeze", "won.yaml", "--seeds", "1", "2")
    assert (code, "trial 3" in output) == (0, False), errors  # nothing is left to do
    grid = load_grid(folder / "won.yaml")
    _, winner = cases_of(grid, Path("runs"))
    assert (list(grid.cases), grid.seeds) == (["baseline", "winner"], (1, 2))
    config, best = winner.runs[0].config, trials[0]["parameters"]
    assert config.stages["backbone"].learning_rate == best["stages.backbone.learning_rate"]
    assert config.model.tower.type == best["model.tower"]["type"]
    (folder / "won.yaml").write_text("name: mine\n")
    code, _, errors = run(folder, *SEARCH, "--freeze", "won.yaml")
    assert (code, errors) == (2, "error: --freeze won.yaml: is there, and no grid of a search; name another file\n")


@pytest.mark.slow
def test_a_killed_search_goes_on_and_prunes_what_is_worse(folder: Path) -> None:
    write_tiny_log(folder / "log", rows=ROWS)
    space = {"stages.backbone.learning_rate": {"choices": [0.01, 1e-9]}}  # the second learns nothing
    overrides = [
        *("stages.experts=null", "stages.joint=null", "stages.backbone.sparse_learning_rate=1e-9"),
        *("stages.backbone.epochs=40", "stages.backbone.patience=40", "stages.backbone.monitor=auc"),
    ]
    settings = {"overrides": overrides, "trials": 2, "sampler_seed": 3}  # which draws the better one first
    write_study(folder, space, **settings, pruning={"startup_trials": 1, "warmup_evaluations": 10})
    process = start(folder, *SEARCH)
    until = time.monotonic() + 400
    while not evaluations(folder, 1) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:  # the run ends with it
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    assert not (folder / "outputs/quality/search_try/trial-1/seed-17/summary.json").exists()

    code, output, errors = run(folder, *SEARCH)
    assert code == 0, output + errors
    page, (good, bad, cut) = read_result(folder)
    assert [(trial["trial"], trial["state"]) for trial in (good, bad, cut)] == [
        (0, "complete"),
        (2, "pruned"),
        (1, "cut off"),
    ]
    assert [trial["parameters"]["stages.backbone.learning_rate"] for trial in (good, bad)] == [0.01, 1e-9]
    assert (cut["parameters"], cut["retried as"]) == (bad["parameters"], 2)
    assert bad["pruned at"] == len(bad["evaluations"]) == 11
    assert bad["value"] == bad["evaluations"][-1] < good["value"] == max(good["evaluations"])
    assert f"pruned, at evaluation {bad['pruned at']}" in page
    assert len(evaluations(folder, 2)) < 41  # its run was ended, too
    assert not list(folder.glob("outputs/**/checkpoints"))


def test_trials_that_fail_are_told_and_leave_no_winner(folder: Path) -> None:
    write_study(folder, {"data.train": {"choices": ["nowhere/*.parquet"]}}, trials=1)
    code, output, errors = run(folder, *SEARCH)
    assert (code, errors) == (1, "")
    fault = "seed 17, exit code 2, outputs/quality/search_try/trial-0/seed-17.log ends in: error: data.train: no file"
    assert f"trial 0: FAILED: {fault}" in output
    assert "try: no trial is complete, so there is no winner" in output
    page, (trial,) = read_result(folder)
    assert (trial["state"], trial["value"]) == ("failed", None)
    assert trial["fault"].startswith(fault)
    assert f"- trial 0: {fault}" in page


def test_no_trial_begins_when_time_is_up(folder: Path) -> None:
    write_study(folder, {"stages.backbone.learning_rate": RATE}, timeout_minutes=1e-9)
    code, output, _ = run(folder, *SEARCH)
    assert (code, "trial 0" in output) == (1, False)
    page, _ = read_result(folder)
    assert "0 of 3 trials have ended" in page and "that a run ends with, with seed 17; the test split" in page


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (["--freeze", "a-b.yaml"], [], "error: --freeze a-b.yaml: its name is to be the grid's"),
        (["--freeze", "won.yaml"], ["data.test=null"], "error: --freeze won.yaml: data.test is not set"),
        (["--seeds", "1"], [], "--seeds is of the grid that --freeze writes"),
    ],
)
def test_what_could_not_be_frozen_is_refused_first(
    folder: Path, arguments: list[str], overrides: list[str], message: str
) -> None:
    write_study(folder, {"stages.backbone.learning_rate": RATE}, overrides=overrides)
    code, output, errors = run(folder, *SEARCH, *arguments)
    assert (code, output) == (2, "")
    assert message in errors
