"""Studies over the tiny config."""

from pathlib import Path
from typing import Any

import yaml

START = ["stages.backbone.epochs=2", "stages.backbone.patience=2", "stages.experts=null", "stages.joint=null"]
RATE = {"low": 1e-4, "high": 1e-1, "log": True}


def write_study(folder: Path, space: dict[str, Any], **settings: Any) -> Path:
    content = {
        "name": "try",
        "config": "tiny.yaml",
        "overrides": START,
        "space": space,
        "seeds": [17],
        "trials": 3,
        **settings,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "study.yaml"
