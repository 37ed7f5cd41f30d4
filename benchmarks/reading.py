"""How fast shards become batches, beside raw decoding and other loaders.

    python -m benchmarks.reading [--rows N] [--rounds N]

Every way of reading is a process of its own, bound to as many cores as it is given, with as many threads that decode,
and takes its turn in each round, so that whatever else slows the machine slows all of them. Then: memory at one and at
many million rows, the time from start to first batch over many files, and how long training waits for data.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.report import RESULTS, Line, environment, number, show, write
from recsys.cli import quiet_libraries, run_entry
from recsys.config import load_config
from recsys.errors import UserError

BATCH_SIZE = 4096
ROW_GROUP_ROWS = 1 << 16
FILE_ROWS = 1 << 18
TIMES = 4
SMALL_FILES = 2000
SMALL_FILE_ROWS = 2000

CRITEO_CARDINALITIES = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
"""Different values of each category in Criteo's Kaggle data."""

SETTINGS = ((1, 1), (2, 1), (2, 2))
"""Cores and threads that decode. With a core to spare, batches are made beside the decoding, as in training."""

Measured = dict[str, float]


def main() -> None:
    """Measure every way of reading in turns, or in a child process the one that is asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.reading", description="Time reading, beside raw decoding.")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of each data set (default: %(default)s)")
    parser.add_argument("--many", type=int, default=50_000_000, help="rows of the long read (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="where the data sets are or go (default: a temporary place)")
    parser.add_argument("--fuxictr", nargs=2, metavar=("CHECKOUT", "PYTHON"), help="measure its loader as well")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    parser.add_argument("--way", nargs=4, metavar=("WAY", "CONFIG", "CORES", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        way, config, cores, threads = arguments.way
        quiet_libraries()
        _measure(WAYS[way], config, int(cores), int(threads))
    else:
        run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.rows < FILE_ROWS or arguments.rounds < 1:
        raise UserError(f"--rows must be at least {FILE_ROWS}, --rounds at least 1")
    place = nullcontext(str(arguments.data)) if arguments.data else TemporaryDirectory(prefix="hilorec-data-")
    with place as directory:
        root = Path(directory)
        configs = {name: write_data(root / name, table, arguments.rows) for name, table in DATA_SETS.items()}
        turns = {name: _turns(arguments, root / name, config) for name, config in configs.items()}
        speed = {name: _medians(of) for name, of in turns.items()}
        for name, measured in speed.items():
            show(f"{name}, {arguments.rows:,} rows", _speed_rows(measured))
        memory = _memory(arguments, root / "criteo")
        start = _child("start", _small_files(root), 2, 2)
        training = _training(root, configs["criteo"])
    about = {"command": _command(arguments), "note": arguments.note, "rows": arguments.rows, **environment()}
    lines: list[Line] = [
        {"kind": "way", "data": name, "cores / threads": setting, "way": way, "medians": figures}
        for name, settings in speed.items()
        for setting, ways in settings.items()
        for way, figures in ways.items()
    ]
    lines += [{"kind": "memory", "figures": figures} for figures in memory]
    lines += [{"kind": "start", "figures": start}, {"kind": "training", "figures": training}]
    lines += [
        {"kind": "turn", "data": name, "cores / threads": setting, "way": way, "turn": turn, "figures": figures}
        for name, of in turns.items()
        for (setting, way), measured in of.items()
        for turn, figures in enumerate(measured, start=1)
    ]
    parts: list[Any] = [
        f"Rows per second from Parquet (zstd, row groups of {ROW_GROUP_ROWS:,}) to batches of {BATCH_SIZE:,}; medians "
        f"of {arguments.rounds} turns, each way a process of its own on the cores that it is given. Raw decoding is "
        "pyarrow's, of the same columns, in the faster of two ways: a row group at a time on all threads, or as many "
        "row groups at a time as there are threads; it keeps nothing of what it reads. Raw, shuffled, is the least "
        "that shuffling adds in numpy: each column, unchecked, into an order that is there already and once into "
        "batches. Ours has as many threads that decode, and one that makes batches. Memory is what the process, "
        "workers aside, holds at most beyond what it holds with all imports. Each way reads the first file once "
        f"before the clock starts, and then all files {TIMES} times over; FuxiCTR's reads them once, torch's rows are "
        "of one file.",
    ]
    for name, measured in speed.items():
        parts += [f"## {DATA_SETS[name].__doc__}", _speed_rows(measured)]
    parts += [
        "## Memory",
        [
            {"rows": f"{of['rows']:,.0f}", "rows/s": number(of["rows/s"]), "peak MiB": number(of["peak MiB"])}
            for of in memory
        ],
        "## Start",
        f"{SMALL_FILES:,} files of {SMALL_FILE_ROWS:,} rows: footers and schemas {start['open']:.2f} s, first batch "
        f"{start['first batch']:.2f} s after that, {start['open'] + start['first batch']:.2f} s in all.",
        "## Training",
        f"`recsys.train` on the first data set, {training['dense FLOPs']:,.0f} FLOPs per row: "
        f"{training['examples/s']:,.0f} examples/s, {training['data wait']:.2%} of the time waiting for data, over one "
        "epoch with its cold start.",
        *([arguments.note] if arguments.note else []),
    ]
    write(arguments.output / "reading_cpu", "From shards to batches", parts, about, lines)


def _command(arguments: argparse.Namespace) -> str:
    """What was run, with no path of the machine that it ran on."""
    given = [f"--{name} {getattr(arguments, name)}" for name in ("rows", "many", "rounds")]
    fuxictr = ['--fuxictr "$HILOREC_FUXICTR" "$HILOREC_FUXICTR_PYTHON"'] if arguments.fuxictr else []
    return " ".join(["python -m benchmarks.reading", *given, *fuxictr])


def _criteo(rows: int, rng: np.random.Generator) -> pa.Table:
    """Criteo-shaped: 26 ids, 13 dense."""
    columns: dict[str, Any] = {"label": rng.integers(0, 2, rows).astype(np.int8)}
    for index in range(13):
        empty = rng.random(rows) < 0.2 if index % 3 == 0 else None
        columns[f"i{index}"] = pa.array(rng.exponential(20, rows).astype(np.float32), mask=empty)
    for index, size in enumerate(CRITEO_CARDINALITIES):
        columns[f"c{index}"] = (size * rng.random(rows) ** 4).astype(np.int32)
    return pa.table(columns)


def _multi_valued(rows: int, rng: np.random.Generator) -> pa.Table:
    """Multi-valued: 4 lists of 0 to 19 ids, 8 single ids, 4 dense."""
    columns: dict[str, Any] = {"label": rng.integers(0, 2, rows).astype(np.int8)}
    for index in range(4):
        columns[f"i{index}"] = rng.normal(size=rows).astype(np.float32)
    for index in range(8):
        columns[f"c{index}"] = (100_000 * rng.random(rows) ** 4).astype(np.int32)
    for index in range(4):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 20, rows))]).astype(np.int32)
        ids = (100_000 * rng.random(offsets[-1]) ** 4).astype(np.int32)
        columns[f"l{index}"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
    return pa.table(columns)


DATA_SETS: dict[str, Callable[[int, np.random.Generator], pa.Table]] = {
    "criteo": _criteo,
    "multi_valued": _multi_valued,
}


def write_data(directory: Path, table: Callable[[int, np.random.Generator], pa.Table], rows: int) -> str:
    """Write a data set and the config that reads it, unless they are there; the config's path."""
    config = directory / f"{rows}.yaml"
    if config.exists():
        return str(config)
    files = directory / str(rows)
    files.mkdir(parents=True, exist_ok=True)
    print(f"writing {directory.name}, {rows:,} rows", flush=True)
    for number_, first in enumerate(range(0, rows, FILE_ROWS)):
        part = table(min(FILE_ROWS, rows - first), np.random.default_rng((len(CRITEO_CARDINALITIES), number_)))
        pq.write_table(part, files / f"part-{number_:05d}.parquet", row_group_size=ROW_GROUP_ROWS, compression="zstd")
    _write_config(directory / "first.yaml", f"{files}/part-00000.parquet", part.schema)
    return _write_config(config, f"{files}/*.parquet", part.schema)


def _write_config(path: Path, train: str, schema: pa.Schema, batch_size: int = BATCH_SIZE) -> str:
    ids = [name for name in schema.names if name[0] in "cl" and name != "label"]
    sizes = {f"c{index}": size for index, size in enumerate(CRITEO_CARDINALITIES)} if "c25" in ids else {}
    rate = {"learning_rate": 1e-3, "sparse_learning_rate": 0.02}
    content = {
        "data": {"train": train, "batch_size": batch_size},
        # As wide as a CPU's memory allows; reading looks at the ids alone.
        "tables": {name: {"num_embeddings": sizes.get(name, 100_000), "embedding_dim": 4} for name in ids},
        "features": {
            "sparse": {name: {"table": name} for name in ids},
            "dense": {name: {"fill": 0.0} for name in schema.names if name[0] == "i"},
        },
        "model": {"tower": {"type": "mlp", "hidden": [256, 128]}, "hilomoe": {}},
        "stages": {"joint": {"trains": "all", "epochs": 1, **rate}},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


def _turns(arguments: argparse.Namespace, directory: Path, config: str) -> dict[tuple[str, str], list[Measured]]:
    """Measure each way in turns; the turns by setting and way."""
    name, turns = directory.name, dict[tuple[str, str], list[Measured]]()
    repeated = _repeated(directory, arguments.rows, TIMES * arguments.rows)
    ways = [way for way in WAYS if way not in ("start", "long")]
    for turn in range(arguments.rounds):
        for cores, threads in SETTINGS:
            setting = f"{cores} / {threads}"
            for way in ways if cores == threads else [way for way in ways if way.startswith(("raw", "HiloRec"))]:
                print(f"{name}: round {turn + 1}, {cores} cores, {threads} threads, {way}", flush=True)
                turns.setdefault((setting, way), []).append(_child(way, repeated, cores, threads))
            if arguments.fuxictr and name == "criteo" and cores == threads:
                turns.setdefault((setting, "FuxiCTR"), []).append(_fuxictr(config, cores, *arguments.fuxictr))
    return turns


def _medians(turns: dict[tuple[str, str], list[Measured]]) -> dict[str, dict[str, Measured]]:
    """Middle figures by setting and way, each beside the faster way of raw decoding."""
    found: dict[str, dict[str, Measured]] = {}
    for (setting, way), measured in turns.items():
        middle = {key: median(one[key] for one in measured) for key in measured[0]}
        found.setdefault(setting, {})[way] = middle
    for of_setting in found.values():
        raw = max(of_setting.pop("raw, all threads on one")["rows/s"], of_setting["raw, row groups"]["rows/s"])
        of_setting["raw pyarrow"] = {**of_setting.pop("raw, row groups"), "rows/s": raw}
        for measured_ in of_setting.values():
            measured_["of raw"] = measured_["rows/s"] / raw
    return found


def _speed_rows(speed: dict[str, dict[str, Measured]]) -> list[dict[str, str]]:
    return [
        {
            "way": way,
            "cores / threads": setting,
            "rows/s": number(measured["rows/s"]),
            "of raw": f"{measured['of raw']:.2f}",
            "CPU ns/row": number(measured["cpu ns/row"]),
            "peak MiB": number(measured["peak MiB"]),
        }
        for setting, ways in speed.items()
        for way, measured in sorted(ways.items(), key=lambda item: -item[1]["rows/s"])
    ]


def _memory(arguments: argparse.Namespace, directory: Path) -> list[Measured]:
    """Measure reading ever more rows: the same files under many names."""
    found = []
    for rows in sorted({1_000_000, 10_000_000, arguments.many}):
        print(f"memory: {rows:,} rows", flush=True)
        many = _repeated(directory, arguments.rows, rows)
        measured = _child("long", many, 2, 2)
        found.append({figure: measured[figure] for figure in ("rows", "rows/s", "peak MiB")})
    return found


def _repeated(directory: Path, rows: int, wanted: int) -> str:
    """The files of a data set of so many rows under ever more names, until they have those wanted; their config."""
    files = sorted((directory / str(rows)).glob("*.parquet"))
    links = directory / f"links-{wanted}"
    links.mkdir(exist_ok=True)
    for index in range(-(-wanted // FILE_ROWS)):
        link = links / f"part-{index:05d}.parquet"
        if not link.exists():
            link.symlink_to(files[index % (len(files) - 1 or 1)].resolve())  # the last may have fewer rows
    return _write_config(directory / f"links-{wanted}.yaml", f"{links}/*.parquet", pq.read_schema(files[0]))


def _small_files(root: Path) -> str:
    """A data set of many small files; the path of its config."""
    directory = root / "small"
    directory.mkdir(exist_ok=True)
    table = _criteo(SMALL_FILE_ROWS, np.random.default_rng(1))
    for index in range(SMALL_FILES):
        path = directory / f"part-{index:05d}.parquet"
        if not path.exists():
            pq.write_table(table, path, compression="zstd")
    return _write_config(root / "small.yaml", f"{directory}/*.parquet", table.schema)


def _training(root: Path, config: str) -> Measured:
    """Train, and take what the trainer says of its waiting."""
    output = root / "training"
    command = [sys.executable, "-m", "recsys.train", "--config", config, f"output_dir={output}"]
    print("training", flush=True)
    limited = [*command, "stages.joint.epochs=null", "stages.joint.steps=300"]
    subprocess.run(limited, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    stage = summary["stages"]["joint"]
    return {
        "examples/s": stage["examples_per_second"],
        "data wait": stage["data_wait"],
        "dense FLOPs": float(summary["cost"]["flops"]["total"]),
    }


def _child(way: str, config: str, cores: int, threads: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.reading", "--way", way, config, str(cores), str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


def _fuxictr(config: str, cores: int, checkout: str, python: str) -> Measured:
    driver = Path(__file__).parent / "fuxictr" / "loader.py"
    files = load_config(config).data.patterns("train")[0]
    command = [python, "-I", "-B", str(driver), checkout, files, str(BATCH_SIZE), str(cores)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


# What a child process measures.


def _measure(way: Callable[[str, int], Iterator[int]], config: str, cores: int, threads: int) -> None:
    """Run one way to its end, and print what it took as JSON. The way yields 0 when it is ready, then rows."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    pa.set_cpu_count(threads)
    import torch

    from recsys.host_memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    reading = way(config, threads)
    next(reading)
    before = _rss()
    if way is _start:
        print(json.dumps(dict(zip(("open", "first batch"), _seconds(reading), strict=True))))
        return
    if (first := Path(config).with_name("first.yaml")).exists():
        sum(way(str(first), threads))  # what is done once in a process is not what is measured
    start, cpu = time.perf_counter(), _cpu()
    rows = sum(reading)
    seconds, cpu = time.perf_counter() - start, _cpu() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"rows": rows, "rows/s": rows / seconds, "cpu ns/row": cpu / rows * 1e9, "peak MiB": peak}))


def _seconds(steps: Iterator[int]) -> Iterator[float]:
    start = time.perf_counter()
    for _ in steps:
        yield time.perf_counter() - start
        start = time.perf_counter()


def _cpu() -> float:
    """Of this process and those of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def _files(config: str) -> tuple[list[Path], list[str]]:
    import glob

    read = load_config(config)
    columns = [read.data.label or "label", *read.features.dense, *read.features.sparse]
    return [Path(path) for path in sorted(glob.glob(read.data.patterns("train")[0]))], columns


def _raw_files(config: str, threads: int) -> Iterator[int]:
    files, columns = _files(config)
    yield 0
    for path in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield len(file.read_row_group(group, columns=columns, use_threads=threads > 1))


def _raw_row_groups(config: str, threads: int) -> Iterator[int]:
    files, columns = _files(config)
    yield 0

    def decode(item: tuple[Path, int]) -> int:
        with pq.ParquetFile(item[0]) as file:
            return len(file.read_row_group(item[1], columns=columns, use_threads=False))

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(decode, _row_groups(files))


def _row_groups(files: list[Path]) -> list[tuple[Path, int]]:
    return [(path, group) for path in files for group in range(pq.read_metadata(path).num_row_groups)]


def _raw_shuffled(config: str, threads: int) -> Iterator[int]:
    """Raw decoding and the least that shuffled batches take in numpy.

    Each column, unchecked, is put into an order that is there already and copied to a batch's types and layout.
    """
    import torch

    from recsys.data.rows import Jagged
    from recsys.data.shuffling import Shuffle

    read = load_config(config)
    files, columns = _files(config)
    longest = np.random.default_rng(0).permutation(ROW_GROUP_ROWS)
    orders = {ROW_GROUP_ROWS: longest}
    yield 0

    def decode(item: tuple[Path, int]) -> int:
        with pq.ParquetFile(item[0]) as file:
            table = file.read_row_group(item[1], columns=columns, use_threads=False)
        order = orders.setdefault(len(table), longest[longest < len(table)])
        arrays = {name: table.column(name).chunk(0) for name in columns}
        singles = [name for name in read.features.sparse if not pa.types.is_list(arrays[name].type)]
        dense = np.empty((len(order), len(read.features.dense)), np.float32)
        ids = np.empty((len(singles), len(order)), np.int64)
        for index, name in enumerate(read.features.dense):
            values = np.frombuffer(arrays[name].buffers()[1], np.float32, len(order))  # nulls as they stand
            dense[:, index] = values.take(order, mode="clip")
        for index, name in enumerate(singles):
            ids[index] = arrays[name].to_numpy().take(order, mode="clip")
        for name in read.features.sparse.keys() - set(singles):
            lists = arrays[name]
            taken = Shuffle(order).lists(Jagged(lists.values.to_numpy(), lists.offsets.to_numpy().astype(np.int64)))
            torch.from_numpy(taken.values.astype(np.int64))
        return len(order)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(decode, _row_groups(files))


def _ours(config: str, threads: int, shuffle: bool) -> Iterator[int]:
    from recsys.data.features import build_columns
    from recsys.data.loader import Loader
    from recsys.data.order import Epoch
    from recsys.data.parquet import ParquetShards

    read = load_config(config)
    yield 0
    shards = ParquetShards(read.data.patterns("train"), build_columns(read), source="data.train")
    epoch = Epoch(shards.row_counts, 1, read.data.batch_size, shuffle=shuffle)
    with Loader(shards, [epoch], 0, reader_threads=threads) as loader:
        for batch in loader:
            yield len(batch.labels)


def _loader(config: str, threads: int) -> Iterator[int]:
    return _ours(config, threads, shuffle=True)


def _unshuffled(config: str, threads: int) -> Iterator[int]:
    return _ours(config, threads, shuffle=False)


def _torch_batches(config: str, threads: int) -> Iterator[int]:
    """Torch's loader over the files, whole batches at a time and in their order, the files dealt to its workers."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
    from torchrec import KeyedJaggedTensor

    read = load_config(config)
    files, columns = _files(config)

    class Batches(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            mine = files[worker.id :: worker.num_workers] if worker else files
            for path in mine:
                for record in pq.ParquetFile(path).iter_batches(BATCH_SIZE, columns=columns, use_threads=False):
                    yield self._batch(record)

        def _batch(self, record: pa.RecordBatch) -> Any:
            dense = [record.column(name).fill_null(0).to_numpy(zero_copy_only=False) for name in read.features.dense]
            values, lengths = [], []
            for name in read.features.sparse:
                column = record.column(name)
                if pa.types.is_list(column.type):
                    values.append(column.flatten().to_numpy())
                    lengths.append(column.value_lengths().to_numpy())
                else:
                    values.append(column.to_numpy())
                    lengths.append(np.ones(len(column), np.int32))
            sparse = KeyedJaggedTensor(
                keys=list(read.features.sparse),
                values=torch.from_numpy(np.concatenate(values).astype(np.int64)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
            )
            labels = torch.from_numpy(record.column(read.data.label).to_numpy().astype(np.float32))
            return torch.from_numpy(np.stack(dense, 1).astype(np.float32)), sparse, labels

    loader = DataLoader(Batches(), batch_size=None, num_workers=threads if threads > 1 else 0)
    yield 0
    for _, _, labels in loader:
        yield len(labels)


def _torch_rows(config: str, threads: int) -> Iterator[int]:
    """Torch's loader in its plainest use: a row at a time, collated; of one file."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    files, columns = _files(config)

    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for record in pq.ParquetFile(files[0]).iter_batches(BATCH_SIZE, columns=columns):
                yield from record.slice(0, BATCH_SIZE // 4).to_pylist()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = {}
        for name in columns:
            values = [row[name] or 0 for row in rows] if not isinstance(rows[0][name], list) else None
            found[name] = torch.tensor(values if values is not None else [i for row in rows for i in row[name]])
        return found

    yield 0
    workers = threads if threads > 1 else 0
    for batch in DataLoader(Rows(), batch_size=BATCH_SIZE, collate_fn=collate, num_workers=workers):
        yield len(batch["label"])


def _start(config: str, threads: int) -> Iterator[int]:
    """After it is ready, yields when the shards are open, then at the first batch."""
    from recsys.data.features import build_columns
    from recsys.data.loader import Loader
    from recsys.data.order import Epoch
    from recsys.data.parquet import ParquetShards

    read = load_config(config)
    yield 0
    shards = ParquetShards(read.data.patterns("train"), build_columns(read), source="data.train")
    yield 0
    epoch = Epoch(shards.row_counts, 1, read.data.batch_size)
    with Loader(shards, [epoch], 0, reader_threads=threads) as loader:
        yield len(next(iter(loader)).labels)


WAYS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "raw, all threads on one": _raw_files,
    "raw, row groups": _raw_row_groups,
    "raw, shuffled": _raw_shuffled,
    "HiloRec, shuffled": _loader,
    "HiloRec, in order": _unshuffled,
    "torch DataLoader, batches": _torch_batches,
    "torch DataLoader, rows": _torch_rows,
    "long": _loader,
    "start": _start,
}


if __name__ == "__main__":
    main()
