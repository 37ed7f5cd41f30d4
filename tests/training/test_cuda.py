"""Training on a GPU. Run where there is one: pytest -m gpu.

Each run is a fresh process: a fork server that has imported TorchRec cannot fork processes that use CUDA.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_config, write_tiny_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train(config: Path, output_dir: Path, *overrides: str) -> Any:
    """The summary of a run in a process of its own."""
    command = [sys.executable, "-m", "recsys.train", "--config", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output_dir / "summary.json").read_text())


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_a_gpu_trains_with_every_fused_optimizer(tmp_path: Path, optimizer: str) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    summary = train(config, tmp_path / "out", "device=cuda", f"optimizers.sparse.type={optimizer}")
    assert summary["device"] == "cuda"
    assert summary["test"]["log_loss"] < 1.0


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_run_is_resumed_on_a_gpu(tmp_path: Path, optimizer: str) -> None:
    """With Adam's count of steps, by which it corrects its averages."""
    write_tiny_log(tmp_path)
    settings = ("device=cuda", f"optimizers.sparse.type={optimizer}", "checkpoints.every_steps=25")
    kept = "checkpoints.keep_every_steps=1"
    whole = train(
        write_tiny_config(tmp_path / "whole.yaml", tmp_path, tmp_path / "whole"), tmp_path / "whole", *settings, kept
    )
    config = write_tiny_config(tmp_path / "again.yaml", tmp_path, tmp_path / "again")
    start = f"resume={tmp_path / 'whole' / 'checkpoints' / 'step-25'}"
    again = train(config, tmp_path / "again", *settings, start)
    assert again["steps"] == whole["steps"]
    assert again["test"]["log_loss"] == pytest.approx(whole["test"]["log_loss"], abs=1e-4)


def test_a_gpu_and_a_cpu_agree(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    figures = {}
    for device in ("cpu", "cuda"):
        config = write_tiny_config(tmp_path / f"{device}.yaml", tmp_path, tmp_path / device)
        figures[device] = train(config, tmp_path / device, f"device={device}")["test"]
    assert figures["cuda"]["log_loss"] == pytest.approx(figures["cpu"]["log_loss"], abs=1e-3)
