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
    rows: list[list[object]] = []
    try:
        shards = ParquetShards([str(path)], COLUMNS, source="data.train")
        with Loader(shards, [Epoch(shards.row_counts, 1, 64, shuffle=False)], 0) as loader:
            for batch in loader:
                sparse = batch.sparse_features
                lists = [sparse[key] for key in COLUMNS.sparse]
                columns = [batch.labels.tolist(), batch.reference.tolist(), batch.domain.tolist()]
                columns.append(batch.dense_features[:, 0].tolist())
                for feature in lists:
                    offsets, values = feature.offsets().tolist(), feature.values().tolist()
                    columns.append([values[i:j] for i, j in pairwise(offsets)])
                rows += map(list, zip(*columns, strict=True))
    except DataError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"unnamed": f"{type(error).__name__}: {error}"}
    return {"rows": rows}


if __name__ == "__main__":
    quiet_libraries()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps({"begin": path.name}), flush=True)
        print(json.dumps(read(path)), flush=True)
