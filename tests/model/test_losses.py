"""Losses by name: one entry and one weight, and whatever the mapping holds is summed, logged and told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import as_config, train_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, write_tiny_log

from recsys.config import Config, StageConfig
from recsys.model import losses
from recsys.model.losses import AGREEMENT, AUXILIARY, CLICK, Auxiliary
from recsys.runtime import Ranks


def test_every_auxiliary_loss_has_a_weight_in_a_stage_and_every_weight_a_loss() -> None:
    stage = StageConfig(trains="all", steps=1, learning_rate=1.0)
    assert set(stage.loss_weights) == {*AUXILIARY, AGREEMENT}
    weighed = StageConfig(trains="all", steps=1, learning_rate=1.0, z_weight=0.5)
    assert weighed.loss_weights == {"balance": 0.0, "z": 0.5, "diversity": 0.0, "agreement": 0.0}


def _train_with_another(ranks: Ranks, config: Config) -> dict[str, Any]:
    """With a loss more in the mapping, whose weight stands in for that of balance."""
    length = Auxiliary(lambda layer, routing: routing.scores.square().mean()[None], watched=True)
    losses.AUXILIARY = {"length": length, **AUXILIARY}
    return train_on(ranks, config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    write_tiny_log(folder)
    raw = tiny_config(folder, folder / "out")
    raw["stages"] = {"joint": raw["stages"]["joint"]}
    run_ranks(2, _train_with_another, as_config(raw, folder))
    return folder / "out"


def test_the_monitor_and_the_summary_take_what_the_mapping_holds(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())["stages"]["joint"]["losses"]
    assert list(told) == [CLICK, "length", "balance", "z"]  # diversity has no weight
    assert all(value > 0 for value in told.values())
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/")}
    assert {f"train/{name}" for name in told} <= tags
    assert "train/diversity" not in tags


def test_the_summarys_losses_are_means_over_the_steps_of_the_last_epoch(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())["stages"]["joint"]["losses"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    # 20 steps: an epoch of 15, logged in windows of 5, and one of 5.
    assert events.Scalars("train/bce")[-1].step == 20
    assert told[CLICK] == pytest.approx(events.Scalars("train/bce")[-1].value, rel=1e-5)


def test_the_total_weighs_each_loss_and_tells_it_unweighed() -> None:
    module, batch = losses.TotalLoss(), type("Batch", (), {"labels": torch.ones(2), "weight": None, "loss_scale": 0.5})
    total, told = module(torch.zeros(2), {"z": torch.tensor(3.0)}, batch, {"z": 0.25})
    assert total == pytest.approx(0.693147 + 0.75)
    assert {name: pytest.approx(value.item()) for name, value in told.items()} == {"bce": 0.693147, "z": 3.0}
