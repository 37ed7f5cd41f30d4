"""Averages of sharded rows through whole runs: at every step, as everyone reads them, and gone on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_module, run_ranks
from runs import checkpoint_tensors, train_on
from safetensors.torch import load_file
from test_pending import SHARDED, WEIGHT, _begun_with, _only, _read, config_of
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.pending import MOVES, PREFIX, PendingRows, renormalise_
from recsys.checkpoint.tensors import TensorReader
from recsys.checkpoint.unsharding import unshard
from recsys.config import AverageConfig, Config
from recsys.serving.artifact import TABLES, write_artifact

STEPS, EPOCH_STEPS, MAX_NORM = 20, 15, 0.4
DECOUPLED = {"type": "adagrad", "weight_decay": 0.7, "weight_decay_mode": "decoupled"}
COUPLED = {"type": "adagrad", "weight_decay": 0.3, "weight_decay_mode": "coupled", "coupled_every": 4}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def averaged(log: Path, folder: Path, tables: str, sparse: dict[str, Any], **changes: Any) -> Config:
    """A checkpoint of every step, an evaluation within the epoch; one table by columns, one with norms."""
    of = tiny_config(log, folder)["tables"]
    of["user"] |= {"sharding": ["table_wise"], "max_norm": MAX_NORM}
    average = {"decay": 0.8, "start": 3, "tables": tables, "every": 4}
    settings: dict[str, Any] = {
        "tables": of,
        "optimizers": {"sparse": sparse, "average": average},
        "logging": {"eval_every_steps": 10} if sparse is DECOUPLED else {},
        "checkpoints": {"every_steps": 1, "keep_every_steps": 1},
    }
    return config_of(log, folder, **{**settings, **changes})


def at(folder: Path, step: int) -> Path:
    return folder / "out" / "checkpoints" / f"step-{step}"


def weight_of(directory: Path, table: str) -> Tensor:
    """Rows with all of their decay, as averages have them: not scaled down, which a lookup does."""
    reader = TensorReader(directory)
    rows, name = reader.read(WEIGHT.format(table)), WEIGHT.format(table)
    PendingRows(reader).decay_(name, rows, 0)
    return rows


def average_of(directory: Path, table: str) -> Tensor:
    return PendingRows(TensorReader(directory, averaged=True)).read(WEIGHT.format(table))


def literal(folder: Path, table: str, settings: AverageConfig, last: int) -> dict[int, Tensor]:
    """By step, the averages that a dense loop makes of the weights of every step."""
    found = {settings.start: weight_of(at(folder, settings.start), table).double()}
    pending = 1.0
    for step in range(settings.start + 1, last + 1):
        n = step - settings.start
        pending *= min(settings.decay, (1 + n) / (10 + n))
        found[step] = found[step - 1]
        if settings.tables == "touched" or step % settings.every == 0 or step == EPOCH_STEPS:
            found[step] = pending * found[step] + (1 - pending) * weight_of(at(folder, step), table).double()
            pending = 1.0
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tables", "sparse"),
    [("sweep", DECOUPLED), ("sweep", COUPLED), ("touched", COUPLED), ("touched", {"type": "adagrad"})],
)
def test_averages_are_those_of_a_literal_loop(log: Path, tmp_path: Path, tables: str, sparse: dict[str, Any]) -> None:
    _compare(tmp_path, averaged(log, tmp_path, tables, sparse))


def _compare(folder: Path, config: Config) -> None:
    run_ranks(2, train_on, config)
    settings = config.optimizers.average
    assert settings is not None
    is_swept = settings.tables == "sweep"
    # Of the table with norms, rows are scaled down at an evaluation, or a sweep, and go on from there.
    for table, last in (("item", STEPS - 1), ("user", 7 if is_swept else 9)):
        expected = literal(folder, table, settings, last)
        for step in range(settings.start + 1, last + 1):
            if is_swept and step == EPOCH_STEPS:
                continue  # of which the checkpoint is older than the sweep
            found, by_definition = average_of(at(folder, step), table), expected[step].clone()
            if table == "user":
                assert found.norm(dim=1).max() < MAX_NORM + 1e-6
                if is_swept:  # each time of rows that were scaled down
                    continue
                renormalise_(by_definition, MAX_NORM)
            torch.testing.assert_close(
                found.double(), by_definition, rtol=1e-5, atol=1e-6, msg=lambda text, at=(table, step): f"{at}: {text}"
            )


@pytest.mark.slow
def test_touched_averages_are_read_as_they_are_by_definition_and_go_on(
    log: Path, tmp_path: Path, process_group: None
) -> None:
    run, within = tmp_path / "run", at(tmp_path / "run", 13)
    config = averaged(log, run, "touched", DECOUPLED)
    _compare(run, config)
    raw = checkpoint_tensors(within, tmp_path)
    assert raw[MOVES].shape == (2, 5)  # an evaluation was at step 10
    unshard(within, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    exported = load_file(write_artifact(within, tmp_path / "artifact", tables="float32") / TABLES)
    (read,) = run_ranks(1, _read, config, within)
    (begun,) = run_ranks(1, _begun_with, config_of(log, tmp_path / "warm", warm_start={"checkpoint": str(within)}))
    for name in SHARDED:
        expected = average_of(within, name)
        assert (raw[WEIGHT.format(name).replace("model.", "average.")] - expected).abs().max() > 1e-3  # it was pending
        assert torch.equal(plain[WEIGHT.format(name).removeprefix("model.")], expected)
        assert torch.equal(_only(exported, name), expected)
        assert torch.equal(torch.from_numpy(read[name]), expected)
        assert torch.equal(torch.from_numpy(begun[name]), expected)
    # Neither checkpoints nor going on from one change a bit.
    run_ranks(2, train_on, averaged(log, tmp_path / "quiet", "touched", DECOUPLED, checkpoints={}))
    changes = [f"resume={within}", f"output_dir={tmp_path}/resumed/out"]
    done = run_module(2, "recsys.train", "--config", str(run / "config-under-test.yaml"), *changes)
    assert not any(of_rank.code for of_rank in done), done
    ends = [checkpoint_tensors(at(tmp_path / of, STEPS), tmp_path) for of in ("run", "quiet", "resumed")]
    names = [name for name in ends[0] if name.startswith(("model.", "optimizer."))]
    assert not [name for name in names for end in ends[1:] if not torch.equal(ends[0][name], end[name])]
    assert not any(name.startswith(("average.", PREFIX)) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["touched", "sweep"])
def test_touched_averages_go_on_on_other_ranks_under_another_plan_and_as_sweeps(
    log: Path, tmp_path: Path, tables: str
) -> None:
    run, within = tmp_path / "run", at(tmp_path / "run", 13)
    run_ranks(2, train_on, averaged(log, run, "touched", DECOUPLED))
    changes = [f"resume={within}", f"output_dir={tmp_path}/other/out", "stages.joint.steps=15"]
    changes += [f"optimizers.average.tables={tables}", "optimizers.average.every=14"]
    changes += ["tables.item.sharding=[table_wise]", "tables.item.min_partition=null", "tables.user.max_norm=null"]
    done = run_module(1, "recsys.train", "--config", str(run / "config-under-test.yaml"), *changes)
    assert not any(of_rank.code for of_rank in done), done
    d = 12 / 21  # of the eleventh step that is averaged
    expected = d * average_of(within, "item") + (1 - d) * weight_of(at(tmp_path / "other", 14), "item")
    torch.testing.assert_close(average_of(at(tmp_path / "other", 14), "item"), expected, rtol=1e-5, atol=1e-6)
