"""Whole runs that diverge: one error that names the rows, and no checkpoint that is of no use."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.config import Config
from recsys.data.origins import origins
from recsys.data.splits import open_splits, train_order
from recsys.runtime import Ranks
from recsys.training import finite

GOOD = {"trains": "backbone", "steps": 4, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
ABSURD = {"trains": "all", "epochs": 1, "learning_rate": 1e30, "sparse_learning_rate": 0.1}


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    write_tiny_log(tmp_path / "log")
    return {**tiny_config(tmp_path / "log", tmp_path / "out"), "stages": {"good": GOOD, "absurd": ABSURD}}


def error_of(raw: dict[str, Any], tmp_path: Path) -> str:
    """The one line with which a run on two ranks ends."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    finished = run_module(2, "recsys.train", "--config", str(path))
    assert 2 in {rank.code for rank in finished} and all(rank.code for rank in finished), finished
    errors = "".join(rank.stderr for rank in finished)
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not (tmp_path / "out" / "summary.json").exists()
    return errors.removeprefix("error: ").strip()


def sources(dump: Path) -> list[dict[str, Any]]:
    """The rows of the log that a dump says its rows are; that these hold the same is checked."""
    found = []
    for row in pq.read_table(dump).to_pylist():
        (source,) = pq.ParquetFile(row["file"]).read_row_group(row["row_group"]).slice(row["row"], 1).to_pylist()
        assert (row["label"], row["sparse/user"]) == (source["label"], [source["user"]])
        assert row["sparse/item"] == ([] if source["item"] is None else [source["item"]])
        assert row["sparse/tags"] == (source["tags"] or [])
        assert row["dense/x"] == np.float32(source["x"] or 0.0) and row["dense/scale"] == np.float32(source["z"])
        found.append(source)
    return found


def assert_checkpoints(tmp_path: Path, *expected: str) -> None:
    """Only the expected ones are there, and all that they hold is finite."""
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").glob("*")) == list(expected)
    for name in expected:
        tensors = checkpoint_tensors(tmp_path / "out/checkpoints" / name, tmp_path)
        assert not [key for key, value in tensors.items() if not value.isfinite().all()]


@pytest.mark.parametrize("has_valid", [True, False])
def test_an_absurd_learning_rate_ends_the_run_at_its_second_step(
    raw: dict[str, Any], tmp_path: Path, has_valid: bool
) -> None:
    if not has_valid:
        raw["data"] |= {"valid": None, "test": None}
    told = error_of(raw, tmp_path)
    assert re.match(r"step 6, rank 0: the loss \w+ is not finite; its batch is of ", told)
    dump = tmp_path / "out/not-finite-rank0-step6.parquet"
    assert f"its rows are in {dump} (largest dense value: " in told
    assert f"the last good checkpoint is {tmp_path}/out/checkpoints/step-4; " in told and "stages.absurd" in told
    config = as_config(raw, tmp_path)
    shards = open_splits(config, ["train"])["train"]
    expected = origins(train_order(shards, config, 2, 1), 0, 1)  # of the second epoch, the second step
    rows = pq.read_table(dump)
    assert [rows["file"].to_pylist(), rows["row_group"].to_pylist(), rows["row"].to_pylist()] == [
        list(column)
        for column in zip(
            *((*shards.place_of(of.row_group), of.start + row) for of, numbers in expected for row in numbers.tolist()),
            strict=True,
        )
    ]
    assert len(sources(dump)) == 32
    for file, group in set(zip(rows["file"].to_pylist(), rows["row_group"].to_pylist(), strict=True)):
        assert str(group) in told.split(f"{file} (row group", 1)[1].split(")")[0]
    assert_checkpoints(tmp_path, "step-4")


def test_rows_of_one_rank_are_told_from_those_of_others(raw: dict[str, Any], tmp_path: Path) -> None:
    """Weights of rows that are finite, but whose sum of losses is not."""
    number = 0
    for path in sorted((tmp_path / "log/train").glob("*.parquet")):
        table = pq.read_table(path)
        rows = np.arange(number, number := number + len(table))
        # The second rank reads rows 450 to 899 as they stand, 32 a step: these are of its third.
        weight = np.where((rows >= 520) & (rows < 530), 3e38, 1.0)
        pq.write_table(table.append_column("weight", pa.array(weight)), path, row_group_size=70)
    raw["data"] |= {"valid": None, "test": None, "shuffle": False, "weight": "weight"}
    raw["stages"] = {"only": {**GOOD, "steps": 10}}
    told = error_of(raw, tmp_path)
    assert told.startswith("step 3, rank 1: the loss bce is not finite; its batch is of ")
    assert f"{tmp_path}/log/train/part-1.parquet (row group 3); its rows are in " in told
    assert "; no checkpoint had been saved before; " in told
    found = sources(tmp_path / "out/not-finite-rank1-step3.parquet")
    whole = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "log/train").glob("*.parquet"))])
    assert found == whole.slice(450 + 64, 32).to_pylist()
    assert_checkpoints(tmp_path)


@pytest.mark.slow
def test_weights_that_the_last_step_spoilt_are_not_saved(raw: dict[str, Any], tmp_path: Path) -> None:
    """No later step tells, and no valid split either."""
    raw["data"] |= {"valid": None, "test": None}
    raw["stages"] = {"good": GOOD, "absurd": {**GOOD, "steps": 1, "sparse_learning_rate": 3e38}}
    told = error_of(raw, tmp_path)
    assert re.match(r"step 5, rank [01]: the weights model\.embedding_bag_collection\.embedding_bags\.", told)
    assert " are not all finite, so they are not saved; " in told
    assert f"the last good checkpoint is {tmp_path}/out/checkpoints/step-4; " in told
    assert_checkpoints(tmp_path, "step-4")


@pytest.mark.slow
def test_a_model_of_finite_weights_that_predicts_nothing_finite_is_not_saved(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["data"] |= {"valid": None, "test": None}
    raw["stages"] = {"good": GOOD, "absurd": {**GOOD, "steps": 1, "learning_rate": 1e30}}
    told = error_of(raw, tmp_path)
    assert told.startswith("step 5: the model predicts NaN or infinite logits, so it is not saved; the last good ")
    assert_checkpoints(tmp_path, "step-4")


@pytest.mark.parametrize("steps", [14, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (15, 30))])
def test_predicting_the_next_batch_works_within_an_epoch_and_at_its_end(
    raw: dict[str, Any], tmp_path: Path, steps: int
) -> None:
    raw["data"] |= {"valid": None, "test": None}
    raw["stages"] = {"only": {**GOOD, "steps": steps}}
    run_ranks(2, train_on, as_config(raw, tmp_path))
    assert_checkpoints(tmp_path, f"step-{steps}")


def test_a_model_that_is_far_off_is_a_warning(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["stages"] = {"wild": {**GOOD, "learning_rate": 3.0}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    (told,) = run_module(1, "recsys.train", "--config", str(path))
    assert told.code == 0, told.stderr
    said = " ".join(told.stdout.split())
    for what in ("wild valid", "final test"):
        assert re.search(rf"warning: {what}: ne is \S+, where always predicting the label rate has 1", said)


def _buckets_made(ranks: Ranks, config: Config) -> list[int]:
    """How many tensors the gradients of a run were watched by, whenever they were put together anew."""
    made: list[int] = []
    put_together = finite._buckets

    def counted(gradients: list[Tensor]) -> list[Tensor]:
        buckets = put_together(gradients)
        assert sum(bucket.numel() for bucket in buckets) == sum(gradient.numel() for gradient in gradients)
        made.append(len(buckets))
        return buckets

    finite._buckets = counted
    train_on(ranks, config)
    return made


def test_a_run_watches_its_gradients_as_buckets_that_it_puts_together_twice_at_most(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["stages"] = {"only": {**GOOD, "steps": 20}}
    raw["data"] |= {"valid": None, "test": None}
    for made in run_ranks(2, _buckets_made, as_config(raw, tmp_path)):
        assert 1 <= len(made) <= 2 and set(made) == {1}
