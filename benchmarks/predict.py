"""How fast files are predicted, by an artefact and by a checkpoint on one rank, beside evaluation of the same rows.

    python -m benchmarks.predict [--turns N] [--rows N]

Every command runs in a process of its own, as a user starts it, in turns that take them one after another. Seconds are
those from opening the files, or from the first batch in evaluation, whose files are open by then, to the last row;
loading the model is not counted. Evaluation computes its figures, and writes its predictions as well where that is
said. The model is that of configs/default.yaml, trained for a few steps, its rows those of the embedded log; evaluation
and the checkpoint take them in batches of its size, and of 8,192.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import RESULTS, ROOT, Line, environment, number, show, write
from recsys.checkpoint.layout import checkpoints
from recsys.cli import run_entry
from recsys.errors import UserError

FOLDER = ROOT / "outputs/predict_benchmark"
AIM = 0.77
"""Of evaluation's rows per second, at least."""

WAYS = {
    "evaluate": ("recsys.evaluate", "recsys.training.evaluation.evaluate"),
    "evaluate --predictions": ("recsys.evaluate", "recsys.training.evaluation.evaluate"),
    "predict --checkpoint": ("recsys.predict", "recsys.training.scoring.predict"),
    "predict --artifact": ("recsys.predict", "recsys.serving.predicting.predict"),
}
"""By way, the command and the function that is timed within it."""

BATCHES = ("512", "8192")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.predict", description="Time predictions, beside evaluation.")
    parser.add_argument("--turns", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=400_000, help="that are predicted (default: %(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # a process that is timed
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        _timed(arguments.way, arguments.options)
    else:
        run_entry(lambda: _benchmark(arguments))


def _timed(way: str, options: list[str]) -> None:
    """Run a way's command, and print the seconds that its function took as the last line."""
    command, function = WAYS[way]
    module, _, name = function.rpartition(".")
    inner: Callable[..., Any] = getattr(import_module(module), name)
    seconds = []

    def timed(*of: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = inner(*of, **named)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(import_module(module), name, timed)
    sys.argv = [command, *options]
    try:
        import_module(command).main()
    except SystemExit as end:
        if end.code:
            raise
    print(json.dumps({"seconds": seconds[0]}))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.turns < 1 or arguments.rows < 1:
        raise UserError("--turns and --rows must be at least 1")
    checkpoint, artifact = _model(arguments.rows)
    turns: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.turns):
        for way in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
            model = artifact if "artifact" in way else checkpoint
            for batch in BATCHES if model is checkpoint else ("",):
                turns.setdefault((way, batch), []).append(_seconds(way, model, batch))
        print(f"turn {turn + 1} of {arguments.turns}", flush=True)
    _report(arguments, turns)


def _model(rows: int) -> tuple[Path, Path]:
    """A checkpoint and its artefact; so many rows lie in its test split."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    rate = "learning_rate: 1e-3, sparse_learning_rate: 0.02"
    _run(
        "recsys.train",
        *("--config", "configs/default.yaml", f"output_dir={FOLDER / 'run'}", "device=cpu"),
        *(f"data.{split}={FOLDER / 'log' / split}/*.parquet" for split in ("train", "valid", "test")),
        f"data.synthetic={{directory: {FOLDER / 'log'}, train_rows: 20000, valid_rows: 1000, test_rows: {rows}}}",
        f"stages={{joint: {{trains: all, steps: 20, {rate}}}}}",
    )
    (checkpoint,) = checkpoints(FOLDER / "run/checkpoints")
    _run("recsys.export", "--checkpoint", str(checkpoint), "--output", str(FOLDER / "artifact"))
    return checkpoint, FOLDER / "artifact"


def _seconds(way: str, model: Path, batch: str) -> float:
    """Of a way in a process of its own; what it wrote is deleted."""
    output = FOLDER / "predictions"
    options = ["--artifact" if "artifact" in way else "--checkpoint", str(model)]
    if way.startswith("predict"):
        options += ["--input", str(FOLDER / "log/test"), "--output", str(output)]
    elif "--predictions" in way:
        options += ["--predictions", str(output)]
    if batch:
        options.append(f"data.eval_batch_size={batch}")
    told = _run("benchmarks.predict", "--way", way, "--", *options)
    shutil.rmtree(output, ignore_errors=True)
    return float(json.loads(told.splitlines()[-1])["seconds"])


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _report(arguments: argparse.Namespace, turns: Mapping[tuple[str, str], list[float]]) -> None:
    tables = [_table(arguments.rows, turns, batch) for batch in BATCHES]
    for batch, table in zip(BATCHES, tables, strict=True):
        show(f"Batches of {int(batch):,}", table)
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.predict --turns {arguments.turns} --rows {arguments.rows}",
        "note": arguments.note,
        **environment(),
    }
    parts: list[Any] = [
        f"{arguments.rows:,} rows of the embedded log by the model of `configs/default.yaml`, on one rank. Medians of "
        f"{arguments.turns} turns; ratios are those of each turn, with their range. The aim is {AIM} of `evaluate`. "
        "Loading the model is not counted.",
    ]
    for batch, table in zip(BATCHES, tables, strict=True):
        parts += [f"Evaluation and the checkpoint in batches of {int(batch):,} rows:", table]
    parts += [arguments.note] if arguments.note else []
    lines: list[Line] = [
        {"kind": "turn", "way": way, "batch": int(batch) if batch else None, "turn": turn, "seconds": seconds}
        for (way, batch), of_way in turns.items()
        for turn, seconds in enumerate(of_way, start=1)
    ]
    write(arguments.output / "predict_cpu", "Predicting", parts, about, lines)


def _table(rows: int, turns: Mapping[tuple[str, str], list[float]], batch: str) -> list[dict[str, str]]:
    """A row for each way, beside evaluation in batches of a size."""
    table = []
    base = turns["evaluate", batch]
    for way in WAYS:
        seconds = turns.get((way, batch)) or turns[way, ""]
        ratios = sorted(there / here for there, here in zip(base, seconds, strict=True))
        table.append(
            {
                "way": way,
                "rows/s": number(rows / median(seconds)),
                "to evaluate": f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            }
        )
    return table


if __name__ == "__main__":
    main()
