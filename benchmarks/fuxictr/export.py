"""A config's rows in the form that FuxiCTR trains from without preprocessing."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.config import Config
from recsys.data.order import RowSlice
from recsys.data.rows import Rows, SparseLayout
from recsys.data.splits import open_splits

Ids = NDArray[np.int64]

SPLITS = ("train", "valid", "test")
DATA_SET = "rows"
LABEL = ".label"
"""No feature can have this name."""


def export_rows(config: Config, directory: Path) -> Path:
    """Write a config's rows as FuxiCTR trains from them, into a folder named by what it holds; returns that folder.

    `<split>.parquet` holds a column per feature and the label, `feature_map.json` the features. Ids are those of our
    tables plus 1, because FuxiCTR pads with 0: an empty bag is 0, as it pools to zeros with us. Features with more than
    one id somewhere are lists padded to the longest, pooled as their table's `pooling` says; features that share a
    table share FuxiCTR's.

    Raises:
        ConfigError: a split is missing.
        DataError: as `ParquetShards`.
    """
    rows: dict[str, list[Rows]] = {}
    ids: dict[str, dict[str, Ids]] = {}
    for split, shards in open_splits(config, SPLITS).items():
        rows[split] = [shards.read(RowSlice(group, 0, count)) for group, count in enumerate(shards.row_counts)]
        ids[split] = _ids(rows[split], shards.layout)

    features: dict[str, dict[str, Any]] = {}
    columns: dict[str, dict[str, NDArray[Any]]] = {split: {} for split in SPLITS}
    for index, name in enumerate(config.features.dense):
        features[name] = {"source": "", "type": "numeric"}
        for split in SPLITS:
            columns[split][name] = np.concatenate([part.dense[index] for part in rows[split]])
    owners: dict[str, str] = {}
    for name, feature in config.features.sparse.items():
        table = config.tables[feature.table]
        longest = max(ids[split][name].shape[1] for split in SPLITS)
        for split in SPLITS:
            found = ids[split][name]
            padded = np.pad(found, ((0, 0), (0, longest - found.shape[1])))
            columns[split][name] = padded if longest > 1 else padded[:, 0]
        features[name] = {
            "source": "",
            "type": "sequence" if longest > 1 else "categorical",
            "padding_idx": 0,
            "vocab_size": table.num_embeddings + 1,
        }
        if longest > 1:
            pooling = "MaskedAveragePooling" if table.pooling == "mean" else "MaskedSumPooling"
            features[name] |= {"max_len": longest, "feature_encoder": f"layers.{pooling}()"}
        if feature.table in owners:
            features[name]["share_embedding"] = owners[feature.table]
        owners.setdefault(feature.table, name)
    for split in SPLITS:
        columns[split][LABEL] = np.concatenate([part.labels for part in rows[split]]).astype(np.int64)
    feature_map = {
        "dataset_id": DATA_SET,
        "num_fields": len(features),
        "total_features": sum(config.tables[table].num_embeddings + 1 for table in owners) + len(config.features.dense),
        "input_length": sum(feature.get("max_len", 1) for feature in features.values()),
        "labels": [LABEL],
        "features": [{name: feature} for name, feature in features.items()],
    }
    return _write_rows(columns, feature_map, directory)


def _ids(rows: Sequence[Rows], layout: SparseLayout) -> dict[str, Ids]:
    """Ids of each feature plus 1, shape (rows, length of the longest list), 0 where a row has no more."""
    found: dict[str, Ids] = {}
    for index, name in enumerate(layout.single):
        found[name] = np.concatenate([part.single[index].astype(np.int64) + 1 for part in rows])[:, None]
    for index, name in enumerate(key for key in layout.keys if key in layout.lists):
        lists = [part.lists[index] for part in rows]
        lengths = np.concatenate([jagged.lengths() for jagged in lists])
        found[name] = np.zeros((len(lengths), max(1, int(lengths.max()))), np.int64)
        found[name][np.arange(found[name].shape[1]) < lengths[:, None]] = np.concatenate([j.values for j in lists]) + 1
    return found


def _write_rows(
    columns: Mapping[str, Mapping[str, NDArray[Any]]], feature_map: Mapping[str, Any], directory: Path
) -> Path:
    digest = hashlib.sha256(json.dumps(feature_map).encode())
    for split in SPLITS:
        for values in columns[split].values():
            digest.update(np.ascontiguousarray(values).data)
    target = directory / f"rows-{digest.hexdigest()[:12]}"
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for split in SPLITS:
        table = pa.table({name: _arrow(values) for name, values in columns[split].items()})
        pq.write_table(table, part / f"{split}.parquet")
    (part / "feature_map.json").write_text(json.dumps(feature_map, indent=2) + "\n", encoding="utf-8")
    return part.rename(target)


def _arrow(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
