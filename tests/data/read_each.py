"""Reads each file of a folder through the loader, in a process that may die of it: `read_each.py FOLDER`.

Prints a line as it begins a file and one as it ends, so that a crash or a hang tells of which file it was.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from recsys.cli import quiet_libraries
from recsys.config import DenseFeatureConfig, DomainConfig, SparseFeatureConfig
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import PlainIds
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError

COLUMNS = Columns(
    label="label",
    reference="truth",
    dense={"x": DenseFeatureConfig(fill=0.5)},
    sparse={
        name: SparseColumn(SparseFeatureConfig(table=name), PlainIds(rows))
        for name, rows in (("user", 1000), ("tags", 50))
    },
    domain=DomainConfig(column="domain", num_domains=3),
)


def read(path: Path) -> dict[str, object]:
    """Everything in the file's order, or the message of a `DataError`; any other exception is its own outcome."""
    try:
        rows, shuffled = (read_in_order(path, shuffle) for shuffle in (False, True))
    except DataError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"unnamed": f"{type(error).__name__}: {error}"}
    if sorted(map(str, rows)) != sorted(map(str, shuffled)):
        return {"unnamed": "other rows when they are shuffled"}
    return {"rows": rows}


def read_in_order(path: Path, shuffle: bool) -> list[list[object]]:
    """Rows in the file's order, or shuffled."""
    rows: list[list[object]] = []
    shards = ParquetShards([str(path)], COLUMNS, source="data.train")
    with Loader(shards, [Epoch(shards.row_counts, 1, 64, seed=1, shuffle=shuffle)], 0) as loader:
        for batch in loader:
            sparse = batch.sparse_features
            lists = [sparse[key] for key in COLUMNS.sparse]
            columns = [batch.labels.tolist(), batch.reference.tolist(), batch.domain.tolist()]
            columns.append(batch.dense_features[:, 0].tolist())
            for feature in lists:
                offsets, values = feature.offsets().tolist(), feature.values().tolist()
                columns.append([values[i:j] for i, j in pairwise(offsets)])
            rows += map(list, zip(*columns, strict=True))
    return rows


if __name__ == "__main__":
    quiet_libraries()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps({"begin": path.name}), flush=True)
        print(json.dumps(read(path)), flush=True)
