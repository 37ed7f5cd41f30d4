"""What a study may say, what it draws from, and what is made of that."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from studies import RATE, write_study

from benchmarks.quality.grid import cases_of, load_grid
from benchmarks.quality.study import (
    IntegersConfig,
    ParameterConfig,
    PruningConfig,
    StudyConfig,
    grid_of,
    load_study,
    runs_of,
    values_of,
)
from recsys.config import ConfigError

ROOT = Path(__file__).parents[3]
LEARNING_RATE = "stages.backbone.learning_rate"


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({}, r"space\.x: give choices, or low and high"),
        ({"low": 1.0}, r"space\.x: give choices, or low and high"),
        ({"choices": [1], "low": 1.0, "high": 2.0}, r"space\.x: give choices, or low and high"),
        ({"choices": [], "log": True}, r"space\.x\.choices: .*at least 1 item"),
        ({"choices": [{"a": 1}, {"a": 1}]}, r"space\.x: choices: one stands twice"),
        ({"low": 2.0, "high": 1.0}, r"space\.x: high: must be above low, which is 2\.0, found 1\.0"),
        ({"low": 0.0, "high": 1.0, "log": True}, r"space\.x: log: goes with a low above 0"),
        (
            {"low": 0.0, "high": 1.0, "step": 0.3},
            r"space\.x: step: from 0\.0 to 1\.0 is no whole number of steps of 0\.3",
        ),
        ({"int": {"low": 1, "high": 8, "log": True, "step": 2}}, r"space\.x\.int: log: goes with .* no step"),
        ({"int": {"low": 1.5, "high": 8}}, r"space\.x\.int\.low: .*found 1\.5"),
        ({"min": 1}, r"space\.x\.min: unknown key; .*space\.x takes choices, high, int, log, low, step"),
    ],
)
def test_a_setting_that_cannot_be_drawn_is_told_by_its_path(
    folder: Path, parameter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(folder, {"x": parameter}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"space": {}}, r"space: .*at least 1 item"),
        ({"space": {"seed": {"choices": [1]}}}, "seed: is the study's to set, by seeds and --runs"),
        ({"overrides": ["output_dir=x"]}, "output_dir: is the study's to set"),
        (
            {"space": {"model.tower": {"choices": [1]}, "model.tower.hidden": {"choices": [1]}}},
            "lies within model.tower",
        ),
        (
            {"space": {"model.towr": {"choices": [1]}}},
            r"space\.model\.towr, 1: tiny\.yaml:\n  model\.towr: unknown key",
        ),
        ({"space": {LEARNING_RATE: {"low": -1.0, "high": 1.0}}}, rf"space\.{LEARNING_RATE}, -1\.0: tiny\.yaml"),
        ({"seeds": [17, 17]}, "seeds: one stands twice"),
        ({"objective": "test AUC"}, r"objective: .*'valid AUC' or 'valid log loss'"),
        ({"trials": 0}, "trials: .*greater than 0"),
        ({"pruning": {"percentile": 100}}, r"pruning\.percentile: .*less than 100"),
        ({"trails": 3}, "trails: unknown key; did you mean 'trials'"),
        ({"config": "absent.yaml"}, r"cannot read config absent\.yaml"),
        ({"overrides": ["data.valid=null"]}, r"data\.valid of tiny\.yaml is not set"),
    ],
)
def test_faults_are_told_before_anything_is_tried(folder: Path, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(folder, **{"space": {LEARNING_RATE: RATE}, **fault}))


def test_a_study_and_a_grid_are_told_apart(folder: Path) -> None:
    study = write_study(folder, {LEARNING_RATE: RATE})
    with pytest.raises(ConfigError, match=r"is a study, and no grid; take .*benchmarks\.quality search .*study"):
        load_grid(study)
    grid = grid_of(load_study(study)[0], "grid", {}, [1], "")
    (folder / "grid.yaml").write_text(json.dumps(grid))
    with pytest.raises(ConfigError, match=r"is a grid, and no study; take .*benchmarks\.quality .*grid"):
        load_study(folder / "grid.yaml")


def test_numbers_and_choices_are_drawn_as_they_are_written(folder: Path) -> None:
    towers = [{"type": "mlp", "hidden": [8]}, {"type": "dcn_v2", "num_cross_layers": 1, "hidden": [8]}]
    space = {
        LEARNING_RATE: RATE,
        "model.dense_dim": {"int": {"low": 4, "high": 16, "step": 4}},
        "model.tower": {"choices": towers},
        "stages.backbone.warmup_steps": {"choices": [0, 3]},
    }
    study, base = load_study(write_study(folder, space, seeds=[17, 18]))
    found = {path: parameter.distribution() for path, parameter in study.space.items()}
    assert found == {
        LEARNING_RATE: FloatDistribution(1e-4, 1e-1, log=True),
        "model.dense_dim": IntDistribution(4, 16, step=4),
        "model.tower": CategoricalDistribution(
            ['{"type": "mlp", "hidden": [8]}', '{"type": "dcn_v2", "num_cross_layers": 1, "hidden": [8]}']
        ),
        "stages.backbone.warmup_steps": CategoricalDistribution(["0", "3"]),
    }
    drawn = {"stages.backbone.warmup_steps": "3", "model.tower": found["model.tower"].choices[1], LEARNING_RATE: 1e-05}  # type: ignore[attr-defined]
    values = values_of(study, drawn)
    assert list(values.items()) == [
        (LEARNING_RATE, 1e-05),
        ("model.tower", towers[1]),
        ("stages.backbone.warmup_steps", 3),
    ]
    runs = list(runs_of(study, "trial-0", values, Path("runs")))
    assert [(run.seed, run.directory) for run in runs] == [(s, Path(f"runs/trial-0/seed-{s}")) for s in (17, 18)]
    config = runs[1].config
    assert (config.seed, config.stages["backbone"].learning_rate, config.model.tower.type) == (18, 1e-05, "dcn_v2")
    assert config.data.test is None and base.data.test is not None
    (folder / "won.yaml").write_text(str(grid_of(study, "won", values, [1, 2], "It won.")))
    baseline, winner = cases_of(load_grid(folder / "won.yaml"), Path("runs"))
    changed = {"output_dir", "seed"}
    assert baseline.runs[0].config.model_dump(exclude=changed) == base.model_dump(exclude=changed)
    same_but_test = {"data": {**config.data.model_dump(), "test": base.data.test}}
    assert winner.runs[1].config.model_dump(exclude=changed) == {
        **config.model_dump(exclude=changed),
        **same_but_test,
    }
    assert [run.seed for run in winner.runs] == [1, 2]


def test_docs_name_every_key_of_a_study() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text().split("## Searching", 1)[1].split("\n## ", 1)[0]
    keys = {
        key for schema in (StudyConfig, ParameterConfig, IntegersConfig, PruningConfig) for key in schema.model_fields
    }
    assert [key for key in keys if f"`{key}`" not in text] == []
