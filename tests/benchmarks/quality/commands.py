"""`python -m benchmarks.quality` as a user calls it, its results in `results/`."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.report import ROOT


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.quality", *arguments, "--output", "results"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    process = start(folder, *arguments)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors
