"""How good models are, side by side: `benchmarks/quality.py GRID.yaml [--jobs N] [--only CASE ...] [--report-only]`.

Trains every case of a grid (docs/benchmarks.md) once a seed, each run a process of its own, and reports every case's
mean and spread and the differences that the grid's tables ask for. A run that is complete under the same settings is
not run again, so an interrupted grid goes on where it was.
"""

import argparse
import fcntl
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from figures import Figures, digits
from grid import Case, Run, cases_of, load_grid
from report import RESULTS, environment, show, shown_path, write

from recsys.cli import run_entry
from recsys.errors import UserError

_LOG_LINES = 15
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/quality.py", description="Train a grid of cases, compare them.")
    parser.add_argument("grid", metavar="GRID.yaml", help="cases, seeds and questions; docs/benchmarks.md has the keys")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="train these cases alone; the report has all")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is there")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of runs that end well; else they are removed")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--runs", type=Path, default="outputs/quality", help="where the runs go (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (default: beside this file)")
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
    figures = Figures(grid, cases)
    runs = [] if arguments.report_only else _in_turns([c for c in cases if c.section in (arguments.only or grid.cases)])
    todo = [run for run in runs if run.seed not in figures.of[run.case]]
    there = len(runs) - len(todo)
    if runs:
        print(f"{grid.name}: {len(runs)} runs, {there} already there, in {arguments.runs / grid.name}", flush=True)
    failed: dict[Run, int] = {}
    began = time.monotonic()
    with closing(_train(todo, grid.nproc, arguments.jobs)) as ends:
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


def _in_turns(cases: Sequence[Case]) -> list[Run]:
    """Every case's first run, then every case's second, so that a part of a grid already compares all cases."""
    longest = max((len(case.runs) for case in cases), default=0)
    return [case.runs[turn] for turn in range(longest) for case in cases if turn < len(case.runs)]


def _train(runs: Sequence[Run], nproc: int, jobs: int) -> Generator[tuple[Run, int, float]]:
    """Train all, at most `jobs` at once, and tell of each end: the run, its exit code, its seconds.

    Closing this ends the runs under way.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * nproc))
    waiting = deque(runs)
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    # Only noted as it arrives: an exception while a run is being started would lose sight of it.
    interrupted: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: interrupted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not interrupted:
                run = waiting.popleft()
                running[run] = (_start(run, nproc, threads), time.monotonic())
            if interrupted:
                raise KeyboardInterrupt
            time.sleep(_POLL_SECONDS)
            for run, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    yield run, process.returncode, time.monotonic() - began
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(run: Run, nproc: int, threads: int) -> subprocess.Popen[bytes]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []
    command = [sys.executable, *launch, "-m", "recsys.train", "--config", run.path, *run.overrides]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        # The run inherits the lock, so that it holds as long as the run lives, whatever becomes of this process.
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run.log}: an earlier process still trains this run; wait for it or end it") from None
        log.truncate(0)
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def _write(arguments: argparse.Namespace, figures: Figures, failed: Mapping[Run, int], *, quiet: bool = False) -> None:
    """Write the report of what is there."""
    grid, note = figures.grid, arguments.note
    result = {
        "name": grid.name,
        "command": shlex.join(["python", "benchmarks/quality.py", shown_path(arguments.grid)]),
        "note": note,
        "jobs": arguments.jobs,
        **figures.result(failed),
        **environment(),
        # The runs tell which code trained them: with some of them kept from before it need not be today's.
        "commit": ", ".join(figures.told("commit")),
    }
    parts = [*figures.parts(failed), f"Trained {arguments.jobs} at a time.", *([note] if note else [])]
    write(arguments.output / f"quality_{grid.name}", f"Quality: {grid.name}", parts, result, quiet=quiet)


if __name__ == "__main__":
    main()
