"""Real launches by `recsys.agent`, whose ends are those of their ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, sys, time
from pathlib import Path

with Path(sys.argv[1], os.environ["RANK"]).open("a") as begun:
    begun.write("x")
if os.environ["RANK"] == "1" and sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
if os.environ["RANK"] == "1" and sys.argv[2] != "sleeps":
    sys.exit(int(sys.argv[2]))
time.sleep(600 if sys.argv[2] != "0" else 0)
"""


def command(folder: Path, end: str) -> list[str]:
    (folder / "rank.py").write_text(RANK)
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    return [sys.executable, "-m", "recsys.agent", *options, str(folder / "rank.py"), str(folder), end]


@pytest.mark.parametrize(
    ("end", "code", "runs"),
    [
        ("2", 2, 1),
        ("3", 3, 2),
        pytest.param("0", 0, 1, marks=pytest.mark.slow),
        pytest.param("killed", 137, 2, marks=pytest.mark.slow),
    ],
)
def test_it_ends_as_the_rank_that_failed_and_starts_again_what_may_help(
    tmp_path: Path, end: str, code: int, runs: int
) -> None:
    done = subprocess.run(command(tmp_path, end), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "1").read_text() == "x" * runs
    assert "Traceback" not in done.stderr
    assert ("Root Cause" in done.stderr) == (code != 0)


def test_hosts_that_do_not_meet_are_one_line(tmp_path: Path) -> None:
    alone = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--rdzv-conf",
        "join_timeout=1",
    ]
    run, agent, module, *given = command(tmp_path, "0")
    done = subprocess.run([run, agent, module, *alone, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "\nerror: hosts did not meet (RendezvousTimeoutError); see that" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_a_rendezvous_that_cannot_be_left_hides_no_ranks_end(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(
        "from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous\n"
        "from recsys import agent\n"
        "def gone(self):\n    raise OSError('the store is gone')\n"
        "StaticTCPRendezvous.shutdown = gone\n"
        "agent.main()\n"
    )
    given = [*command(tmp_path, "2")[3:-3], "--master-port", "0", *command(tmp_path, "2")[-3:]]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "agent.py"), *given], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Root Cause" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_is_its_end_too(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path, "sleeps"), stderr=subprocess.PIPE, text=True) as agent:
        until = time.monotonic() + 60
        while not (tmp_path / "1").exists() and time.monotonic() < until:
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        _, told = agent.communicate(timeout=60)
    assert agent.returncode == 143, told
    assert "Traceback" not in told
