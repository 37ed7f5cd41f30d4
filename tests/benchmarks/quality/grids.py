"""Grids over the tiny config, and what their runs leave."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.grid import GridConfig, Run, load_grid

BACKBONE = ["stages.backbone.epochs=1", "stages.experts=null", "stages.joint=null"]


def write_grid(folder: Path, cases: Mapping[str, Any], **settings: Any) -> GridConfig:
    content = {"name": "try", "config": "tiny.yaml", "seeds": [17, 18], "overrides": BACKBONE, "cases": cases}
    (folder / "grid.yaml").write_text(yaml.safe_dump({**content, **settings}, sort_keys=False))
    return load_grid(folder / "grid.yaml")


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
