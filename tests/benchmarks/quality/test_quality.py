"""Grids as a user runs them, trained on the tiny config, and the report of them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from commands import run, start
from grids import BACKBONE, leave, write_grid
from tiny import write_tiny_log

from benchmarks.quality.grid import cases_of
from benchmarks.report import Line, read


def read_result(folder: Path) -> tuple[str, dict[str, list[Line]]]:
    page = (folder / "results" / "quality_try.md").read_text()
    result = read(folder / "results" / "quality_try.jsonl")
    assert str(folder) not in page + json.dumps(result)
    return page, result


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    lines = page[page.index(title) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| ---"))
    table = lines[first + 1 : lines.index("", first)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.slow
def test_a_grid_trains_goes_on_and_names_what_failed(folder: Path) -> None:
    write_tiny_log(folder / "log", rows={"train": 300, "valid": 60, "test": 60})
    cases = {"tiny": {}, "bad": {"overrides": ["data.train=nowhere/*.parquet"]}}
    write_grid(folder, cases, seeds=[17])
    code, output, errors = run(folder, "grid.yaml")
    assert code == 1
    assert "tiny, seed 17: test AUC 0." in output, output + errors
    assert "bad, seed 17 | error: data.train: no file matches" in output
    assert "bad, seed 17: FAILED with exit code 2; its log is outputs/quality/try/bad/seed-17.log" in output
    assert "2/2 done" in output
    assert errors == "try: failed: bad seed 17\n"
    page, result = read_result(folder)
    assert "Missing: bad, seed 17 (FAILED with exit code 2)." in page
    assert result["failed run"] == [{"kind": "failed run", "case": "bad", "seed": 17, "exit code": 2}]
    (trained,) = result["run"]
    assert (trained["case"], trained["seed"]) == ("tiny", 17)
    figures = trained["figures"]
    assert figures["best valid AUC"] == figures["valid AUC after backbone"]
    assert figures["gap to it"] == figures["test AUC of truth"] - figures["test AUC"]
    assert (figures["examples"], figures["epochs"]) == (300, 1)
    assert [line["case"] for line in result["case"]] == ["tiny", "bad"]
    assert result["case"][0]["statistics"]["test AUC"]["mean"] == figures["test AUC"]
    assert str(folder) not in json.dumps(result)
    for fact in ("commit", "hardware", "versions", "date", "command"):
        assert f"- {fact}: " in page
    directory = folder / "outputs" / "quality" / "try" / "tiny" / "seed-17"
    assert "backbone: 10 steps" in directory.with_name("seed-17.log").read_text()
    assert not (directory / "checkpoints").exists()

    shutil.rmtree(folder / "log")  # what runs from here on must fail
    code, output, _ = run(folder, "grid.yaml", "--only", "tiny")
    assert (code, "try: 1 runs, 1 already there" in output) == (0, True)
    again = read_result(folder)[1]["run"]
    assert [(line["case"], line["seed"], line["figures"]) for line in again] == [("tiny", 17, figures)]
    write_grid(folder, cases, seeds=[17], overrides=[*BACKBONE, "stages.backbone.learning_rate=0.5"])
    code, _, errors = run(folder, "grid.yaml", "--report-only")
    assert (code, errors) == (0, "try: no run is complete, so there is nothing to report\n")  # other settings


def test_an_interrupted_grid_ends_its_runs(folder: Path) -> None:
    write_tiny_log(folder / "log", rows={"train": 300, "valid": 60, "test": 60})
    write_grid(folder, {"tiny": {}})
    process = start(folder, "grid.yaml")
    children: list[str] = []
    until = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.terminate()  # not SIGINT, which a shell has its background jobs ignore
    assert process.wait(90) == 130
    process.communicate()
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_the_report_pairs_seeds_and_tells_what_is_missing(folder: Path) -> None:
    cases = {
        "dense": {"overrides": ["model.hilomoe=null"]},
        "hilomoe": {"seeds": [17, 18, 19]},
        "rival": {"rivals": {"file": "rivals.jsonl", "model": "DNN"}},
        "unknown": {"rivals": {"file": "rivals.jsonl", "model": "Other"}},
        "later": {},
    }
    table = {"question": "Which?", "baseline": "dense", "cases": ["hilomoe", "rival", "unknown"], "text": "Mind this."}
    nobody = {"question": "Anybody?", "baseline": "dense", "cases": ["later"]}
    grid = write_grid(folder, cases, tables=[table, nobody])
    dense, hilomoe, *_ = cases_of(grid, Path("outputs", "quality", "try"))

    def cost(flops: int, parameters: int) -> dict[str, Any]:
        return {"flops": {"total": flops + 7, "embedding": 7}, "parameters": {"total": parameters + 9, "embedding": 9}}

    leave(dense.runs[0], auc=0.80, log_loss=0.500, cost=cost(1000, 400))
    leave(dense.runs[1], auc=0.82, log_loss=0.520, cost=cost(1000, 400))
    leave(hilomoe.runs[0], auc=0.81, log_loss=0.499, cost=cost(1240, 500))
    leave(hilomoe.runs[1], auc=0.85, log_loss=0.515, cost=cost(1240, 500))
    rivals = {1: {"test AUC": 0.78, "parameters": 5}, 2: {"test AUC": 0.80, "test log loss": None, "parameters": 5}}
    lines: list[Line] = [
        {"kind": "about", "commit": "x"},
        {"kind": "model", "model": "DNN", "name": "A rival's DNN", "settings": {}},
        *({"kind": "run", "model": "DNN", "seed": seed, "figures": figures} for seed, figures in rivals.items()),
    ]
    (folder / "rivals.jsonl").write_text("\n".join(map(json.dumps, lines)))

    code, output, errors = run(folder, "grid.yaml", "--report-only", "--note", "Nothing else ran.")
    assert (code, errors) == (0, "")
    assert "│ hilomoe │ 2 of 3 │ 0.83000 ± 0.02828 │" in output
    page, result = read_result(folder)
    assert "Missing: hilomoe, seed 19; unknown, from rivals.jsonl; later, not run." in page
    assert "Reference column truth: test AUC 0.90000, log loss 0.50000." in page
    assert "Mind this." in page
    assert "Nothing else ran." in page
    assert "- rival: A rival's DNN, from rivals.jsonl" in page
    assert "- dense: `tiny.yaml` `stages.backbone.epochs=1` " in page
    timed = ["2.0", "300", "1.0"]
    assert rows(page, "# Quality") == [
        ["dense", "2", "0.81000 ± 0.01414", "0.51000 ± 0.01414", "0.70000 ± 0.00000", "1,000", "400", "409", *timed],
        [
            "hilomoe",
            "2 of 3",
            "0.83000 ± 0.02828",
            "0.50700 ± 0.01131",
            "0.70000 ± 0.00000",
            "1,240",
            "500",
            "509",
            *timed,
        ],
        ["rival", "2", "0.79000 ± 0.01414", "-", "-", "-", "-", "5", "-", "-", "-"],
    ]
    # AUC differences 0.01 and 0.03, so 0.02 +- 12.706 * 0.01; log loss -0.001 and -0.005, so -0.003 +- 12.706 * 0.002.
    # The rival's means are 0.79 and 0.81 with equal deviations: 2 degrees of freedom, 0.02 +- 4.3027 * sqrt(2) * 0.01.
    pairs = ["+200.0 [-1070.6, +1470.6]", "+2.469", "-30.0 [-284.1, +224.1]", "-0.588"]
    assert rows(page, "## Which?") == [
        ["hilomoe", "2 pairs of one seed", *pairs, "+24.0", "+25.0"],
        ["rival", "means (Welch)", "-200.0 [-808.5, +408.5]", "-2.469", "-", "-", "-", "-"],
    ]
    assert "## Anybody?" not in page
    differences = result["table"][0]["differences"]["hilomoe"]
    assert differences["test AUC"]["mean"] == pytest.approx(0.02)
    runs = {(line["case"], line["seed"]): line for line in result["run"]}
    assert runs["hilomoe", 17]["figures"]["test AUC"] == 0.81
    assert runs["hilomoe", 17]["stages"]["backbone"]["examples"] == 300
    assert runs["rival", 1]["figures"]["test AUC"] == 0.78 and "stages" not in runs["rival", 1]


def test_only_takes_cases_of_the_grid(folder: Path) -> None:
    write_grid(folder, {"tiny": {}})
    code, _, errors = run(folder, "grid.yaml", "--only", "tyni")
    assert (code, errors) == (2, "error: --only tyni: no such case; there are tiny\n")
