"""Splits without the labels that a run needs are refused before it trains, at the cost of a look at a row group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from runs import as_config
from tiny import tiny_config, write_tiny_log

from recsys.config import Config
from recsys.data.splits import open_splits
from recsys.data.storage import DataError
from recsys.runtime import Ranks
from recsys.training.learnable import check_labels

Labels = Callable[[int], np.ndarray[Any, Any]]
"""From a number of rows to their labels, NaN for none."""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_tiny_log(tmp_path / "log", {"train": 300, "valid": 200, "test": 50})
    return tmp_path / "log"


def relabel(directory: Path, labels: Labels) -> None:
    """Give all rows of a split other labels, file after file."""
    for path in sorted(directory.glob("*.parquet")):
        table = pq.read_table(path)
        values = labels(len(table))
        column = pa.array(np.nan_to_num(values), pa.int8(), mask=np.isnan(values))
        table = table.set_column(table.schema.get_field_index("label"), "label", column)
        pq.write_table(table, path, row_group_size=20)


def config(log: Path, tmp_path: Path, *, label_null: str = "skip", **stage: Any) -> Config:
    raw = tiny_config(log, tmp_path / "out")
    raw["data"]["label_null"] = label_null
    raw["stages"]["experts"] |= stage
    return as_config(raw, tmp_path)


def _refused(ranks: Ranks, config: Config) -> str | None:
    try:
        check_labels(config, open_splits(config, config.data.splits), ranks)
    except DataError as error:
        return str(error)
    return None


def none(rows: int) -> np.ndarray[Any, Any]:
    return np.full(rows, np.nan)


def zeros(rows: int) -> np.ndarray[Any, Any]:
    return np.zeros(rows)


def ones_and_none(rows: int) -> np.ndarray[Any, Any]:
    return np.where(np.arange(rows) % 2, 1.0, np.nan)


def last_is_one(rows: int) -> np.ndarray[Any, Any]:
    return np.append(np.zeros(rows - 1), 1.0)


AUC = {"patience": 1, "monitor": "auc"}


@pytest.mark.parametrize(
    ("split", "labels", "stage", "expected"),
    [
        ("train", none, {}, "data.train: no row has a label and data.label_null is skip"),
        ("train", zeros, AUC, None),
        ("valid", none, {}, None),
        (
            "valid",
            none,
            {"patience": 1},
            "data.valid: no row has a label and data.label_null is skip, so stages.experts",
        ),
        ("valid", none, AUC, "data.valid: no row has a label and data.label_null is skip, so stages.experts"),
        ("valid", zeros, {"patience": 1}, None),
        ("valid", zeros, {}, None),
        ("valid", zeros, AUC, "data.valid: all labels are 0, so there is no AUC, which stages.experts.monitor goes by"),
        ("valid", ones_and_none, AUC, "data.valid: all labels are 1, so there is no AUC"),
        ("valid", last_is_one, AUC, None),
    ],
)
def test_what_a_split_lacks_is_said_before_training(
    log: Path, tmp_path: Path, split: str, labels: Labels, stage: dict[str, Any], expected: str | None
) -> None:
    relabel(log / split, labels)
    told, again = run_ranks(2, _refused, config(log, tmp_path, **stage))
    assert told == again
    assert told is None if expected is None else str(told).startswith(expected)
    assert "\n" not in str(told)


def test_one_class_is_found_where_no_label_is_missing_either(log: Path, tmp_path: Path) -> None:
    relabel(log / "valid", zeros)
    (told,) = run_ranks(1, _refused, config(log, tmp_path, label_null="error", **AUC))
    assert str(told).startswith("data.valid: all labels are 0")


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("label_null", "stage", "read"),
    [
        ("error", {}, []),
        ("error", {"patience": 1}, []),  # a label that is missing would be refused
        ("skip", {}, [("train", 0)]),
        ("skip", {"patience": 1}, [("train", 0), ("valid", 0)]),
        ("error", AUC, [("valid", 0), ("valid", 1)]),
    ],
)
def test_no_more_is_read_than_answers_the_question(
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label_null: str,
    stage: dict[str, Any],
    read: list[tuple[str, int]],
) -> None:
    relabel(log / "valid", lambda rows: (np.arange(rows) >= 20).astype(float))  # the second row group has ones
    found = config(log, tmp_path, label_null=label_null, **stage)
    splits = open_splits(found, found.data.splits)
    seen: list[tuple[str, int]] = []
    for name, shards in splits.items():

        def table(group: int, names: tuple[str, ...], *, of: Any = shards.table, name: str = name) -> pa.Table:
            assert tuple(names) == ("label",)
            seen.append((name, group))
            return of(group, names)

        monkeypatch.setattr(shards, "table", table)
    check_labels(found, splits, Ranks(0, 1, 0, 1, torch.device("cpu")))
    assert seen == read
