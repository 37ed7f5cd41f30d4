"""A job that loses a host goes on with those left: the real trainer, two agents of torchrun, one of which is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from test_lifetime import environment
from tiny import tiny_config, write_tiny_log

pytestmark = pytest.mark.slow


def test_a_job_goes_on_without_a_host_that_died(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    raw = tiny_config(tmp_path / "log", tmp_path / "out")
    raw["stages"] = {"joint": {"trains": "all", "epochs": 60, "learning_rate": 0.001, "sparse_learning_rate": 0.01}}
    raw["checkpoints"] = {"every_steps": 20}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "elastic"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "last_call_timeout=20,keep_alive_interval=1"),
        *("-m", "recsys.train", "--config", str(tmp_path / "config.yaml")),
    ]
    agents: list[subprocess.Popen[bytes]] = []
    for number in range(2):
        with (tmp_path / f"told-{number}").open("w") as told:
            settings = environment(OMP_NUM_THREADS="1")
            agents.append(subprocess.Popen(command, env=settings, stdout=told, stderr=told, start_new_session=True))
        # The first to come holds the store at which agents meet, and that one may not be lost. It waits 20 s for the
        # other, which a busy machine starts slowly: ranks that had begun would be ended and begun again.
        _await_store(port)
    try:
        _await_step(tmp_path, agents, 60)
        os.kill(agents[1].pid, signal.SIGKILL)
        assert agents[0].wait(240) == 0, _told(tmp_path)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    told = _told(tmp_path)
    assert "4 ranks on cpu" in told and "2 ranks on cpu" in told
    assert (resumed := re.search(r"Resumed from \S+/step-(\d+): joint", " ".join(told.split())))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["world_size"] == 2 and int(resumed[1]) >= 20
    assert summary["stages"]["joint"]["epochs"] == 60
    assert summary["stages"]["joint"]["examples"] == 60 * 900  # each row once an epoch, on four ranks and on two


def _told(folder: Path) -> str:
    return "".join((folder / f"told-{number}").read_text() for number in range(2))


def _await_store(port: int) -> None:
    until = time.monotonic() + 120
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert time.monotonic() < until, "the first agent opens no store"
        time.sleep(0.1)


def _await_step(folder: Path, agents: list[subprocess.Popen[bytes]], step: int) -> None:
    until = time.monotonic() + 180
    while not any(int(found) >= step for found in re.findall(r"joint +step +(\d+)/", _told(folder))):
        assert time.monotonic() < until and all(agent.poll() is None for agent in agents), _told(folder)
        time.sleep(0.1)
