"""Reading checkpoints: what is no checkpoint is named, and nothing in one can run code."""

import enum
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import TEXTS
from ranks import run_module, run_ranks
from runs import as_config, reseal, train_on
from tiny import tiny_config, write_tiny_log

from recsys.checkpoint.layout import CheckpointError, read_meta
from recsys.config import Config, load_config
from recsys.model.ranker import POOLED, build_ranker
from recsys.runtime import Ranks
from recsys.sharding.shard import shard
from recsys.training.checkpoint import load_model
from recsys.training.dcp import _member, _Reader


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


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_an_index_that_would_run_code_is_refused_without_running_it(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    reseal(checkpoint)
    assert "no checkpoint of ours" in evaluation_error(checkpoint)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("builtins", "getattr"),
        ("builtins", "eval"),
    ],
)
def test_an_index_reaches_nothing_through_a_module_it_may_name(
    checkpoint: Path, module: str, name: str, tmp_path: Path
) -> None:
    index = _call(module, name, f"touch {tmp_path / 'sprung'}")
    (checkpoint / ".metadata").write_bytes(index)
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint of ours"):
        _Reader(checkpoint).read_metadata()
    assert not (tmp_path / "sprung").exists()


def _call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls what it names, twice over its argument if that is `getattr`."""
    arguments = (argument, "upper") if name == "getattr" else (argument,)
    texts = [pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name, *arguments)]
    tuple_of = pickle.TUPLE2 if len(arguments) == 2 else pickle.TUPLE1
    called = [*texts[:2], pickle.STACK_GLOBAL, *texts[2:], tuple_of, pickle.REDUCE]
    return b"".join([pickle.PROTO, b"\x04", *called, pickle.STOP])


class Coloured(enum.Enum):
    RED = 1

    def said(self) -> str:
        return self.name


def test_members_of_enums_are_all_that_getattr_reaches() -> None:
    """As which Python before 3.11.4 pickles them."""
    assert _member(Coloured, "RED") is Coloured.RED
    for of, name in ((Coloured, "said"), (Coloured, "__members__"), (os, "system"), (Coloured.RED, "name")):
        with pytest.raises(pickle.UnpicklingError, match="no checkpoint of ours"):
            _member(of, name)
