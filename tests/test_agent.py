"""Real launches by `recsys.agent`, whose ends are those of their ranks."""

import os
import signal
import socket
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


def test_it_ends_as_its_ranks_where_nobody_takes_what_it_tells(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run(command(tmp_path, "2"), stdout=full, stderr=full, timeout=120).returncode == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --rdzv-conf join_timeout=1", "RendezvousTimeoutError"),
        (
            "--node-rank 1 --master-addr 127.0.0.1 --master-port 1 --rdzv-conf timeout=1",
            "DistNetworkError: The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, 1).",
        ),
    ],
    ids=["timeout", "static"],
)
def test_hosts_that_do_not_meet_are_one_line(tmp_path: Path, options: str, why: str) -> None:
    run, agent, module, *given = command(tmp_path, "0")
    alone = ["--nnodes", "2", *options.split()]
    done = subprocess.run([run, agent, module, *alone, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert f"\nerror: hosts did not meet ({why}); see that" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


LATER = """
import os, sys, time
from pathlib import Path

Path(sys.argv[1], f"began-{os.environ['RANK']}").touch()
while not all(Path(sys.argv[1], name).exists() for name in ("began-0", "began-1", f"end-{os.environ['RANK']}")):
    time.sleep(0.1)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("rendezvous", "code", "restarts"),
    [
        ("c10d", 2, 1),
        ("c10d", 1, 1),
        ("static", 3, 1),
        pytest.param("c10d", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_host_ends_as_its_own_ranks_where_that_of_the_store_has_gone(
    tmp_path: Path, rendezvous: str, code: int, restarts: int
) -> None:
    """Though torchrun looks at the store again and again, and again when it starts ranks anew."""
    (tmp_path / "later.py").write_text(LATER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", rendezvous, "--rdzv-id", "it"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    if rendezvous == "static":
        options += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents = [
        subprocess.Popen(
            [
                *[sys.executable, "-m", "recsys.agent", *options, "--node-rank", str(number)],
                *(["--rdzv-conf", f"is_host={int(number == 0)}"] if rendezvous == "c10d" else []),
                *[str(tmp_path / "later.py"), str(tmp_path), end],
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, end in enumerate(["2", str(code)])
    ]
    try:
        # Which of the two has rank 0 is the rendezvous's to say; the store's host is the first.
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("began-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        ranks = {agent.pid: rank_below(agent.pid) for agent in agents}
        (tmp_path / f"end-{ranks[agents[0].pid]}").touch()
        told = agents[0].communicate(timeout=60)[1]
        assert agents[0].returncode == 2, told
        time.sleep(2)
        assert agents[1].poll() is None
        (tmp_path / f"end-{ranks[agents[1].pid]}").touch()
        told = agents[1].communicate(timeout=60)[1]
    finally:
        for agent in agents:
            agent.kill()
    assert agents[1].returncode == code, told
    assert "Root Cause" in told and "Traceback" not in told
    assert ("\nwarning: the hosts do not meet again (" in f"\n{told}") == (code != 2)


def rank_below(pid: int) -> str:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    (rank,) = [variable[5:].decode() for variable in variables if variable.startswith(b"RANK=")]
    return rank


MET = """
import sys, time
from pathlib import Path
from torch import distributed as dist

dist.init_process_group("gloo")
Path(sys.argv[1], f"met-{dist.get_world_size()}").touch()
dist.barrier()
time.sleep(0 if dist.get_world_size() == 2 else 600)
"""


@pytest.mark.slow
def test_a_host_that_comes_later_joins_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "met.py").write_text(MET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "it"]
    options += ["--local-addr", "127.0.0.1", "--monitor-interval", "0.1"]
    agents = []
    try:
        for number in range(2):
            conf = f"is_host={int(number == 0)},last_call_timeout=1,read_timeout=20"
            run = [sys.executable, "-m", "recsys.agent", *options, "--rdzv-conf", conf]
            agents.append(
                subprocess.Popen(
                    [*run, str(tmp_path / "met.py"), str(tmp_path)],
                    env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            until = time.monotonic() + 60
            while not (tmp_path / f"met-{number + 1}").exists() and time.monotonic() < until:
                time.sleep(0.1)
        for agent in agents:
            told = agent.communicate(timeout=60)[1]
            assert agent.returncode == 0, told
    finally:
        for agent in agents:
            agent.kill()
    assert (tmp_path / "met-1").exists() and (tmp_path / "met-2").exists()


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
