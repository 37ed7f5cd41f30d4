"""What a probability costs: rows and candidates in one process on one core, memory of several, time to import.

    python -m benchmarks.serving [--turns N] [--table-mib N]

Models have random weights, which cost what trained ones do: that of configs/default.yaml, and one of Criteo's shape (26
hashed strings, 13 numbers). They are held against the raw torch module: tables and dense arch, fed with tensors. In a
turn all ways take one after another, so that they meet the same machine.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import RESULTS, ROOT, Line, environment, show, write
from recsys.checkpoint.layout import CONFIG, digest_of
from recsys.cli import run_entry
from recsys.config import Config, load_config
from recsys.errors import UserError
from recsys.model.dense_arch import build_dense_arch
from recsys.model.experts import expert_layers
from recsys.serving import Scorer
from recsys.serving.artifact import DENSE, MANIFEST, TABLES, Manifest

FOLDER = ROOT / "outputs/serving_benchmark"
ROWS = (1, 10, 100, 1000)
EXPERTS = {"num_layers": 3, "num_experts": 8}
TOWERS = ("mlp", "dcn_v2", "transformer", "final_mlp")
CATEGORIES = [f"C{number}" for number in range(1, 27)]
NUMBERS = [f"I{number}" for number in range(1, 14)]
CONTEXTS = {
    "default": ["user_id", "recent_categories", "profile_id", "region_id", "device_id", "domain", "time_of_day"],
    "criteo": [*CATEGORIES[:13], *NUMBERS[:6]],
}
HOLDER = """
import sys, torch
from recsys.serving import Scorer
scorer = Scorer(sys.argv[1])
for table in scorer.artifact.tables.values():
    for ids in torch.arange(table.num_embeddings).split(4096):
        table.rows(ids)
print("ready", flush=True)
sys.stdin.read()
"""
IMPORTING = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import recsys.serving
print(middle - begin, time.perf_counter() - middle)
"""

Timed = dict[str, list[float]]


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description="Time and weigh the scorer.")
    parser.add_argument("--turns", type=int, default=200, help="of each way; a third of 1,000 rows (%(default)s)")
    parser.add_argument("--table-mib", type=int, default=500, help="tables that processes share (%(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    run_entry(lambda: _benchmark(parser.parse_args()))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.turns < 9 or arguments.table_mib < 1:
        raise UserError("--turns must be at least 9, --table-mib at least 1")
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    lines: list[Line] = []
    default = load_config(ROOT / "configs/default.yaml")
    ways, shares = [], []
    for name, config in (("default", default), ("criteo", _criteo("dcn_v2", EXPERTS))):
        scorer = Scorer(_artifact(config, name))
        for rows in ROWS:
            timed = _ways(scorer, rows, CONTEXTS[name], arguments.turns if rows < 1000 else arguments.turns // 3)
            lines.append({"kind": "rows", "model": name, "rows": rows, **_figures(timed)})
            ways.append(_way(name, rows, timed))
            shares.append(_share(name, rows, timed))
        print(f"{name}: rows and candidates", flush=True)
    towers = [_tower(tower, experts, arguments.turns // 5, lines) for tower in TOWERS for experts in (None, EXPERTS)]
    compiled = [_compiled(name, arguments.turns // 3, lines) for name in CONTEXTS]
    memory = _memory(arguments.table_mib, lines)
    imports = _imports(9, lines)
    _report(arguments, [ways, shares, towers, compiled, memory, imports], lines)


def _criteo(tower: str, experts: Mapping[str, Any] | None, num_embeddings: int = 10_000) -> Config:
    rate = {"learning_rate": 1e-3, "sparse_learning_rate": 0.02}
    raw = {
        "name": "criteo",
        "data": {"train": "train", "valid": "valid", "batch_size": 2048},
        "tables": {name: {"num_embeddings": num_embeddings, "embedding_dim": 16} for name in CATEGORIES},
        "features": {
            "sparse": {name: {"table": name, "ids": {"type": "hash"}} for name in CATEGORIES},
            "dense": {name: {"fill": 0.0, "log1p": True} for name in NUMBERS},
        },
        "model": {"tower": {"type": tower}, "hilomoe": experts},
        "stages": {"joint": {"trains": "all", "epochs": 1, **rate}},
    }
    path = FOLDER / "criteo.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_config(path)


def _artifact(config: Config, name: str) -> Path:
    """An artefact of random weights."""
    folder = FOLDER / name
    folder.mkdir()
    torch.manual_seed(0)
    dense_arch = build_dense_arch(config.model, config.embedding_dims, num_dense_features=len(config.features.dense))
    for layer in expert_layers(dense_arch).values():
        for parameters in layer.parameter_groups().values():
            for parameter in parameters:
                torch.nn.init.normal_(parameter, std=0.1)
    save_file(dense_arch.state_dict(), folder / DENSE)
    sizes = {key: (table.num_embeddings, table.embedding_dim) for key, table in config.tables.items()}
    save_file({key: torch.randn(size) for key, size in sizes.items()}, folder / TABLES)
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    files = {path.name: digest_of(path) for path in folder.iterdir()}
    manifest = Manifest(config.name, "float32", 0, "joint", files=files)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _rows(config: Config, rows: int) -> dict[str, list[Any]]:
    """Raw values by column."""
    random = np.random.default_rng(rows)
    found: dict[str, list[Any]] = {}
    for name, feature in config.features.sparse.items():
        below = config.tables[feature.table].num_embeddings
        if feature.ids is not None:
            found[name] = [f"{value:08x}" for value in random.integers(0, 2**32, rows)]
        elif name in ("recent_categories", "tag_ids"):
            found[name] = random.integers(0, below, (rows, 5)).tolist()
        else:
            found[name] = random.integers(0, below, rows).tolist()
    return found | {name: random.integers(0, 100, rows).astype(float).tolist() for name in config.features.dense}


def _ways(scorer: Scorer, rows: int, shared: list[str], turns: int) -> Timed:
    """Milliseconds of each way to score so many rows, and of the parts of one."""
    columns = _rows(scorer.artifact.config, rows)
    context = {name: columns[name][0] for name in shared}
    columns |= {name: [value] * rows for name, value in context.items()}
    table = pa.table(columns)
    items, listed = table.drop(shared), table.to_pylist()
    dense_arch = scorer.dense_arch
    layout = scorer.check_schema(table.schema, "rows")
    decoded = scorer.decode(table, layout, "rows")
    with torch.inference_mode():
        inputs = scorer.inputs(decoded, layout)
        raw = _raw_module(scorer, decoded, layout)
        _check(raw().sigmoid().numpy(), scorer.score(table), scorer.score_candidates(context, items))
        ways: dict[str, Callable[[], object]] = {
            "raw module": raw,
            "score, Arrow": lambda: scorer.score(table),
            "score, mappings": lambda: scorer.score(listed),
            "candidates": lambda: scorer.score_candidates(context, items),
            "decoding": lambda: scorer.decode(table, scorer.check_schema(table.schema, "x"), "x"),
            "tables": lambda: scorer.inputs(decoded, layout),
            "tower": lambda: dense_arch(*inputs),
        }
        return _timed(ways, turns)


def _raw_module(scorer: Scorer, decoded: Any, layout: Any) -> Callable[[], Tensor]:
    """Tables by torch's own embeddings and the dense arch, of ids that are tensors already."""
    config, tables = scorer.artifact.config, scorer.artifact.tables
    single = dict(zip(layout.single, torch.from_numpy(decoded.single).long(), strict=True))
    lists = dict(zip((name for name in layout.keys if name in layout.lists), decoded.lists, strict=True))
    dense = torch.from_numpy(decoded.dense.T.copy())
    parts: list[Callable[[], Tensor]] = []
    for name, feature in config.features.sparse.items():
        weight = tables[feature.table].rows(torch.arange(tables[feature.table].num_embeddings))
        if name in single:
            parts.append(lambda ids=single[name], weight=weight: F.embedding(ids, weight))  # type: ignore[misc]
        else:
            ids, offsets = torch.tensor(lists[name].values).long(), torch.tensor(lists[name].offsets[:-1])
            mode = config.tables[feature.table].pooling
            parts.append(lambda *of, ids=ids, at=offsets, w=weight, mode=mode: F.embedding_bag(ids, w, at, mode=mode))
    dense_arch = scorer.dense_arch

    def raw() -> Tensor:
        logits: Tensor = dense_arch(torch.cat([part() for part in parts], 1), dense)[0]
        return logits

    return raw


def _check(*ways: Any) -> None:
    differences = [float(np.abs(way - ways[0]).max()) for way in ways]
    if max(differences) > 1e-6:
        raise UserError(f"ways that are compared differ by {differences}")


def _timed(ways: Mapping[str, Callable[[], object]], turns: int) -> Timed:
    found: Timed = {name: [] for name in ways}
    for turn in range(turns + 5):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn >= 5:
                found[name].append(1000 * (time.perf_counter() - began))
    return found


def _figures(timed: Timed) -> dict[str, dict[str, float]]:
    return {name: {"p50": median(of), "p99": float(np.quantile(of, 0.99))} for name, of in timed.items()}


def _ratio(timed: Timed, one: str, other: str) -> float:
    return median(a / b for a, b in zip(timed[one], timed[other], strict=True))


def _way(model: str, rows: int, timed: Timed) -> dict[str, str]:
    told = {"model": model, "rows": f"{rows:,}"}
    for name in ("raw module", "score, Arrow", "score, mappings", "candidates"):
        figures = _figures(timed)[name]
        told[f"{name}: p50 / p99, ms"] = f"{figures['p50']:.2f} / {figures['p99']:.2f}"
    told["score / raw"] = f"{_ratio(timed, 'score, Arrow', 'raw module'):.2f}"
    told["candidates / raw"] = f"{_ratio(timed, 'candidates', 'raw module'):.2f}"
    return told


def _share(model: str, rows: int, timed: Timed) -> dict[str, str]:
    parts = {name: median(timed[name]) for name in ("decoding", "tables", "tower")}
    return {"model": model, "rows": f"{rows:,}"} | {
        name: f"{value:.2f} ms, {value / sum(parts.values()):.0%}" for name, value in parts.items()
    }


def _tower(tower: str, experts: Mapping[str, Any] | None, turns: int, lines: list[Line]) -> dict[str, str]:
    """1,000 rows of Criteo's shape, half of whose columns are the context, in both forms."""
    kind = "HiLoMoE" if experts else "dense"
    scorer = Scorer(_artifact(_criteo(tower, experts), f"{tower}-{kind}"))
    timed = _ways(scorer, 1000, CONTEXTS["criteo"], turns)
    lines.append({"kind": "tower", "tower": tower, "experts": kind, **_figures(timed)})
    flat, ratio = median(timed["score, Arrow"]), _ratio(timed, "score, Arrow", "candidates")
    print(f"{tower}, {kind}", flush=True)
    return {"tower": tower, "linears": kind, "rows, ms": f"{flat:.1f}", "rows / candidates": f"{ratio:.2f}"}


def _compiled(model: str, turns: int, lines: list[Line]) -> dict[str, str]:
    """The dense arch as it is and compiled."""
    plain, compiled = Scorer(FOLDER / model), Scorer(FOLDER / model, compile=True)
    tables = {rows: pa.table(_rows(plain.artifact.config, rows)) for rows in (1, 1000)}
    began = time.perf_counter()
    for table in tables.values():
        _check(compiled.score(table), plain.score(table))
    first = time.perf_counter() - began
    told = {"model": model, "first calls, s": f"{first:.0f}"}
    for rows, table in tables.items():
        ways = {name: lambda s=s, t=table: s.score(t) for name, s in (("plain", plain), ("compiled", compiled))}
        timed = _timed(ways, turns)
        lines.append({"kind": "compiled", "model": model, "rows": rows, "first_s": first, **_figures(timed)})
        told[f"plain / compiled, {rows:,} rows"] = f"{_ratio(timed, 'plain', 'compiled'):.2f}"
    return told


def _memory(mebibytes: int, lines: list[Line]) -> list[dict[str, str]]:
    """Proportional memory of processes that have read every row of the same artefact."""
    rows = mebibytes * 2**20 // (4 * 16 * len(CATEGORIES))
    folder = _artifact(_criteo("mlp", EXPERTS, rows), "large")
    told = []
    for count in (1, 4):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        holders = [
            subprocess.Popen(command, cwd=ROOT, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        for holder in holders:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"ready\n":
                raise UserError(f"a process that was to open {folder} ended with {holder.wait()}")
        pss = [_pss(holder.pid) for holder in holders]
        for holder in holders:
            holder.communicate()
        total = {key: sum(one[key] for one in pss) / 1024 for key in pss[0]}
        lines.append({"kind": "memory", "processes": count, "tables_mib": mebibytes, **total})
        told.append(
            {
                "processes": str(count),
                "all, MiB": f"{total['Pss']:,.0f}",
                "of files (tables, libraries), MiB": f"{total['Pss_File']:,.0f}",
                "own, of each, MiB": f"{total['Pss_Anon'] / count:,.0f}",
            }
        )
    return told


def _pss(pid: int) -> dict[str, int]:
    """KiB; what processes share counts in equal parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {key: found[key] for key in ("Pss", "Pss_File", "Pss_Anon")}


def _imports(turns: int, lines: list[Line]) -> list[dict[str, str]]:
    found = []
    for _ in range(turns):
        command = [sys.executable, "-c", IMPORTING]
        done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True)
        found.append([float(part) for part in done.stdout.split()])
    ours = sorted(one[1] for one in found)
    lines.append({"kind": "import", "torch_s": [one[0] for one in found], "over_torch_s": [one[1] for one in found]})
    torchs = median(one[0] for one in found)
    return [
        {
            "import torch, s": f"{torchs:.2f}",
            "recsys.serving over it, s": f"{median(ours):.2f} ({ours[0]:.2f} to {ours[-1]:.2f})",
        }
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _report(arguments: argparse.Namespace, tables: list[list[dict[str, str]]], lines: list[Line]) -> None:
    headings = ("Rows and candidates", "Where the time of rows goes", "Towers", "Compiled", "Memory", "Import")
    for heading, rows in zip(headings, tables, strict=True):
        show(heading, rows)
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.serving --turns {arguments.turns} --table-mib {arguments.table_mib}",
        "note": arguments.note,
        **environment(),
    }
    ways, shares, towers, compiled, memory, imports = tables
    parts: list[Any] = [
        f"One thread; {arguments.turns} turns, {arguments.turns // 3} of 1,000 rows. Ratios are medians of those of "
        "each turn. The raw module is torch's embeddings and the dense arch, fed with tensors. Candidates come from "
        "Arrow; their context is "
        + "; ".join(f"{len(names)} columns ({name})" for name, names in CONTEXTS.items())
        + ". All ways gave the same probabilities within 1e-6.",
        ways,
        "Where the time of rows from Arrow goes, medians: decoding holds what checks the schema.",
        shares,
        "1,000 rows of Criteo's shape, half of whose columns are the context, in both forms; towers at their defaults.",
        towers,
        "Compiled dense arch; `first calls` are of 1 and of 1,000 rows.",
        compiled,
        "Proportional set size, summed over processes that read each row of the same "
        f"{arguments.table_mib} MiB of tables.",
        memory,
        imports,
        *([arguments.note] if arguments.note else []),
    ]
    write(arguments.output / "serving_cpu", "Serving", parts, about, lines)
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
