"""Grids: what their YAML may say, what is run, what the report makes of it; trained on the tiny config."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import quality
import yaml
from figures import Figures
from grid import CaseConfig, GridConfig, RivalsConfig, Run, TableConfig, cases_of, load_grid
from tiny import write_tiny_config, write_tiny_log

from recsys.config import ConfigError
from recsys.errors import UserError

ROOT = Path(__file__).parents[2]
BACKBONE = ["stages.backbone.epochs=1", "stages.experts=null", "stages.joint=null"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tiny config, whose log is yet to be written."""
    write_tiny_config(tmp_path / "tiny.yaml", Path("log"), Path("out"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(folder: Path, cases: Mapping[str, Any], **settings: Any) -> GridConfig:
    content = {"name": "try", "config": "tiny.yaml", "seeds": [17, 18], "overrides": BACKBONE, "cases": cases}
    (folder / "grid.yaml").write_text(yaml.safe_dump({**content, **settings}, sort_keys=False))
    return load_grid(folder / "grid.yaml")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "grid.yaml", "--output", "results", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def read(folder: Path) -> tuple[str, dict[str, Any]]:
    page = (folder / "results" / "quality_try.md").read_text()
    result: dict[str, Any] = json.loads((folder / "results" / "quality_try.json").read_text())
    assert str(folder) not in page + json.dumps(result)
    return page, result


def leave(run: Run, *, auc: float | None, log_loss: float = 0.5, valid: float = 0.7, **other: Any) -> None:
    """Leave what a complete run leaves, as far as a report reads it."""
    figures = {"auc": auc, "log_loss": log_loss, "ne": 0.9, "calibration": 1.0}
    stage = {"seconds": 2.0, "examples": 300, "epochs": 1, "valid": {**figures, "auc": valid}}
    summary = {
        "test": figures,
        "reference": {"column": "truth", **figures, "auc": 0.9},
        "stages": {"backbone": stage},
        "examples_per_second": 150.0,
        "world_size": 1,
        "device": "cpu",
        "commit": "abc",
    }
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(run.config.to_yaml())
    (run.directory / "summary.json").write_text(json.dumps({**summary, **other}))


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    lines = page[page.index(title) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| ---"))
    table = lines[first + 1 : lines.index("", first)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_a_grid_trains_goes_on_and_names_what_failed(folder: Path) -> None:
    write_tiny_log(folder / "log", rows={"train": 300, "valid": 60, "test": 60})
    cases = {"tiny": {}, "bad": {"overrides": ["data.train=nowhere/*.parquet"]}}
    write_grid(folder, cases, seeds=[17])
    code, output, errors = run(folder)
    assert code == 1
    assert "tiny, seed 17: test AUC 0." in output, output + errors
    assert "bad, seed 17 | error: data.train: no file matches" in output
    assert "bad, seed 17: FAILED with exit code 2; its log is outputs/quality/try/bad/seed-17.log" in output
    assert "2/2 done" in output
    assert errors == "try: failed: bad seed 17\n"
    page, result = read(folder)
    assert "Missing: bad, seed 17 (FAILED with exit code 2)." in page
    assert result["cases"]["bad"]["failed"] == {"17": 2}
    figures = result["cases"]["tiny"]["runs"]["17"]
    assert figures["best valid AUC"] == figures["valid AUC after backbone"]
    assert figures["gap to it"] == figures["test AUC of truth"] - figures["test AUC"]
    assert (figures["examples"], figures["epochs"]) == (300, 1)
    assert result["cases"]["tiny"]["statistics"]["test AUC"]["mean"] == figures["test AUC"]
    assert str(folder) not in json.dumps(result)
    for fact in ("commit", "hardware", "versions", "date", "command"):
        assert f"- {fact}: " in page
    directory = folder / "outputs" / "quality" / "try" / "tiny" / "seed-17"
    assert "backbone: 10 steps" in directory.with_name("seed-17.log").read_text()
    assert not (directory / "checkpoints").exists()

    shutil.rmtree(folder / "log")  # what runs from here on must fail
    code, output, _ = run(folder, "--only", "tiny")
    assert (code, "try: 1 runs, 1 already there" in output) == (0, True)
    assert read(folder)[1]["cases"]["tiny"]["runs"] == {"17": figures}
    write_grid(folder, cases, seeds=[17], overrides=[*BACKBONE, "stages.backbone.learning_rate=0.5"])
    code, _, errors = run(folder, "--report-only")
    assert (code, errors) == (0, "try: no run is complete, so there is nothing to report\n")  # other settings


def test_an_interrupted_grid_ends_its_runs(folder: Path) -> None:
    write_tiny_log(folder / "log", rows={"train": 300, "valid": 60, "test": 60})
    write_grid(folder, {"tiny": {}})
    process = start(folder)
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


def test_at_most_so_many_runs_train_at_once_and_closing_ends_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = cases_of(write_grid(folder, {"tiny": {}}, seeds=[1, 2, 3, 4]), Path("runs"))
    started: list[subprocess.Popen[bytes]] = []

    def stand_in(run: Run, nproc: int, threads: int) -> subprocess.Popen[bytes]:
        assert sum(process.poll() is None for process in started) < 2
        started.append(subprocess.Popen(["sleep", "600" if run.seed == 4 else "0"]))
        return started[-1]

    monkeypatch.setattr(quality, "_start", stand_in)
    with closing(quality._train(case.runs, nproc=1, jobs=2)) as ends:
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
    monkeypatch.setattr(quality.subprocess, "Popen", lambda command, **how: started.append((command, how)))
    quality._start(run, nproc=nproc, threads=3)
    ((command, how),) = started
    assert command[1:3] == launcher
    assert ("--nproc-per-node" in command) == (nproc > 1)
    assert command[-2:] == ["seed=17", 'output_dir="runs/tiny/seed-17"']
    assert how["env"]["OMP_NUM_THREADS"] == threads
    assert how["stdout"].name == "runs/tiny/seed-17.log"


def test_a_run_that_another_process_still_trains_is_not_started_again(folder: Path) -> None:
    run = cases_of(write_grid(folder, {"tiny": {}}), Path("runs"))[0].runs[0]
    run.log.parent.mkdir(parents=True)
    with run.log.open("w") as log:
        log.write("what it says")
        log.flush()
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"tiny/seed-17\.log: an earlier process still trains this run"):
            quality._start(run, nproc=1, threads=1)
    assert run.log.read_text() == "what it says"


def test_every_case_has_its_turn_before_the_next_seed(folder: Path) -> None:
    grid = write_grid(folder, {"a": {}, "b": {"seeds": [1]}, "c": {"seeds": [5, 6, 7]}})
    order = [(run.case, run.seed) for run in quality._in_turns(cases_of(grid, Path("runs")))]
    assert order == [("a", 17), ("b", 1), ("c", 5), ("a", 18), ("c", 6), ("c", 7)]


def test_the_report_pairs_seeds_and_tells_what_is_missing(folder: Path) -> None:
    cases = {
        "dense": {"overrides": ["model.hilomoe=null"]},
        "hilomoe": {"seeds": [17, 18, 19]},
        "rival": {"rivals": {"file": "rivals.json", "model": "DNN"}},
        "unknown": {"rivals": {"file": "rivals.json", "model": "Other"}},
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
    rivals = {"1": {"test AUC": 0.78, "parameters": 5}, "2": {"test AUC": 0.80, "test log loss": None, "parameters": 5}}
    content = {"models": {"DNN": {"model": "A rival's DNN", "settings": {}, "runs": rivals}}, "commit": "x"}
    (folder / "rivals.json").write_text(json.dumps(content, indent=2))

    code, output, errors = run(folder, "--report-only", "--note", "Nothing else ran.")
    assert (code, errors) == (0, "")
    assert "│ hilomoe │ 2 of 3 │ 0.83000 ± 0.02828 │" in output
    page, result = read(folder)
    assert "Missing: hilomoe, seed 19; unknown, from rivals.json; later, not run." in page
    assert "Reference column truth: test AUC 0.90000, log loss 0.50000." in page
    assert "Mind this." in page
    assert "Nothing else ran." in page
    assert "- rival: A rival's DNN, from rivals.json" in page
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
    differences = result["tables"][0]["differences"]["hilomoe"]
    assert differences["test AUC"]["mean"] == pytest.approx(0.02)
    assert result["cases"]["hilomoe"]["runs"]["17"]["test AUC"] == 0.81
    assert result["cases"]["hilomoe"]["stages"]["17"]["backbone"]["examples"] == 300


def test_a_search_is_ranked_by_the_valid_split_and_each_trial_has_one_seed(folder: Path) -> None:
    rates = {"stages.backbone.learning_rate": [0.001, 1e-05], "model.tower.hidden": [[8], [16, 8]]}
    grid = write_grid(folder, {"dense": {"search": rates}})
    cases = cases_of(grid, Path("runs"))
    assert [case.name for case in cases] == [
        "dense[learning_rate=0.001, hidden=[8]]",
        "dense[learning_rate=0.001, hidden=[16, 8]]",
        "dense[learning_rate=1e-05, hidden=[8]]",
        "dense[learning_rate=1e-05, hidden=[16, 8]]",
    ]
    assert [[run.seed for run in case.runs] for case in cases] == [[17]] * 4
    config = cases[3].runs[0].config
    assert (config.stages["backbone"].learning_rate, config.model.tower.hidden) == (1e-05, (16, 8))  # type: ignore[union-attr]
    assert config.output_dir == f"runs/{cases[3].name}/seed-17"
    for case, valid, auc in zip(cases, (0.6, 0.8, 0.7), (0.9, 0.5, 0.7), strict=False):
        leave(case.runs[0], auc=auc, valid=valid)
    figures = Figures(grid, cases)
    assert figures.result({})["searches"] == {"dense": [cases[index].name for index in (1, 2, 0)]}
    assert figures.case_rows() == []
    page = "\n\n".join(part if isinstance(part, str) else str(part) for part in figures.parts({}))
    assert "3 trials" in page
    assert "0.90000" not in page.replace("test AUC 0.90000, log loss", "")  # the reference's


def test_names_of_trials_keep_paths_apart_that_end_alike(folder: Path) -> None:
    rates = {
        "stages.backbone.learning_rate": [0.001],
        "stages.backbone.sparse_learning_rate": [0.1],
        "data.label": ["a"],
    }
    rates["optimizers.dense.weight_decay"] = rates["optimizers.sparse.weight_decay"] = [0.0]
    (case,) = cases_of(write_grid(folder, {"dense": {"search": rates}}), Path("runs"))
    assert case.name == (
        'dense[learning_rate=0.001, sparse_learning_rate=0.1, label="a", optimizers.dense.weight_decay=0.0, '
        "optimizers.sparse.weight_decay=0.0]"
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"sede": 1}, r"sede: unknown key; did you mean 'seeds'\?"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: one stands twice"),
        ({"overrides": ["seed=3"]}, "overrides: seed=3 is the grid's to set, by seeds and --runs"),
        ({"cases": {}}, "cases: Dictionary should have at least 1 item"),
        ({"cases": {"a.b": {}}}, "cases.a.b: String should match pattern"),
        ({"cases": {"a": {"overides": []}}}, "cases.a.overides: unknown key; did you mean 'overrides'"),
        ({"cases": {"a": {"seeds": [2, 2]}}}, "cases.a.seeds: one stands twice"),
        ({"cases": {"a": {"overrides": ["output_dir=x"]}}}, "cases.a.overrides: output_dir=x is the grid's to set"),
        ({"cases": {"a": {"search": {"seed": []}}}}, "cases.a.search.seed: Tuple should have at least 1 item"),
        (
            {"cases": {"a": {"rivals": {"file": "x", "model": "y"}, "seeds": [1]}}},
            "cases.a: rivals are trained elsewhere",
        ),
        ({"tables": [{"question": "?", "baseline": "tiny"}]}, "tables.0.cases: missing, and has no default"),
        ({"tables": [{"question": "?", "baseline": "b", "cases": ["tiny"]}]}, "tables.0: no case 'b'; there are tiny"),
        (
            {
                "cases": {"tiny": {"search": {"model.dense_dim": [4]}}, "other": {}},
                "tables": [{"question": "?", "baseline": "tiny", "cases": ["other"]}],
            },
            "tables.0: case 'tiny' is a search",
        ),
    ],
)
def test_what_is_wrong_with_a_grid_is_named(folder: Path, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_grid(folder, **{"cases": {"tiny": {}}, **fault})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"overrides": ["model.hilomo=null"]}, r"cases\.bad: tiny\.yaml:\n  model\.hilomo: unknown key"),
        ({"config": "absent.yaml"}, r"cases\.bad: cannot read config absent\.yaml"),
        ({"overrides": ["data.test=null"]}, r"cases\.bad: data\.test is not set"),
        ({"search": {"model.dense_dim": [4, 0]}}, r"cases\.bad\[dense_dim=0\]: tiny\.yaml:\n  model\.dense_dim"),
    ],
)
def test_a_case_that_cannot_be_trained_is_named_before_anything_is(
    folder: Path, case: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cases_of(write_grid(folder, {"tiny": {}, "bad": case}), Path("runs"))


def test_files_that_are_not_grids_or_figures_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read grid absent\.yaml: No such file"):
        load_grid("absent.yaml")
    grid = write_grid(folder, {"rival": {"rivals": {"file": "rivals.json", "model": "DNN"}}})
    for text in ('{"models": {"DNN": {"runs": {"a": {}}}}}', "[1"):
        (folder / "rivals.json").write_text(text)
        with pytest.raises(ConfigError, match=r"rivals\.json"):
            Figures(grid, cases_of(grid, Path("runs")))


def test_only_takes_cases_of_the_grid(folder: Path) -> None:
    write_grid(folder, {"tiny": {}})
    code, _, errors = run(folder, "--only", "tyni")
    assert (code, errors) == (2, "error: --only tyni: no such case; there are tiny\n")


def test_runs_on_another_number_of_ranks_do_not_count(folder: Path) -> None:
    grid = write_grid(folder, {"tiny": {}})
    cases = cases_of(grid, Path("runs"))
    leave(cases[0].runs[0], auc=0.8, world_size=2)
    leave(cases[0].runs[1], auc=0.8)
    assert list(Figures(grid, cases).of["tiny"]) == [18]


def test_an_undefined_figure_of_one_run_leaves_no_mean_of_the_others(folder: Path) -> None:
    grid = write_grid(folder, {"tiny": {}})
    cases = cases_of(grid, Path("runs"))
    leave(cases[0].runs[0], auc=0.8)
    leave(cases[0].runs[1], auc=None)
    assert Figures(grid, cases).case_rows()[0]["test AUC"] == "-"


def test_the_grids_of_the_repository_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    paths = sorted((ROOT / "benchmarks" / "grids").glob("*.yaml"))
    assert "small.yaml" in {path.name for path in paths}
    for path in paths:
        grid = load_grid(path)
        assert grid.name == path.stem
        assert cases_of(grid, Path("runs"))


def test_docs_name_every_key_of_a_grid() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    keys = {key for schema in (GridConfig, CaseConfig, RivalsConfig, TableConfig) for key in schema.model_fields}
    assert [key for key in keys if f"`{key}`" not in text] == []
