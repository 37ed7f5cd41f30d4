"""What a process is set up to do."""

import contextlib
import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import pytest
import torch
import torch.distributed as dist

from recsys.config import ConfigError
from recsys.runtime import agree_on_device, leave_a_core, meet, process_group

FAULTS = """
import resource, sys
import numpy as np
from recsys.runtime import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(51):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (24, 2):
        np.empty(megabytes << 18, np.float32).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_asking_for_its_pages() -> None:
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            capture_output=True,
            text=True,
            check=True,
            env={"NUMPY_MADVISE_HUGEPAGE": "0"},
        )
        return int(done.stdout)

    assert faults("keep") < 500 < faults("leave") / 5


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_fewer_gpus_than_processes_are_refused_and_no_cpu_steps_in(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = f"device: {device} needs a GPU for each .* 2 processes, and it has 1; start"
    with pytest.raises(ConfigError, match=message), process_group(device):
        pass


def test_without_gpus_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with process_group("auto") as ranks:
        assert ranks.device.type == "cpu"


def test_ranks_on_other_kinds_of_devices_are_refused() -> None:
    store = dist.HashStore()
    for rank in (2, 0):
        agree_on_device(store, "cuda", rank)
    with pytest.raises(ConfigError, match="rank 1 has cpu, but rank 2 has cuda: not every machine has GPUs; set dev"):
        agree_on_device(store, "cpu", 1)


def test_ranks_meet_anew_whatever_earlier_ones_left_in_the_store() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(order: list[int], world_size: int) -> list[dist.Store]:
        def join(rank: int) -> dist.Store:
            return meet(dist.TCPStore("127.0.0.1", server.port, is_master=False), rank, world_size)

        with ThreadPoolExecutor(world_size) as threads:
            futures = {}
            for rank in order:
                futures[rank] = threads.submit(join, rank)
                with contextlib.suppress(FutureTimeout):  # so that each finds what those before it have left
                    futures[rank].result(0.2)
            return [futures[rank].result(30) for rank in sorted(order)]

    for number, (order, world_size) in enumerate(
        [([0, 1, 2], 3), ([2, 1, 0], 3), ([1, 0], 2), ([0], 1), ([3, 1, 0, 2], 4)]
    ):
        stores = attempt(order, world_size)
        assert not any(store.check(["left"]) for store in stores)
        stores[0].set("left", str(number))
        assert [store.get("left").decode() for store in stores] == [str(number)] * world_size


def test_ranks_meet_after_an_attempt_that_ended_half_way() -> None:
    store = dist.HashStore()
    store.set("hilorec/meeting", "of a first rank that died")
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(meet, store, 1, 2)
        while not store.check(["hilorec/of a first rank that died/1"]):
            assert not second.done()
        first = threads.submit(meet, store, 0, 2)
        first.result(30).set("here", "1")
        assert second.result(30).check(["here"])


@pytest.mark.parametrize(
    ("cores", "processes", "told", "threads"), [(8, 1, None, 7), (8, 2, None, 3), (2, 2, None, 1), (8, 1, "5", 2)]
)
def test_a_core_is_left_to_the_reader(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, told: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # as OpenMP found it
        leave_a_core(processes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
