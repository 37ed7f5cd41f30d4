"""What checkpoints cost: the time that training waits for them, how fast they are written, how soon a run goes on.

    python -m benchmarks.checkpoint [--device cuda] [--turns N] [--steps N] [--table-mib N]

Three questions, each answered in turns that take the ways one after another:

- A stage of configs/default.yaml without checkpoints, with one every 100 steps in the background, and with one every
  100 steps that training waits for.
- A checkpoint of a table of `--table-mib`, written either way, beside a copy of its files that is flushed to the disk.
- From the start of the command to the first step: of a run that begins, and of one that goes on.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.report import RESULTS, ROOT, Line, environment, show, write
from recsys.checkpoint.layout import checkpoints, flush
from recsys.cli import run_entry
from recsys.errors import UserError

FOLDER = ROOT / "outputs/checkpoint_benchmark"
EVERY = 100
WAYS = {
    "none": ("checkpoints.every_minutes=null",),
    "background": ("checkpoints.every_minutes=null", f"checkpoints.every_steps={EVERY}"),
    "waiting": ("checkpoints.every_minutes=null", f"checkpoints.every_steps={EVERY}", "checkpoints.asynchronous=false"),
}
TABLE_DIM = 64

Measured = dict[str, float]


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description="Time checkpoints.")
    parser.add_argument("--turns", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of the stage (default: %(default)s)")
    parser.add_argument("--table-mib", type=int, default=512, help="size of the large table (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it trains (%(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    run_entry(lambda: _benchmark(parser.parse_args()))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.turns < 1 or arguments.steps <= EVERY or arguments.table_mib < 1:
        raise UserError(f"--turns and --table-mib must be at least 1, --steps above {EVERY}")
    device = f"device={arguments.device}"
    turns: dict[str, list[Measured]] = {}
    for turn in range(arguments.turns):
        ways = list(WAYS.items())[:: 1 if turn % 2 == 0 else -1]
        for way, settings in ways:
            turns.setdefault(f"stage, {way}", []).append(_stage(arguments.steps, (device, *settings)))
        for way, settings in ways:
            if way != "none":
                turns.setdefault(f"table, {way}", []).append(_table(arguments.table_mib, (device, *settings)))
        for case, figures in _restart(device).items():
            turns.setdefault(f"start, {case}", []).append(figures)
        print(f"turn {turn + 1} of {arguments.turns}", flush=True)
    _report(arguments, turns)


def _stage(steps: int, settings: tuple[str, ...]) -> Measured:
    """A stage of so many steps: seconds in all, and what of them was waiting for checkpoints."""
    summary = _train(*_stages(steps), *settings)
    (stage,) = summary["stages"].values()
    saves = len(range(EVERY, steps + 1, EVERY)) if any("every_steps" in setting for setting in settings) else 1
    waited = summary["checkpoint_wait"]
    return {"seconds": stage["seconds"] + waited, "waited_ms": 1000 * waited / saves}


def _table(mebibytes: int, settings: tuple[str, ...]) -> Measured:
    """Saving a large table: seconds that training waits, bytes, and seconds that copying the same bytes takes."""
    rows = mebibytes * 2**20 // (4 * TABLE_DIM)
    table = (f"tables.user.num_embeddings={rows}", f"tables.user.embedding_dim={TABLE_DIM}")
    _train(*_stages(2), *settings, *table, "checkpoints.every_steps=1")
    events = EventAccumulator(str(FOLDER / "run/tensorboard"))
    events.Reload()
    first = events.Scalars("throughput/checkpoint_wait")[0]
    (checkpoint,) = checkpoints(FOLDER / "run/checkpoints")
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    began = time.perf_counter()
    copy = Path(shutil.copytree(checkpoint, FOLDER / "copy"))
    for file in copy.rglob("*"):
        flush(file)
    copied = time.perf_counter() - began
    shutil.rmtree(copy)
    return {"waited_ms": 1000 * first.value, "mib": size / 2**20, "copy_ms": 1000 * copied}


def _restart(device: str) -> dict[str, Measured]:
    """Seconds from the command to its first step, of a run that begins and of one that goes on."""
    overrides = (device, *_stages(100_000), "checkpoints.every_minutes=null", "logging.every_steps=1")
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    return {case: {"seconds": _first_step(overrides, case == "going on")} for case in ("beginning", "going on")}


def _first_step(overrides: tuple[str, ...], resumed: bool) -> float:
    began = time.perf_counter()
    with subprocess.Popen(_command(*overrides), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=_environment()) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if re.match(r"backbone +step", line):
                break
        seconds = time.perf_counter() - began
        run.send_signal(signal.SIGTERM)
        run.stdout.read()
    if run.returncode != 128 + signal.SIGTERM or any("Resumed" in line for line in said) != resumed:
        raise UserError(f"a run that was to be stopped ended with {run.returncode}:\n{''.join(said)[-2000:]}")
    return seconds


def _stages(steps: int) -> tuple[str, ...]:
    rates = "learning_rate: 1e-3, sparse_learning_rate: 0.02"
    return (f"stages={{backbone: {{trains: backbone, steps: {steps}, {rates}}}}}", "data.valid=null", "data.test=null")


def _train(*overrides: str) -> Any:
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    done = subprocess.run(_command(*overrides), cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(_command(*overrides))} failed:\n{done.stderr[-2000:]}")
    return json.loads((FOLDER / "run/summary.json").read_text(encoding="utf-8"))


def _command(*overrides: str) -> list[str]:
    command = [sys.executable, "-m", "recsys.train", "--config", "configs/default.yaml"]
    return [*command, f"output_dir={FOLDER / 'run'}", *overrides]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _report(arguments: argparse.Namespace, turns: Mapping[str, list[Measured]]) -> None:
    def middle(case: str, figure: str) -> float:
        return median(turn[figure] for turn in turns[case])

    stages = []
    for way in WAYS:
        pairs = zip(turns["stage, none"], turns[f"stage, {way}"], strict=True)
        ratios = sorted(with_["seconds"] / without["seconds"] - 1 for without, with_ in pairs)
        stages.append(
            {
                f"checkpoints every {EVERY} steps": way,
                "stage, s": f"{middle(f'stage, {way}', 'seconds'):.2f}",
                "training waits for each, ms": f"{middle(f'stage, {way}', 'waited_ms'):.0f}",
                "overhead": "" if way == "none" else f"{median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})",
            }
        )
    tables = []
    for way in ("background", "waiting"):
        case = f"table, {way}"
        waited, copied, size = (middle(case, figure) for figure in ("waited_ms", "copy_ms", "mib"))
        ratio = median(turn["waited_ms"] / turn["copy_ms"] for turn in turns[case])
        tables.append(
            {
                "written": way,
                "MiB": f"{size:,.0f}",
                "training waits, s": f"{waited / 1000:.2f}",
                "MiB/s": f"{size / waited * 1000:,.0f}",
                "copy and flush, MiB/s": f"{size / copied * 1000:,.0f}",
                "time to a copy's": f"{ratio:.2f}",
            }
        )
    starts = [
        {"a run that is": case, "command to first step, s": f"{middle(f'start, {case}', 'seconds'):.1f}"}
        for case in ("beginning", "going on")
    ]
    title = f"Checkpoints on {arguments.device}"
    for heading, rows in (("A stage", stages), ("A large table", tables), ("Starting", starts)):
        show(heading, rows)
    command = (
        f"python -m benchmarks.checkpoint --device {arguments.device} --turns {arguments.turns} "
        f"--steps {arguments.steps} --table-mib {arguments.table_mib}"
    )
    about: dict[str, Any] = {"command": command, "device": arguments.device, "note": arguments.note, **environment()}
    parts: list[Any] = [
        f"Medians of {arguments.turns} turns; ratios are those of each turn, with their range. A stage: "
        f"{arguments.steps:,} steps of `configs/default.yaml` on one rank; its seconds include those in which training "
        "waits.",
        stages,
        f"The first checkpoint of a model with a table of {arguments.table_mib:,} MiB, its optimizer's state included. "
        "In the background, training waits for the copy in memory alone; `MiB/s` is of that wait.",
        tables,
        starts,
        *([arguments.note] if arguments.note else []),
    ]
    lines: list[Line] = [
        {"kind": "turn", "case": case, "turn": number, **figures}
        for case, of_case in turns.items()
        for number, figures in enumerate(of_case, start=1)
    ]
    write(arguments.output / f"checkpoint_{arguments.device}", title, parts, about, lines)


if __name__ == "__main__":
    main()
