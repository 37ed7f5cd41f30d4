"""A rank that is gone, silent or late is named by one line of all ranks; one that fails by itself tells why."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch.distributed as dist

from recsys import watch
from recsys.cli import run_entry
from recsys.runtime import process_group

SECONDS = 4.0


def _run(folder: str, how: str) -> None:
    """A run whose rank 1 comes to no good, as the process of each rank has it."""
    file = os.open(f"{folder}/{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)

    def body() -> None:
        with process_group("cpu", SECONDS) as here, watch.positioned(lambda: f"step {here.rank}7"):
            if here.rank == 1:
                time.sleep(2)  # some beats
                COMES_TO[how]()
            dist.barrier()

    run_entry(body)


def _late() -> None:
    time.sleep(60)


def _wrong() -> None:
    raise RuntimeError("the store of socks is empty")


COMES_TO = {
    "silent": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "late": _late,
    "wrong": _wrong,
}


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("silent", r"error: rank 1 \(\S+, process \d+\) is gone or cut off \((not heard of for 2 s|Timed out .*)\)"),
        ("killed", r"error: rank 1 \(\S+, process \d+\) is gone or cut off \(.*onnection"),
        ("late", r"error: rank 1 \(\S+, process \d+\) did not come within 4 s to what the others wait for"),
        ("wrong", "RuntimeError: the store of socks is empty"),
    ],
)
def test_one_line_names_who_is_missing(tmp_path: Path, how: str, told: str) -> None:
    processes, _store = ranks.start(3, [(_run, (str(tmp_path), how))] * 3)
    try:
        until = time.monotonic() + 90
        for process in (processes[0], processes[2]):
            process.join(until - time.monotonic())
            assert process.exitcode == 1
        errors = "".join((tmp_path / str(rank)).read_text() for rank in range(3))
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert len(re.findall(f"^{told}", errors, re.MULTILINE)) == 1, errors
    assert errors.count("error: ") == (how != "wrong")
    if how != "wrong":
        for rank in range(3):
            assert re.search(rf"^  rank {rank} \(\S+, process \d+\): step {rank}7; ", errors, re.MULTILINE)
        assert re.findall(r"^rank (\d) .*; its stack:$", errors, re.MULTILINE).count("1") == (how == "late")
