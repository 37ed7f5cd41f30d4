"""Who of the ranks is still there: while they train, each tells the others that it lives, and where it stands.

A rank that is killed closes its connections, which the others see at once, though not whose they were. One that is
stopped, whose host is lost or whose link is cut says nothing at all, and the others wait for it in a collective. So
every rank leaves a beat in the store at which the ranks met, from a thread of its own, and reads those of the ranks
that come after it. The first to miss one tells for all who is gone, and all end, so that the launcher can start them
anew. Imports no torch.
"""

import faulthandler
import json
import math
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

from recsys.errors import is_first_here_to_tell, report_failure

_WATCHED = 8
"""Ranks after itself that each rank watches: however many there are, so many beats are read."""

_MOST_SECONDS, _BEATS = 5.0, 20
"""Beats are a twentieth of the time-out apart, and at most five seconds."""

_MISSED = 0.6
"""Share of the time-out after which a rank that is not heard of is given up; the rest is to make sure, and to tell."""

_CLAIM, _VERDICT, _TOLD, _STACK = "hilorec/error", "hilorec/verdict", "hilorec/told", "hilorec/stack/{}"
_MOST_TOLD = 64
_GRACE_SECONDS, _END_SECONDS, _LEAST_SECONDS = 5.0, 30.0, 1.0
_T = TypeVar("_T")
_PACKAGE = str(Path(__file__).parent)


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...  # noqa: D102


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: counts beats.
        host: name of its machine.
        pid: of its process there.
        position: how far its run has come, in words.
        at: the innermost line of this package in its main thread.
        failed: whether it has failed and ends, as by a connection that broke.
        is_over: whether it has come to its end, and is not missed.
    """

    number: int = 0
    host: str = ""
    pid: int = 0
    position: str = ""
    at: str = ""
    failed: bool = False
    is_over: bool = False

    def told(self, rank: int) -> str:
        """One line for a person."""
        return f"rank {rank} ({self.host}, process {self.pid}): {self.position or 'starting'}; {self.at or 'ending'}"


class Watch:
    """Watches ranks until it is closed. Where one is gone, one rank tells so, every rank its stack, and all end.

    Args:
        store: a connection of its own to a part that is these ranks' alone.
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process on its machine.
        seconds: within which a rank must be heard of, and the store answer.
        place: where the store is, for a person.

    Attributes:
        position: says how far the run has come; called by another thread than that which trains.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, local_rank: int, seconds: float, place: str
    ) -> None:
        self._store, self._rank, self._world_size, self._local_rank = store, rank, world_size, local_rank
        self._seconds, self._place = seconds, place
        self._interval = min(seconds / _BEATS, _MOST_SECONDS)
        self.position: Callable[[], str] = str
        self._main, self._at = threading.get_ident(), ""
        self._mine = Beat(host=socket.gethostname(), pid=os.getpid())
        self._failed_at: float | None = None
        self._stood_still, self._went_on = 0.0, -math.inf  # seconds for which this process was stopped, and until when
        self._ends = self._condemned = self._ending = False
        self._answered = time.monotonic()
        self._heard: dict[int, tuple[Beat, float]] = {}  # and since when
        self._awaited: list[int] = []  # who is to tell its stack, where this rank tells who is gone
        self._store_lock = threading.Lock()  # held for long where the store no longer answers
        self._done = threading.Event()
        self._beat()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("beats of ranks", self._carry), ("watch of ranks", self._look))
        ]

    def start(self) -> None:
        """Begin to watch, when all ranks have made theirs."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End, when all ranks have come so far: the others do not miss this one."""
        self._ends = True
        self._done.set()
        for thread in self._threads:
            thread.join(self._seconds)
        self._reached(self._beat)

    def fail(self, error: BaseException) -> None:
        """Say that this rank has failed, and so is not gone; it is to end by itself."""
        if self._ending:  # it fails since others end, of which the other thread has told
            self._threads[1].join()
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        self._at, self._failed_at = _innermost(reversed(frames)), time.monotonic()
        self._reached(self._beat)

    @property
    def is_condemned(self) -> bool:
        """Whether the run ends because a rank is gone."""
        # The store may have gone since, with the launcher of a rank that has told.
        return self._condemned or bool(self._reached(lambda: self._store.check([_VERDICT])))

    def blame(self, cause: str) -> str | None:
        """Which ranks are to blame for a failure of this one, if any; takes a few beats to make sure.

        Args:
            cause: the failure, in a line.

        Returns:
            What is to be told in its place, nothing where another rank of this machine tells that the store is lost;
            None where all others are there, or have failed themselves.
        """
        try:
            self._asked(lambda: self._store.set(_VERDICT, str(self._rank)))
            return self._found(cause)
        except Exception:
            return self._lost_store(cause)

    # What both threads do all the time.

    def _carry(self) -> None:
        successors = [(self._rank + step) % self._world_size for step in range(1, _WATCHED + 1)]
        others = sorted(set(successors) - {self._rank})
        while not self._done.wait(self._interval):
            with suppress(Exception), self._store_lock:  # else the other thread sees that no answer comes
                self._beat()
                self._hear(others)
                self._condemned = self._store.check([_VERDICT])
                self._answered = time.monotonic()

    def _look(self) -> None:
        try:
            self._look_on()
        except Exception as error:  # as of a store that goes while it is asked: nobody else would end this process
            self._end(self._lost_store(" ".join(str(error).split())))

    def _look_on(self) -> None:
        before = time.monotonic()
        while not self._done.wait(self._interval / 2):
            now, limit = time.monotonic(), _MISSED * self._seconds
            if now - before > 4 * self._interval:  # this process was stopped, and has heard of nobody meanwhile
                self._answered = now
                self._heard = {}
                self._stood_still, self._went_on = now - before, now
            before = now
            if self._failed_at is not None:  # it ends by itself, unless the store holds it up
                if now - self._failed_at > self._seconds + _END_SECONDS:
                    self._end(None)
            elif now - self._answered > limit:
                self._end(self._lost_store(f"no answer for {now - self._answered:.0f} s"))
            elif now - self._answered > 3 * self._interval:
                continue  # beats stand still because the store does; to ask it now might take for ever
            elif any(now - since > limit and not beat.is_over for beat, since in self._heard.values()):
                self._condemn()
            elif self._condemned:
                self._ending = True
                self._dump()
                self.await_told()
                self._end(None)

    def _condemn(self) -> None:
        """Make sure who is gone, and tell it, unless another rank does; ends this process if one is."""
        # Another name than the main thread claims by, which may have failed meanwhile and tell.
        text, mine = self._found(f"not heard of for {_MISSED * self._seconds:.0f} s"), f"{self._rank}, as it watches"
        if text is None:
            self._heard = {}  # all are there again
            return
        self._ending = True
        claim = self._reached(lambda: self._store.compare_set(_CLAIM, "", mine))
        self._dump()
        if claim == mine.encode():
            self._reached(lambda: self._store.set(_VERDICT, mine))
            self._end(text)
        self.await_told()
        self._end(None)

    # Beats.

    def _beat(self) -> None:
        position = self._mine.position
        with suppress(Exception):  # read while the main thread changes it
            position = self.position()
        mine, failed = self._mine, self._failed_at is not None
        at = self._at if failed else _innermost(_stack(sys._current_frames().get(self._main)))
        self._mine = Beat(mine.number + 1, mine.host, mine.pid, position, at, failed, self._ends)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._mine)))

    def _hear(self, ranks: list[int]) -> None:
        found, now = self._beats(ranks), time.monotonic()
        heard = self._heard  # which another takes the place of where this process was stopped
        for rank, beat in found.items():
            last, since = heard.get(rank, (None, now))
            heard[rank] = (beat, since if last is not None and last.number == beat.number else now)

    def _beats(self, ranks: list[int]) -> dict[int, Beat]:
        found = self._store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}

    def _asked(self, ask: Callable[[], _T]) -> _T:
        def alone() -> _T:
            with self._store_lock:
                return ask()

        return answer_within(max(2 * self._interval, _LEAST_SECONDS), alone)

    def _reached(self, ask: Callable[[], _T]) -> _T | None:
        with suppress(Exception):
            return self._asked(ask)
        return None

    # What is told.

    def _found(self, cause: str) -> str | None:
        """Who is gone, or keeps others waiting, and where all stand."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        before = self._asked(lambda: self._beats(others))
        self._done.wait(3 * self._interval)
        beats = self._asked(lambda: self._beats(others))
        there = {rank: beat for rank, beat in beats.items() if not beat.is_over and not beat.failed}
        gone = {rank: beat for rank, beat in there.items() if beat.number == before[rank].number}
        self._awaited = [rank for rank, beat in beats.items() if not beat.is_over and rank not in gone]
        if gone:
            told = f"{_named(gone)} {'is' if len(gone) == 1 else 'are'} gone or cut off ({_brief(cause)})"
        elif there and "imed out" in cause:
            told = (
                f"{_named(there)} did not come within {self._seconds:g} s to what the others wait for "
                "(rank_timeout_seconds has them wait for longer)"
            )
        elif not there and time.monotonic() - self._went_on < self._seconds + _END_SECONDS:
            told = (
                f"rank {self._rank} stood still for {self._stood_still:.0f} s, as all of a job that is suspended do, "
                f"and ranks wait for {self._seconds:g} s at most ({_brief(cause)}; see rank_timeout_seconds)"
            )
        else:
            return None
        lines = [beat.told(rank) for rank, beat in sorted({**beats, self._rank: self._mine}.items())]
        more = [f"and {len(lines) - _MOST_TOLD} more"] if len(lines) > _MOST_TOLD else []
        told = f"error: {told}; run the same command to go on from the last checkpoint"
        return "\n".join([told, *(f"  {line}" for line in (*lines[:_MOST_TOLD], *more))])

    def _lost_store(self, cause: str) -> str:
        """What the first rank of this machine tells, or another that notices alone; the others nothing."""
        self._awaited = []  # nobody is heard of any more
        if self._local_rank:
            time.sleep(_GRACE_SECONDS)
        if not is_first_here_to_tell():
            time.sleep(_LEAST_SECONDS)  # until the other has, as the launcher may end it once this one ends
            return ""
        return (
            f"error: rank {self._rank} has lost the store at {self._place}, at which ranks meet: its machine, the "
            f"launcher there, or the link to it ({_brief(cause)}); run the same command to go on from the last "
            f"checkpoint\n  {self._mine.told(self._rank)}"
        )

    def _dump(self) -> None:
        with suppress(Exception), os.fdopen(os.memfd_create("stacks"), "w+b") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            told = stacks.read().decode(errors="replace")
            # At once: faulthandler writes word by word, and ranks of a machine may share their stderr.
            print(f"{self}\n{told}", end="", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"{self._mine.told(self._rank)}; its stack:"

    def await_told(self) -> None:
        """Say that this rank has told its stack, and wait until the one that tells who is gone lets all end.

        A rank's end has its launcher end others, and with them the store.
        """
        self._reached(lambda: self._store.set(_STACK.format(self._rank), ""))
        self._await([_TOLD])

    def told(self) -> None:
        """Let the others end, as the failure has been told; first wait until they have told their stacks.

        Else one that hears of it late may find the store gone, and take that for the failure.
        """
        if self._awaited:
            self._await([_STACK.format(rank) for rank in self._awaited])
        self._reached(lambda: self._store.set(_TOLD, ""))

    def _await(self, keys: list[str]) -> None:
        until = time.monotonic() + 4 * self._interval + _GRACE_SECONDS
        while time.monotonic() < until and not self._reached(lambda: self._store.check(keys)):
            time.sleep(self._interval / 4)

    def _end(self, text: str | None) -> None:
        try:
            if text:
                report_failure(text)
                self.told()
            if sys.stdout is not None:
                sys.stdout.flush()
        finally:
            os._exit(1)


def answer_within(seconds: float, ask: Callable[[], _T]) -> _T:
    """What a store answers, asked by a thread of its own: a call over a link that is cut never returns.

    Raises:
        TimeoutError: no answer came; the call goes on, and what it does is done if the link comes back.
        Exception: what the call raises.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((True, ask()))
        except Exception as error:
            answers.put((False, error))

    threading.Thread(target=call, name="question to the store", daemon=True).start()
    try:
        is_answered, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("the store does not answer") from None
    if not is_answered:
        raise answer
    return cast(_T, answer)


current: Watch | None = None
"""The watch of this process's ranks, while there is one."""


@contextmanager
def positioned(position: Callable[[], str]) -> Iterator[None]:
    """Have the watch, where there is one, say where the run stands; `position` is called by another thread."""
    if current is None:
        yield
        return
    current.position = position
    yield
    current.position = str


def _brief(cause: str) -> str:
    """A failure of gloo's without the line of its source and its advice."""
    return re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", cause).partition(". ")[0]


def _named(ranks: Mapping[int, Beat]) -> str:
    """`rank 1 (host a, process 7)`, or `ranks 2, 3 (host b)`."""
    hosts: dict[str, list[int]] = {}
    for rank, beat in ranks.items():
        hosts.setdefault(beat.host, []).append(rank)
    parts = []
    for host, of_host in hosts.items():
        numbers = ", ".join(map(str, of_host[:_WATCHED])) + (" ..." if len(of_host) > _WATCHED else "")
        process = f", process {ranks[of_host[0]].pid}" if len(of_host) == 1 else ""
        parts.append(f"rank{'s' * (len(of_host) > 1)} {numbers} ({host}{process})")
    return " and ".join(parts)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost(frames: Iterable[FrameType]) -> str:
    """The first line of this package, of frames from the innermost on."""
    for frame in frames:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            return f"{Path(code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} {code.co_name}"
    return ""
