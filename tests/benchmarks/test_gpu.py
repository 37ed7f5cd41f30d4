"""What runs all that needs a GPU: that it says so without one, and what it makes of parts that end, fail and hang."""

import json
import time
from pathlib import Path

import pytest
import torch
from calling import run

from benchmarks import gpu
from benchmarks.report import ROOT, read


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    ended = run("gpu", tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: no GPU: torch sees none on this machine; make doctor says why\n"
    assert not (tmp_path / "results").exists()


def test_parts_take_ten_minutes_together_and_every_marked_test_is_among_them() -> None:
    assert sum(limit for limit, _ in gpu.PARTS.values()) <= 600
    tests = gpu.PARTS["tests"][1]
    assert tests[tests.index("-m", 2) :][:2] == ("-m", "gpu")
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert {str(path.relative_to(ROOT)) for path in marked} - {"tests/benchmarks/test_gpu.py"} == {tests[-1]}


def test_a_part_that_fails_or_hangs_is_told_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = {"fails": (30, ("-c", "raise SystemExit(3)")), "hangs": (1, ("-c", hangs)), "ends": (30, ("-c", "pass"))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    told: list[str] = []
    began = time.monotonic()
    assert gpu.run_parts(tuple(parts), tmp_path, "some GPU", "cuda", told.append) == 1
    assert time.monotonic() - began < 30
    assert told[1::2] == ["fails: failed with 3", "hangs: ended after 1 s", "ends: done"]
    lines = read(tmp_path / "gpu_cuda.jsonl")
    assert [line["outcome"] for line in lines["part"]] == ["failed with 3", "ended after 1 s", "done"]
    page = (tmp_path / "gpu_cuda.md").read_text()
    assert "on some GPU" in page and "| ends | done |" in page
    assert gpu.run_parts(("ends",), tmp_path, "some GPU", "cuda", told.append) == 0
    assert json.dumps(str(tmp_path)) not in page
