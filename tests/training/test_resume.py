"""A run that is resumed ends as the one that was not interrupted: the same bits on as many ranks."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.layout import checkpoints, read_meta
from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.splits import open_splits
from recsys.runtime import Ranks
from recsys.training import stage
from recsys.training.monitor import Monitor
from recsys.training.output import MARKER
from recsys.training.progress import Progress
from recsys.training.run import Trainer

TIMES = ("seconds", "examples_per_second", "data_wait", "checkpoint", "checkpoint_wait")


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

    def evaluation(self, source: str, split: str, step: int, epochs: int, metrics: Any, *more: Any) -> None:
        self.told[f"{step} {source} {split}"] = (epochs, metrics)


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
    # Gradients of several tens of KiB: how three ranks add up depends on where in a bucket they are.
    raw["model"]["tower"] |= {"hidden": [160, 64], "normalization": "batch"}
    raw["model"]["embedding_dropout"] = 0.1
    plateau = {"schedule": "plateau", "plateau": {"factor": 0.5, "restore_best": True}}
    raw["stages"]["backbone"] |= {"patience": 2, "epochs": 4, **plateau}
    raw["stages"]["experts"] |= {"patience": 1, "monitor": "auc", "expert_learning_rate": 0.04}
    raw["optimizers"] = {"dense": {"max_grad_norm": 0.2}}
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


@pytest.mark.parametrize(
    ("world_size", "every", "optimizer"),
    [
        pytest.param(3, 5, "muon", marks=pytest.mark.slow),
        *(pytest.param(world_size, 1, "adamw", marks=pytest.mark.slow) for world_size in (1, 2, 3)),
    ],
)
def test_resumed_equals_uninterrupted(log: Path, tmp_path: Path, world_size: int, every: int, optimizer: str) -> None:
    """From checkpoints of a run: at ends of stages and phases, at best states, within epochs, before log lines.

    With Muon, AdamW trains what it leaves.
    """
    dense = {"type": optimizer, "max_grad_norm": 0.2, "muon": {"experts": optimizer == "muon"}}
    _resume_from_each(log, tmp_path, world_size, every, optimizers={"dense": dense})


AVERAGED = {"dense": {"max_grad_norm": 0.2}, "average": {"decay": 0.9, "start": 3, "tables": "sweep", "every": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "every"), [(1, 17), (1, 1), (2, 1)])
def test_resumed_equals_uninterrupted_with_averages(log: Path, tmp_path: Path, world_size: int, every: int) -> None:
    """From before they begin, between sweeps, at ends of epochs and at best states to which the run goes back."""
    _resume_from_each(log, tmp_path, world_size, every, optimizers=AVERAGED)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_large_tables_on_every_rank(log: Path, tmp_path: Path) -> None:
    """Their gradients are added up by a DDP of TorchRec's own."""
    tables = tiny_config(log, tmp_path)["tables"]
    for table in tables.values():
        table.pop("min_partition", None)
        table |= {"num_embeddings": 3000, "sharding": ["data_parallel"]}
    _resume_from_each(log, tmp_path, 3, 3, tables=tables)


def _resume_from_each(log: Path, tmp_path: Path, world_size: int, every: int, **changes: Any) -> None:
    whole = config_of(log, tmp_path / "whole", tmp_path, **changes)
    told, summary, rows = zip(*run_ranks(world_size, run, whole, None), strict=True)
    steps = [read_meta(path).step for path in reversed(checkpoints(tmp_path / "whole" / "checkpoints"))]
    last = steps[-1]
    assert len(steps) > 8 and last == summary[0]["steps"]
    windows = {int(key.split()[0]): value for key, value in told[0].items() if key.endswith("window")}
    rates = {step: scalars["learning_rate/dense"] for step, (of, _, scalars) in windows.items() if of == "backbone"}
    if "optimizers" not in changes:  # else the valid split may say something else
        assert {rates[min(rates)], rates[max(rates)]} == {0.01, 0.005}  # at a plateau they were cut
    expected = tensors_of(tmp_path / "whole" / "checkpoints" / f"step-{last}", tmp_path)
    for step in steps[::every]:
        folder = tmp_path / f"from-{step}"
        for kept in (kept for kept in steps if kept <= step):
            name = f"checkpoints/step-{kept}"
            shutil.copytree(tmp_path / "whole" / name, folder / name)
        config = config_of(log, folder, tmp_path, **changes)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_resumed_equals_uninterrupted_with_decay_of_all_rows(log: Path, tmp_path: Path, mode: str) -> None:
    """Of which rows lack some steps, or a sweep is due, in most checkpoints."""
    tables = tiny_config(log, tmp_path)["tables"]
    tables["user"]["max_norm"] = 0.5
    decay, every = (0.5, None) if mode == "decoupled" else (1e-3, 7)
    sparse = {"weight_decay": decay, "weight_decay_mode": mode, "coupled_every": every}
    optimizers = {"dense": {"max_grad_norm": 0.2}, "sparse": sparse}
    _resume_from_each(log, tmp_path, 2, 8, tables=tables, optimizers=optimizers)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_on_another_number_of_ranks_the_rows_left_are_trained_once(
    log: Path, tmp_path: Path, before: int, after: int
) -> None:
    stages = tiny_config(log, tmp_path)["stages"]
    stages["joint"] = {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    whole = config_of(log, tmp_path / "whole", tmp_path, stages=stages)
    _, (summary, *_), rows = zip(*run_ranks(before, run, whole, None), strict=True)
    steps = [read_meta(path).step for path in reversed(checkpoints(tmp_path / "whole" / "checkpoints"))]
    epochs = sum(stage["epochs"] for stage in summary["stages"].values())
    once = Counter(row for rank in rows for step in rank for row in step)
    assert once.total() == epochs * 900 and set(once.values()) == {epochs}
    for step in (steps[len(steps) // 4], steps[-2]):
        start = tmp_path / "whole" / "checkpoints" / f"step-{step}"
        config = config_of(log, tmp_path / f"from-{step}", tmp_path, stages=stages)
        _, (its_summary, *_), rest = zip(*run_ranks(after, run, config, start), strict=True)
        done = Counter(row for rank in rows for of_step in rank[:step] for row in of_step)
        left = Counter(row for rank in rest for of_step in rank for row in of_step)
        assert done + left == once
        for name, stage_ in summary["stages"].items():
            assert its_summary["stages"][name]["examples"] == stage_["examples"]
        assert its_summary["data"] == summary["data"]  # what was cut, before and after
        assert its_summary["test"]["auc"] == pytest.approx(summary["test"]["auc"], abs=0.05)


def test_a_run_that_was_cut_off_is_gone_on_with_and_a_finished_one_is_kept_aside(log: Path, tmp_path: Path) -> None:
    config = config_of(log, tmp_path / "out", tmp_path)
    path = tmp_path / "config-under-test.yaml"
    (done,) = run_module(1, "recsys.train", "--config", str(path))
    assert done.code == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())
    evaluations = (tmp_path / "out" / "evaluations.jsonl").read_text()
    cut_off(tmp_path / "out", 35)
    with (tmp_path / "out" / "evaluations.jsonl").open("a") as file:
        file.write('{"source": "joi')  # as it was being written
    (again,) = run_module(1, "recsys.train", "--config", str(path))
    assert again.code == 0, again.stderr
    assert f"Resumed from {tmp_path}/out/checkpoints/step-35: " in again.stdout
    assert without_times(json.loads((tmp_path / "out" / "summary.json").read_text())) == without_times(figures)
    assert (tmp_path / "out" / "evaluations.jsonl").read_text() == evaluations
    assert_one_tail(tmp_path / "out" / "tensorboard")
    (third,) = run_module(1, "recsys.train", "--config", str(path), "stages.joint.steps=6")
    assert third.code == 0 and "An earlier run was in" in third.stdout and "Resumed" not in third.stdout
    assert len(list(tmp_path.glob("out*"))) == 2
    assert config.resume == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_is_saved_and_goes_on(log: Path, tmp_path: Path, by: signal.Signals) -> None:
    changes = {"checkpoints": {"every_minutes": 0.002}}
    stages = {"joint": {"trains": "all", "steps": 150, "learning_rate": 0.01, "sparse_learning_rate": 0.1}}
    config_of(log, tmp_path / "whole", tmp_path, stages=stages, **changes)
    path = str(tmp_path / "config-under-test.yaml")
    command = [sys.executable, "-m", "recsys.train", "--config", path]
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Resumed" not in whole.stdout
    with subprocess.Popen([*command, f"output_dir={tmp_path}/out"], stdout=PIPE, stderr=PIPE, text=True) as stopped:
        assert stopped.stdout is not None and stopped.stderr is not None
        while "step  40/150" not in (line := stopped.stdout.readline()):
            assert line, stopped.stderr.read()
        stopped.send_signal(by)
        said = stopped.stdout.read()
        told = stopped.stderr.read()
    assert stopped.returncode == 128 + by
    assert told.startswith(f"stopped by {by.name} at step ") and told.count("\n") == 1
    assert f"{by.name}: saving the run at step" in said
    again = subprocess.run([*command, f"output_dir={tmp_path}/out"], capture_output=True, text=True, check=True)
    assert "Resumed from" in again.stdout
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "out")]
    assert without_times(summaries[0]) == without_times(summaries[1])
    last = "checkpoints/step-150"
    assert_same_tensors(tensors_of(tmp_path / "out" / last, tmp_path), tensors_of(tmp_path / "whole" / last, tmp_path))


@pytest.mark.slow
def test_a_finished_run_can_be_gone_on_with_in_its_own_place(log: Path, tmp_path: Path) -> None:
    """With more epochs in the stage under way: it is kept aside, and gone on with from there."""
    stages = {"joint": {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}}
    config_of(log, tmp_path / "out", tmp_path, stages=stages)
    command = ("--config", str(tmp_path / "config-under-test.yaml"))
    (done,) = run_module(1, "recsys.train", *command)
    assert done.code == 0, done.stderr
    within = f"resume={tmp_path}/out/checkpoints/step-20"
    (again,) = run_module(1, "recsys.train", *command, within, "stages.joint.epochs=2")
    assert again.code == 0, again.stderr
    assert "An earlier run was in" in again.stdout and "stages.joint.epochs: 1 -> 2" in again.stdout
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2 * 29


@pytest.mark.slow
def test_a_split_that_is_new_since_is_evaluated(log: Path, tmp_path: Path) -> None:
    stages = {"joint": {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}}
    config_of(log, tmp_path / "out", tmp_path, stages=stages)
    command = ("--config", str(tmp_path / "config-under-test.yaml"))
    (done,) = run_module(1, "recsys.train", *command, "data.test=null")
    assert done.code == 0, done.stderr
    start = f"resume={tmp_path}/out/checkpoints/step-20"
    (again,) = run_module(1, "recsys.train", *command, start, f"output_dir={tmp_path}/new")
    assert again.code == 0, again.stderr
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["test"]["examples"] == 251


@pytest.mark.slow
def test_a_stage_whose_copy_was_cut_off_is_copied_when_the_run_goes_on(log: Path, tmp_path: Path) -> None:
    stage = {"trains": "all", "steps": 3, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    copies = {"copy_to": str(tmp_path / "far")}
    config_of(log, tmp_path / "out", tmp_path, stages={"one": stage, "two": stage}, checkpoints=copies)
    command = ("--config", str(tmp_path / "config-under-test.yaml"))
    (done,) = run_module(1, "recsys.train", *command)
    assert done.code == 0, done.stderr
    cut_off(tmp_path / "out", 3)
    shutil.rmtree(tmp_path / "far" / "step-6")
    (tmp_path / "far" / "step-3" / "meta.json").unlink()
    (again,) = run_module(1, "recsys.train", *command)
    assert again.code == 0, again.stderr
    for name in ("step-3", "step-6"):
        kept, copy = (folder / name / "meta.json" for folder in (tmp_path / "out" / "checkpoints", tmp_path / "far"))
        assert copy.read_bytes() == kept.read_bytes()


@pytest.fixture(scope="module")
def two_stages(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in two stages, of 29 steps an epoch: two epochs, and one."""
    folder = tmp_path_factory.mktemp("two-stages")
    one = {"trains": "all", "epochs": 2, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    changes = {"logging": {"every_steps": 4}, "metrics": {"exact_examples": 10}}
    config_of(log, folder / "out", folder, stages={"one": one, "two": {**one, "epochs": 1}}, **changes)
    (done,) = run_module(1, "recsys.train", "--config", str(folder / "config-under-test.yaml"))
    assert done.code == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize(
    ("step", "changes", "steps", "told"),
    [
        (87, ["stages.two.epochs=3"], 58 + 3 * 29, ""),
        pytest.param(87, ["stages.two.epochs=null", "stages.two.steps=40"], 58 + 40, "", marks=pytest.mark.slow),
        pytest.param(
            87, ["stages.two.epochs=3", "stages.two.patience=1"], 87, "stage two has ended", marks=pytest.mark.slow
        ),
        pytest.param(73, ["stages.two.epochs=null", "stages.two.steps=5"], 73, "", marks=pytest.mark.slow),
        (73, ["stages.one.epochs=5"], 87, "stage one has ended, so what differs in stages.one changes nothing"),
        pytest.param(40, ["stages.one.epochs=1", "data.batch_size=30"], 40 + 30, "", marks=pytest.mark.slow),
        pytest.param(58, ["stages.one.epochs=1"], 87, "stage one has ended", marks=pytest.mark.slow),
        pytest.param(68, ["stages.two.diversity_weight=0.1"], 87, "", marks=pytest.mark.slow),
        pytest.param(68, ["metrics.num_bins=131072"], 87, "", marks=pytest.mark.slow),
    ],
)
def test_another_length_and_other_figures_are_taken_up(
    two_stages: Path, tmp_path: Path, step: int, changes: list[str], steps: int, told: str
) -> None:
    start = f"resume={two_stages}/checkpoints/step-{step}"
    args = ("--config", str(two_stages / "config.yaml"), start, f"output_dir={tmp_path}/out", *changes)
    (done,) = run_module(1, "recsys.train", *args)
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == steps
    said = " ".join(done.stdout.split())
    assert told in said and ("has ended, so" in said) == bool(told)


@pytest.mark.slow
def test_patience_that_is_added_within_a_stage_goes_by_where_it_was_added(two_stages: Path, tmp_path: Path) -> None:
    start = f"resume={two_stages}/checkpoints/step-50"
    changes = ("stages.one.patience=1", "stages.one.learning_rate=1e-9", "stages.one.sparse_learning_rate=1e-9")
    args = ("--config", str(two_stages / "config.yaml"), start, f"output_dir={tmp_path}/out", *changes)
    (done,) = run_module(1, "recsys.train", *args)
    assert done.code == 0, done.stderr
    assert "valid before step 51:" in done.stdout
    best = Progress.from_json((tmp_path / "out" / "checkpoints" / "step-55" / "progress.json").read_bytes(), "").best
    assert best is not None and (best.epoch, best.step) == (1, 50)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]["one"]["steps"] == 58


@pytest.mark.slow
def test_an_unfinished_run_makes_way_for_one_that_goes_on_from_elsewhere(cut: Path, tmp_path: Path) -> None:
    other = shutil.copytree(cut, tmp_path / "other")
    start = checkpoints(cut / "checkpoints")[-1]
    config = str(cut / "config.yaml")
    (done,) = run_module(1, "recsys.train", "--config", config, f"resume={start}", f"output_dir={other}")
    assert done.code == 0, done.stderr
    assert "An earlier run was in" in done.stdout and f"Resumed from {start}" in " ".join(done.stdout.split())
    (kept,) = tmp_path.glob("other-*")
    assert len(checkpoints(kept / "checkpoints")) == len(checkpoints(cut / "checkpoints"))


def cut_off(output_dir: Path, step: int) -> None:
    """Leave a run as it was some time after a step's checkpoint."""
    (output_dir / "summary.json").unlink()
    marker = json.loads((output_dir / MARKER).read_text())
    (output_dir / MARKER).write_text(json.dumps({**marker, "state": "running", "finished": None}))
    for checkpoint in checkpoints(output_dir / "checkpoints"):
        if read_meta(checkpoint).step > step:
            shutil.rmtree(checkpoint)


def assert_one_tail(folder: Path) -> None:
    """Every scalar of the run stands once at each step, though its events are in two files."""
    assert len(list(folder.glob("events*"))) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("train/auc", "valid/auc", "learning_rate/dense"):
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)) and len(steps) > 5, tag


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=3", "seed: 17 -> 3"),
        ("optimizers.average.tables=sweep", "optimizers.average: None -> {"),
        ("stages.joint.learning_rate=0.5", "stages.joint.learning_rate: 0.003 -> 0.5"),
        ("features.sparse.tags.max_length=1", "features.sparse.tags.max_length: 2 -> 1"),
    ],
)
def test_a_config_that_differs_is_refused_with_both_ways_out(
    cut: Path, tmp_path: Path, override: str, told: str
) -> None:
    (done,) = run_module(1, "recsys.train", "--config", str(cut / "config.yaml"), override, f"output_dir={cut}")
    assert done.code == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr and "set it back" in done.stderr and "resume=never" in done.stderr
    assert not (cut / "summary.json").exists()


@pytest.mark.slow
def test_what_has_no_part_in_the_result_may_differ(cut: Path) -> None:
    changes = ("logging.every_steps=3", "data.reader_threads=2", "checkpoints.keep_last=1", "device=cpu")
    (done,) = run_module(1, "recsys.train", "--config", str(cut / "config.yaml"), *changes, f"output_dir={cut}")
    assert done.code == 0, done.stderr
    assert "Resumed from" in done.stdout


@pytest.mark.slow
def test_another_run_is_gone_on_with_and_harmless_changes_are_told(cut: Path, tmp_path: Path) -> None:
    config, other = str(cut / "config.yaml"), tmp_path / "other"
    changes = (f"resume={cut}", f"output_dir={other}", "stages.joint.learning_rate=0.5", "tables.item.sharding=null")
    (done,) = run_module(1, "recsys.train", "--config", config, *changes, "tables.item.min_partition=null")
    assert done.code == 0, done.stderr
    assert "stages.joint.learning_rate: 0.003 -> 0.5" in done.stdout
    assert json.loads((other / "summary.json").read_text())["steps"] > 35
    assert not (cut / "summary.json").exists()
    (refused,) = run_module(1, "recsys.train", "--config", config, f"resume={cut}", f"output_dir={other}", "seed=3")
    assert refused.code == 2 and "seed: 17 -> 3" in refused.stderr and "warm_start" in refused.stderr


@pytest.mark.slow
def test_one_that_was_moved_aside_when_the_run_was_cut_off_is_the_newest(cut: Path) -> None:
    newest = checkpoints(cut / "checkpoints")[0]
    newest.rename(newest.with_name(f"{newest.name}.replaced"))
    (done,) = run_module(1, "recsys.train", "--config", str(cut / "config.yaml"), f"output_dir={cut}")
    assert done.code == 0, done.stderr
    assert f"Resumed from {newest}: " in " ".join(done.stdout.split())


def test_a_damaged_checkpoint_is_passed_over_aloud(cut: Path) -> None:
    newest, older = checkpoints(cut / "checkpoints")[:2]
    spoilt = max(newest.glob("*.distcp"))
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 1
    spoilt.write_bytes(data)
    (done,) = run_module(1, "recsys.train", "--config", str(cut / "config.yaml"), f"output_dir={cut}")
    assert done.code == 0, done.stderr
    assert f"{newest} is passed over: {spoilt} is not what was written" in " ".join(done.stdout.split())
    assert f"Resumed from {older}" in " ".join(done.stdout.split())
    assert newest.with_name(f"{newest.name}.aside").is_dir()  # or it would be taken for the newest later


@pytest.mark.slow
def test_never_begins_anew_and_keeps_what_is_there(cut: Path) -> None:
    (done,) = run_module(
        1, "recsys.train", "--config", str(cut / "config.yaml"), "resume=never", f"output_dir={cut}", "seed=3"
    )
    assert done.code == 0, done.stderr
    assert "Resumed" not in done.stdout
    (kept,) = cut.parent.glob(f"{cut.name}-*")
    assert checkpoints(kept / "checkpoints")


def test_rows_that_changed_since_are_refused(cut: Path, log: Path, tmp_path: Path) -> None:
    shutil.copytree(log, tmp_path / "log")
    (tmp_path / "log" / "train" / "part-2.parquet").unlink()
    config = str(cut / "config.yaml")
    train = f"data.train={tmp_path}/log/train/*.parquet"
    (done,) = run_module(1, "recsys.train", "--config", config, f"resume={cut}", f"output_dir={tmp_path}/new", train)
    assert done.code == 2 and "the position belongs to another order of rows" in done.stderr


@pytest.mark.parametrize("fault", ["damaged", "without its best", "of other rows"])
def test_what_cannot_be_gone_on_with_is_refused_before_the_run_is_moved_aside(
    cut: Path, log: Path, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(cut, other := tmp_path / "other")
    folder = (cut if fault == "of other rows" else other) / "checkpoints"
    start = next(path for path in checkpoints(folder) if read_meta(path).best_step not in (None, read_meta(path).step))
    changes, named = list[str](), str(start)
    if fault == "damaged":
        file = max(start.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1])
        named = str(file)
    elif fault == "without its best":
        shutil.rmtree(start.with_name(f"step-{read_meta(start).best_step}"))
    else:
        changes, named = [f"data.train={log}/valid/*.parquet"], "the position belongs to another order of rows"
    args = ("--config", str(cut / "config.yaml"), f"resume={start}", f"output_dir={other}", *changes)
    (done,) = run_module(1, "recsys.train", *args)
    assert done.code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert (other / "config.yaml").exists() and not list(tmp_path.glob("other-*"))


@pytest.fixture(scope="module")
def cut_once(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    config_of(log, folder / "out", folder)
    (done,) = run_module(1, "recsys.train", "--config", str(folder / "config-under-test.yaml"))
    assert done.code == 0, done.stderr
    cut_off(folder / "out", 70)
    return folder / "out"


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A run that was cut off."""
    return shutil.copytree(cut_once, tmp_path / "cut")
