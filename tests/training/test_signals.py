"""Requests to stop: noted, repeated, ignored, and agreed on by all ranks at one step."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ranks import run_ranks

from recsys.errors import Stopped
from recsys.runtime import Ranks
from recsys.training.signals import Agreement, StopRequest

ROOT = Path(__file__).parents[2]


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", body],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


# The main thread waits in C, where no handler written in Python runs, until it is killed.
WAITING = """
import ctypes, os, signal, sys, threading, time
from recsys.training.signals import StopRequest

def others(*signals):
    def send():
        for pause, number in signals:
            time.sleep(pause)
            os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()

def wait_in_c():
    while True:
        ctypes.CDLL(None).pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may be run without, by nohup
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)  # to this thread: any may be given what a process is sent, and be late
        assert stop.signal is number
        # Forwarded, by torchrun perhaps as another one.
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_even_a_process_that_waits(second: signal.Signals) -> None:
    done = run(
        f"{WAITING}\nwith StopRequest():\n    others((0, signal.SIGTERM), (0.2, signal.SIGINT), (2.5, {int(second)}))\n"
        "    time.sleep(1)\n    print('goes on', flush=True)\n    wait_in_c()\n"
    )
    assert done.returncode == -second
    assert done.stdout == "goes on\n"


def test_the_grace_ends_a_process_that_waits() -> None:
    done = run(f"{WAITING}\nwith StopRequest(0.5):\n    others((0, signal.SIGTERM))\n    wait_in_c()\n")
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == "error: SIGTERM: not saved within 0.5 s; go on from the last checkpoint\n"


def test_what_ends_within_the_grace_is_left_alone() -> None:
    done = run(f"{WAITING}\nwith StopRequest(0.5):\n    signal.raise_signal(15)\ntime.sleep(1)\nprint('through')\n")
    assert (done.returncode, done.stdout) == (0, "through\n")


@pytest.mark.slow
def test_nohup_keeps_its_hangup_ignored_save_below_torchrun() -> None:
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from recsys.training.signals import StopRequest\n"
        "with StopRequest() as stop:\n    signal.raise_signal(signal.SIGHUP)\n    print(stop.signal)\n"
    )
    assert run(code).stdout == "None\n"
    assert run(code, TORCHELASTIC_RUN_ID="x").stdout == f"{signal.SIGHUP}\n"


def test_another_thread_than_the_main_one_is_refused_and_leaves_nothing() -> None:
    found: list[str] = []

    def enter() -> None:
        try:
            with StopRequest():
                found.append("entered")
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(found) == 1 and "main thread" in found[0]


def wishes(ranks: Ranks) -> list[tuple[int | None, bool]]:
    """What a rank learns in ten steps, in which ranks wish for different things."""
    learnt = []
    with Agreement(ranks) as agreement:
        for step in range(10):
            stop = signal.SIGINT if step == 5 and ranks.rank == 1 else None
            if step == 5 and ranks.rank == 0:
                stop = signal.SIGTERM
            agreed = agreement.exchange(stop, save=step == 2 and ranks.is_first)
            learnt.append((agreed.stop, agreed.save))
    return learnt


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_learn_the_same_one_step_late(world_size: int) -> None:
    expected: list[tuple[int | None, bool]] = [(None, False)] * 10
    expected[3], expected[6] = (None, True), (signal.SIGTERM, False)
    assert run_ranks(world_size, wishes) == [expected] * world_size


def test_one_rank_agrees_with_itself_at_once() -> None:
    (learnt,) = run_ranks(1, wishes)
    assert learnt[2] == (None, True) and learnt[5] == (signal.SIGTERM, False)
    assert set(learnt) == {(None, False), (None, True), (signal.SIGTERM, False)}


def stopped(ranks: Ranks) -> list[str]:
    """The group is given up and made again, as by one stage after another; the last ends by a signal."""
    ends = []
    for _ in range(2):
        try:
            with Agreement(ranks) as agreement:
                for step in range(100):
                    agreed = agreement.exchange(signal.SIGTERM if step == ranks.rank + 3 else None, save=False)
                    if agreed.stop is not None:
                        raise Stopped(agreed.stop, step)
        except Stopped as stop:
            ends.append(f"{stop} {stop.exit_code}")
    return ends


def test_a_stop_waits_for_what_is_under_way_at_the_same_step() -> None:
    (first, second) = run_ranks(2, stopped)
    assert first == second == ["stopped by SIGTERM at step 4; run the same command to go on 143"] * 2
