"""Every command and program of docs/serving.md runs as it is written there, one after another."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_the_page_is_followed_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"python -m recsys.train --config {ROOT}/configs/small.yaml", tmp_path)
    (tmp_path / "tomorrow").symlink_to("data/synthetic_small/test")
    monkeypatch.chdir(tmp_path)
    rows = pq.read_table("tomorrow")
    names: dict[str, Any] = {"rows": rows, "torch": torch}
    for language, text in BLOCKS:
        if "score_candidates" in text:
            names["candidates"] = rows.slice(0, 50).drop(["user_id", "domain"])
        if "pooled" in text:  # of an artefact that the sentence above asks for both programs
            command = "python -m recsys.export --checkpoint outputs/small/checkpoints/step-471 --output programs"
            run(f"{command} --format torch-export --format aoti", tmp_path)
            text = text.replace("outputs/small/artifact", "programs")
            names |= {"pooled": torch.zeros(3, 6 * 8), "dense_features": torch.zeros(3, 3)}
        if language == "bash":
            for line in text.splitlines():
                run(line, tmp_path)
        else:
            exec(text, names)
    assert len([language for language, _ in BLOCKS if language == "bash"]) >= 4 and names["logits"].shape == (3,)
    expected = names["scorer"].score(rows)
    for folder in ("predictions", "predictions-by-checkpoint"):
        np.testing.assert_allclose(pq.read_table(folder)["probability"], expected, rtol=0, atol=1e-6)
