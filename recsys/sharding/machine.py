"""What the machines of a run have for tables: memory of their devices and of their hosts, and links between ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torchrec.distributed.planner import Topology

from recsys.host_memory import host_memory
from recsys.runtime import Ranks

RESERVED = 0.15
"""Share of all memory that is kept from tables: for the process, its batches, the dense arch and its activations."""


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
