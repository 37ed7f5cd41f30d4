"""What a resumed run needs is one object, which counts stages, phases, epochs and steps."""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import as_config
from tiny import tiny_config, write_tiny_log

from recsys.config import Config
from recsys.data.order import Epoch
from recsys.data.splits import open_splits, train_order
from recsys.runtime import Ranks
from recsys.training import optimizers
from recsys.training.monitor import Monitor
from recsys.training.progress import Progress
from recsys.training.run import Trainer


def test_steps_and_epochs_are_counted_for_the_run_the_stage_and_the_phase() -> None:
    progress = Progress()
    progress.begin_stage("one")
    for _ in range(3):
        progress.step_done(10)
    assert (progress.step, progress.phase_steps, progress.epoch, progress.epoch_step) == (3, 3, 0, 3)
    progress.epoch_done()
    progress.begin_phase(1)
    progress.step_done(7)
    assert (progress.step, progress.phase, progress.phase_steps, progress.phase_epochs) == (4, 1, 1, 0)
    assert (progress.epoch, progress.epoch_step) == (1, 1)
    assert (progress.of_stage.steps, progress.of_stage.examples, progress.of_stage.epochs) == (4, 37, 1)
    progress.epoch_done()
    progress.begin_stage("two")
    assert (progress.phase, progress.phase_steps, progress.of_stage.steps) == (0, 0, 0)
    assert progress.totals["one"].steps == progress.step == 4


def test_counts_add_up() -> None:
    progress = Progress()
    for number in (2, 3):
        progress.add_counts("train", Counter({("cut", "tags"): number}))
    assert progress.counts == {"train": {("cut", "tags"): 5}}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_position_is_what_the_epoch_under_way_leaves(world_size: int) -> None:
    epoch = Epoch((50, 70, 20), 2, 8, seed=3)
    progress = Progress(epoch_step=4)
    left = Epoch((50, 70, 20), world_size, 8, seed=3).resumed(progress.position(epoch))
    read = sum(epoch.global_batch_rows(step) for step in range(4))
    rows = sum(left.global_batch_rows(step) for step in range(left.first_step, left.num_steps))
    assert rows == 140 - read


def _run(ranks: Ranks, config: Config, trained: dict[str, Any]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """How far the run had come whenever a phase began and at its end; the summary; what each phase changed."""
    optimizers._TRAINED = {**optimizers._TRAINED, **trained}
    seen: list[Any] = []
    changed: dict[str, Any] = {}
    with Monitor(Path(config.output_dir), enabled=ranks.is_first) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        before: dict[str, Any] = {}

        def begin(name: str, trains: str, num_steps: int) -> None:
            progress = trainer.progress
            seen.append((progress.stage, progress.phase, progress.step, progress.epoch, num_steps))
            state = {key: value.clone() for key, value in trainer.dense_arch.state_dict().items()}
            if before:
                changed[len(seen) - 1] = {key for key in state if not torch.equal(state[key], before[key])}
            before.update(state)

        monitor.begin_stage = begin  # type: ignore[method-assign]
        summary = trainer.run()
        begin("end", "", 0)
        held = {name for name, value in vars(trainer).items() if isinstance(value, int | float | Counter)}
        assert not held, f"the trainer keeps {held} beside its progress"
        epoch = train_order(trainer.splits["train"], config, ranks.world_size, trainer.progress.epoch)
        assert trainer.progress.position(epoch).taken == ()
    return seen, summary, changed


@pytest.mark.slow
def test_a_stage_of_two_phases_counts_them_and_trains_one_after_another(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    raw = tiny_config(tmp_path, tmp_path / "out")
    raw["stages"] = {"backbone": raw["stages"]["backbone"], "experts": raw["stages"]["experts"]}
    trained = {"experts": (frozenset({"experts"}), frozenset({"backbone"}))}
    (tmp_path / "out").mkdir()
    seen, summary, changed = run_ranks(2, _run, as_config(raw, tmp_path), trained)[0]
    # 15 steps an epoch: two epochs of the backbone, then one of each phase.
    assert seen[:3] == [("backbone", 0, 0, 0, 30), ("experts", 0, 30, 2, 15), ("experts", 1, 45, 3, 15)]
    assert seen[3][2:4] == (60, 4)
    assert summary["stages"]["experts"]["steps"] == 30 and summary["stages"]["experts"]["epochs"] == 2
    experts = {name for name in changed[2] if name.endswith(("lora_A", "lora_B"))}
    assert changed[2] == experts and experts
    assert changed[3] and not {name for name in changed[3] if name.endswith(("lora_A", "lora_B"))}
    assert (tmp_path / "out/checkpoints/step-60").is_dir() and not (tmp_path / "out/checkpoints/best").exists()


def test_progress_says_of_each_field_what_it_is() -> None:
    assert {field.name for field in fields(Progress)} <= set((Progress.__doc__ or "").replace(":", " ").split())
