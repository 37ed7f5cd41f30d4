"""Small checkpoints to spoil."""

from pathlib import Path

import torch
from ranks import run_ranks
from runs import as_config, train_on
from tiny import tiny_config, write_tiny_log
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def train_checkpoint(folder: Path, world_size: int, seed: int = 0) -> Path:
    """A checkpoint of one short stage, written by so many ranks."""
    write_tiny_log(folder / "log")
    raw = {**tiny_config(folder / "log", folder / "out"), "seed": seed}
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 5}}
    run_ranks(world_size, train_on, as_config(raw, folder))
    return folder / "out" / "checkpoints" / "step-5"


def tensors_as_dcp_reads_them(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by torch's own reader, which trusts it."""
    metadata = FileSystemReader(directory).read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=directory, no_dist=True)
    return state
