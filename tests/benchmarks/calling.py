"""A benchmark as a user calls it, in a folder of its own, its results in `results/` there."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.report import ROOT


def run(benchmark: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.<benchmark>`; tells how it ended."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--output", "results", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
