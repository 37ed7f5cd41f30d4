"""Training on a GPU. Run where there is one: pytest -m gpu.

Each run is a fresh process: a fork server that has imported TorchRec cannot fork processes that use CUDA.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import train_on
from tiny import write_tiny_config, write_tiny_log

from recsys.config import load_config
from recsys.runtime import process_group
from recsys.training.stage import PhaseTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or not run with -m gpu"),
]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # as several of these tests run at once
UVM = "tables.user.compute_kernel=fused_uvm_caching"


def run(module: str, *arguments: object) -> str:
    """What a module that ends well says, in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(config: Path, output_dir: Path, *overrides: str) -> Any:
    """The summary of a run in a process of its own."""
    run("recsys.train", "--config", config, *overrides)
    return json.loads((output_dir / "summary.json").read_text())


def figures(checkpoint: object, split: str, *overrides: str) -> Any:
    """Those of `recsys.evaluate`."""
    return json.loads(run("recsys.evaluate", "--checkpoint", checkpoint, "--split", split, "--json", *overrides))[
        "model"
    ]


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
    assert again["test"] == whole["test"]


def test_a_gpu_and_a_cpu_agree(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    found = {}
    for device in ("cpu", "cuda"):
        config = write_tiny_config(tmp_path / f"{device}.yaml", tmp_path, tmp_path / device)
        found[device] = train(config, tmp_path / device, f"device={device}")["test"]
    assert found["cuda"]["log_loss"] == pytest.approx(found["cpu"]["log_loss"], abs=1e-3)


FASTER = {
    "compiled": ["compute.compile=true"],
    "bfloat16": ["compute.autocast=bfloat16"],
    "TF32": ["compute.tf32=true"],
    "fused AdamW": ["optimizers.dense.fused=true"],
    "fp16 tables": ["tables.user.data_type=fp16", "tables.item.data_type=fp16"],
    "quantised all-to-all": ["compute.qcomms={forward_precision: bf16, backward_precision: bf16}"],
    "binned AUC": ["metrics.train_auc=binned"],
}
"""The keys that are there for GPUs."""


@pytest.mark.parametrize("keys", [*FASTER, "all"])
def test_a_run_by_the_keys_for_gpus_is_close_to_a_plain_one_and_read_on_a_cpu(tmp_path: Path, keys: str) -> None:
    write_tiny_log(tmp_path)
    found = {}
    every = [key for of in FASTER.values() for key in of]
    for name, more in (("plain", []), ("other", every if keys == "all" else FASTER[keys])):
        config = write_tiny_config(tmp_path / f"{name}.yaml", tmp_path, tmp_path / name)
        found[name] = train(config, tmp_path / name, "device=cuda", *more)
    assert found["other"]["test"]["log_loss"] == pytest.approx(found["plain"]["test"]["log_loss"], abs=0.02)
    on_cpu = figures(found["other"]["checkpoint"], "test", "device=cpu")
    assert on_cpu["log_loss"] == pytest.approx(found["other"]["test"]["log_loss"], abs=1e-2)


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm_caching"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, kernel: str) -> None:
    write_tiny_log(tmp_path)
    stages = ("stages.backbone.epochs=30", "checkpoints.every_steps=50")
    settings = ("device=cuda", "optimizers.sparse.type=adam", f"tables.user.compute_kernel={kernel}", *stages)
    whole = train(
        write_tiny_config(tmp_path / "whole.yaml", tmp_path, tmp_path / "whole"), tmp_path / "whole", *settings
    )
    config = write_tiny_config(tmp_path / "killed.yaml", tmp_path, tmp_path / "killed")
    command = [sys.executable, "-m", "recsys.train", "--config", str(config), *settings]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL) as killed:
        while not (tmp_path / "killed/checkpoints/step-100").exists():
            assert killed.poll() is None
            time.sleep(0.005)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert "Resumed from" in run("recsys.train", "--config", config, *settings)
    again = json.loads((tmp_path / "killed/summary.json").read_text())
    assert again["steps"] == whole["steps"]
    assert again["test"] == whole["test"]
    assert again["stages"]["joint"]["losses"] == whole["stages"]["joint"]["losses"]


@pytest.mark.parametrize("average", ["null", "{tables: sweep, every: 3, decay: 0.9}"])
def test_cached_rows_are_those_of_the_best_state_that_a_stage_goes_back_to(tmp_path: Path, average: str) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    stage = "{trains: backbone, epochs: 30, patience: 2, learning_rate: 0.05, sparse_learning_rate: 0.5}"
    settings = ("device=cuda", UVM, f"stages={{backbone: {stage}}}", f"optimizers.average={average}")
    said = run("recsys.train", "--config", config, *settings)
    assert "back to its best" in said
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    for split in ("valid", "test"):
        assert figures(summary["checkpoint"], split, "device=cuda") == summary[split]


def test_a_model_trained_on_a_gpu_is_exported_on_a_cpu(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    settings = ("device=cuda", UVM, "optimizers.sparse={type: adam, weight_decay: 1e-4}")
    checkpoint = train(config, tmp_path / "out", *settings)["checkpoint"]
    artifact, inputs = tmp_path / "artifact", tmp_path / "test"
    told = json.loads(run("recsys.export", "--checkpoint", checkpoint, "--output", artifact, "--json"))
    assert told["rows"] == 251 and told["max_difference"] <= 1e-6
    run("recsys.evaluate", "--checkpoint", checkpoint, "--predictions", tmp_path / "evaluated")
    run("recsys.predict", "--artifact", artifact, "--input", inputs, "--output", tmp_path / "predicted")
    evaluated = pq.read_table(tmp_path / "evaluated")["probability"].to_numpy()
    predicted = pq.read_table(tmp_path / "predicted")["probability"].to_numpy()
    assert np.abs(evaluated - predicted).max() <= 1e-6


OPTIONS = {
    "sweeps": ["optimizers.average={tables: sweep}"],
    "touched rows": ["optimizers.average={tables: touched}"],
    "decay and clipping": [
        "optimizers.sparse={weight_decay: 1e-4, weight_decay_mode: decoupled}",
        "optimizers.dense.max_grad_norm=1.0",
    ],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_waits_for_the_device_only_where_ids_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """TorchRec must know how many ids come, and sends them on a stream of its own; nothing waits for the model."""
    write_tiny_log(tmp_path)
    stage = "{trains: all, steps: 60, learning_rate: 1e-3, sparse_learning_rate: 0.02, balance_weight: 0.01}"
    overrides = ["device=cuda", f"stages={{joint: {stage}}}", "logging.every_steps=1000"]
    overrides += [*OPTIONS[option], "metrics.train_auc=binned"]
    config = load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out"), overrides)
    step, waits, watched = PhaseTrainer._step, [], []

    def watching(self: PhaseTrainer, *arguments: Any) -> None:
        # Not the first steps, which make state, nor the last, which have no batch to send ahead; but what is between.
        is_watched = 5 <= self._progress.epoch_step < 25 and self._progress.epoch == 1
        torch.cuda.set_sync_debug_mode("warn" if is_watched else "default")
        step(self, *arguments)
        if is_watched:
            watched.append(self._progress.phase_steps)
            torch.zeros((), device="cuda").item()  # one wait, to see that such are seen

    def note(message: Warning | str, *_: object) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            waits.append([frame.name for frame in traceback.extract_stack()])

    monkeypatch.setattr(PhaseTrainer, "_step", watching)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", note)
        with process_group("cuda") as ranks:
            train_on(ranks, config)
    assert len(watched) == 20
    sending = {"start_sparse_data_dist", "wait_sparse_data_dist"}
    within = "train_epoch"
    others = [names[names.index(within) :] for names in waits if within in names and not sending & set(names)]
    assert len(others) == len(watched), others
