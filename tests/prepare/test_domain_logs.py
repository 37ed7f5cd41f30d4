"""The logs of many domains that configs are for: schemas and configs agree, on generated rows and on the real ones."""

import os
from collections import Counter
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, VocabularyIdsConfig, load_config
from recsys.prepare import writing
from recsys.prepare.tabular import convert_text, load_schema

CONFIGS = Path(__file__).parents[2] / "configs"
LOGS = {"epinions": "ratings", "trivago": "impressions"}
"""File of each log."""


def sample(name: str, rows: int = 3000) -> pa.Table:
    """Rows of a log's columns, drawn evenly up to what is there in the real one."""
    rng = np.random.default_rng(5)
    tops = {"user": 300, "item": 400, "category": 27, "rating": 5, "helpfulness": 5, "period": 11}
    if name == "trivago":
        tops = {"clickout": 99, "session": 99, "user": 99, "timestamp": 999, "step": 9, "platform": 55, "device": 3}
        tops |= {"city": 50, "item": 500, "position": 24, "price": 300, "price_rank": 24, "num_impressions": 25}
        tops |= {"last_action": 10, "history_length": 30, "item_in_history": 9, "item_is_last": 1}
    columns = {column: pa.array(rng.integers(1, top, rows, endpoint=True), pa.int32()) for column, top in tops.items()}
    if name == "trivago":
        columns["label"] = pa.array(rng.integers(0, 2, rows), pa.int8())
        columns["split_time"] = pa.array(np.repeat([0, 1, 2], [rows - 600, 300, 300]), pa.int8())
        for column, top in (("filters", 72), ("history", 500)):
            columns[column] = pa.array([rng.integers(1, top, n).tolist() for n in rng.integers(0, 5, rows)])
    return pa.table(columns)


def convert(source: Path, name: str, output: Path) -> dict[str, int]:
    """Converts by the schema that is shipped; returns the rows of each split."""
    convert_text([source], output, load_schema(CONFIGS / f"schemas/{name}.yaml"))
    summary = writing.read_summary(output)
    assert summary is not None and writing.is_complete(output, summary)
    return {split: told["rows"] for split, told in summary["splits"].items()}


def shipped(name: str, output: Path) -> tuple[Config, Config]:
    """The config that is shipped and one of dataset.yaml, which say the same of features, label and domain."""
    path = output.parent / f"{name}.yaml"
    path.write_text(
        f"include: {output.name}/dataset.yaml\ndata: {{batch_size: 8}}\nmodel: {{tower: {{type: mlp}}}}\n"
        "stages: {joint: {trains: all, steps: 1, learning_rate: 1e-3, sparse_learning_rate: 1e-3}}\n"
    )
    written = load_config(path)
    files = [
        f"features.sparse.{feature}.ids.file={settings.ids.file}"  # which is in another folder here
        for feature, settings in written.features.sparse.items()
        if isinstance(settings.ids, VocabularyIdsConfig)
    ]
    config = load_config(CONFIGS / f"{name}_domains.yaml", files)
    assert (config.features, config.data.domain, config.data.label) == (
        written.features,
        written.data.domain,
        written.data.label,
    )
    assert list(config.tables) == list(written.tables)
    return config, written


@pytest.mark.parametrize("name", LOGS)
def test_schema_and_config_agree(tmp_path: Path, name: str) -> None:
    raw = sample(name)
    pq.write_table(raw, tmp_path / "log.parquet")
    rows = convert(tmp_path / "log.parquet", name, tmp_path / "out")
    config, written = shipped(name, tmp_path / "out")
    assert all(table.num_embeddings >= written.tables[of].num_embeddings for of, table in config.tables.items())
    assert config.data.domain is not None
    for split, count in rows.items():
        table = pq.read_table(tmp_path / "out" / split)
        assert len(table) == count > 0
        others = {26, 27} if name == "epinions" else set()
        assert set(table[config.data.domain.column].to_pylist()) <= {*(config.data.domain.values or ()), *others}
    if name == "trivago":
        assert rows == {"train": 2400, "valid": 300, "test": 300}
    else:
        last = {(row["user"], row["item"]): row for row in raw.to_pylist()}
        found = [row for split in rows for row in pq.read_table(tmp_path / "out" / split).to_pylist()]
        assert len(found) == len(last) < len(raw)
        told = ("user", "category", "rating", "period")
        assert Counter(map(itemgetter(*told), found)) == Counter(map(itemgetter(*told), last.values()))
        assert all(row["label"] == (row["rating"] >= 4) for row in found)


@pytest.mark.slow
@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with epinions/ and trivago/")
@pytest.mark.parametrize(
    ("name", "rows", "positive"),
    [
        ("epinions", [729_952, 91_244, 91_245], 0.738),
        ("trivago", [250_051, 31_157, 31_306], 0.0435),
    ],
)
def test_the_real_logs(tmp_path: Path, name: str, rows: list[int], positive: float) -> None:
    source = Path(os.environ["HILOREC_DATA"]) / name / f"{LOGS[name]}.parquet"
    found = convert(source, name, tmp_path / "out")
    assert list(found.values()) == rows and (name == "trivago" or sum(rows) == 912_441)
    config, written = shipped(name, tmp_path / "out")
    assert all(table.num_embeddings == written.tables[of].num_embeddings for of, table in config.tables.items())
    parts = [pq.read_table(tmp_path / "out" / split) for split in found]
    raw = pq.read_table(source)
    assert sum(pc.sum(part["label"]).as_py() for part in parts) / sum(rows) == pytest.approx(positive, abs=0.0005)
    if name == "trivago":
        assert parts[1]["item"].equals(raw.filter(pc.equal(raw["split_time"], 1))["item"].cast(pa.int64()))
        return
    # By NumPy alone: the last row of each pair, in file order, and their permutation.
    pairs = raw["user"].to_numpy().astype(np.int64) << 32 | raw["item"].to_numpy()
    _, from_end = np.unique(pairs[::-1], return_index=True)
    kept = np.sort(len(pairs) - 1 - from_end)
    order = np.random.default_rng(2024).permutation(len(kept))
    for part, places in zip(parts, np.split(order, np.cumsum(rows)[:2]), strict=True):
        assert part["rating"].to_pylist() == raw["rating"].to_numpy()[kept[np.sort(places)]].tolist()
