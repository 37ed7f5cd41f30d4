"""How a column tells domains: by numbers, by values or by hash; and rows of none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import as_config
from tiny import tiny_config, write_tiny_log

from recsys.config import ConfigError, DomainConfig
from recsys.data.domains import count_domains
from recsys.data.hashing import hash_ids
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits
from recsys.data.storage import DataError


def shards_of(folder: Path, column: pa.Array, domain: dict[str, Any]) -> ParquetShards:
    """One row group whose column of domains is this."""
    write_tiny_log(folder, {"train": len(column), "valid": 20, "test": 20}, files=1)
    path = folder / "train" / "part-0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("domain"), "domain", column), path)
    raw = tiny_config(folder, folder / "out")
    raw["data"]["domain"] = {"column": "domain", **domain}
    return open_splits(as_config(raw, folder), ["train"])["train"]


def read(shards: ParquetShards) -> list[int]:
    return shards.read(RowSlice(0, 0, shards.row_counts[0])).domain.tolist()


BACKBONE = {"unseen": "backbone"}


@pytest.mark.parametrize(
    ("column", "domain", "expected"),
    [
        (pa.array(["b", "a", "c", "a"]), {"values": ["a", "b", "c"]}, [1, 0, 2, 0]),
        (pa.array(["b", "x", None]), {"values": ["a", "b"], **BACKBONE}, [1, 2, 2]),
        (pa.array(["b", "a"]).dictionary_encode(), {"values": ["a", "b"]}, [1, 0]),
        (pa.array(["b", "a"], pa.large_string()), {"values": ["a", "b"]}, [1, 0]),
        (pa.array([30, -7, 2**40]), {"values": [-7, 2**40, 30]}, [2, 0, 1]),
        (pa.array([30, 200], pa.uint8()), {"values": [-7, 300, 30], **BACKBONE}, [2, 3]),
        (pa.array([2**64 - 1, 5, 2**63 - 1], pa.uint64()), {"values": [5, -1], **BACKBONE}, [2, 0, 2]),
        (pa.array([0, 2, 1], pa.int8()), {"num_domains": 3}, [0, 2, 1]),
        (pa.array([0, 3, -1, None]), {"num_domains": 3, **BACKBONE}, [0, 3, 3, 3]),
        (pa.nulls(2), {"values": ["a", "b"], **BACKBONE}, [2, 2]),
    ],
)
def test_rows_have_the_number_of_their_value(
    tmp_path: Path, column: pa.Array, domain: dict[str, Any], expected: list[int]
) -> None:
    shards = shards_of(tmp_path, column, domain)
    assert read(shards) == expected
    counts = count_domains(shards, [0])
    assert counts.rows[0].tolist() == np.bincount(expected, minlength=counts.rows.shape[1]).tolist()
    assert shards.columns.domain is not None and len(shards.columns.domain.labels) == counts.rows.shape[1]


def test_rows_of_one_domain_may_have_columns_of_views(tmp_path: Path) -> None:
    """From which Arrow takes no rows."""
    domain = pa.array(["b", "a", None, "b"], pa.string_view())
    shards = shards_of(tmp_path, domain, {"values": ["a", "b"], **BACKBONE})
    only = shards.of_domain(1, count_domains(shards, [0]).rows[:, 1].tolist())
    assert read(only) == [1, 1]


@pytest.mark.parametrize("values", [["de", "fr", "Zürich", ""], [5, -3, 2**62, 0]])
def test_hashed_values_have_the_number_that_features_would(tmp_path: Path, values: list[Any]) -> None:
    shards = shards_of(tmp_path, pa.array([*values, None]), {"num_domains": 50, "hashed": True, **BACKBONE})
    assert read(shards) == [*hash_ids(pa.array(values), 50).tolist(), 50]


@pytest.mark.parametrize(
    ("column", "domain", "told"),
    [
        (["b", "x"], {"values": ["a", "b"]}, "has 1 value out of range, such as x; there are 2 data.domain.values"),
        ([5, 6], {"values": [5]}, "such as 6; there are 1 data.domain.values: add it, set data.domain.unseen"),
        (["b", None], {"values": ["a", "b"]}, "has 1 nulls; give rows"),
        ([1, 0], {"values": ["a", "b"]}, "domain.* strings"),
        (["1", "0"], {"num_domains": 2}, "domain.* integers"),
        ([0.5, 1.0], {"num_domains": 2, "hashed": True}, "integers or strings"),
    ],
)
def test_values_of_no_domain_and_other_types_are_named(
    tmp_path: Path, column: list[Any], domain: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read(shards_of(tmp_path, pa.array(column), domain))


@pytest.mark.parametrize(
    ("domain", "told"),
    [
        ({"values": ["a", "a"]}, "values must be 2 different ones"),
        ({"values": ["a", "b"], "num_domains": 3}, "values must be 3 different ones"),
        ({"values": ["a"], "hashed": True}, "leave one of them out"),
        ({"values": ["a", 1]}, "values"),
        ({"values": ["a", "(other)"], **BACKBONE}, "give that domain another in names"),
        ({}, "num_domains"),
    ],
)
def test_what_does_not_number_domains_is_refused(tmp_path: Path, domain: dict[str, Any], told: str) -> None:
    raw = tiny_config(tmp_path, tmp_path / "out")
    raw["data"]["domain"] = {"column": "domain", **domain}
    with pytest.raises(ConfigError, match=told):
        as_config(raw, tmp_path)


def test_names_are_those_of_the_values_and_of_other_rows() -> None:
    values = {"column": "c", "values": ["de", "fr"]}
    assert DomainConfig.model_validate(values).labels == ("de", "fr")
    assert DomainConfig.model_validate({**values, **BACKBONE}).labels == ("de", "fr", "(other)")
    assert DomainConfig.model_validate({**values, "names": ["Germany", "France"]}).labels == ("Germany", "France")
    assert DomainConfig(column="c", num_domains=2).labels == ("0", "1")
