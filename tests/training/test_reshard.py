"""A checkpoint goes on under any plan: weights and optimizer state are those that were saved, by the stated rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from runs import as_config, checkpoint_tensors
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.config import Config
from recsys.data.splits import open_splits
from recsys.runtime import Ranks
from recsys.training.checkpoint import load_dense_optimizer
from recsys.training.monitor import Monitor
from recsys.training.reshard import Columns, recut
from recsys.training.run import Trainer
from recsys.training.stage import PhaseTrainer

TABLE_WISE: dict[str, Any] = {"sharding": ["table_wise"]}
COLUMN_WISE: dict[str, Any] = {"sharding": ["column_wise"], "min_partition": 4}
DATA_PARALLEL: dict[str, Any] = {"sharding": ["data_parallel"]}
KINDS = {"table": TABLE_WISE, "column": COLUMN_WISE, "replicated": DATA_PARALLEL}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def config_of(log: Path, folder: Path, kind: str, optimizer: str) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(log, folder / "out")
    raw["tables"]["item"] = {"num_embeddings": 30, "embedding_dim": 8, **KINDS[kind]}
    raw["tables"]["user"] = {"num_embeddings": 40, "embedding_dim": 8, **TABLE_WISE}
    replicated = {"rowwise_adagrad": "adagrad", "adagrad": "adagrad", "sgd": "sgd"}[optimizer]
    raw["optimizers"] = {"sparse": {"type": optimizer}, "data_parallel": {"type": replicated}}
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "schedule": "constant", "warmup_steps": 0, "steps": 9}}
    raw["checkpoints"] = {"every_steps": 3, "keep_every_steps": 1, "asynchronous": False}
    return as_config(raw, folder)


def _train(ranks: Ranks, config: Config) -> None:
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with Monitor(output_dir, enabled=False) as monitor:
        Trainer(config, ranks, open_splits(config, config.data.splits), monitor).run()


def _save_again(ranks: Ranks, config: Config, start: str) -> None:
    """Load a checkpoint and save what was loaded, without a step between."""
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with Monitor(output_dir, enabled=False) as monitor:
        trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
        trainer.resume(Path(start))
        phase = PhaseTrainer(
            config,
            ranks,
            trainer.sharded,
            trainer.dense_arch,
            trainer.progress,
            monitor,
            counted=(),
            num_steps=9,
            evaluate=lambda: None,
            after_step=lambda: None,
            end_not_finite=trainer._end_not_finite,
        )
        load_dense_optimizer(Path(start), phase.optimizers.dense)
        trainer._save(phase)
        trainer.checkpoints.close()


def pieces(checkpoint: Path, table: str) -> Columns:
    shards = json.loads((checkpoint / "plan.json").read_text())[table]["shards"]
    return [(column, width) for _, column, _, width in shards] or [(0, 8)]


def squares(tensors: dict[str, Tensor], table: str, columns: Columns) -> Tensor | None:
    """A table's sums of squares for each weight, by the definition: (R, D)."""
    for name, value in tensors.items():
        if f".{table}." in name and name.startswith("optimizer.") and name.split(".")[-1] in ("momentum1", "sum"):
            if value.dim() == 2:
                return value
            whole = torch.empty(len(value) // len(columns), 8)
            for (first, width), part in zip(columns, value.split(len(whole)), strict=True):
                whole[:, first : first + width] = part[:, None]
            return whole
    return None


CHANGES: list[tuple[tuple[int, str], tuple[int, str]]] = [
    ((1, "table"), (2, "column")),
    ((2, "column"), (1, "table")),
    ((2, "table"), (3, "replicated")),
    ((3, "replicated"), (1, "table")),
    ((2, "replicated"), (2, "column")),
    ((2, "column"), (3, "replicated")),
]


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        *(("rowwise_adagrad", *change) for change in CHANGES[:2]),
        *(pytest.param("rowwise_adagrad", *change, marks=pytest.mark.slow) for change in CHANGES[2:]),
        *(pytest.param(kind, *change, marks=pytest.mark.slow) for kind in ("adagrad", "sgd") for change in CHANGES),
    ],
    ids=lambda told: f"{told[1]}-on-{told[0]}" if isinstance(told, tuple) else told,
)
def test_what_was_saved_is_what_goes_on(
    log: Path, tmp_path: Path, optimizer: str, before: tuple[int, str], after: tuple[int, str]
) -> None:
    first = config_of(log, tmp_path / "before", before[1], optimizer)
    run_ranks(before[0], _train, first)
    start = tmp_path / "before" / "out" / "checkpoints" / "step-6"
    second = config_of(log, tmp_path / "after", after[1], optimizer)
    run_ranks(after[0], _save_again, second, str(start))
    again = tmp_path / "after" / "out" / "checkpoints" / "step-6"
    saved, loaded = checkpoint_tensors(start, tmp_path), checkpoint_tensors(again, tmp_path)
    for name in (name for name in saved if name.startswith(("model.", "optimizer.dense."))):
        assert torch.equal(saved[name], loaded[name]), name
    for table in ("user", "item"):
        columns, now = pieces(start, table), pieces(again, table)
        expected, found = squares(saved, table, columns), squares(loaded, table, now)
        if optimizer == "sgd":
            assert expected is found is None
            continue
        assert expected is not None and found is not None and expected.count_nonzero() > 100
        if optimizer == "rowwise_adagrad" and after[1] != "replicated":
            # Each shard has the mean over its columns.
            expected = torch.cat(
                [expected[:, i : i + n].double().mean(1, keepdim=True).float().expand(-1, n) for i, n in now], 1
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if columns == now else 1e-12)


shards = st.lists(st.integers(1, 5), min_size=1, max_size=6).map(
    lambda widths: [(sum(widths[:i]), width) for i, width in enumerate(widths)]
)


@given(saved=shards, wanted=shards, seed=st.integers(0, 9))
def test_the_mean_over_a_row_is_kept(saved: Columns, wanted: Columns, seed: int) -> None:
    width = sum(n for _, n in saved)
    wanted = [(i, min(n, width - i)) for i, n in wanted if i < width]
    if (end := sum(n for _, n in wanted)) < width:
        wanted.append((end, width - end))
    state = torch.rand(len(saved), 3, generator=torch.Generator().manual_seed(seed))
    found = recut(state, saved, wanted)

    def mean(values: Tensor, columns: Columns) -> Tensor:
        return torch.stack([row.double() * n for row, (_, n) in zip(values, columns, strict=True)]).sum(0) / width

    torch.testing.assert_close(mean(found, wanted), mean(state, saved), rtol=1e-6, atol=1e-7)
    if wanted == saved:
        assert torch.equal(found, state)
