"""What a process is set up to do."""

import os

import pytest
import torch

from recsys.config import ConfigError
from recsys.meeting import MeetingError, Place
from recsys.runtime import ASKED_GPUS, _do_without_gpus, device_type, leave_a_core, process_group


def test_fewer_gpus_than_processes_are_refused_where_gpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    message = "device: cuda needs a GPU for each .* 2 processes, and it has 1; start"
    with pytest.raises(ConfigError, match=message), process_group("cuda"):
        pass
    monkeypatch.setenv(ASKED_GPUS, "2")
    message = "device: the job asks for 2 GPUs on each machine, and torch finds 1 on .* for 2 processes;"
    with pytest.raises(ConfigError, match=message), process_group("auto"):
        pass


def test_auto_is_the_cpu_where_there_are_fewer_gpus_than_processes_and_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in range(2):
        _do_without_gpus("auto", Place(rank, 2, rank, 2))
    told = (
        "device: auto is the CPU here, as this machine has 1 GPU for 2 processes; to compute on it, start 1 at most\n"
    )
    assert capsys.readouterr().err == told
    assert (device_type("auto", 2), device_type("auto", 1)) == ("cpu", "cuda")
    _do_without_gpus("cpu", Place(0, 2, 0, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _do_without_gpus("auto", Place(0, 2, 0, 2))
    assert capsys.readouterr().err == ""


def test_without_gpus_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with process_group("auto") as ranks:
        assert ranks.device.type == "cpu"


def test_a_job_that_asks_for_gpus_and_has_none_does_not_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv(ASKED_GPUS, "8")
    message = "device: the job asks for 8 GPUs on each machine, and torch finds none on .*; .*set device=cpu"
    with pytest.raises(ConfigError, match=message), process_group("auto"):
        pass
    with process_group("cpu") as ranks:
        assert ranks.device.type == "cpu"


def test_a_network_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    told = r"GLOO_SOCKET_IFNAME: .* has no network interface ib7, but .*\blo\b.*; TorchX sets it"
    with pytest.raises(MeetingError, match=told), process_group("cpu"):
        pass
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with process_group("cpu"):
        pass


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
