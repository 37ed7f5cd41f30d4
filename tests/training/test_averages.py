"""Averages of weights, held to their definition by checkpoints of every step."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, train_on
from safetensors.torch import load_file
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.layout import read_meta
from recsys.checkpoint.pending import PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.checkpoint.unsharding import unshard
from recsys.config import AverageConfig, Config, ConfigError, load_config
from recsys.data.batch import build_batch
from recsys.data.loader import Loader
from recsys.data.splits import open_splits, train_order
from recsys.model.names import weight_name
from recsys.model.towers.normalization import BatchNorm
from recsys.runtime import Ranks
from recsys.serving.artifact import write_artifact
from recsys.training import averages, run
from recsys.training.averages import check_start
from recsys.training.checkpoint import load_ranker
from recsys.training.monitor import Monitor
from recsys.training.norms import NORM_STEPS, count_statistics, trained_norms
from recsys.training.run import Trainer

STEPS = 22


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory, {"train": 500, "valid": 200, "test": 251})
    return directory


def config_of(log: Path, folder: Path, average: Mapping[str, Any] | None, **stages: Any) -> Config:
    """A checkpoint of every step; evaluations within epochs, whose figures it has; batch norm."""
    raw = tiny_config(log, folder / "out")
    raw["model"]["tower"]["normalization"] = "batch"
    raw["stages"] = stages
    raw["optimizers"] = {"average": average}
    raw["logging"] = {"every_steps": 5, "eval_every_steps": 4}
    raw["checkpoints"] = {"every_steps": 1, "keep_every_steps": 1, "keep_best": 1}
    folder.mkdir(exist_ok=True)
    return as_config(raw, folder)


def train(ranks: Ranks, config: Config) -> None:
    averages._BLOCK_ROWS = 7  # so that tables change places in several blocks
    train_on(ranks, config)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "out" / "checkpoints" / f"step-{step}"


def tensors(folder: Path, step: int, of: str) -> dict[str, Tensor]:
    """Those of a checkpoint whose names begin so, by what follows."""
    reader = TensorReader(checkpoint(folder, step))
    return {name.removeprefix(of): reader.read(name) for name in reader.names if name.startswith(of)}


def table_weight(table: str) -> str:
    return weight_name(table).removeprefix("model.")


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def literal(weights: list[dict[str, Tensor]], settings: AverageConfig, epoch_steps: int) -> list[dict[str, Tensor]]:
    """The averages after each step of a phase, those at the ends of epochs as they are once these are over.

    Args:
        weights: at the phase's beginning and after each step.
        settings: of the average.
        epoch_steps: of an epoch.
    """
    found = weights[: settings.start + 1]
    pending = 1.0
    for step in range(settings.start + 1, len(weights)):
        n = step - settings.start
        d = min(settings.decay, (1 + n) / (10 + n)) if settings.warmup else settings.decay
        pending *= d
        is_swept = step % settings.every == 0 or step % epoch_steps == 0 or step == len(weights) - 1
        decays = dict.fromkeys(weights[0], d)
        for table in ("user", "item"):
            decays[table_weight(table)] = pending if is_swept else 1.0
        before, now = found[-1], weights[step]
        found.append({name: decay * before[name] + (1 - decay) * now[name] for name, decay in decays.items()})
        pending = 1.0 if is_swept else pending
    return found


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["1 rank", "2 ranks"],
)
def runs(request: pytest.FixtureRequest, log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Folders of two runs, one of them with averages, and its config."""
    folder = tmp_path_factory.mktemp("runs")
    one = {"trains": "backbone", "steps": STEPS, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    two = {"trains": "experts", "steps": 6, "learning_rate": 0.01}
    average = {"decay": 0.8, "start": 3, "tables": "sweep", "every": 5}
    config = config_of(log, folder / "averaged", average, one=one, two=two)
    run_ranks(request.param, train, config)
    run_ranks(request.param, train, config_of(log, folder / "plain", None, one=one, two=two))
    return folder / "averaged", folder / "plain", config


def test_averages_are_those_of_a_literal_loop(runs: tuple[Path, Path, Config]) -> None:
    averaged, plain, config = runs
    settings = config.optimizers.average
    assert settings is not None
    ranks = read_meta(checkpoint(averaged, 1)).world_size
    weights = [tensors(plain, step, "model.") for step in range(1, STEPS + 1)]
    expected = literal([weights[0], *weights], settings, epoch_steps=math.ceil(500 / 32 / ranks))
    for step in range(1, STEPS):  # neither the averages nor evaluating them changes a bit of the weights
        assert_equal(tensors(averaged, step, "model."), weights[step - 1])
    is_end = {step: step % math.ceil(500 / 32 / ranks) == 0 for step in range(1, STEPS)}
    trained = {name for name in weights[0] if "lora_" not in name}
    assert any("running_var" in name for name in trained) and sum("embedding_bags" in name for name in trained) == 3
    for step in range(settings.start, STEPS):
        found = tensors(averaged, step, "average.")
        assert found.keys() == trained
        for name, value in found.items():
            if "running_" in name:
                if step % 4 and step > settings.start:  # else they were counted for an evaluation
                    n = step - settings.start
                    d = min(settings.decay, (1 + n) / (10 + n))
                    of_step = d * tensors(averaged, step - 1, "average.")[name] + (1 - d) * weights[step - 1][name]
                    torch.testing.assert_close(value, of_step, rtol=1e-5, atol=1e-7, msg=f"{name} of {step}")
            elif not (is_end[step] and "embedding_bags" in name):  # of which the checkpoint is older than the sweep
                torch.testing.assert_close(value, expected[step][name], rtol=1e-5, atol=1e-7, msg=f"{name} of {step}")
    assert not tensors(averaged, settings.start - 1, "average.")
    ended = tensors(averaged, STEPS, "model.")
    assert not tensors(averaged, STEPS, "average.")
    for name in trained:
        if "running_" not in name:
            torch.testing.assert_close(ended[name], expected[STEPS][name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(ended[name], weights[-1][name])


def _counted(ranks: Ranks, config: Config, directory: Path, world_size: int) -> dict[str, list[list[float]]]:
    """Means over the first steps of the unbiased variances and means of what each norm is given, by its name.

    Of several ranks, whose rows each norm sees together, those of the first norm alone.
    """
    ranker = load_ranker(directory, config, ranks).eval()
    shards = open_splits(config, ["train"])["train"]
    order = train_order(shards, config, world_size, 0)
    norms = {name: part for name, part in ranker.named_modules() if isinstance(part, BatchNorm)}
    given: dict[str, list[Tensor]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.momentum = 0.0
        norm.train(world_size == 1)
        norm.register_forward_pre_hook(lambda _, x, name=name: given[name].append(x[0]))
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    with torch.no_grad(), ExitStack() as opened:
        loaders = [opened.enter_context(Loader(shards, [order], rank)) for rank in range(world_size)]
        for batches in islice(zip(*loaders, strict=True), NORM_STEPS):
            for batch in batches:
                ranker(batch)
            for name in list(norms)[: None if world_size == 1 else 1]:
                found.setdefault(name, []).append(torch.var_mean(torch.cat(given[name]).double(), 0))
            for rows in given.values():
                rows.clear()
    return {
        name: [torch.stack(of).mean(0).tolist() for of in zip(*steps, strict=True)] for name, steps in found.items()
    }


@pytest.mark.parametrize("step", [12, STEPS], ids=["evaluated within the stage", "its end"])
def test_batch_norms_of_averages_have_the_statistics_that_these_give(
    runs: tuple[Path, Path, Config], step: int
) -> None:
    """Not averages of those that the weights gave, which may be of another size altogether."""
    averaged, _, config = runs
    world_size = read_meta(checkpoint(averaged, 1)).world_size
    (found,) = run_ranks(1, _counted, config, checkpoint(averaged, step), world_size)
    assert len(found) == (2 if world_size == 1 else 1)
    now = tensors(averaged, step, "model.") | tensors(averaged, step, "average.")
    for name, (variance, mean) in found.items():
        assert now[f"{name}.running_mean"].tolist() == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert now[f"{name}.running_var"].tolist() == pytest.approx(variance, rel=1e-4, abs=1e-6)


def _statistics_of(ranks: Ranks, config: Config, directory: Path) -> list[list[list[float]]]:
    """Of four steps, and of these among some of no row and of one."""
    shards = open_splits(config, ["train"])["train"]
    with Loader(shards, [train_order(shards, config, ranks.world_size, 0)], ranks.rank) as loader:
        steps = list(islice(loader, 4))
    none = build_batch((), shards.layout, len(config.features.dense), loss_scale=1.0, pin_memory=False)
    singly = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 1})})
    with Loader(shards, [train_order(shards, singly, 1, 0)], 0) as loader:
        one = next(iter(loader)) if ranks.is_first else none
    found = []
    for batches in (steps, [none, one, *steps[:2], none, *steps[2:], one]):
        ranker = load_ranker(directory, config, ranks)
        norms = trained_norms(ranker.dense_arch)
        count_statistics(ranker, norms, batches)
        found.append([value.tolist() for norm in norms for value in (norm.running_mean, norm.running_var)])
    return found


def test_steps_without_two_rows_have_no_part_in_statistics(runs: tuple[Path, Path, Config]) -> None:
    """As rows without a label leave them: else a first one kept a share of what the statistics were before."""
    for of_steps, among_others in run_ranks(2, _statistics_of, runs[2], checkpoint(runs[0], 12)):
        assert len(of_steps) == 4 and of_steps == among_others


def test_a_stage_begins_from_the_average_of_the_one_before_and_what_it_freezes_is_itself(
    runs: tuple[Path, Path, Config],
) -> None:
    averaged, _, _ = runs
    ended = tensors(averaged, STEPS, "model.")
    for step in (STEPS + 1, STEPS + 4, STEPS + 6):
        now = tensors(averaged, step, "model.")
        frozen = [name for name in now if "lora_" not in name]
        assert_equal({name: now[name] for name in frozen}, {name: ended[name] for name in frozen})
    assert {name for name in ended if "lora_" in name} == set(tensors(averaged, STEPS + 4, "average."))


def test_what_is_evaluated_exported_and_begun_with_is_the_average(
    runs: tuple[Path, Path, Config], log: Path, tmp_path: Path
) -> None:
    averaged, _, _ = runs
    within = checkpoint(averaged, 12)
    valid = read_meta(within).valid
    assert valid is not None
    expected = tensors(averaged, 12, "model.") | tensors(averaged, 12, "average.")
    (shown,) = run_module(1, "recsys.evaluate", "--checkpoint", str(within), "--split", "valid", "--json")
    figures = json.loads(shown.stdout)["model"]
    assert figures["log_loss"] == pytest.approx(valid["log_loss"], rel=1e-6)
    unshard(within, tmp_path / "model.safetensors")
    assert_equal(load_file(tmp_path / "model.safetensors"), expected)
    written = write_artifact(within, tmp_path / "artifact")
    dense = {f"dense_arch.{name}": value for name, value in load_file(written / "dense.safetensors").items()}
    tables = {table_weight(name): value for name, value in load_file(written / "tables.safetensors").items()}
    assert_equal({**dense, **tables}, expected)
    stage = {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1, "patience": 1}
    path = tmp_path / "warm" / "config-under-test.yaml"
    config_of(log, tmp_path / "warm", None, one=stage)
    (done,) = run_module(1, "recsys.train", "--config", str(path), f"warm_start.checkpoint={within}")
    assert done.code == 0, done.stderr
    assert_equal(tensors(tmp_path / "warm", 0, "model."), expected)


@pytest.mark.slow
def test_averages_go_on_on_another_number_of_ranks_and_with_another_decay(
    runs: tuple[Path, Path, Config], tmp_path: Path
) -> None:
    averaged, _, _ = runs
    within = checkpoint(averaged, 12)
    ranks = 3 - read_meta(within).world_size
    changes = [f"resume={within}", f"output_dir={tmp_path}/out", "stages.one.steps=14", "optimizers.average.decay=0.5"]
    done = run_module(ranks, "recsys.train", "--config", str(averaged / "config-under-test.yaml"), *changes)
    assert not any(of_rank.code for of_rank in done), done
    assert "optimizers.average.decay: 0.8 -> 0.5" in " ".join(done[0].stdout.split())
    before, now = tensors(averaged, 12, "average."), tensors(tmp_path, 13, "model.")
    for name, value in tensors(tmp_path, 13, "average.").items():
        d = 1.0 if name in (table_weight("user"), table_weight("item")) else 0.5
        torch.testing.assert_close(value, d * before[name] + (1 - d) * now[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_an_export_of_a_checkpoint_within_a_stage_has_the_figures_of_its_evaluation(
    runs: tuple[Path, Path, Config], tmp_path: Path
) -> None:
    within = str(checkpoint(runs[0], 12))
    (done,) = run_module(1, "recsys.export", "--checkpoint", within, "--output", str(tmp_path / "artifact"))
    assert done.code == 0, done.stderr
    (shown,) = run_module(1, "recsys.evaluate", "--checkpoint", within, "--split", "test", "--json")
    parity = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["parity"]
    figures = json.loads(shown.stdout)["model"]
    assert [figures["log_loss"]] * 2 == pytest.approx([parity[side]["log_loss"] for side in ("model", "artifact")])


@pytest.mark.slow
def test_going_back_to_the_best_state_brings_back_its_averages(log: Path, tmp_path: Path) -> None:
    """At a plateau's cut, and at the end of a stage, which becomes the average of its best state."""
    one = {
        "trains": "all",
        "epochs": 4,
        "learning_rate": 1.0,
        "sparse_learning_rate": 10.0,
        "patience": 3,
        "schedule": "plateau",
        "plateau": {"factor": 0.5, "restore_best": True},
    }
    average = {"decay": 0.5, "warmup": False, "tables": "sweep", "every": 1}
    config_of(log, tmp_path, average, one=one)
    (done,) = run_module(1, "recsys.train", "--config", str(tmp_path / "config-under-test.yaml"), "data.batch_size=64")
    assert done.code == 0, done.stderr
    back = 0
    metas = [read_meta(checkpoint(tmp_path, step)) for step in range(1, 33)]
    for meta in metas[:-1]:
        best = meta.best_step
        if meta.step % 8 != 1 or meta.step == 1 or best in (None, meta.step - 1):
            continue
        assert best is not None
        back += 1
        before = tensors(tmp_path, best, "model.") | tensors(tmp_path, best, "average.")
        now = tensors(tmp_path, meta.step, "model.")
        for name, value in tensors(tmp_path, meta.step, "average.").items():
            torch.testing.assert_close(value, (before[name] + now[name]) / 2, rtol=1e-5, atol=1e-6)
    assert back
    ended, best = tensors(tmp_path, metas[-1].step, "model."), metas[-2].best_step
    assert best is not None and best < metas[-1].step
    assert_equal(ended, tensors(tmp_path, best, "model.") | tensors(tmp_path, best, "average."))


def _gone_on(ranks: Ranks, config: Config, directory: Path) -> None:
    run._better = lambda *_: False  # so that a stage that has a best state goes back to where it went on
    Path(config.output_dir).mkdir(exist_ok=True)
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        trainer.resume(directory)
        trainer.run()


@pytest.mark.slow
def test_averages_begin_and_end_with_weights_that_had_their_decay(log: Path, tmp_path: Path) -> None:
    one = {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    sparse = {"type": "adagrad", "weight_decay": 0.7, "weight_decay_mode": "decoupled"}

    def config(folder: str, start: int, **stage: Any) -> Config:
        average = {"decay": 0.9, "start": start, "warmup": False, "tables": "sweep", "every": 4}
        made = config_of(log, tmp_path / folder, average, one={**one, **stage}).model_dump(mode="json")
        made["optimizers"]["sparse"], made["logging"]["eval_every_steps"] = sparse, None
        return as_config(made, tmp_path / folder)

    def user(folder: str, step: int, *, averaged: bool) -> Tensor:
        return PendingRows(TensorReader(checkpoint(tmp_path / folder, step), averaged=averaged)).read(
            weight_name("user")
        )

    run_ranks(1, train, config("run", 5))
    assert torch.equal(user("run", 5, averaged=True), user("run", 5, averaged=False))
    # Where they begin as a run is gone on with, they know of the steps from there on alone.
    run_ranks(1, _gone_on, config("late", 0), checkpoint(tmp_path / "run", 3))
    weights = [user(folder, step, averaged=False) for folder, step in (("run", 3), ("late", 4))]
    torch.testing.assert_close(user("late", 4, averaged=True), 0.9 * weights[0] + 0.1 * weights[1], rtol=0, atol=1e-6)
    # The best state can be one in which rows lack the decay of some steps; its averages do not.
    best = user("run", 7, averaged=True)
    run_ranks(1, _gone_on, config("run", 5, patience=1), checkpoint(tmp_path / "run", 7))
    ended = read_meta(checkpoint(tmp_path / "run", 16))
    assert ended.kept == "stage" and not tensors(tmp_path / "run", 16, "optimizer.decay.")
    assert torch.equal(user("run", 16, averaged=True), best)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("decay=1.0", "optimizers.average.decay"),
        ("decay=0", "optimizers.average.decay"),
        ("start=-1", "optimizers.average.start"),
        ("every=0", "optimizers.average.every"),
        ("warmup=5", "optimizers.average.warmup"),
        ("tables=all", "optimizers.average.tables"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_their_path(
    log: Path, tmp_path: Path, override: str, told: str
) -> None:
    config_of(log, tmp_path, None, one={"trains": "all", "steps": 3, "learning_rate": 0.1, "sparse_learning_rate": 0.1})
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "config-under-test.yaml", [f"optimizers.average.{override}"])


def test_averages_that_no_stage_would_have_are_refused() -> None:
    check_start(AverageConfig(start=29), {"one": 30, "two": 10})
    check_start(None, {"one": 30})
    with pytest.raises(
        ConfigError, match=r"^optimizers\.average\.start is 30, but no stage has more than 30 steps; .*null$"
    ):
        check_start(AverageConfig(start=30), {"one": 30, "two": 10})
