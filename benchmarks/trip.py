"""How far a row travels: the functions of the project that a Parquet row group passes on its way to the loss.

    python -m benchmarks.trip [--list]

Counted are the named functions and methods of recsys/ that are entered, on any thread, from the moment at which the
loader of one row group is asked for until the ranker has the loss of its batch, in the order in which each is first
entered. Opening the files, building the model and the backward pass are not part of the trip. A change of file is a
pair of neighbours in that order which stand in different files. Results in JSON, on one line.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

ROOT = Path.cwd() / "recsys"


def main() -> None:
    """Count, and list if asked to."""
    parser = argparse.ArgumentParser(prog="benchmarks.trip", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name every function, in order")
    listing = parser.parse_args().list
    with tempfile.TemporaryDirectory() as folder:
        passed = trip(Path(folder))
    files = [code.co_filename for code in passed]
    if listing:
        for code in passed:
            print(f"{Path(code.co_filename).relative_to(ROOT)!s:<28} {code.co_qualname}")
    changes = sum(one != other for one, other in pairwise(files))
    print(json.dumps({"functions": len(passed), "files": len(set(files)), "changes_of_file": changes}))


def trip(folder: Path) -> list[CodeType]:
    """What the one row group of a small log passes."""
    from recsys.config import load_config
    from recsys.data.order import Epoch
    from recsys.data.splits import open_loader, open_splits
    from recsys.model.ranker import build_ranker
    from recsys.prepare.synthetic import write_synthetic
    from recsys.runtime import process_group

    write_synthetic(folder / "log", seed=1, train_rows=500, valid_rows=10, test_rows=10, files=1)
    overrides = ["data.synthetic=null", f"data.train={folder}/log/train/*.parquet", "data.reader_threads=1"]
    config = load_config("configs/default.yaml", [*overrides, "device=cpu"])
    passed: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            passed.setdefault(code)

    with process_group("cpu") as ranks:
        (shards,) = open_splits(config, ["train"]).values()
        ranker = build_ranker(config, seed=0, device=torch.device("cpu"))
        epoch = Epoch(shards.row_counts, 1, 500, seed=1)
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            with open_loader(shards, [epoch], config, ranks) as loader:
                time.sleep(1.0)  # the batch is made before it is asked for, so that the order is always the same
                loss, _ = ranker(next(iter(loader)))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        assert loss.isfinite()
    return list(passed)


if __name__ == "__main__":
    main()
