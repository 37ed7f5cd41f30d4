"""How fast, and in how much memory, files of Criteo's form become shards.

    python -m benchmarks.conversion [--rows N ...]

The files are generated: 13 integers and 26 hashes of a power law, about as many different values in each column as
Criteo's own has or all that the rows make, a seventh of the fields blank. Each conversion is a process of its own,
started as a user would, whose time and peak memory the system tells.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from benchmarks.report import RESULTS, ROOT, Line, environment, show, write
from recsys.cli import run_entry
from recsys.terminal import Rows

# One more than a column's different values: about what C1 to C26 have in the Kaggle challenge's training file.
SIZES = [1_400, 580, 10_000_000, 2_200_000, 300, 24, 12_500, 630, 3, 93_000, 5_700, 8_300_000, 3_200]
SIZES += [27, 15_000, 5_500_000, 10, 5_700, 2_200, 4, 7_000_000, 18, 15, 290_000, 105, 142_000]
MODES = {
    "vocabulary": ["--ids", "vocabulary", "--min-count", "10"],
    "hash": ["--ids", "hash", "--buckets", "1000000"],
}
_BATCH = 100_000


def main() -> None:
    """Convert what the command line asks for, and report."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.conversion", description="Convert generated files of Criteo's form."
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000], help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where files and shards go (default: a temporary place)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    runs: list[Line] = []
    with TemporaryDirectory(prefix="hilorec-", dir=arguments.folder) as folder:
        for rows in arguments.rows:
            source = Path(folder) / f"{rows}.txt"
            generate(source, rows)
            for mode, options in MODES.items():
                output = Path(folder) / f"{rows}-{mode}"
                figures = convert(source, output, options)
                figures |= {"input_bytes": source.stat().st_size, "output_bytes": _size(output)}
                runs.append({"kind": "run", "rows": rows, "ids": mode, "figures": figures})
                print(json.dumps(runs[-1]), flush=True)
            source.unlink()
    _report(arguments, runs)


def generate(path: Path, rows: int, seed: int = 1) -> None:
    """Write a file of Criteo's form."""
    options = pa_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    sizes = np.array(SIZES)
    with path.open("wb") as file:
        for batch in range(-(-rows // _BATCH)):
            random = np.random.default_rng([seed, batch])
            count = min(_BATCH, rows - batch * _BATCH)
            columns: list[pa.Array] = [pa.array(random.random(count) < 0.25).cast(pa.int8())]
            for _ in range(13):
                columns.append(pa.array(random.geometric(0.01, count) - 2, mask=random.random(count) < 1 / 7))
            # A value's rank is size^u for a uniform u in [0, 1): a few are in most rows, most in one or none.
            for column, size in enumerate(sizes):
                rank = np.floor(size ** random.random(count)).astype(np.uint64)
                digits = (rank * np.uint64(2_654_435_761) + np.uint64(column)) & np.uint64(0xFFFFFFFF)
                text = digits.astype(">u4").tobytes().hex().encode()
                values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), count, [None, pa.py_buffer(text)])
                blank = pa.array(random.random(count) < 1 / 7)
                columns.append(pa.compute.if_else(blank, None, values.cast(pa.binary()).cast(pa.string())))
            table = pa.Table.from_arrays(columns, names=[str(column) for column in range(40)])
            pa_csv.write_csv(table, file, options)


def convert(source: Path, output: Path, options: Sequence[str]) -> dict[str, Any]:
    """Convert once: seconds, peak resident bytes, and the rows that were written."""
    command = [sys.executable, "-m", "recsys.prepare", "criteo", "--source", str(source), "--output", str(output)]
    start = time.perf_counter()
    process = os.posix_spawn(
        sys.executable,
        [*command, *options],
        {**os.environ, "PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{shlex.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
    splits = json.loads((output / "dataset.json").read_text())["splits"]
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "rows_written": sum(told["rows"] for told in splits.values()),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _report(arguments: argparse.Namespace, runs: Sequence[Line]) -> None:
    rows: Rows = [
        {
            "rows, ids": f"{run['rows']:,}, {run['ids']}",
            "rows/s": f"{run['rows'] / figures['seconds']:,.0f}",
            "seconds": f"{figures['seconds']:,.0f}",
            "CPU seconds": f"{figures['cpu_seconds']:,.0f}",
            "peak memory, MiB": f"{figures['peak_bytes'] / 2**20:,.0f}",
            "text, MiB": f"{figures['input_bytes'] / 2**20:,.0f}",
            "shards, MiB": f"{figures['output_bytes'] / 2**20:,.0f}",
        }
        for run in runs
        for figures in [run["figures"]]
    ]
    show("Criteo's form to shards", rows)
    parts = [
        "Generated rows of 40 columns, through `python -m recsys.prepare criteo`, start of Python included. Lines are "
        "counted first, to split by order; a vocabulary is counted in a pass of its own.",
        rows,
        *([arguments.note] if arguments.note else []),
    ]
    command = " ".join(["python -m benchmarks.conversion", "--rows", *map(str, arguments.rows)])
    about = {"command": command, "note": arguments.note, **environment()}
    write(arguments.output / "conversion_cpu", "Criteo to shards", parts, about, runs)


if __name__ == "__main__":
    main()
