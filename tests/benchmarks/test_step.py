"""The benchmark of a step as a user runs it, on a config so small that the figures mean nothing but must be there."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calling import run
from tiny import write_tiny_config, write_tiny_log

from benchmarks.report import Line, read
from benchmarks.step import OPTIONS

ROOT = Path(__file__).parents[2]


def read_result(folder: Path, name: str) -> tuple[str, dict[str, list[Line]]]:
    page = (folder / "results" / f"{name}.md").read_text()
    result = read(folder / "results" / f"{name}.jsonl")
    assert str(folder) not in page + json.dumps(result)
    (about,) = result["about"]
    for fact in ("commit", "hardware", "versions", "date", "command"):
        assert about[fact] is not None or fact == "commit"  # none outside a checkout
        assert f"- {fact}: " in page
    return page, result


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_log(tmp_path / "log", rows={"train": 300, "valid": 60, "test": 60})
    write_tiny_config(tmp_path / "tiny.yaml", tmp_path / "log", tmp_path / "out")
    return tmp_path


@pytest.mark.slow
def test_step_tells_the_parts_of_every_case_and_their_ratios(folder: Path) -> None:
    paths = "model.tower=null", "model.paths=[{type: mlp, hidden: [4]}, {type: mlp, hidden: [6]}]"
    given = ["--steps", "8", "--turns", "3", "device=cpu", *paths, "model.replaces={type: mlp, hidden: [10]}"]
    ended = run("step", folder, "--config", "tiny.yaml", *given)
    assert (ended.returncode, ended.stderr) == (0, "")
    page, result = read_result(folder, "step_cpu")
    about = result["about"][0]
    assert about["command"] == shlex.join(["python", "-m", "benchmarks.step", "--config", "tiny.yaml", *given])
    # 24 numbers to hidden layers of 4 and 6, or 10, and the logit; embeddings are looked up, dense features projected.
    flops = 2 * (24 * 10 + 10) + 20 + 2 * 2 * 4
    assert about["flops_per_example"] == {"mlp 4 + mlp 6": flops, "mlp 10": flops}
    cases = {line["case"]: line["medians"] for line in result["case"]}
    options = [name for name in OPTIONS if name != "batch norm"]  # which takes one tower
    stages = [f"HiLoMoE, {stage}" for stage in ("backbone", "experts", "joint")]
    assert list(cases) == ["dense tower", *options, *stages, "replaced tower"]
    assert all(math.isfinite(number) for number in numbers(result))
    assert all(line["median"] > 0 for line in result["ratio"]) and len(result["ratio"]) == len(options) + 4
    for name, figures in cases.items():
        assert f"| {name} |" in page
        assert f"│ {name}" in ended.stdout
        # How much the parts leave as the rest, on a busy machine, is anything; of each turn they sum up, below.
        rate, step, wait, _ = (figures.pop(key) for key in ("examples/s", "step", "data wait", "rest"))
        # 300 rows in batches of 32 have a last one of 12, which a turn need not meet.
        assert 12 / step < rate < 33 / step
        assert wait >= 0
        assert all(seconds > 0 for seconds in figures.values())
    assert [(line["case"], line["turn"]) for line in result["turn"]] == [(c, turn) for c in cases for turn in (1, 2, 3)]
    for turn in (line["figures"] for line in result["turn"]):
        rate, step = turn.pop("examples/s"), turn.pop("step")
        assert sum(turn.values()) == pytest.approx(step)


@pytest.mark.slow
def test_step_writes_the_embedded_log_for_all_ranks(tmp_path: Path) -> None:
    rows = [f"data.synthetic.{split}_rows=600" for split in ("train", "valid", "test")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.step", "--config", "configs/small.yaml", "--output", str(tmp_path)]
    command += ["--steps", "2", "--turns", "1", "device=cpu", "data.batch_size=32", *rows]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "WARNING"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    (about,) = read(tmp_path / "step_cpu.jsonl")["about"]
    assert about["command"].startswith("torchrun --nproc-per-node 2 -m benchmarks.step --config configs/small.yaml ")
    assert about["ranks"] == 2


def test_step_needs_experts_to_compare(folder: Path) -> None:
    ended = run("step", folder, "--config", "tiny.yaml", "model.hilomoe=null")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: model.hilomoe is null")
    assert not (folder / "results").exists()
