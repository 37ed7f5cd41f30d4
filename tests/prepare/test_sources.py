"""What converters share: no row is lost between the splits, none of a user's is tested on what came before."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.config import SparseFeatureConfig
from recsys.prepare import writing
from recsys.prepare.sources import Source, split_at_random, split_by_time, write_data_set


def test_random_split_has_the_sizes_of_the_published_figures() -> None:
    sizes = {split: len(rows) for split, rows in split_at_random(1_000_209).items()}
    assert sizes == {"train": 800_167, "valid": 100_021, "test": 100_021}
    for rows in range(100):
        splits = split_at_random(rows)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(rows))
        assert 0 <= len(splits["test"]) - len(splits["valid"]) <= 1


def test_split_by_time_holds_out_each_users_last_tenths() -> None:
    rng = np.random.default_rng(7)
    counts = {user: int(count) for user, count in enumerate(rng.integers(0, 60, 40), start=3)} | {99: 9, 100: 10}
    user = rng.permutation(np.repeat(list(counts), list(counts.values())))
    timestamp = rng.integers(0, 20, len(user))  # many ties
    splits = split_by_time(user, timestamp)
    assert list(splits) == ["train", "valid", "test"]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(user)))
    for one, count in counts.items():
        parts = [np.sort(rows[user[rows] == one]) for rows in splits.values()]
        assert [len(part) for part in parts] == [count - 2 * (count // 10), count // 10, count // 10]
        # Sorted by time, then by place in the file, the parts follow one another.
        keys = [[(timestamp[row], row) for row in part] for part in parts if len(part)]
        for earlier, later in itertools.pairwise(keys):
            assert max(earlier) < min(later)


def test_split_by_time_is_written_in_the_order_of_the_permutation() -> None:
    user, timestamp = np.repeat(np.arange(5), 40), np.arange(200)
    order = np.random.default_rng(2024).permutation(200)
    for rows in split_by_time(user, timestamp).values():
        assert rows.tolist() == [row for row in order if row in set(rows)]
        assert (np.diff(timestamp[rows]) < 0).any()


@pytest.mark.parametrize("separator", [",", "\t", "::", "|||"])
def test_numbers_between_any_separator(tmp_path: Path, separator: str) -> None:
    lines = ["a", separator.join("123"), separator.join("456")]
    (tmp_path / "f").write_text("\r\n".join(lines))
    numbers = Source(tmp_path, "folder", "ask").read("f", header="a").numbers(["x", "y", "z"], separator)
    assert {name: column.tolist() for name, column in numbers.items()} == {"x": [1, 4], "y": [2, 5], "z": [3, 6]}
    (tmp_path / "f").write_text("\n".join([*lines, separator.join("78")]))
    with pytest.raises(ValueError, match=r"f, line 4: .* is not x.*y.*z, each a whole number; ask"):
        Source(tmp_path, "folder", "ask").read("f", header="a").numbers(["x", "y", "z"], separator)


def test_data_set_is_written_in_the_order_of_its_rows(tmp_path: Path) -> None:
    table = pa.table({"label": [0, 1, 1, 0, 1], "x": [0, 1, 2, 3, 4], "y": [0, 0, 0, 0, 9]})
    splits = {"train": np.array([4, 0, 2]), "valid": np.array([3]), "test": np.array([], np.int64)}
    output = tmp_path / "out"
    columns = {"x": {"size": 5}, "y": {"size": 10}}
    domain = {"column": "x", "num_domains": 5}
    write_data_set(
        output,
        table,
        splits,
        name="it",
        columns=columns,
        vocabularies={},
        sparse={column: SparseFeatureConfig(table="both") for column in ("x", "y")},
        mapped_as={},
        domain=domain,
        overwrite=False,
    )
    assert pq.read_table(output / "train")["x"].to_pylist() == [4, 0, 2]
    assert pq.read_table(output / "test").num_rows == 0
    summary = writing.read_summary(output)
    assert summary == {
        "name": "it",
        "columns": columns,
        "vocabularies": {},
        "splits": {
            "train": {"rows": 3, "files": 3, "label_rate": 2 / 3},
            "valid": {"rows": 1, "files": 1, "label_rate": 0.0},
            "test": {"rows": 0, "files": 1, "label_rate": None},
        },
    }
    assert writing.is_complete(output, summary)
    assert yaml.safe_load((output / "dataset.yaml").read_text()) == {
        # No test: a split without rows cannot be read.
        "data": {
            "train": "${here}/train/*.parquet",
            "valid": "${here}/valid/*.parquet",
            "label": "label",
            "domain": domain,
        },
        "tables": {"both": {"num_embeddings": 10, "embedding_dim": 16}},
        "features": {"sparse": {"x": {"table": "both"}, "y": {"table": "both"}}, "dense": {}},
    }
    (output / "dataset.yaml").unlink()
    assert not writing.is_complete(output, summary)
