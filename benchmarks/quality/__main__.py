"""How good models are, side by side: train every case of a grid, once per seed, and compare the cases.

    python -m benchmarks.quality GRID.yaml [--jobs N] [--only CASE ...] [--report-only]

Each run is a process of its own. The report has every case's mean and spread and the differences that the grid's tables
ask for; docs/benchmarks.md has the keys of a grid. A run that is complete under the same settings is not run again, so
an interrupted grid goes on where it was. `search STUDY.yaml` instead finds settings: see `benchmarks.quality.search`.
"""

import argparse
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from benchmarks.quality.figures import Figures, digits
from benchmarks.quality.grid import Run, cases_of, load_grid
from benchmarks.quality.training import in_turns, train
from benchmarks.report import RESULTS, environment, show, shown_path, write
from recsys.cli import run_entry
from recsys.errors import UserError

_LOG_LINES = 15


def main() -> None:
    """Train and compare what the command line asks for."""
    if sys.argv[1:2] == ["search"]:
        from benchmarks.quality import search  # with optuna, which no grid needs

        search.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality",
        description="Train a grid of cases, compare them.",
        epilog="search STUDY.yaml finds settings instead; search --help has its options.",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="cases, seeds and questions; docs/benchmarks.md has the keys")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="train these cases alone; the report has all")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is there")
    parser.add_argument(
        "--landed",
        type=Path,
        metavar="REPORT.jsonl",
        help="an earlier report of this grid, whose figures stand for runs that are not here",
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="of runs that end well; else they are removed")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--runs", type=Path, default="outputs/quality", help="where the runs go (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill, too, ends the runs under way
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    grid = load_grid(arguments.grid)
    cases = cases_of(grid, arguments.runs / grid.name)
    if unknown := set(arguments.only or ()) - set(grid.cases):
        raise UserError(f"--only {min(unknown)}: no such case; there are {', '.join(grid.cases)}")
    figures = Figures(grid, cases, arguments.landed)
    runs = [] if arguments.report_only else in_turns([c for c in cases if c.section in (arguments.only or grid.cases)])
    todo = [run for run in runs if run.seed not in figures.of[run.case]]
    there = len(runs) - len(todo)
    if runs:
        print(f"{grid.name}: {len(runs)} runs, {there} already there, in {arguments.runs / grid.name}", flush=True)
    failed: dict[Run, int] = {}
    began = time.monotonic()
    with closing(train(todo, grid.nproc, arguments.jobs)) as ends:
        for done, (run, code, seconds) in enumerate(ends, start=1):
            label = f"{run.case}, seed {run.seed}"
            if code == 0 and figures.take(run):
                outcome = f"test AUC {digits(figures.of[run.case][run.seed]['test AUC'])}, {seconds:.0f} s"
                if not arguments.keep_checkpoints:
                    shutil.rmtree(run.directory / "checkpoints")
                _write(arguments, figures, failed, quiet=True)
            else:
                failed[run] = code
                outcome = f"FAILED with exit code {code}; its log is {run.log}"
                for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]:
                    print(f"{label} | {line}")
            minutes = math.ceil((time.monotonic() - began) / done * (len(todo) - done) / 60)
            left = f", about {minutes} min left" if done < len(todo) else ""
            print(f"{label}: {outcome}; {there + done}/{len(runs)} done{left}", flush=True)
    if any(figures.of.values()):
        show(grid.name, figures.case_rows(brief=True))
        _write(arguments, figures, failed)
    else:
        print(f"{grid.name}: no run is complete, so there is nothing to report", file=sys.stderr)
    if failed:
        print(f"{grid.name}: failed: {', '.join(f'{run.case} seed {run.seed}' for run in failed)}", file=sys.stderr)
        sys.exit(1)


def _write(arguments: argparse.Namespace, figures: Figures, failed: Mapping[Run, int], *, quiet: bool = False) -> None:
    """Write the report of what is there."""
    grid, note = figures.grid, arguments.note
    about = {
        "name": grid.name,
        "command": shlex.join(["python", "-m", "benchmarks.quality", shown_path(arguments.grid)]),
        "note": note,
        "jobs": arguments.jobs,
        "ranks": grid.nproc,
        "device": ", ".join(figures.told("device")),
        **environment(),
        # The runs tell which code trained them: with some of them kept from before it need not be today's.
        "commit": ", ".join(figures.told("commit")),
    }
    parts = [*figures.parts(failed), f"Trained {arguments.jobs} at a time.", *([note] if note else [])]
    stem = arguments.output / f"quality_{grid.name}"
    write(stem, f"Quality: {grid.name}", parts, about, figures.lines(failed), quiet=quiet)


if __name__ == "__main__":
    main()
