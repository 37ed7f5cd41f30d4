"""What each stage adds, as a page of a grid with domains tells it."""

import json
import math
from pathlib import Path

import pytest
from grids import leave, write_grid

from benchmarks.quality.figures import Figures
from benchmarks.quality.grid import Case, GridConfig, cases_of
from benchmarks.quality.stages import StageEnd, stage_rows
from benchmarks.report import Line
from recsys.config import ConfigError

STAGES = {  # of two domains, and one of one class, the WAUC of each state
    "backbone": [(0.60, {"a": 0.6, "b": 0.6, "one": None}), (0.70, {"a": 0.72, "b": 0.64, "one": None})],
    "experts": [(0.69, {"a": 0.7, "b": 0.66, "one": None}), (0.73, {"a": 0.75, "b": 0.63, "one": None})],
    "gate": [(0.71, {"a": 0.73, "b": 0.63, "one": None})],  # worse than what it began with
}
BEST = {"backbone": 0.70, "experts": 0.73, "gate": 0.73}


@pytest.fixture
def page(folder: Path) -> Figures:
    return Figures(*left(folder))


def left(folder: Path) -> tuple[GridConfig, list[Case]]:
    grid = write_grid(folder, {"moe": {}, "joint": {}})
    moe, joint = cases_of(grid, Path("runs"))
    for number, run in enumerate(moe.runs):
        stages = {}
        for name, wauc in BEST.items():
            stage = {"seconds": 1.0, "examples": 10, "epochs": 1, "valid": {"auc": wauc}}
            stages[name] = {**stage, "over_domains": {"wauc": wauc + number / 100}}
        leave(run, auc=0.7, stages=stages)
        lines = [
            {"source": name, "over_domains": {"wauc": wauc + number / 100}, "domains": domains}
            for name, states in STAGES.items()
            for wauc, domains in states
        ]
        lines.insert(2, {"source": "experts", "auc": 0.9, "over_domains": {"wauc": 0.9}})  # a phase's, of one domain
        (run.directory / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    leave(joint.runs[0], auc=0.7)
    return grid, [moe, joint]


def test_each_stage_tells_what_it_changed_and_for_which_domains(page: Figures) -> None:
    rows = next(part for part in page.parts({}) if isinstance(part, list) and "stage" in part[0])
    assert [list(row.values()) for row in rows] == [
        ["moe", "backbone", "0.70500", "-", "-", "-", "-"],
        ["moe", "experts", "0.73500", "+300.0", "1", "1", "-100.0 (b)"],
        ["moe", "gate", "0.73500", "+0.0", "0", "0", "none"],
    ]


def test_programs_are_told_each_domains_auc_after_each_stage(page: Figures) -> None:
    runs = {(line["case"], line["seed"]): line for line in page.lines({}) if line["kind"] == "run"}
    assert runs["moe", 17]["domains after stages"] == {
        "backbone": {"a": 0.72, "b": 0.64},
        "experts": {"a": 0.75, "b": 0.63},
        "gate": {"a": 0.75, "b": 0.63},
    }
    assert "domains after stages" not in runs["joint", 17]


def test_a_report_stands_for_runs_that_are_elsewhere_but_for_none_of_other_settings(folder: Path) -> None:
    grid, cases = left(folder)
    page = Figures(grid, cases)
    about = {"kind": "about", "device": "cpu"}
    landed = folder / "landed.jsonl"
    landed.write_text("".join(json.dumps(line) + "\n" for line in [about, *page.lines({})]))
    here = Figures(grid, cases_of(grid, Path("elsewhere")), landed)
    assert here.of == page.of
    without_reference = [part for part in page.parts({}) if not str(part).startswith("Reference column")]
    assert here.parts({}) == without_reference  # which a report tells on its page alone
    assert json.dumps(list(here.lines({}))) == json.dumps(list(page.lines({})))  # whole numbers stay such
    assert here.told("commit") == ["abc"]
    other = write_grid(folder, {"moe": {"overrides": ["stages.backbone.epochs=2"]}, "joint": {}})
    here = Figures(other, cases_of(other, Path("elsewhere")), landed)
    assert {case: sorted(runs) for case, runs in here.of.items()} == {"moe": [], "joint": [17]}
    leave(cases_of(other, Path("elsewhere"))[1].runs[0], auc=0.8)  # what is here comes first
    here = Figures(other, cases_of(other, Path("elsewhere")), landed)
    assert here.of["joint"][17]["test AUC"] == 0.8
    landed.write_text('{"kind": "case"}\n')
    with pytest.raises(ConfigError, match=r"landed.jsonl:\n  about: missing.*\n  case.0.case: missing"):
        Figures(grid, cases, landed)


def test_an_odd_report_is_refused(folder: Path) -> None:
    grid, cases = left(folder)
    lines = [{"kind": "about", "device": "cpu"}, *Figures(grid, cases).lines({}), {"kind": "of another program"}]
    run = next(line for line in lines if "domains after stages" in line)
    landed = folder / "landed.jsonl"
    odd: list[tuple[list[Line], str]] = [
        ([lines[0]], r"about: .*1"),
        ([run], "moe, seed 17 is there twice"),
        ([lines[1]], "moe is there twice"),
        ([{**run, "seed": 99, "stages": {}}], 'has backbone, but "stages" has no WAUC'),
        ([{**run, "seed": 99, "figures": {"test AUC": math.nan}}], "NaN is no number of JSON"),
    ]
    for more, told in [([], ""), *odd]:
        landed.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        if more:
            with pytest.raises(ConfigError, match=told):
                Figures(grid, cases_of(grid, Path("elsewhere")), landed)
        else:
            assert Figures(grid, cases_of(grid, Path("elsewhere")), landed).of["moe"].keys() == {17, 18}


def test_a_stage_without_a_mean_over_all_runs_has_no_row() -> None:
    ends = [StageEnd("joint", 0.7, {"a": 0.7}), StageEnd("experts", 0.8, {"b": 0.8}), StageEnd("gate", 0.9, {"b": 0.9})]
    rows = stage_rows({"moe": [ends, ends[:1] + ends[2:]]})
    assert [list(row.values())[1:] for row in rows] == [
        ["joint", "0.70000", "-", "-", "-", "-"],
        ["gate", "0.90000", "+2000.0", "0", "0", "none"],  # no domain has an AUC after both
    ]
