"""Runs over several hosts: their results, and what is told when one of them, a rank or a link is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hosts import Hosts, await_, hosts, needs_hosts
from runs import checkpoint_tensors
from test_lifetime import environment
from tiny import tiny_config, write_tiny_log

pytestmark = [pytest.mark.slow, needs_hosts]

SECONDS = 12
"""The time-out of the runs that lose something."""


def agent(nodes: str, processes: int, config: Path, *more: str, by: str = "torch.distributed.run") -> list[str]:
    """A host's torchrun, all of which meet on host0."""
    return [
        *(sys.executable, "-m", by, "--nnodes", nodes, "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29500", "--rdzv-id", "run", *more),
        *("-m", "recsys.train", "--config", str(config)),
    ]


def settings() -> dict[str, str]:
    return environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="eth0")


def write_config(folder: Path, **changes: object) -> Path:
    write_tiny_log(folder / "log")
    raw = {**tiny_config(folder / "log", folder / "out"), **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


@pytest.mark.parametrize(("count", "processes"), [(2, 2), (3, 1)])
def test_several_hosts_train_to_the_bits_of_one(tmp_path: Path, count: int, processes: int) -> None:
    def trained(name: str, count: int, processes: int) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(folder)
        with hosts(count, folder) as made:
            agents = [
                made.start(host, agent(str(count), processes, config), folder / f"told{host}", **settings())
                for host in range(count)
            ]
            told = [folder / f"told{host}" for host in range(count)]
            for process in agents:
                assert process.wait(300) == 0, "".join(path.read_text() for path in told)
        checkpoints = sorted((folder / "out/checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
        return checkpoint_tensors(checkpoints[-1], folder)

    several, one = trained("several", count, processes), trained("one", 1, count * processes)
    assert several.keys() == one.keys()
    assert all(torch.equal(several[name], one[name]) for name in one)


class Lost:
    """A run on two hosts of two ranks each, which is to lose something in mid-run."""

    def __init__(self, made: Hosts, folder: Path, by: str) -> None:
        self.made, self.folder = made, folder
        stages = {"joint": {"trains": "all", "epochs": 4000, "learning_rate": 0.001, "sparse_learning_rate": 0.01}}
        config = write_config(folder, stages=stages, rank_timeout_seconds=SECONDS)
        self.agents = [
            made.start(host, agent("2", 2, config, "--max-restarts", "0", by=by), self.log(host), **settings())
            for host in range(2)
        ]
        await_(lambda: "joint      step" in self.told(), 120, self.told)
        time.sleep(SECONDS / 4)  # five beats: the first steps take less than one, and the last beat is what is told

    def log(self, host: int) -> Path:
        return self.folder / f"told{host}"

    def told(self, *of: int) -> str:
        return "".join(self.log(host).read_text() for host in of or range(2) if self.log(host).exists())

    def process(self, rank: int) -> int:
        """The process of a rank; of two ranks on a host the lower has the lower id."""
        return self.living(rank // 2)[rank % 2]

    def living(self, host: int) -> list[int]:
        """The processes of a host's ranks that have not ended."""
        ps = ["ps", "-o", "pid=,stat=", "--ppid", str(self.agents[host].pid)]
        found = subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()
        return sorted(int(line.split()[0]) for line in found if line.split()[1][0] not in "ZX")

    def errors(self, *of: int) -> list[str]:
        """Lines of error, without those in which torchrun repeats them."""
        return re.findall(r"^(error: .*)$", self.told(*of), re.MULTILINE)

    def await_error(self, host: int) -> tuple[str, float]:
        seconds = await_(lambda: bool(self.errors(host)), 2 * SECONDS + 30, self.told)
        return self.errors(host)[0], seconds

    def await_end(self, *of: int) -> None:
        """Until the ranks of these hosts have ended: a second one might tell late; torchrun waits for longer."""
        await_(lambda: not any(self.living(host) for host in of), 60, self.told)

    def check(self, error: str, seconds: float, *named: str) -> None:
        assert all(name in error for name in named), error
        assert seconds < SECONDS, f"{error} was told after {seconds:.0f} s"


@pytest.fixture
def lost(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lost]:
    with hosts(2, tmp_path) as made:
        yield Lost(made, tmp_path, getattr(request, "param", "torch.distributed.run"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_is_gone_or_silent_is_named(lost: Lost, rank: int, how: signal.Signals) -> None:
    os.kill(lost.process(rank), how)
    seconds = await_(lambda: bool(lost.errors()), 2 * SECONDS + 30, lost.told)
    (error,) = lost.errors()
    lost.check(error, seconds, f"rank {rank} (host{rank // 2}, process ")
    others = [str(other) for other in range(4) if other != rank]
    await_(lambda: sorted(re.findall(r"^rank (\d) \(.*; its stack:", lost.told(), re.M)) == others, 30, lost.told)
    lost.await_end(0, 1)
    assert len(lost.errors()) == 1
    for other in range(4):  # where each stood
        stood = rf"^  rank {other} \(host{other // 2}, process \d+\): step \d+ of joint; [a-z_/]+\.py:\d+ "
        assert re.search(stood, lost.told(), re.M)


@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_is_lost_is_named(lost: Lost, host: int) -> None:
    """Its agent and ranks are killed; host0's had the store."""
    os.killpg(lost.agents[host].pid, signal.SIGKILL)
    error, seconds = lost.await_error(1 - host)
    named = ["ranks 2, 3 (host1)"] if host else ["has lost the store at "]
    lost.check(error, seconds, *named)
    lost.await_end(1 - host)
    assert len(lost.errors(1 - host)) == 1


@pytest.mark.parametrize("lost", ["recsys.agent"], indirect=True)
def test_a_link_that_is_cut_is_told_on_both_sides(lost: Lost) -> None:
    lost.made.cut(1)
    error, seconds = lost.await_error(0)
    lost.check(error, seconds, "ranks 2, 3 (host1) are gone or cut off")
    error, _ = lost.await_error(1)
    assert "has lost the store at " in error
    lost.await_end(0, 1)
    assert len(lost.errors(0)) == 1 and len(lost.errors(1)) == 1
    assert [of_host.wait(120) for of_host in lost.agents] == [1, 1]  # torchrun's own stays on the host that was cut off
