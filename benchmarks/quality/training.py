"""Runs as processes of their own, some at a time, each under a lock and with a log."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from functools import partial

from benchmarks.quality.grid import Case, Run
from recsys.errors import UserError

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def in_turns(cases: Sequence[Case]) -> list[Run]:
    """Every case's first run, then every case's second, so that a part of a grid already compares all cases."""
    longest = max((len(case.runs) for case in cases), default=0)
    return [case.runs[turn] for turn in range(longest) for case in cases if turn < len(case.runs)]


def train(runs: Sequence[Run], nproc: int, jobs: int) -> Generator[tuple[Run, int, float]]:
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
                running[run] = (start(run, nproc, threads), time.monotonic())
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
        end([process for process, _ in running.values()])


def end(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End runs: all are asked to, and those that do not within a minute are killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def start(run: Run, nproc: int, threads: int, *, dies_with_us: bool = False) -> subprocess.Popen[bytes]:
    """Start a run that holds the lock on its log as long as it lives; it goes on where it was cut off.

    One that its directory has under other settings is kept under another name, cut off or not.

    Args:
        run: what to train.
        nproc: its ranks.
        threads: of each rank, unless OMP_NUM_THREADS says otherwise.
        dies_with_us: whether the run is asked to end when this process does, however that ends.

    Raises:
        UserError: a process started earlier still does.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []
    command = [sys.executable, *launch, "-m", "recsys.train", "--config", run.path, *run.overrides]
    if run.makes_way:  # else an unfinished one under other settings would be refused, and could not be begun again
        command.append("resume=never")
    # Looked up here: between fork and exec nothing may be loaded.
    bind = partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) if dies_with_us else None
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
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=bind,
        )
