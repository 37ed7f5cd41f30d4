"""What the figures of runs come to, and which runs count."""

import json
from pathlib import Path

import pytest
from grids import leave, write_grid

from benchmarks.quality.figures import Figures
from benchmarks.quality.grid import cases_of, load_grid
from recsys.config import ConfigError


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
    searches = [line for line in figures.lines({}) if line["kind"] == "search"]
    assert searches == [{"kind": "search", "case": "dense", "trials": [cases[index].name for index in (1, 2, 0)]}]
    assert figures.case_rows() == []
    page = "\n\n".join(part if isinstance(part, str) else str(part) for part in figures.parts({}))
    assert "3 trials" in page
    assert "0.90000" not in page.replace("test AUC 0.90000, log loss", "")  # the reference's


def test_files_that_are_not_grids_or_figures_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read grid absent\.yaml: No such file"):
        load_grid("absent.yaml")
    grid = write_grid(folder, {"rival": {"rivals": {"file": "rivals.jsonl", "model": "DNN"}}})
    faults = {
        '{"kind": "run", "model": "DNN", "seed": "a", "figures": {}}': r"rivals\.jsonl:\n  run\.0\.seed",
        '{"kind": "about"}\n[1': r"rivals\.jsonl, line 2: Expecting",
        '{"models": {}}': r"rivals\.jsonl, line 1: no JSON object with a kind",
    }
    for text, message in faults.items():
        (folder / "rivals.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=message):
            Figures(grid, cases_of(grid, Path("runs")))


def test_references_that_differ_name_the_cases_they_are_of(folder: Path) -> None:
    grid = write_grid(folder, {"one": {}, "two": {}}, logs={"a": {}, "b": {}}, seeds=[17])
    cases = cases_of(grid, Path("runs"))
    for case in cases:
        attainable = 0.9 if case.name.endswith("_a") else 0.8
        leave(case.runs[0], auc=0.7, reference={"column": "truth", "auc": attainable, "log_loss": 0.5})
    told = [part for part in Figures(grid, cases).parts({}) if isinstance(part, str) and "Reference" in part]
    assert told == [
        "one_a, two_a: Reference column truth: test AUC 0.90000, log loss 0.50000.",
        "one_b, two_b: Reference column truth: test AUC 0.80000, log loss 0.50000.",
    ]


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


def test_figures_over_domains_are_shown_and_compared_where_there_are_some(folder: Path) -> None:
    question = {"question": "Which?", "baseline": "one", "cases": ["two"]}
    grid = write_grid(folder, {"one": {}, "two": {}}, tables=[question], seeds=[17])
    cases = cases_of(grid, Path("runs"))
    for case in cases:
        leave(case.runs[0], auc=0.8)
        assert "test WAUC" not in Figures(grid, cases).case_rows()[0]
    for case, wauc in zip(cases, (0.6, 0.7), strict=True):
        path = case.runs[0].directory / "summary.json"
        over = {"wauc": wauc, "worst_auc": wauc - 0.1}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"over_domains": over}))
    figures = Figures(grid, cases)
    shown = [(row["test WAUC"], row["worst domain"]) for row in figures.case_rows()]
    assert shown == [("0.60000", "0.50000"), ("0.70000", "0.60000")]
    (table,) = (part for part in figures.parts({}) if not isinstance(part, str) and "compared" in part[0])
    assert "+1000.0" in table[0]["test WAUC, 10⁻⁴"]
    assert "test WAUC" not in figures.case_rows(brief=True)[0]
