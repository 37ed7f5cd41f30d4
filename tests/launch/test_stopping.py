"""Real launches that are signalled, killed and restarted: by torchrun and torchx, on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_lifetime import ends, environment

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
STEPS = str(ROOT / "tests" / "steps.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHX = [str(BINARIES / "torchx"), "run", "-s", "local_cwd", "-cfg", "log_dir=logs", "dist.ddp", "-j", "1x2"]
LAUNCHERS = {"torchrun": TORCHRUN, "torchx": TORCHX}

pytestmark = pytest.mark.slow


@pytest.fixture
def unused_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def launched(folder: Path, *command: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a session of its own, as from another terminal; what it wrote is in `told`."""
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, LOGLEVEL="WARNING", OMP_NUM_THREADS="1", **more)
    with (folder / "told").open("w") as told:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=told, stderr=told, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for file in folder.glob("*.pid"):
            if not ends(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def told(folder: Path) -> str:
    """What torchrun and its ranks wrote: to TorchX's logs, whose console can lose lines, or the console."""
    return "".join(file.read_text() for file in [*folder.glob("logs/torchx/*/*/[0-9]/std???.log")] or [folder / "told"])


def await_that(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def ranks(folder: Path, attempt: int = 0, count: int = 2) -> list[int]:
    """Process ids of an attempt's ranks, once all take steps."""
    files = [folder / f"{attempt}-{rank}.pid" for rank in range(count)]
    await_that(lambda: all(file.exists() for file in files), f"the ranks do not begin: {told(folder)}")
    return [int(file.read_text()) for file in files]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_the_launcher_saves_on_all_ranks_at_one_step(
    tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    with launched(tmp_path, *LAUNCHERS[launcher], STEPS, str(tmp_path)) as process:
        pids = ranks(tmp_path)
        process.send_signal(number)
        assert process.wait(60) == 1  # theirs, not ours to change
        assert all(map(ends, pids))
    # torchx passes every signal on as SIGTERM.
    name = "SIGTERM" if launcher == "torchx" else number.name
    first, second = ((tmp_path / f"{rank}.saved").read_text() for rank in range(2))
    assert first == second and first.startswith(f"{name} ")
    line = f"stopped by {name} at step {first.split()[1]}; run the same command to go on"
    assert told(tmp_path).count(line) == 1


def test_a_signal_to_one_rank_stops_all_and_names_the_cause(tmp_path: Path) -> None:
    with launched(tmp_path, *TORCHRUN, STEPS, str(tmp_path)) as process:
        os.kill(ranks(tmp_path)[1], signal.SIGTERM)
        assert process.wait(60) == 1
    assert (tmp_path / "0.saved").read_text() == (tmp_path / "1.saved").read_text()
    report = told(tmp_path)
    assert re.search(r"Root Cause.*rank +: 0 .*exitcode +: 143 .*traceback : stopped by SIGTERM", report, re.DOTALL)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_signal_ends_what_would_save_for_ever(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "slow").touch()
    with launched(tmp_path, *LAUNCHERS[launcher], STEPS, str(tmp_path), "600") as process:
        pids = ranks(tmp_path)
        process.send_signal(signal.SIGINT)
        time.sleep(4)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert all(map(ends, pids))
        process.wait(60)
    assert not list(tmp_path.glob("*.saved"))


def test_torchrun_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    command = [*TORCHRUN, STEPS, str(tmp_path), "600"]
    with launched(tmp_path, *command, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3") as process:
        pids = ranks(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 1
        assert all(map(ends, pids))
    assert "forcefully exiting via 9" in told(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_rank_outlives_a_killed_torchrun(tmp_path: Path, launcher: str) -> None:
    with launched(tmp_path, *LAUNCHERS[launcher], STEPS, str(tmp_path)) as process:
        pids = ranks(tmp_path)
        os.kill(parent(pids[0]), signal.SIGKILL)
        assert all(map(ends, pids))
        assert process.wait(60) != 0


@pytest.mark.parametrize("retries", ["0", "3"])
def test_neither_rank_nor_torchrun_outlives_a_killed_torchx(tmp_path: Path, retries: str) -> None:
    with launched(tmp_path, *TORCHX, "--max_retries", retries, STEPS, str(tmp_path)) as process:
        pids = ranks(tmp_path)
        torchrun = parent(pids[0])
        assert parent(torchrun) == process.pid
        process.kill()
        assert all(map(ends, [*pids, torchrun]))
    assert not list(tmp_path.glob("1-*.pid"))


def test_a_killed_torchx_ends_two_nodes_on_this_machine(tmp_path: Path, unused_port: str) -> None:
    command = [*TORCHX[:-1], "2x1", "--rdzv_port", unused_port]
    with launched(tmp_path, *command, STEPS, str(tmp_path)) as process:
        pids = ranks(tmp_path)
        torchruns = [parent(pid) for pid in pids]
        assert len(set(torchruns)) == 2
        process.kill()
        assert all(map(ends, [*pids, *torchruns]))


def test_ranks_do_not_begin_below_a_torchrun_whose_torchx_was_killed(tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(f"import pathlib, sys, time\npathlib.Path(sys.argv[1], 'early').touch()\ntime.sleep(3)\n{CHAINED}")
    with launched(tmp_path, *TORCHX, str(late), str(tmp_path)) as process:
        await_that((tmp_path / "early").exists, f"no rank starts: {told(tmp_path)}")
        process.kill()
        process.wait()
        await_that(lambda: "has ended; launch the run again" in told(tmp_path), "a rank begins")
    assert not list(tmp_path.glob("*.pid"))


CHAINED = f"import runpy; runpy.run_path({STEPS!r}, run_name='__main__')\n"


def test_a_run_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    shell = f"nohup {' '.join(TORCHX)} {STEPS} {tmp_path} & echo $! > torchx.pid"
    with launched(tmp_path, "bash", "-c", shell) as process:
        pids = ranks(tmp_path)
        process.wait(60)
        time.sleep(4)  # the watch would have seen it in one
        assert not any(ended(pid) for pid in pids)
        torchx = int((tmp_path / "torchx.pid").read_text())
        os.kill(torchx, signal.SIGTERM)
        assert all(map(ends, [*pids, torchx]))
    assert (tmp_path / "0.saved").read_text().startswith("SIGTERM ")


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "command",
    [[*TORCHRUN, "--max-restarts", "2"], [*TORCHX, "--max_retries", "2"]],
    ids=["torchrun", "torchx"],
)
def test_a_killed_rank_starts_all_again_and_they_meet(tmp_path: Path, command: list[str]) -> None:
    """Without a part of the store of their own they would connect to those before them, and hang."""
    with launched(tmp_path, *command, STEPS, str(tmp_path)) as process:
        os.kill(ranks(tmp_path)[1], signal.SIGKILL)
        os.kill(ranks(tmp_path, attempt=1)[0], signal.SIGKILL)
        ranks(tmp_path, attempt=2)
        process.terminate()
        assert process.wait(60) == 1
    assert (tmp_path / "0.saved").read_text() == (tmp_path / "1.saved").read_text()


def test_nodes_that_count_their_restarts_differently_meet(tmp_path: Path, unused_port: str) -> None:
    command = [*TORCHX[:-1], "2x1", "--max_retries", "2", "--rdzv_port", unused_port]
    with launched(tmp_path, *command, STEPS, str(tmp_path)) as process:
        first = ranks(tmp_path)
        os.kill(first[1], signal.SIGKILL)
        both = [tmp_path / f"{attempt}-{rank}.pid" for attempt in (0, 1) for rank in (0, 1)]

        def anew() -> list[int]:
            return [pid for file in both if file.exists() and (pid := int(file.read_text())) not in first]

        await_that(lambda: len(anew()) == 2, f"no new ranks: {told(tmp_path)}")
        process.terminate()
        process.wait(60)
    assert (tmp_path / "0.saved").read_text() == (tmp_path / "1.saved").read_text()
