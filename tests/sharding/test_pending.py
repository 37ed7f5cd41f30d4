"""A checkpoint between two evaluations: it changes nothing in training, and is read as the model that training has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import as_config, checkpoint_tensors, train_on
from safetensors.torch import load_file
from test_shard import unsharded
from test_types import whole
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.index import Index, UnreadableError
from recsys.checkpoint.pending import LAST, LOGS, MAX_NORM, MOVES, PREFIX, SWEEP, PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.checkpoint.unsharding import unshard
from recsys.config import Config, SparseOptimizerConfig
from recsys.data.splits import open_splits
from recsys.model.names import POOLED
from recsys.model.ranker import Ranker
from recsys.runtime import Ranks
from recsys.serving.artifact import TABLES, write_artifact
from recsys.sharding.rows import Rows
from recsys.training.checkpoint import load_ranker
from recsys.training.monitor import Monitor
from recsys.training.run import Trainer

WEIGHT = f"model.{POOLED}.embedding_bags.{{}}.weight"
SHARDED = ("user", "item")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def config_of(log: Path, folder: Path, steps: int = 20, **changes: Any) -> Config:
    """One stage with decay of all rows; a table of which column shards lie apart."""
    folder.mkdir(exist_ok=True)
    raw = tiny_config(log, folder / "out")
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "schedule": "constant", "warmup_steps": 0, "steps": steps}}
    raw["optimizers"] = {"sparse": {"type": "adagrad", "weight_decay": 0.7, "weight_decay_mode": "decoupled"}}
    raw["checkpoints"] = {"every_steps": 13, "keep_every_steps": 1}
    return as_config({**raw, **changes}, folder)


def _tables(ranker: Ranker) -> dict[str, Any]:
    """The sharded tables, on the first rank."""
    found = ranker.collections[POOLED].state_dict()
    tables = {name: whole(found[f"embedding_bags.{name}.weight"]) for name in SHARDED}
    return {name: None if value is None else value.numpy().copy() for name, value in tables.items()}


def _read(ranks: Ranks, config: Config, directory: Path) -> dict[str, Any]:
    """The tables as evaluation, predictions and exports read them, on any number of ranks."""
    return _tables(load_ranker(directory, config, ranks))


def _resumed(ranks: Ranks, config: Config, directory: Path) -> dict[str, Any]:
    """The same once a run on other ranks, under another plan, has gone on from it and settled its rows."""
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        trainer.resume(directory)
        trainer.sharded.rows.settle()
        return _tables(trainer.sharded.ranker)


def _gone_on(ranks: Ranks, config: Config, directory: Path) -> None:
    Path(config.output_dir).mkdir()
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        trainer.resume(directory)
        trainer.run()


def _begun_with(ranks: Ranks, config: Config) -> dict[str, Any]:
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        assert config.warm_start is not None
        trainer.warm_start(config.warm_start)
        return _tables(trainer.sharded.ranker)


@pytest.mark.slow
def test_a_checkpoint_within_an_epoch_is_read_as_the_model_of_its_step(
    log: Path, tmp_path: Path, process_group: None
) -> None:
    config = config_of(log, tmp_path / "run")
    run_ranks(2, train_on, config)
    directory = tmp_path / "run" / "out" / "checkpoints" / "step-13"
    raw = checkpoint_tensors(directory, tmp_path)
    assert raw[LOGS].shape == (14,) and raw[f"{LAST}item"].shape == (30,) and f"{LAST}tag" not in raw
    short = config_of(log, tmp_path / "run", steps=13)
    dense = unsharded(short, open_splits(short, ["train"])["train"], 2)
    unshard(directory, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    exported = load_file(write_artifact(directory, tmp_path / "artifact", tables="float32") / TABLES)
    (other,) = run_ranks(1, _read, config, directory)
    tables = {name: {"num_embeddings": rows, "embedding_dim": 8} for name, rows in (("user", 40), ("item", 30))}
    tables |= {"tag": tiny_config(log, tmp_path)["tables"]["tag"]}
    tables["user"] |= {"sharding": ["column_wise"], "min_partition": 4}
    (gone_on, *_) = run_ranks(3, _resumed, config_of(log, tmp_path / "other", tables=tables), directory)
    warm = config_of(log, tmp_path / "warm", warm_start={"checkpoint": str(directory)})
    (begun,) = run_ranks(1, _begun_with, warm)
    for name in SHARDED:
        value = other[name] = torch.from_numpy(other[name])
        assert (raw[WEIGHT.format(name)] - value).abs().max() > 1e-3  # decay was pending
        torch.testing.assert_close(value, dense[WEIGHT.format(name)], rtol=0, atol=1e-5)
        assert torch.equal(plain[WEIGHT.format(name).removeprefix("model.")], value)
        assert torch.equal(_only(exported, name), value)
        assert torch.equal(torch.from_numpy(gone_on[name]), value)
        assert torch.equal(torch.from_numpy(begun[name]), value)
    # Where none was written within the epoch, the same bits are trained, and nothing is pending at the end.
    run_ranks(2, train_on, config_of(log, tmp_path / "quiet", checkpoints={}))
    ends = [checkpoint_tensors(tmp_path / of / "out" / "checkpoints" / "step-20", tmp_path) for of in ("run", "quiet")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not any(name.startswith(PREFIX) for name in ends[0])


def _only(tensors: dict[str, Tensor], table: str) -> Tensor:
    (found,) = (value for name, value in tensors.items() if name.split(".")[-2:-1] == [table] or name == table)
    return found


def test_evaluations_settle_rows_and_frozen_tables_do_not_decay(log: Path, tmp_path: Path) -> None:
    stages = tiny_config(log, tmp_path)["stages"]
    stages["backbone"] = {"trains": "backbone", "steps": 6, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    stages["experts"] = {"trains": "experts", "steps": 3, "learning_rate": 0.01}
    del stages["joint"]
    config = config_of(
        log,
        tmp_path / "run",
        stages=stages,
        logging={"eval_every_steps": 4},
        checkpoints={"every_steps": 1, "keep_every_steps": 1},
    )
    run_ranks(1, train_on, config)
    folder = tmp_path / "run" / "out" / "checkpoints"
    states = {step: checkpoint_tensors(folder / f"step-{step}", tmp_path) for step in range(1, 10)}
    pending = {step: len(state[LOGS]) - 1 for step, state in states.items() if LOGS in state}
    assert pending == {1: 1, 2: 2, 3: 3, 5: 1}
    for name in SHARDED:
        weight = WEIGHT.format(name)
        assert not torch.equal(states[5][weight], states[6][weight])
        assert all(torch.equal(states[6][weight], states[step][weight]) for step in (7, 8, 9))


def test_rows_that_no_step_looks_up_keep_to_max_norm(log: Path, tmp_path: Path) -> None:
    stages = {"experts": {"trains": "experts", "steps": 1, "learning_rate": 0.01}}
    tables = tiny_config(log, tmp_path)["tables"]
    tables["user"]["max_norm"] = 0.2
    config = config_of(log, tmp_path / "run", stages=stages, tables=tables, optimizers={})
    run_ranks(1, train_on, config)
    norms = TensorReader(tmp_path / "run" / "out" / "checkpoints" / "step-1").read(WEIGHT.format("user")).norm(dim=1)
    assert norms.max().item() == pytest.approx(0.2, rel=1e-5)  # as drawn, they are up to 0.36


@pytest.mark.parametrize("start", [2, 3], ids=["within the stage that trains tables", "at its end"])
def test_rows_of_another_run_keep_to_a_max_norm_that_is_new(log: Path, tmp_path: Path, start: int) -> None:
    """Tables, and averages of them, that no step looks up any more."""
    stages = tiny_config(log, tmp_path)["stages"]
    stages["backbone"] = {"trains": "backbone", "steps": 3, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
    stages["experts"] = {"trains": "experts", "steps": 1, "learning_rate": 0.01}
    del stages["joint"]
    sparse = {"type": "adagrad", "weight_decay": 0.7, "weight_decay_mode": "decoupled"}
    optimizers = {"sparse": sparse, "average": {"decay": 0.8, "tables": "sweep"}}
    settings = {"stages": stages, "optimizers": optimizers, "checkpoints": {"every_steps": 1, "keep_every_steps": 1}}
    run_ranks(1, train_on, config_of(log, tmp_path / "run", **settings))
    checkpoints = tmp_path / "run" / "out" / "checkpoints"
    tables = tiny_config(log, tmp_path)["tables"]
    tables["user"]["max_norm"] = 0.02
    run_ranks(1, _gone_on, config_of(log, tmp_path / "new", tables=tables, **settings), checkpoints / f"step-{start}")
    folders = (checkpoints, tmp_path / "new" / "out" / "checkpoints")
    before, after = (TensorReader(of / "step-4").read(WEIGHT.format("user")).norm(dim=1) for of in folders)
    assert before.min() > 0.03 and 0.019 < after.max() < 0.0200001


def coupled(every: int) -> SparseOptimizerConfig:
    return SparseOptimizerConfig(type="sgd", weight_decay=0.1, weight_decay_mode="coupled", coupled_every=every)


def test_a_coupled_decay_leaves_max_norm_in_a_checkpoint() -> None:
    rows = Rows([], coupled(8), {"user": 0.2}, torch.device("cpu"))
    rows.begin_step(0.1)
    assert rows.state({}).keys() == {SWEEP, LOGS, f"{MAX_NORM}user"}


def test_a_sweep_that_fewer_steps_than_are_pending_now_make_due_comes_at_once() -> None:
    rows = Rows([], coupled(4), {}, torch.device("cpu"))
    reader: Any = _Reader({SWEEP: torch.tensor([0.7, 7.0], dtype=torch.float64)})
    rows.load(PendingRows(reader))
    rows.begin_step(0.25)
    assert rows.state({})[SWEEP].tolist() == [0.25, 1.0]  # type: ignore[union-attr]


class _Reader:
    """A checkpoint of a few tensors, as `TensorReader` tells them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.names = tensors, tuple(tensors)
        self.index = Index(Path(), {})

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({LOGS: torch.zeros(3)}, "logs is of torch.float32"),
        ({MOVES: torch.zeros(2, 3, dtype=torch.float64)}, "averages has not what averages need of the steps in"),
        ({MOVES: torch.zeros(2, 4, dtype=torch.float64)}, "averages has not what averages need"),
        ({MOVES: torch.full((2, 4), torch.inf, dtype=torch.float64)}, "averages has not what averages need"),
        ({SWEEP: torch.tensor([0.1, torch.nan], dtype=torch.float64)}, "sweep is no sum of learning rates"),
        ({f"{LAST}item": torch.tensor([0, 3, 0, 0], dtype=torch.int32)}, "counts steps that are not in"),
        ({f"{LAST}item": torch.tensor([0, -1, 0, 0], dtype=torch.int32)}, "counts steps that are not in"),
        ({f"{LAST}item": torch.zeros(3, dtype=torch.int32)}, "has no rows of its table"),
    ],
)
def test_what_cannot_be_pending_is_refused(changes: dict[str, Tensor], expected: str) -> None:
    whole = {LOGS: torch.zeros(3, dtype=torch.float64), f"{LAST}item": torch.zeros(4, dtype=torch.int32)}
    reader: Any = _Reader({**whole, **changes})
    with pytest.raises(UnreadableError, match=expected):
        PendingRows(reader).settle_(WEIGHT.format("item"), torch.ones(4, 8))
