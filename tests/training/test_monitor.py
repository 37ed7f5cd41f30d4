"""summary.json and evaluations.jsonl are JSON whatever the figures are."""

import json
from pathlib import Path
from typing import Any

import pytest

from recsys.training.metrics import Metrics
from recsys.training.monitor import Monitor


def summary(**figures: Any) -> dict[str, Any]:
    return {
        "steps": 3,
        "stages": {},
        "valid": None,
        "test": {"auc": 0.5, "log_loss": 0.7, "ne": 1.0, "calibration": None},
        "reference": None,
        "cost": {"flops": {"total": 3}, "parameters": {"total": 2}},
        "checkpoint": "checkpoints/step-3",
        **figures,
    }


def written(directory: Path, given: dict[str, Any]) -> Any:
    with Monitor(directory, enabled=True) as monitor:
        monitor.close_run(given, {})

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads((directory / "summary.json").read_text(), parse_constant=refuse)


def test_figures_that_are_finite_are_written_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(tmp_path, summary()) == summary()
    assert "warning" not in capsys.readouterr().out


def test_figures_that_are_not_finite_are_null_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routing = {"tower": {"layer1": {"entropy": float("nan"), "dead": [1, 2], "cv": 0.5}}}
    given = summary(routing=routing, figures=[1.0, float("inf"), {"deep": float("-inf")}])
    found = written(tmp_path, given)
    assert found["routing"]["tower"]["layer1"] == {"entropy": None, "dead": [1, 2], "cv": 0.5}
    assert found["figures"] == [1.0, None, {"deep": None}]
    assert found["test"] == given["test"]
    said = " ".join(capsys.readouterr().out.split())
    told = "routing.tower.layer1.entropy, figures.1, figures.2.deep"
    assert f"warning: null in summary.json, as they are not finite: {told}" in said


def test_an_evaluation_is_a_line_whose_figures_are_finite_or_null(tmp_path: Path) -> None:
    metrics = Metrics(examples=2, positives=2, auc=None, auc_error=0.0, log_loss=float("nan"), ne=0.5, calibration=1.0)
    with Monitor(tmp_path, enabled=True) as monitor:
        monitor.evaluation("joint", "valid", 7, 1, metrics)
    with Monitor(tmp_path, enabled=False) as other:
        other.evaluation("joint", "valid", 7, 1, metrics)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    figures = {**metrics.as_dict(), "log_loss": None}
    assert json.loads(line) == {"source": "joint", "split": "valid", "step": 7, "epochs": 1, **figures}
