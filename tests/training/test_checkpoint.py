"""Reading checkpoints into models: what is no checkpoint, or one of another model, is named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile import TEXTS
from ranks import run_module, run_ranks
from runs import as_config, reseal, train_on
from tiny import tiny_config, write_tiny_log

from recsys.checkpoint.layout import CheckpointError, read_meta, verify
from recsys.config import CheckpointsConfig, Config, load_config
from recsys.data.storage import DataError
from recsys.model.names import POOLED
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.shard import shard
from recsys.training.checkpoint import Checkpoints, load_model, together


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one short stage."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_log(folder / "log")
    raw = tiny_config(folder / "log", folder / "out")
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 5}}
    run_ranks(1, train_on, as_config(raw, folder))
    return folder / "out" / "checkpoints" / "step-5"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "step-5")


def evaluation_error(checkpoint: Path, *overrides: str) -> str:
    (finished,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), *overrides)
    assert finished.code == 2, finished
    assert finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr
    return finished.stderr


def test_a_checkpoint_says_what_it_is(checkpoint: Path) -> None:
    meta = read_meta(checkpoint)
    assert (meta.stage, meta.step, meta.stage_step, meta.world_size) == ("joint", 5, 5, 1)


def test_a_folder_without_meta_is_no_checkpoint_and_those_below_it_are_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint") as error:
        read_meta(checkpoint.parent)
    assert str(checkpoint) in str(error.value)


def test_a_checkpoint_from_before_options_were_retired_opens(checkpoint: Path) -> None:
    def figures() -> Any:
        (done,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
        assert done.code == 0, done.stderr
        return json.loads(done.stdout)

    now = figures()
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    retired = {"query_projection": False, "learned_temperature": False, "detach_query": False, "expert_dropout": 0.0}
    assert not set(retired) & set(config["model"]["hilomoe"])
    config["model"]["hilomoe"].update(retired)
    for features in config["features"].values():
        for feature in features.values():
            feature.pop("minimum"), feature.pop("list_text", None)  # keys that there were not
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    reseal(checkpoint)
    assert figures() == now


def _purged(ranks: Ranks, config: Config, checkpoint: str) -> list[str]:
    """What the tables' lookups were told while a checkpoint was loaded."""
    ranker = build_ranker(config, seed=0)
    dense_arch = ranker.dense_arch
    sharded = shard(ranker, config, ranks, seed=0)
    told: list[str] = []
    for lookup in ranker.collections[POOLED]._lookups:  # type: ignore[union-attr]
        inner = getattr(lookup, "module", lookup)
        inner.purge = lambda: told.append("purge")
    load_model(Path(checkpoint), sharded, dense_arch)
    return told


def test_loading_empties_the_tables_caches(checkpoint: Path) -> None:
    """Which a GPU's tables have: a cached row would outlive the weights that were loaded in its place."""
    config = load_config(checkpoint / "config.yaml")
    ((first, *others),) = run_ranks(1, _purged, config, str(checkpoint))
    assert first == "purge" and set(others) <= {"purge"}


def test_a_checkpoint_of_the_first_format_is_evaluated_as_before(checkpoint: Path) -> None:
    def figures() -> Any:
        (done,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
        assert done.code == 0, done.stderr
        return json.loads(done.stdout)

    now = figures()
    (checkpoint / "progress.json").unlink()
    (checkpoint / "plan.json").unlink()
    meta = json.loads((checkpoint / "meta.json").read_text())
    first = {key: meta[key] for key in ("stage", "step", "stage_step", "world_size")}
    (checkpoint / "meta.json").write_text(json.dumps({**first, "format": 1}))
    assert figures() == now


def test_another_format_is_refused(checkpoint: Path) -> None:
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    assert "checkpoint format 99" in evaluation_error(checkpoint)


@pytest.mark.parametrize("name", ["aliases that multiply", "lists that nest 900 deep", "no such date"])
def test_a_checkpoint_whose_config_means_harm_is_refused(checkpoint: Path, name: str) -> None:
    text, message = TEXTS[name]
    (checkpoint / "config.yaml").write_text(text)
    error = evaluation_error(checkpoint)
    assert f"{checkpoint}/config.yaml" in error and message in error


def test_a_pipe_in_place_of_a_checkpoints_config_is_not_waited_for(checkpoint: Path) -> None:
    (checkpoint / "config.yaml").unlink()
    os.mkfifo(checkpoint / "config.yaml")
    assert f"cannot read config {checkpoint}/config.yaml: it is no regular file" in evaluation_error(checkpoint)


def test_evaluating_writes_nothing_whatever_the_config_says(checkpoint: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    elsewhere = str(tmp_path / "elsewhere")
    config |= {"output_dir": elsewhere, "checkpoints": {"copy_to": elsewhere}}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    reseal(checkpoint)
    files = sorted(tmp_path.rglob("*"))
    (done,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint))
    assert done.code == 0, done.stderr
    config["data"]["synthetic"] = {"directory": elsewhere, "train_rows": 100, "valid_rows": 100, "test_rows": 100}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    reseal(checkpoint)
    error = evaluation_error(checkpoint)
    assert f"data.synthetic: '{elsewhere}' does not hold the log" in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == files
    (done,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "data.synthetic=null")
    assert done.code == 0, done.stderr


def test_a_checkpoints_config_includes_nothing(checkpoint: Path) -> None:
    path = checkpoint / "config.yaml"
    path.write_text("include: /etc/passwd\n" + path.read_text())
    assert f"{path}: a checkpoint's config includes nothing" in evaluation_error(checkpoint)


def test_a_missing_split_is_named(checkpoint: Path) -> None:
    assert "data.test is not set; the config has train, valid" in evaluation_error(checkpoint, "data.test=null")


def test_a_model_of_another_size_is_refused(checkpoint: Path) -> None:
    error = evaluation_error(checkpoint, "model.tower.hidden=[24, 8]")
    assert str(checkpoint) in error
    assert "model.dense_arch.tower.linears.0" in error


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    error = evaluation_error(checkpoint, "model.tower.hidden=[16, 8, 8]")
    assert "model.dense_arch.tower.linears.2" in error


def test_a_cut_off_file_is_refused(checkpoint: Path) -> None:
    (data,) = checkpoint.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    assert str(checkpoint) in evaluation_error(checkpoint)


def test_what_is_the_same_in_all_checkpoints_of_a_run_is_on_the_disk_once(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    raw = tiny_config(tmp_path / "log", tmp_path / "out")
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 6, "warmup_steps": 0}}
    raw["checkpoints"] = {"every_steps": 2, "keep_every_steps": 1}
    run_ranks(1, train_on, as_config(raw, tmp_path))
    found = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert len(found) == 3
    for name in ("config.yaml", "kinds.json", "plan.json"):
        assert len({(path / name).stat().st_ino for path in found}) == 1
    for name in ("progress.json", "meta.json", ".metadata", "__0_0.distcp"):
        assert len({(path / name).stat().st_ino for path in found}) == 3
    assert all(verify(path, read_meta(path).files) is None for path in found)


CANNOT = "CheckpointError: it cannot be done"


def _together(ranks: Ranks, error: Exception) -> str:
    def action() -> int:
        if ranks.rank == 1:
            raise error
        return ranks.rank

    try:
        return f"{together(ranks, 'it cannot be done', action)}"
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("a file is odd"), ["CheckpointError: a file is odd"] * 3),
        (
            OSError(28, "No space left", "/disk/file"),
            ["CheckpointError: it cannot be done: No space left (/disk/file)"] * 3,
        ),
        (KeyError("x"), [f"{CANNOT}: rank 1 failed", "KeyError: 'x'", f"{CANNOT}: rank 1 failed"]),
    ],
)
def test_what_fails_on_one_rank_ends_all_alike(error: Exception, told: list[str]) -> None:
    """And none waits for it for half an hour."""
    assert run_ranks(3, _together, error) == told


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_falls_due_once_by_the_first_ranks_clock(
    tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("recsys.training.checkpoint.time.monotonic", lambda: clock[-1])
    ranks = Ranks(0 if first else 1, 1, 0, 1, torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path, CheckpointsConfig(every_minutes=2), ranks, lambda directory: None)
    told = []
    for now in (1000.0, 1119.0, 1121.0, 1122.0, 1400.0):
        clock.append(now)
        told.append(checkpoints.falls_due())
    assert told == [False, False, first, False, False]
    assert not Checkpoints(tmp_path, CheckpointsConfig(every_minutes=None), ranks, lambda _: None).falls_due()
