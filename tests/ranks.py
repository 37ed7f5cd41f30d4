"""Runs a function on several gloo ranks of this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, directory: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(rank, *arguments)` in a process for each rank, joined in a process group; results by rank.

    The function must be one of a module's top level; the ranks meet and leave their results in `directory`.
    """
    mp.spawn(_run, args=(world_size, str(directory), function, arguments), nprocs=world_size)
    return [torch.load(directory / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), f"{directory}/result-{rank}")
    dist.destroy_process_group()
