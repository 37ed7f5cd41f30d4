"""A run that is resumed ends as the one that was not interrupted: the same bits on as many ranks."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import as_config, checkpoint_tensors
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.layout import checkpoints, read_meta
from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.splits import open_splits
from recsys.runtime import Ranks
from recsys.training import stage
from recsys.training.monitor import Monitor
from recsys.training.run import Trainer

TIMES = ("seconds", "examples_per_second", "data_wait", "checkpoint")


class Recorder(Monitor):
    """Keeps what is recorded, without what has to do with time."""

    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir, enabled=True)
        self.told: dict[str, Any] = {}

    def train_window(self, stage: str, step: int, *args: Any) -> None:
        *_, metrics, scalars = args
        kept = {tag: value for tag, value in scalars.items() if not tag.startswith("throughput/")}
        self.told[f"{step} window"] = (stage, metrics, kept)

    def routing(self, step: int, window: Mapping[str, Any]) -> None:
        self.told[f"{step} routing"] = {name: (s.as_dict(), s.scores.tolist()) for name, s in window.items()}

    def evaluation(self, source: str, split: str, step: int, metrics: Any) -> None:
        self.told[f"{step} {source} {split}"] = metrics


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return value


def run(ranks: Ranks, config: Config, start: Path | None) -> tuple[dict[str, Any], Any, list[tuple[int, ...]]]:
    """What was recorded, the summary, and the rows that this rank trained on, by the step."""
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, ...]] = []
    take = stage._Taken.step_done

    def step_done(self: stage._Taken) -> Any:
        rows.append(tuple(taken.pop(0)))
        return take(self)

    following = stage._Taken.__next__
    taken: list[list[int]] = []

    def __next__(self: stage._Taken) -> Batch:
        batch = following(self)
        taken.append(batch.dense_features[:, 1].view(torch.int32).tolist())  # `scale`, which no two rows share
        return batch

    stage._Taken.step_done, stage._Taken.__next__ = step_done, __next__  # type: ignore[method-assign]
    try:
        monitor = Recorder(output_dir) if ranks.is_first else Monitor(output_dir, enabled=False)
        with monitor:
            trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
            if start is not None:
                trainer.resume(start)
            summary = trainer.run()
    finally:
        stage._Taken.step_done, stage._Taken.__next__ = take, following  # type: ignore[method-assign]
    return getattr(monitor, "told", {}), without_times(summary), rows


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def config_of(log: Path, output_dir: Path, scratch: Path, **changes: Any) -> Config:
    """Three stages, the first two chosen by the valid split, of all kinds of table; a checkpoint every few steps."""
    raw = tiny_config(log, output_dir)
    raw["features"]["sparse"]["tags"]["max_length"] = 2  # so that something is counted
    raw["data"]["reader_threads"] = 1
    raw["stages"]["backbone"] |= {"patience": 1, "epochs": 3}
    raw["stages"]["experts"] |= {"patience": 1, "monitor": "auc"}
    raw["logging"] = {"every_steps": 4, "eval_every_steps": 9}
    raw["checkpoints"] = {"every_steps": 5, "keep_every_steps": 1}
    for path, value in changes.items():
        raw[path] = value
    return as_config(raw, scratch)


def tensors_of(directory: Path, scratch: Path) -> dict[str, Tensor]:
    return checkpoint_tensors(directory, scratch)


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_equals_uninterrupted(log: Path, tmp_path: Path, world_size: int) -> None:
    """From every checkpoint of a run: at ends of stages and phases, at best states, within epochs, before log lines."""
    whole = config_of(log, tmp_path / "whole", tmp_path)
    told, summary, rows = zip(*run_ranks(world_size, run, whole, None), strict=True)
    steps = [read_meta(path).step for path in reversed(checkpoints(tmp_path / "whole" / "checkpoints"))]
    last = steps[-1]
    assert len(steps) > 12 and last == summary[0]["steps"]
    expected = tensors_of(tmp_path / "whole" / "checkpoints" / f"step-{last}", tmp_path)
    for step in steps if world_size == 3 else steps[:: 1 + world_size]:
        folder = tmp_path / f"from-{step}"
        for kept in (kept for kept in steps if kept <= step):
            name = f"checkpoints/step-{kept}"
            shutil.copytree(tmp_path / "whole" / name, folder / name)
        config = config_of(log, folder, tmp_path)
        again, its_summary, its_rows = zip(
            *run_ranks(world_size, run, config, folder / "checkpoints" / f"step-{step}"), strict=True
        )
        for rank in range(world_size):
            assert its_rows[rank] == rows[rank][step:], (step, rank)
        late = {key: value for key, value in told[0].items() if int(key.split()[0]) > step}
        assert {key: again[0][key] for key in late} == late, step
        assert its_summary == summary, step
        assert_same_tensors(tensors_of(folder / "checkpoints" / f"step-{last}", tmp_path), expected)
        shutil.rmtree(folder)
