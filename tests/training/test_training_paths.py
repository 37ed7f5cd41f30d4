"""Runs with two paths over ranks: in stages, with experts in one of them, resumed, begun with weights of another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import _resume_from_each, config_of
from test_warm_start import begun
from tiny import tiny_config, write_tiny_log

PATHS: list[dict[str, Any]] = [
    {"type": "mlp", "hidden": [160, 64], "normalization": "batch"},
    {"type": "dcn_v2", "num_cross_layers": 1, "hidden": [48]},
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def two_paths(log: Path, output_dir: Path) -> dict[str, Any]:
    """The tiny config with experts in its second path alone, and a weight on agreement in its last stage."""
    raw = tiny_config(log, output_dir)
    raw["model"] = {
        "paths": PATHS,
        "hilomoe": {"num_layers": 2, "num_experts": 3, "experts_in": ["paths.1.mlp.*"]},
        "dense_dim": 4,
    }
    raw["stages"]["joint"]["agreement_weight"] = 20.0
    return raw


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of that on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, train_on, as_config(two_paths(log, folder), folder))
    return folder


def test_its_losses_are_told_apart_and_it_learns(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for stage in summary["stages"].values():
        assert list(stage["losses"]) == ["bce", "bce_paths", "agreement", "balance", "z"]
        assert 0 < stage["losses"]["agreement"] < 0.1
        assert stage["losses"]["bce"] < stage["losses"]["bce_paths"]
    assert summary["test"]["auc"] > 0.65
    agreement = [stage["losses"]["agreement"] for stage in summary["stages"].values()]
    assert agreement[2] < 0.5 * agreement[1]  # where it has a weight
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    # It is the log loss that metrics make of the logits. In the first two windows all batches are full.
    bce, log_loss = ([scalar.value for scalar in events.Scalars(f"train/{name}")[:2]] for name in ("bce", "log_loss"))
    assert bce == pytest.approx(log_loss, rel=1e-5)


def test_a_stage_trains_experts_of_one_path_and_leaves_all_else_bit_identical(run: Path, tmp_path: Path) -> None:
    before, after, last = (checkpoint_tensors(run / "checkpoints" / f"step-{step}", tmp_path) for step in (30, 45, 65))
    names = {name for name in before if name.startswith("model.")}
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed == {f"model.dense_arch.paths.1.mlp.linears.0.lora_{one}" for one in "AB"}
    assert not {name for name in names if torch.equal(after[name], last[name])}


@pytest.mark.slow
def test_resumed_equals_uninterrupted(log: Path, tmp_path: Path) -> None:
    """Over three ranks, to which it matters in which order DDP adds up gradients."""
    stages = json.loads(config_of(log, tmp_path, tmp_path).model_dump_json())["stages"]
    stages["joint"]["agreement_weight"] = 20.0
    _resume_from_each(log, tmp_path, 3, 12, stages=stages, model=two_paths(log, tmp_path)["model"])


def test_weights_are_taken_by_name(run: Path, log: Path, tmp_path: Path) -> None:
    raw = two_paths(log, tmp_path / "out")
    raw["model"]["paths"] = [PATHS[0], {**PATHS[1], "hidden": [24]}]
    checkpoint = run / "checkpoints" / "step-65"
    raw["warm_start"] = {"checkpoint": str(checkpoint)}
    saved = checkpoint_tensors(checkpoint, tmp_path)
    told, initial, found = begun(raw, tmp_path)
    fits = {name for name in found if name in saved and saved[name].shape == found[name].shape}
    assert {name for name in found if ".paths.0." in name or ".heads.0." in name} < fits
    assert all(torch.equal(value, (saved if name in fits else initial)[name]) for name, value in found.items())
    shapes = "(24, 24) here, (48, 24) in the checkpoint"
    assert f"  tensor paths.1.mlp.linears.0.weight: has another shape, {shapes}; left as initialised" in told
    # A tower goes by other names than a path.
    raw["model"] = {"tower": PATHS[0], "dense_dim": 4}
    raw["stages"] = {"backbone": raw["stages"]["backbone"]}
    told, _, _ = begun(raw, tmp_path)
    assert "  tensor tower.linears.0.weight: the checkpoint has none; left as initialised" in told
    assert "  tensor paths.0.linears.0.weight of the checkpoint: there is none here" in told
