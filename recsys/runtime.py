"""Where a process stands among its ranks, and the seeds it draws from."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from recsys import watch
from recsys.config import ConfigError
from recsys.host_memory import keep_freed_memory
from recsys.lifetime import end_with_launcher
from recsys.meeting import (
    Patience,
    Place,
    agree_on_device,
    check_interfaces,
    ending_unless_done,
    meet,
    open_store,
    telling_of_a_lost_store,
    told_place,
)

DEFAULT_TIMEOUT = 300.0  # seconds

ASKED_GPUS = "HILOREC_GPUS"
"""Environment variable in which `launch` leaves how many GPUs a job asks for; `launch/dist.py` names it too."""


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: rank within this machine.
        local_world_size: processes on this machine.
        device: where this rank computes.
        timeout: seconds for which others are waited for.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    timeout: float = DEFAULT_TIMEOUT

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def new_host_group(self, timeout: float | None = None) -> dist.ProcessGroup:
        """A group of all ranks for tensors on the host, whatever trains on the device; a collective call.

        Args:
            timeout: seconds for which its calls wait; None: `timeout` of the ranks.
        """
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout or self.timeout))
        return group


@contextlib.contextmanager
def process_group(device: str, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Join the process group that torchrun or TorchX prepared, or make one of this process alone.

    While the block lasts, ranks watch one another: where one is gone, this process ends (`recsys.watch`).

    Args:
        device: `auto` (CUDA where this machine has a GPU for each of its processes, else the CPU), `cpu` or `cuda`.
        timeout: seconds that a rank may be silent, and that others are waited for.

    Raises:
        ConfigError: there are fewer GPUs than processes, and the config or the job asks for them; or this machine has
            GPUs and another of the run has none.
        MeetingError: the ranks do not come together, or are to meet at a network interface that is not there.
        OrphanError: the torchx that launched this run has ended already.
    """
    end_with_launcher()
    place = told_place()
    if torch.cuda.device_count() < place.local_world_size:
        _do_without_gpus(device, place)
    check_interfaces()
    use_cuda = device_type(device, place.local_world_size) == "cuda"
    chosen = torch.device("cuda", place.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    keep_freed_memory()
    set_precision()
    leave_a_core(place.local_world_size)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    with _joined(place, chosen, backend, timeout):
        yield Ranks(place.rank, place.world_size, place.local_rank, place.local_world_size, chosen, timeout)


def _do_without_gpus(device: str, place: Place) -> None:
    """Say what a machine with fewer GPUs than processes means for these.

    Raises:
        ConfigError: they were to compute on GPUs.
    """
    gpus, processes, asked = torch.cuda.device_count(), place.local_world_size, os.environ.get(ASKED_GPUS)
    if device == "auto" and asked:
        raise ConfigError(
            f"device: the job asks for {asked} GPUs on each machine, and torch finds {gpus or 'none'} on "
            f"{socket.gethostname()} for {processes} processes; python -m recsys.doctor tells what is there, or set "
            "device=cpu"
        )
    if device == "cuda":
        raise ConfigError(
            f"device: cuda needs a GPU for each of this machine's {processes} processes, and it has {gpus}; start "
            "fewer processes or set device=cpu"
        )
    if device == "auto" and gpus and place.local_rank == 0:
        told = f"{gpus} GPU{'s' * (gpus > 1)}"
        print(
            f"device: auto is the CPU here, as this machine has {told} for {processes} processes; to compute on "
            f"{'it' if gpus == 1 else 'them'}, start {gpus} at most",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def _joined(place: Place, device: torch.device, backend: str, timeout: float) -> Iterator[None]:
    """The default process group, and a watch over its ranks."""
    limit = timedelta(seconds=timeout)
    if not place.host:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
        return
    told = f"rank {place.rank} waits for the store at {place}, which does not answer"
    with ending_unless_done(2 * timeout, told), telling_of_a_lost_store(place):
        patience = Patience(timeout, says=place.local_rank == 0)
        store = meet(open_store(place, patience), place, patience)
        agree_on_device(store, device.type, place.rank)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit)
        watching = watch.Watch(
            dist.distributed_c10d._get_default_store().clone(),  # type: ignore[attr-defined]
            place.rank,
            place.world_size,
            local_rank=place.local_rank,
            seconds=timeout,
            place=str(place),
        )
        dist.barrier()  # so that each finds the others' first beats
    watching.start()
    watch.current = watching
    yield
    # Not in a finally: after a failure the other ranks may never come, and the process is about to end anyway.
    dist.barrier()
    watching.close()
    watch.current = None
    dist.destroy_process_group()


def is_told_to_be_first() -> bool:
    """Whether this process will be the first rank, before the ranks meet.

    Raises:
        MeetingError: the environment tells wrongly.
    """
    return told_place().rank == 0


def set_precision(*, tf32: bool = False) -> None:
    """Compute in float32 throughout: matrix products of float32 are not rounded on the way, or by GPUs to TF32."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 throughout within the block, whatever steps are computed in."""
    before = torch.get_float32_matmul_precision()
    set_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, such as `order` or `dropout`, independent of the seeds for other purposes."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint32)[0])
