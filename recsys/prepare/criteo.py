"""Criteo's click logs, of the Kaggle challenge and of a terabyte: a schema of its lines for the tabular converter."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from recsys.config import DenseFeatureConfig
from recsys.prepare.splitting import SplitSchema
from recsys.prepare.tabular import ColumnSchema, Schema, TableSchema
from recsys.prepare.writing import EMBEDDING_DIM

INTEGERS = tuple(f"I{number}" for number in range(1, 14))
CATEGORIES = tuple(f"C{number}" for number in range(1, 27))


def criteo_schema(
    sources: Sequence[Path],
    *,
    ids: Literal["vocabulary", "hash"] = "vocabulary",
    min_count: int | None = None,
    buckets: int | None = None,
    split: Literal["order", "last-file"] = "order",
    valid: float = 0.1,
    test: float = 0.1,
    embedding_dim: int = EMBEDDING_DIM,
) -> Schema:
    """What Criteo's lines are: a label, 13 integers and 26 hashed values, separated by tabs, blank where unknown.

    A blank stays null: an empty bag, or the dense feature's `fill` of 0. The negative integers, -1 to -3 and few, mean
    what nobody has said; they are raised to 0, as Meta's DLRM does, so that log(1 + x) exists. Each of C1 to C26 has a
    table of its own.

    Args:
        sources: the files, whose rows are in the order of time.
        ids: see `TableSchema`.
        min_count: for a vocabulary, by default 10.
        buckets: of each of the 26 tables, for hashing, by default a million.
        split: `order` holds out the last rows; `last-file` the last file, its first half as valid.
        valid: share of the rows before those of test, for `order`.
        test: share of the last rows, for `order`.
        embedding_dim: of every table.

    Raises:
        ValueError: a number is out of range, or one is set that these ids do not take.
    """
    choice = {"min_count": min_count, "buckets": buckets}
    own, default = ("buckets", 1_000_000) if ids == "hash" else ("min_count", 10)
    table = TableSchema(ids=ids, **{own: default, **{key: value for key, value in choice.items() if value is not None}})
    if split == "order":
        rule = SplitSchema(by="order", valid=valid, test=test)
    else:
        rule = SplitSchema(by="file", valid_files=(sources[-1].name,), test_files=(sources[-1].name,))
    dense = DenseFeatureConfig(fill=0.0, log1p=True)
    return Schema(
        name="criteo",
        delimiter="\t",
        quote=None,
        header=False,
        label="label",
        tables=dict.fromkeys(CATEGORIES, table),
        columns={
            "label": ColumnSchema(type="int"),
            **dict.fromkeys(INTEGERS, ColumnSchema(type="int", dense=dense, minimum=0.0)),
            **{name: ColumnSchema(type="string", table=name) for name in CATEGORIES},
        },
        split=rule,
        embedding_dim=embedding_dim,
    )


def by_day(sources: Sequence[Path]) -> list[Path]:
    """The files with the numbers in their names in order: day_2 before day_10."""

    def parts(path: Path) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    return sorted(sources, key=parts)
