"""Time FuxiCTR's own loader: `loader.py CHECKOUT FILES BATCH_SIZE CORES`, started by benchmarks/reading.py.

It runs in FuxiCTR's environment. Its streaming loader is what FuxiCTR offers for data that do not fit memory: a file at
a time into an array of doubles, rows shuffled within the file's order of batches. Print JSON.
"""

import glob
import json
import os
import resource
import sys
import time
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq


def main() -> None:
    """Read all files once, and print what it took."""
    checkout, pattern, batch_size, cores = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["POLARS_MAX_THREADS"] = str(cores)
    sys.path.insert(0, checkout)
    feature_map_class = import_module("fuxictr.features").FeatureMap
    loader_class = import_module("fuxictr.pytorch.dataloaders").RankDataLoader

    names = pq.read_schema(sorted(glob.glob(pattern))[0]).names
    feature_map = feature_map_class("rows", str(Path(pattern).parent))
    feature_map.labels = ["label"]
    for name in names:
        if name != "label":
            kind = {"type": "categorical", "vocab_size": 1} if name.startswith("c") else {"type": "numeric"}
            feature_map.features[name] = {"source": "", **kind}
    feature_map.num_fields = len(feature_map.features)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    start, cpu = time.perf_counter(), cpu_seconds()
    batches, _ = loader_class(
        feature_map,
        stage="train",
        train_data=str(Path(pattern).parent),
        valid_data=None,
        batch_size=batch_size,
        shuffle=True,
        streaming=True,
        data_format="parquet",
        num_workers=cores if cores > 1 else 0,
    ).make_iterator()
    rows = sum(len(batch["label"]) for batch in batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"rows": rows, "rows/s": rows / seconds, "cpu ns/row": cpu / rows * 1e9, "peak MiB": peak}))


def cpu_seconds() -> float:
    """Of this process and those of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
