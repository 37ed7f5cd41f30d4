"""Training on a GPU. Run where there is one: pytest -m gpu."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_module
from tiny import write_tiny_config, write_tiny_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_a_gpu_trains_with_every_fused_optimizer(tmp_path: Path, optimizer: str) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    override = f"optimizers.sparse.type={optimizer}"
    (finished,) = run_module(1, "recsys.train", "--config", str(config), "device=cuda", override)
    assert finished.code == 0, finished.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["test"]["log_loss"] < 1.0


def test_a_gpu_and_a_cpu_agree(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    figures = {}
    for device in ("cpu", "cuda"):
        config = write_tiny_config(tmp_path / f"{device}.yaml", tmp_path, tmp_path / device)
        (finished,) = run_module(1, "recsys.train", "--config", str(config), f"device={device}")
        assert finished.code == 0, finished.stderr
        figures[device] = json.loads((tmp_path / device / "summary.json").read_text())["test"]
    assert figures["cuda"]["log_loss"] == pytest.approx(figures["cpu"]["log_loss"], abs=1e-3)
