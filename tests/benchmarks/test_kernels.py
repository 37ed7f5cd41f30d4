"""What the benchmark counts as the kernels of a step."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import as_config
from tiny import tiny_config

from benchmarks.kernels import _kernels, count_kernels
from recsys.config import Config

CPU = torch.device("cpu")


def config_of(tmp_path: Path, **sections: object) -> Config:
    raw = tiny_config(tmp_path, tmp_path / "out")
    return as_config(raw | sections, tmp_path)


def test_an_operator_that_computes_counts_once_and_a_view_does_not() -> None:
    a, b = torch.ones(4, 4), torch.ones(4)
    assert _kernels(lambda: a.t().unsqueeze(0).detach(), CPU) == 0
    assert _kernels(lambda: (a + b).mul(2.0).relu(), CPU) == 3
    # Of operators that call others, as those of a linear with a bias, the innermost alone.
    assert _kernels(lambda: torch.nn.functional.linear(a, a, b), CPU) == 1


def test_a_fused_optimizer_takes_fewer_kernels_and_casts_more(tmp_path: Path) -> None:
    plain = count_kernels(config_of(tmp_path), CPU)
    fused = count_kernels(config_of(tmp_path, optimizers={"dense": {"fused": True}}), CPU)
    cast = count_kernels(config_of(tmp_path, compute={"autocast": "bfloat16"}), CPU)
    assert fused["forward and backward"] == plain["forward and backward"]
    assert 0 < fused["optimizer"] < plain["optimizer"] / 2
    assert cast["forward and backward"] > plain["forward and backward"]
    assert cast["optimizer"] == plain["optimizer"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles for a CPU with g++")
def test_a_compiled_step_takes_fewer_kernels(tmp_path: Path) -> None:
    plain = count_kernels(config_of(tmp_path), CPU)
    compiled = count_kernels(config_of(tmp_path, compute={"compile": True}), CPU)
    assert 0 < compiled["forward and backward"] < plain["forward and backward"]
    assert compiled["optimizer"] == plain["optimizer"]
