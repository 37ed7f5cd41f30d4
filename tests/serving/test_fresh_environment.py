"""Serving needs the packages of requirements/serving.txt and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_scorer import COLUMNS

from recsys.serving import Scorer

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, json, sys
import numpy as np, pyarrow.parquet as pq
from recsys.serving import Scorer
others = ("torchrec", "fbgemm_gpu", "torchx", "tensorboard", "rich", "scipy")
absent = [name for name in others if importlib.util.find_spec(name)]
assert not absent, absent
rows = pq.read_table(sys.argv[2], columns=json.loads(sys.argv[3]))
np.save(sys.argv[4], Scorer(sys.argv[1]).score(rows))
"""


@pytest.mark.slow
def test_a_fresh_environment_with_the_serving_packages_scores(
    trained: tuple[Path, Path], tiny_log: Path, tmp_path: Path
) -> None:
    artifact = trained[1]
    source = tmp_path / "source"  # building leaves files beside what is built
    for name in ("recsys", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", ROOT / "requirements/serving.txt")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", source)
    rows, columns = tiny_log / "test/part-0.parquet", list(COLUMNS)
    run(python, "-c", PROGRAM, artifact, rows, str(columns).replace("'", '"'), tmp_path / "found.npy")
    expected = Scorer(artifact).score(pq.read_table(rows, columns=columns))
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
