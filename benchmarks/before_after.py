"""How fast a change reads and trains, beside the commit before it, in turns.

    python -m benchmarks.before_after COMMIT [--turns N] [--rows N]

COMMIT is checked out under outputs/before_after/. Each turn reads two data sets with the code of either tree, shuffled
and in order, each time in a process of its own on the cores that it is given, and trains two stages of
configs/default.yaml on two ranks; the trees take turns at going first. What counts is the ratio of each turn.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.reading import DATA_SETS, FILE_ROWS, Measured, write_data
from benchmarks.report import RESULTS, ROOT, Line, environment, show, write
from recsys.cli import run_entry
from recsys.errors import UserError

FOLDER = ROOT / "outputs/before_after"
WAYS = ("HiloRec, shuffled", "HiloRec, in order")
SETTINGS = ((1, 1), (2, 1), (2, 2))
FIGURES = {"rows/s": "rows/s", "cpu ns/row": "CPU ns/row", "peak MiB": "peak MiB"}
STEPS = 400


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.before_after", description="Time a change beside a commit.")
    parser.add_argument("commit", help="the state before the change")
    parser.add_argument("--turns", type=int, default=5, help="of each tree (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each data set (default: %(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    run_entry(lambda: _benchmark(parser.parse_args()))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.rows < FILE_ROWS or arguments.turns < 1:
        raise UserError(f"--rows must be at least {FILE_ROWS}, --turns at least 1")
    commit = _run(ROOT, "git", "rev-parse", "--short", arguments.commit).strip()
    before = FOLDER / commit
    if not before.exists():
        _run(ROOT, "git", "worktree", "add", "--detach", str(before), commit)
    trees = {"before": before, "after": ROOT}
    configs = {name: write_data(FOLDER / "data" / name, table, arguments.rows) for name, table in DATA_SETS.items()}
    turns: dict[str, dict[str, list[Measured]]] = {}
    for turn in range(arguments.turns):
        order = list(trees.items())[:: 1 if turn % 2 == 0 else -1]
        for data, config in configs.items():
            for cores, threads in SETTINGS:
                for way in WAYS:
                    case = f"{data}, {way.removeprefix('HiloRec, ')}, {cores} / {threads}"
                    for side, tree in order:
                        figures = _read(tree, way, config, cores, threads)
                        turns.setdefault(case, {"before": [], "after": []})[side].append(figures)
        for side, tree in order:
            for stage, figures in _train(tree).items():
                turns.setdefault(f"training, {stage}", {"before": [], "after": []})[side].append(figures)
        print(f"turn {turn + 1} of {arguments.turns}", flush=True)
    _report(arguments, commit, turns)


def _read(tree: Path, way: str, config: str, cores: int, threads: int) -> Measured:
    """One pass of a tree's own reading benchmark."""
    package = (tree / "benchmarks/reading.py").exists()
    program = ["-m", "benchmarks.reading"] if package else ["benchmarks/data.py"]  # the name before it was a package
    told = _run(tree, sys.executable, *program, "--way", way, config, str(cores), str(threads))
    figures: Measured = json.loads(told.splitlines()[-1])
    return figures


def _train(tree: Path) -> dict[str, Measured]:
    """Examples per second of two stages of the default config."""
    output, log = FOLDER / "run", FOLDER / "data/log"
    rates = "learning_rate: 1e-3, sparse_learning_rate: 0.02, balance_weight: 0.01, z_weight: 0.001"
    overrides = [
        f"output_dir={output}",
        f"data.synthetic.directory={log}",
        *(f"data.{split}={log}/{split}/*.parquet" for split in ("train", "valid", "test")),
        f"stages={{backbone: {{trains: backbone, steps: {STEPS}, {rates}}}, "
        f"joint: {{trains: all, steps: {STEPS}, {rates}}}}}",
        "device=cpu",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recsys.train"]
    _run(ROOT, "rm", "-rf", str(output))
    _run(tree, *launch, "--config", "configs/default.yaml", *overrides)
    stages = json.loads((output / "summary.json").read_text(encoding="utf-8"))["stages"]
    return {name: {"rows/s": stage["examples_per_second"]} for name, stage in stages.items()}


def _run(tree: Path, *command: str) -> str:
    """What a command prints, with a tree's code."""
    environment_ = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment_, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} in {tree} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _report(arguments: argparse.Namespace, commit: str, turns: Mapping[str, Mapping[str, list[Measured]]]) -> None:
    rows: list[dict[str, str]] = []
    lines: list[Line] = []
    for case, sides in turns.items():
        pairs = list(zip(sides["before"], sides["after"], strict=True))
        row = {"data, way, cores / threads": case}
        for key, shown in FIGURES.items():
            if key not in pairs[0][0]:
                row |= {f"{shown}: before": "", f"{shown}: after": "", f"{shown}: ratio": ""}
                continue
            ratios = sorted(after[key] / before[key] for before, after in pairs)
            row |= {
                f"{shown}: before": f"{median(before[key] for before, _ in pairs):,.0f}",
                f"{shown}: after": f"{median(after[key] for _, after in pairs):,.0f}",
                f"{shown}: ratio": f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            }
        rows.append(row)
        lines += [
            {"kind": "turn", "case": case, "turn": turn, "before": before, "after": after}
            for turn, (before, after) in enumerate(pairs, start=1)
        ]
    title = f"Reading and training, before ({commit}) and after"
    show(title, rows)
    command = f"python -m benchmarks.before_after {commit} --turns {arguments.turns} --rows {arguments.rows}"
    about: dict[str, Any] = {"command": command, "before": commit, "note": arguments.note, **environment()}
    how = (
        f"Medians of {arguments.turns} turns, in which either tree goes first in turn; ratios are after to before of "
        f"each turn, with their range. Reading: {arguments.rows:,} rows, each time a process of its own. Training: "
        f"{STEPS} steps of two stages of `configs/default.yaml` on two ranks, evaluation left out."
    )
    parts: list[Any] = [how, rows, *([arguments.note] if arguments.note else [])]
    write(arguments.output / "before_after_cpu", title, parts, about, lines)


if __name__ == "__main__":
    main()
