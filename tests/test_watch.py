"""A rank that is gone, silent or late is named by one line of all ranks; one that fails by itself tells why."""

import errno
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch.distributed as dist

from recsys import cli, watch
from recsys.cli import run_entry
from recsys.errors import UserError, is_first_here_to_tell, report_failure
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
        pytest.param(
            "silent",
            r"error: rank 1 \(\S+, process \d+\) is gone or cut off \((not heard of for 2 s|Timed out .*)\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "killed", r"error: rank 1 \(\S+, process \d+\) is gone or cut off \(.*onnection", marks=pytest.mark.slow
        ),
        pytest.param(
            "late",
            r"error: rank 1 \(\S+, process \d+\) did not come within 4 s to what the others wait for",
            marks=pytest.mark.slow,
        ),
        pytest.param("wrong", "RuntimeError: the store of socks is empty", marks=pytest.mark.slow),
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


class Going(dist.HashStore):
    """A store that no longer answers the thread that finds out who is gone."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if threading.current_thread().name != "beats of ranks":
            self.set, self.check = self._gone, self._gone
            self._gone()
        return super().multi_get(keys)

    def _gone(self, *_: object) -> Any:
        raise dist.DistNetworkError("connection reset")


def test_a_rank_ends_though_the_store_goes_while_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    store = Going()
    first, _silent = (watch.Watch(store, rank, 2, local_rank=rank, seconds=1, place="here:1") for rank in range(2))
    awaited: list[list[str]] = []  # though nobody is heard of any more
    monkeypatch.setattr(first, "_await", awaited.append)
    first.start()
    assert ended.wait(30) and not awaited
    first.close()
    assert capsys.readouterr().err.count("error: rank 0 has lost the store at here:1") == 1


def torchrun(monkeypatch: pytest.MonkeyPatch, folder: Path, local_rank: int) -> None:
    """The environment of a rank that torchrun starts, as far as it is asked."""
    (folder / str(local_rank)).mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(local_rank) / "error.json"))


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """Its handler is as it was: a rank that fails ignores it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_one_rank_of_a_machine_tells_that_the_store_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], order: list[int]
) -> None:
    """Whichever notices first, as by the other's end, in the thread that trains or that which watches."""
    monkeypatch.setattr(watch, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(watch, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda _: None)
    for attempt in ("attempt_0", "attempt_1"):  # each is told of
        for rank in order:
            store = Going()
            one = watch.Watch(store, rank, 2, local_rank=rank, seconds=1, place="here:1")
            monkeypatch.setattr(watch, "current", one)
            monkeypatch.setattr(store, "set", store._gone)
            torchrun(monkeypatch, tmp_path / attempt, rank)
            try:
                raise dist.DistNetworkError("Connection closed by peer")
            except dist.DistNetworkError:
                cli._tell_failure()
            one._end(one._lost_store("no answer for 1 s"))
        told = capsys.readouterr().err
        assert told.count("error: ") == told.count(f"error: rank {order[0]} has lost the store at here:1") == 1
        assert re.findall(r"^rank (\d) .*; its stack:$", told, re.MULTILINE) == [str(rank) for rank in order]
        assert [rank for rank in order if (tmp_path / attempt / str(rank) / "error.json").exists()] == order[:1]


@pytest.mark.parametrize(
    "changed", [("TORCHELASTIC_RUN_ID", None), ("TORCHELASTIC_ERROR_FILE", "error.json"), ("LOCAL_RANK", "7")]
)
def test_where_torchrun_gives_no_folder_every_rank_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, str | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    torchrun(monkeypatch, tmp_path / "attempt_0", 0)
    name, value = changed
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert is_first_here_to_tell() and is_first_here_to_tell()
    assert not list(tmp_path.rglob("told*"))


class Cut(dist.HashStore):
    """A store whose link is cut, once `cut` is set: its calls never return."""

    cut = False

    def check(self, keys: list[str]) -> bool:
        if self.cut:
            threading.Event().wait()
        return super().check(keys)

    def set(self, key: str, value: str) -> None:
        if self.cut:
            threading.Event().wait()
        super().set(key, value)


@pytest.mark.parametrize(("error", "code"), [(OSError("no such bucket"), 1), (UserError("no such key"), 2)])
def test_a_rank_that_fails_by_itself_tells_though_its_link_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    store = Cut()
    monkeypatch.setattr(watch, "current", watch.Watch(store, 0, 2, local_rank=0, seconds=1, place="here:1"))
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(cli, "_process_group_is_up", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(store, "compare_set", lambda *_: threading.Event().wait())
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def body() -> None:
        store.cut = True
        raise error

    with pytest.raises(SystemExit):
        run_entry(body, checks_versions=False)
    assert codes == [code] and str(error) in capsys.readouterr().err


def test_a_rank_whose_main_thread_tells_does_not_tell_by_its_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(watch, "report_failure", told.append)
    monkeypatch.setattr(os, "_exit", lambda _: None)
    store = dist.HashStore()
    first, _silent = (watch.Watch(store, rank, 2, local_rank=rank, seconds=1, place="here:1") for rank in range(2))
    monkeypatch.setattr(first, "_await", lambda _: None)
    store.compare_set(watch._CLAIM, "", "0")  # as the main thread does
    first._condemn()
    assert not told
    store.delete_key(watch._CLAIM)
    first._condemn()
    assert len(told) == 1 and told[0].startswith("error: rank 1 (")


def test_a_rank_that_is_there_again_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    store = dist.HashStore()
    first, second = (watch.Watch(store, rank, 2, local_rank=rank, seconds=4, place="here:1") for rank in range(2))
    asked, found = threading.Event(), first._found

    def slowly(cause: str) -> str | None:
        asked.set()
        return found(cause)

    monkeypatch.setattr(first, "_found", slowly)
    first.start()
    assert asked.wait(30)
    second.start()  # it was silent for long, and beats
    assert not ended.wait(4)
    first.close()
    second.close()


def test_ranks_do_not_end_before_all_have_told_their_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ends would end the store, which one that has yet to hear of it would take for the failure."""
    told, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(watch, "report_failure", lambda _: told.set())
    store = dist.HashStore()
    first, _silent, late = (
        watch.Watch(store, rank, 3, local_rank=rank, seconds=4, place="here:1") for rank in range(3)
    )
    stacks: list[watch.Watch] = []
    for watched in (first, late):
        monkeypatch.setattr(watched, "_dump", lambda watched=watched: stacks.append(watched))
    beats, looks = late._threads
    first.start()
    beats.start()
    assert told.wait(30) and not ended.wait(1)
    failing = threading.Thread(target=first.fail, args=(RuntimeError("Connection closed by peer"),))
    failing.start()  # as the main thread does where others end: it is not to tell again
    failing.join(1)
    assert failing.is_alive()
    looks.start()
    assert ended.wait(30)
    assert set(stacks) == {first, late}
    first.close()
    late.close()
    failing.join(30)


def test_a_stack_is_told_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those of ranks that share their stderr mix, and an error line begins within another."""
    told: list[str] = []
    watched = watch.Watch(dist.HashStore(), 0, 1, local_rank=0, seconds=8, place="here:1")

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            told.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stderr())
    watched._dump()
    (text,) = filter(None, told)
    assert text.startswith("rank 0 (") and "; its stack:\n" in text and text.endswith("\n")
    assert f'File "{__file__}", line ' in text and "in test_a_stack_is_told_in_one_piece" in text


def test_a_job_that_was_suspended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now, away = dist.HashStore(), time.monotonic, 0.0
    first, second = (watch.Watch(store, rank, 2, local_rank=rank, seconds=8, place="here:1") for rank in range(2))
    second.fail(RuntimeError("Timed out"))
    assert first.blame("Timed out waiting 8000ms") is None
    first = watch.Watch(dist.HashStore(), 0, 1, local_rank=0, seconds=8, place="here:1")
    monkeypatch.setattr(time, "monotonic", lambda: now() + away)
    first.start()
    time.sleep(1)
    away = 100.0
    time.sleep(1)
    first.fail(RuntimeError("Timed out"))
    told = first.blame("Timed out waiting 8000ms")
    first.close()
    assert told is not None and told.startswith(
        "error: rank 0 stood still for 100 s, as all of a job that is suspended"
    )


def test_a_failure_that_cannot_be_told_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        report_failure("error: it fails")


class Full(io.StringIO):
    """A stream to a disk that is full."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
