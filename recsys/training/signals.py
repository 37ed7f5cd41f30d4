"""Stopping on a signal: one that is asked of any rank is agreed on by all, which then act at the same step."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from recsys import watch
from recsys.errors import Stopped
from recsys.runtime import Ranks

_SAME_SECONDS = 2.0
"""Signals this soon after the first are the same request once more, as torchrun or a scheduler forwards it."""


class StopRequest:
    """While entered, the first SIGTERM, SIGINT or SIGHUP is noted, and a second one ends the process at once.

    A request often reaches a rank twice: Slurm signals torchrun and its ranks, and torchrun passes on what it gets. So
    what arrives within two seconds of the first is not a second one; losing what would have been saved is worse than
    having to ask again. A thread reads which signals came, so that the second, and the end of the grace, also end a
    process whose main thread waits for another rank. It dies of the signal, as if it had not been handled.

    SIGHUP stays ignored where `nohup` had it ignored, save below torchrun, which ends of it all the same.

    Args:
        grace_seconds: how long after the first signal the block may still last; None is for ever.

    Attributes:
        signal: the first that came, or None.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._grace_seconds = grace_seconds
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Begin to note signals.

        Raises:
            ValueError: this is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signals are handled in the main thread alone")
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            self._undo.callback(end.close)
            end.setblocking(False)
        handled = [signal.SIGTERM, signal.SIGINT]
        if "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        for number in handled:
            before = signal.signal(number, self._note)
            self._undo.callback(signal.signal, number, before or signal.SIG_DFL)  # None: not set by Python
        thread = threading.Thread(target=self._watch, args=(reader, set(handled)), name="signals", daemon=True)
        self._undo.callback(thread.join)
        self._undo.callback(writer.shutdown, socket.SHUT_WR)
        thread.start()
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Handle signals as before; after a failure of one of several ranks ignore SIGTERM.

        A launcher that sees another rank end ends this one, from which the others have yet to hear that it was there.
        """
        self._undo.close()
        if error is not None and not isinstance(error, Stopped) and watch.current is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)

    def _watch(self, reader: socket.socket, handled: set[int]) -> None:
        """Read the numbers of signals as they come, until the writing end is shut."""
        began, limit = 0.0, None
        number = 0
        while True:
            left = None if limit is None else max(limit - time.monotonic(), 0.0)
            if not select.select([reader], [], [], left)[0]:
                if os.environ.get("RANK", "0") == "0":
                    name = signal.Signals(number).name
                    told = f"error: {name}: not saved within {self._grace_seconds:g} s; go on from the last checkpoint"
                    print(told, file=sys.stderr, flush=True)
                _die_of(number)
            received = reader.recv(64)
            if not received:
                return
            for number in filter(handled.__contains__, received):
                if not began:
                    began = time.monotonic()
                    limit = None if self._grace_seconds is None else began + self._grace_seconds
                elif time.monotonic() - began > _SAME_SECONDS:
                    _die_of(number)


def _die_of(number: int) -> None:
    """End this process by a signal; unlike the `signal` module, which only the main thread may call, from anywhere."""
    ctypes.CDLL(None).signal(number, ctypes.c_void_p(0))  # SIG_DFL
    os.kill(os.getpid(), number)
    time.sleep(60)  # not reached: the kernel delivers it before


@dataclass(frozen=True)
class Agreed:
    """What all ranks do at this step.

    Attributes:
        stop: the signal to stop for, or None; of different ones on different ranks that of the highest number.
        save: whether a rank found that a checkpoint is due.
    """

    stop: signal.Signals | None = None
    save: bool = False


_NOTHING = Agreed()


class Agreement:
    """What ranks agree to do at a step, without waiting for one another.

    Each step starts a reduction of the ranks' wishes among themselves and takes the result of the one that the step
    before started, so that all learn the same at the same step, one step late. It has a gloo group of its own: two
    integers on the host, whatever trains on the device. One rank alone agrees with itself at once.

    Leaving the block waits for the reduction that is under way, unless an error made the ranks part.

    Args:
        ranks: this process among all; making the object is a collective call.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._alone = ranks.world_size == 1
        self._group = None if self._alone else ranks.new_host_group()
        self._wishes, self._under_way = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        self._work: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped):
            self.close()

    def exchange(self, stop: signal.Signals | None, save: bool) -> Agreed:
        """Say what this rank wishes and learn what all do; a collective call, once in every step.

        Args:
            stop: the signal that asked this rank to stop, or None.
            save: whether a checkpoint is due.
        """
        if self._alone:
            return Agreed(stop, save) if stop is not None or save else _NOTHING
        wishes = self._wishes
        wishes[0], wishes[1] = stop or 0, save
        work = dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        earlier, before = self._work, self._under_way
        self._work, self._under_way, self._wishes = work, wishes, before
        if earlier is None:
            return _NOTHING
        earlier.wait()
        agreed_stop, agreed_save = before.tolist()
        if not agreed_stop and not agreed_save:
            return _NOTHING
        return Agreed(signal.Signals(agreed_stop) if agreed_stop else None, bool(agreed_save))

    def close(self) -> None:
        """Wait for the exchange that is under way and give up the group; a collective call."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
