"""What the machines of a run have for tables: memory of their devices and of their hosts, and links between ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed.planner import Topology

from recsys.runtime import Ranks

RESERVED = 0.15
"""Share of all memory that is kept from tables: for the process, its batches, the dense arch and its activations."""


_DIGITS = 20  # of more bytes than 64 bits count


@dataclass(frozen=True)
class Machine:
    """A machine of a run; those with less stand for all others.

    Attributes:
        hbm: bytes of memory of each of its GPUs; 0 where ranks compute on CPUs.
        ddr: bytes of host memory, which its ranks share.
        intra_bw: bytes a second between two of its ranks; None for what TorchRec takes (600 GiB/s).
        inter_bw: bytes a second from it to another; None for what TorchRec takes (12.5 GiB/s).
    """

    hbm: int
    ddr: int
    intra_bw: float | None = None
    inter_bw: float | None = None

    def topology(self, ranks: Ranks) -> Topology:
        """These ranks on such machines, each with its share of the memory that is not kept from tables."""
        bandwidths = {"intra_host_bw": self.intra_bw, "inter_host_bw": self.inter_bw}
        return Topology(
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            compute_device=ranks.device.type,
            hbm_cap=int((1 - RESERVED) * self.hbm),
            ddr_cap=int((1 - RESERVED) * self.ddr) // ranks.local_world_size,
            **{name: value / 1000 for name, value in bandwidths.items() if value is not None},  # a millisecond
        )


def this_machine(ranks: Ranks) -> Machine:
    """What this machine has, or, in a process group, each of its machines at least; then a collective call.

    Of memory all that there is, and not what is free at the moment, so that a run gets the plan again that it had.
    """
    hbm = torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else 0
    least = torch.tensor([hbm, host_memory()])
    if dist.is_initialized():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return Machine(*least.tolist())


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may use with all others of its control group (cgroup).

    Args:
        root: of the file system that tells.
    """
    fields = (root / "proc/meminfo").read_text().split()
    whole = 1024 * int(fields[fields.index("MemTotal:") + 1])
    return min([whole, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Of this process's control group and of those above it, of either version; a container may not see its own."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups if line.count(":") > 1):
        if controllers not in ("", "memory"):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            try:
                limit = (folder / name).read_text().strip()
            except OSError:
                continue
            if limit.isdecimal() and len(limit) < _DIGITS:  # and not "max"
                yield int(limit)
