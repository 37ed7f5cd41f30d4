"""Where a process stands among its ranks, and the seeds it draws from."""

import contextlib
import ctypes
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from recsys.config import ConfigError
from recsys.lifetime import end_with_launcher

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: rank within this machine.
        local_world_size: processes on this machine.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun or TorchX prepared, or make one of this process alone.

    Args:
        device: `auto` (CUDA where this machine has GPUs), `cpu` or `cuda`.

    Raises:
        ConfigError: there are fewer GPUs than processes that are to compute on them, or this machine has GPUs and
            another of the run has none.
        OrphanError: the torchx that launched this run has ended already.
    """
    end_with_launcher()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    gpus = torch.cuda.device_count()
    if gpus < local_world_size and (device == "cuda" or (device == "auto" and gpus)):
        raise ConfigError(
            f"device: {device} needs a GPU for each of this machine's {local_world_size} processes, and it has {gpus}; "
            "start fewer processes or set device=cpu"
        )
    use_cuda = device_type(device, local_world_size) == "cuda"
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    keep_freed_memory()
    set_precision()
    leave_a_core(local_world_size)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        store = meet(store, rank, world_size)
        agree_on_device(store, chosen.type, rank)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(rank, world_size, local_rank, local_world_size, chosen)
    # Not in a finally: after a failure the other ranks may never come, and the process is about to end anyway.
    dist.destroy_process_group()


def meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store that is these ranks' alone; a collective call.

    The store of torchrun lives on when it restarts its ranks, with all that those before them have left there: their
    addresses, to which gloo would connect, and the claim of an error. How often torchrun restarted does not tell the
    attempts apart: it does not count a node that joins or leaves, and nodes count each for itself. So the first rank
    opens a part under a new name, and each other takes part in what answers it, which a part left behind never does.

    Args:
        store: at which the ranks meet.
        rank: of this process.
        world_size: number of processes.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("hilorec/meeting", me)
        for other in range(1, world_size):
            guest = store.get(f"hilorec/{me}/{other}").decode()
            store.set(f"hilorec/welcome/{guest}", "")
        return dist.PrefixStore(me, store)
    meeting, until = None, time.monotonic() + _TIMEOUT.total_seconds()
    while not store.check([f"hilorec/welcome/{me}"]):
        if time.monotonic() > until:
            raise TimeoutError(f"rank {rank} waited {_TIMEOUT} for the first rank, which did not come")
        if (newest := store.get("hilorec/meeting").decode()) != meeting:
            meeting = newest
            store.set(f"hilorec/{meeting}/{rank}", me)
        time.sleep(_MEETING_SECONDS)
    assert meeting is not None
    return dist.PrefixStore(meeting, store)


_MEETING_SECONDS = 0.01  # between two looks for the first rank


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


def set_precision() -> None:
    """Compute in float32 throughout: matrix products of float32 are not rounded to fewer bits on the way."""
    torch.set_float32_matmul_precision("highest")


def once_on_each_machine(ranks: Ranks, action: Callable[[], object]) -> None:
    """Have one rank of each machine do something that the others wait for; a collective call."""
    if ranks.local_rank == 0:
        action()
    dist.barrier()


def leave_a_core(local_world_size: int) -> None:
    """Compute on this process's share of the cores but one, unless OMP_NUM_THREADS says on how many.

    One core stays free for the reader: OpenMP threads that lose theirs make all others spin.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size - 1))


def device_type(device: str, local_world_size: int) -> str:
    """`cpu` or `cuda`: what a config's `device` means for that many processes on this machine."""
    if device == "auto":
        return "cuda" if torch.cuda.device_count() >= local_world_size else "cpu"
    return device


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what is allocated next; does nothing where it is not glibc.

    Decoded rows and batches are large and live for moments. Left alone, glibc hands such memory back to the system, and
    the kernel clears and maps the pages of the next, under a lock that all threads share. The process keeps what it
    held at most until it ends.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, size in ((_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 64 << 20), (_MMAP_THRESHOLD, 32 << 20)):
            set_option(option, size)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_NEVER = (1 << 31) - 1


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, such as `order` or `dropout`, independent of the seeds for other purposes."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint32)[0])
