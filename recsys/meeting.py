"""How the ranks of a run find one another: at the store of torchrun, or of the first rank where there is none."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from recsys.config import ConfigError
from recsys.errors import TEMPORARY, UserError, report_failure

_LOOK_SECONDS = 0.01  # between two looks for those that are to come
_LOOK_SECONDS_A_RANK = 1e-4  # at least, so that thousands that wait leave the one store time to answer
_SAY_SECONDS = 10.0  # between two lines on who is waited for
_MOST_NAMED, _MOST_DIGITS = 16, 20


class MeetingError(UserError):
    """The ranks of a run do not come together: they were told wrongly of one another."""


class AbsentError(MeetingError):
    """A rank did not come in time, or left, or somebody else has the port: another time they may meet."""

    exit_code = TEMPORARY


@dataclass(frozen=True)
class Place:
    """This process among all, as its launcher tells by environment variables.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: rank within this machine.
        local_world_size: processes on this machine.
        host: name or address of where the ranks meet; empty for a process alone.
        port: there.
        is_kept: whether the launcher keeps the store there; else the first rank does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""
    port: int = 0
    is_kept: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def told_place() -> Place:
    """The place that `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` tell; that of a process alone without them.

    Raises:
        MeetingError: there are some of them and not the others, or one is no such number.
    """
    if not os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
        return Place()
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        there = ", ".join(name for name in needed if name not in missing)
        raise MeetingError(
            f"there is {there} in the environment, but no {', '.join(missing)}: start the processes by torchrun or "
            "torchx, which set all of them, or unset them for a process alone"
        )
    world_size = _number("WORLD_SIZE", 1, 1 << 20)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size) if os.environ.get("LOCAL_WORLD_SIZE") else world_size
    return Place(
        rank=_number("RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, local_world_size - 1) if os.environ.get("LOCAL_RANK") else 0,
        local_world_size=local_world_size,
        host=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 1, (1 << 16) - 1),
        is_kept=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True),
    )


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    # Python refuses to read numbers of thousands of digits.
    if not text.isdecimal() or len(text) > _MOST_DIGITS or not least <= int(text) <= most:
        raise MeetingError(
            f"{name} is {text[:_MOST_DIGITS]!r}, which is no number from {least} to {most}; torchrun and torchx set it"
        )
    return int(text)


class Patience:
    """Waits for others for so long, and says what for.

    Args:
        seconds: after which it ends.
        says: whether this rank is one to say it.
    """

    def __init__(self, seconds: float, *, says: bool) -> None:
        self.seconds = seconds
        began = time.monotonic()
        self._until, self._says_at = began + seconds, began + _SAY_SECONDS if says else float("inf")

    @property
    def is_over(self) -> bool:
        """Whether they have been waited for long enough."""
        return time.monotonic() > self._until

    @property
    def is_to_say(self) -> bool:
        """Whether it is time for a line; true once in ten seconds."""
        due = time.monotonic() > self._says_at
        self._says_at += _SAY_SECONDS * due
        return due


def open_store(place: Place, patience: Patience) -> dist.Store:
    """Open the store at which the ranks meet, or a connection to it.

    Raises:
        AbsentError: the port is taken, or nothing answers there in time.
    """
    hosts, timeout = place.rank == 0 and not place.is_kept, timedelta(seconds=patience.seconds)
    while reason := _unreachable(place, resolve_only=hosts):
        if patience.is_over:
            raise AbsentError(
                f"no store at {place} within {patience.seconds:g} s: {reason}; is MASTER_ADDR the first rank's "
                "machine, and is that rank started?"
            )
        if patience.is_to_say:
            _say(f"waiting for the store at {place}: {reason}")
        time.sleep(0.1)
    try:
        return dist.TCPStore(
            place.host, place.port, place.world_size, hosts, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        told = " ".join(str(error).split())
        if "EADDRINUSE" in told or "address already in use" in told.lower():
            raise AbsentError(
                f"port {place.port} of this machine, at which ranks are to meet, is taken; set MASTER_PORT to another"
            ) from None
        raise AbsentError(f"no store at {place}: {told[:300]}") from None


def _unreachable(place: Place, *, resolve_only: bool) -> str:
    """Why nobody answers where ranks are to meet; empty where somebody does, or may."""
    try:
        if resolve_only:
            socket.getaddrinfo(place.host, place.port)
        else:
            socket.create_connection((place.host, place.port), timeout=5).close()
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: what no name of a host can be
        why = error.strerror if isinstance(error, OSError) else "it is no name of a host"
        return f"the name {place.host!r} does not resolve ({why})"
    except OSError as error:
        return f"nothing answers ({error.strerror or error})"
    return ""


def meet(store: dist.Store, place: Place, patience: Patience) -> dist.Store:
    """A part of the store that is these ranks' alone; a collective call.

    The store of torchrun lives on when it restarts its ranks, with all that those before them have left there: their
    addresses, to which gloo would connect, and the claim of an error. How often torchrun restarted does not tell the
    attempts apart: it does not count a node that joins or leaves, and nodes count each for itself. So the first rank
    opens a part under a new name, and each other takes part in what answers it, which a part left behind never does.

    Args:
        store: at which the ranks meet.
        place: of this process.
        patience: how long others are waited for.

    Raises:
        AbsentError: a rank does not come in time.
    """
    me = uuid.uuid4().hex
    if place.rank == 0:
        store.set("hilorec/meeting", me)
        missing = {rank: f"hilorec/{me}/{rank}" for rank in range(1, place.world_size)}
        for rank, key in list(missing.items()):
            while not store.check([key]):
                if patience.is_over:
                    raise AbsentError(_absent(store, missing, place, patience.seconds))
                if patience.is_to_say:
                    _say(f"waiting for {_numbered(_left(store, missing))} of {place.world_size} at {place}")
                time.sleep(_LOOK_SECONDS)
            store.set(f"hilorec/welcome/{store.get(missing.pop(rank)).decode()}", "")
        return dist.PrefixStore(me, store)
    meeting = None
    while not store.check([f"hilorec/welcome/{me}"]):
        if patience.is_over:
            raise AbsentError(f"rank {place.rank} waited {patience.seconds:g} s at {place} for rank 0 in vain")
        if patience.is_to_say:
            _say(f"waiting for rank 0 at {place}")
        if store.check(["hilorec/meeting"]) and (newest := store.get("hilorec/meeting").decode()) != meeting:
            meeting = newest
            store.set(f"hilorec/{meeting}/{place.rank}", me)
        time.sleep(max(_LOOK_SECONDS, place.world_size * _LOOK_SECONDS_A_RANK))
    assert meeting is not None
    return dist.PrefixStore(meeting, store)


def _left(store: dist.Store, missing: dict[int, str]) -> list[int]:
    return [rank for rank, key in missing.items() if not store.check([key])]


def _absent(store: dist.Store, missing: dict[int, str], place: Place, seconds: float) -> str:
    left = _left(store, missing)
    return (
        f"{_numbered(left)} of {place.world_size} did not come to {place} within {seconds:g} s; are all processes "
        "started, with the same MASTER_ADDR and WORLD_SIZE? rank_timeout_seconds has others waited for longer"
    )


def _numbered(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 1, 2 and 5 more`."""
    names = [str(rank) for rank in ranks]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"rank{'s' * (len(names) > 1)} {', '.join(names[:_MOST_NAMED])}{more}"


def _say(text: str) -> None:
    with suppress(OSError):  # nobody listens
        print(text, file=sys.stderr, flush=True)


@contextmanager
def telling_of_a_lost_store(place: Place) -> Iterator[None]:
    """Have the end of the store while ranks meet told in a line: it ends with the first rank, where that keeps it.

    Raises:
        AbsentError: the store is gone.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        told = " ".join(str(error).split())[:300]
        raise AbsentError(
            f"rank {place.rank} has lost the store at {place}, at which ranks meet ({told}); the first rank, or the "
            "launcher there, tells why"
        ) from None


@contextmanager
def ending_unless_done(seconds: float, told: str) -> Iterator[None]:
    """End this process with a line where the block takes too long: calls of a store whose link is cut never return."""

    def end() -> None:
        report_failure(f"error: {told}")
        os._exit(1)

    limit = threading.Timer(seconds, end)
    limit.daemon = True
    limit.start()
    try:
        yield
    finally:
        limit.cancel()


def check_interfaces() -> None:
    """Hold the interfaces that gloo is told to use against those of this machine.

    Raises:
        MeetingError: one is not there, of which gloo would tell by a traceback.
    """
    here = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in here:
            raise MeetingError(
                f"GLOO_SOCKET_IFNAME: {socket.gethostname()} has no network interface {name}, but {', '.join(here)}; "
                "TorchX sets it by --interface"
            )


def agree_on_device(store: dist.Store, device_type: str, rank: int) -> None:
    """Refuse to compute on another kind of device than the first rank that came by; ranks of both would never meet.

    Args:
        store: at which the ranks meet.
        device_type: of this rank, `cpu` or `cuda`.
        rank: of this process.

    Raises:
        ConfigError: another rank's device is of the other kind.
    """
    first = store.compare_set("hilorec/device", "", f"{device_type} {rank}").decode()
    kind, other = first.split()
    if kind != device_type:
        raise ConfigError(
            f"device: rank {rank} has {device_type}, but rank {other} has {kind}: not every machine has GPUs; set "
            "device=cpu, or leave those without out"
        )
