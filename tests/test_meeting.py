"""How ranks find one another, and what is told where they do not."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from tiny import tiny_config, write_tiny_log

from recsys.config import ConfigError
from recsys.errors import TEMPORARY
from recsys.meeting import MeetingError, Patience, Place, agree_on_device, meet, open_store, told_place

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}
"""What torchrun tells the first of two ranks."""


def test_ranks_on_other_kinds_of_devices_are_refused() -> None:
    store = dist.HashStore()
    for rank in (2, 0):
        agree_on_device(store, "cuda", rank)
    with pytest.raises(ConfigError, match="rank 1 has cpu, but rank 2 has cuda: not every machine has GPUs; set dev"):
        agree_on_device(store, "cpu", 1)


def test_ranks_meet_anew_whatever_earlier_ones_left_in_the_store() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    patience = Patience(60, says=False)

    def attempt(order: list[int], world_size: int) -> list[dist.Store]:
        def join(rank: int) -> dist.Store:
            return meet(dist.TCPStore("127.0.0.1", server.port, is_master=False), Place(rank, world_size), patience)

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
        second = threads.submit(meet, store, Place(1, 2), Patience(60, says=False))
        while not store.check(["hilorec/of a first rank that died/1"]):
            assert not second.done()
        first = threads.submit(meet, store, Place(0, 2), Patience(60, says=False))
        first.result(30).set("here", "1")
        assert second.result(30).check(["here"])


@pytest.mark.slow
def test_a_first_rank_that_ends_while_ranks_meet_is_no_traceback_of_another(config: Path) -> None:
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(started, config, "rank_timeout_seconds=8", RANK="0", **place)
        code, errors, _ = started(config, "rank_timeout_seconds=60", RANK="1", **place)
        assert first.result()[0] == TEMPORARY
    assert code == TEMPORARY and "Traceback" not in errors
    assert f"error: rank 1 has lost the store at 127.0.0.1:{place['MASTER_PORT']}, at which ranks meet" in errors


@pytest.mark.parametrize("host", ["a..b", ".b", "x" * 64, "\udcff"])
def test_what_no_host_is_called_does_not_resolve(host: str) -> None:
    with pytest.raises(MeetingError, match="does not resolve"):
        open_store(Place(1, 2, host=host, port=1), Patience(-1, says=False))


def test_variables_that_are_empty_are_as_those_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
    assert told_place() == Place(1, 2, 0, 2, "::1", 7) and str(told_place()) == "[::1]:7"
    monkeypatch.setenv("RANK", "1" * 5000)
    with pytest.raises(MeetingError, match="RANK is '1111"):
        told_place()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meeting")
    write_tiny_log(folder / "log")
    raw = {**tiny_config(folder / "log", folder / "out"), "rank_timeout_seconds": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


def started(config: Path, *overrides: str, **place: str) -> tuple[int, str, float]:
    """Exit code and errors of a process that finds these variables, and how long it was about it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "recsys.train", "--config", str(config), *overrides],
        env={**environment, **place},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return run.returncode, run.stderr, time.monotonic() - began


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ({"RANK": "0"}, "there is RANK in the environment, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "there is WORLD_SIZE in the environment, but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "MASTER_PORT": "first"}, "MASTER_PORT is 'first', which is no number from 1 to 65535"),
        ({**WHOLE, "LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', which is no number from 0 to 1"),
        ({**WHOLE, "RANK": "2"}, "RANK is '2', which is no number from 0 to 1"),
    ],
)
def test_an_environment_that_tells_no_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: dict[str, str], told: str
) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MeetingError, match=told):
        told_place()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ({"RANK": "1"}, "within 2 s: nothing answers (Connection refused); is MASTER_ADDR the first rank's machine"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"RANK": "first"}, "RANK is 'first', which is no number from 0 to 1"),
                ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', which is no number from 0 to 1"),
                ({"MASTER_ADDR": "no.such.host.invalid"}, "the name 'no.such.host.invalid' does not resolve"),
                (
                    {"MASTER_ADDR": "no.such.host.invalid", "RANK": "1"},
                    "the name 'no.such.host.invalid' does not resolve",
                ),
                ({}, "rank 1 of 2 did not come to 127.0.0.1:"),
            )
        ),
    ],
)
def test_a_process_whose_peers_are_not_there_ends_with_a_line(config: Path, place: dict[str, str], told: str) -> None:
    code, errors, seconds = started(config, **{**WHOLE, "MASTER_PORT": free_port(), **place})
    assert code == (2 if told.startswith(("RANK", "LOCAL_RANK")) else TEMPORARY)
    assert errors.count("error: ") == 1 and told in errors
    assert seconds < 60  # and not torch's 30 minutes


def test_a_port_that_another_program_has_is_told(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, errors, _ = started(config, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == TEMPORARY and f"error: port {port} of this machine, at which ranks are to meet, is taken" in errors


@pytest.mark.slow
def test_who_is_waited_for_is_said(config: Path, tmp_path: Path) -> None:
    raw = {**yaml.safe_load(config.read_text()), "rank_timeout_seconds": 14, "output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code, errors, _ = started(tmp_path / "config.yaml", **place)
    assert code == TEMPORARY
    assert f"waiting for ranks 1, 2, 3 of 4 at 127.0.0.1:{port}\n" in errors
    assert f"error: ranks 1, 2, 3 of 4 did not come to 127.0.0.1:{port} within 14 s" in errors
