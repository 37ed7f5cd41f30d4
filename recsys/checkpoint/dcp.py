"""Reading PyTorch's distributed checkpoints (DCP) into tensors of any number of ranks, without running code.

DCP plans who reads what; what it reads by, index and bytes, is that of `recsys.checkpoint`.
"""

import os
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Size
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from recsys.checkpoint.index import Index, UnreadableError, read_index
from recsys.checkpoint.tensors import Region, read_parts


def load_tensors(directory: Path, state: dict[str, Any], *, averaged: bool = False) -> None:
    """Fill every tensor of `state` in place from the one of its name; a collective call.

    Args:
        directory: a checkpoint, written by any number of ranks.
        state: tensors and sharded tensors by name.
        averaged: as `recsys.checkpoint.index.read_index` has it.

    Raises:
        UnreadableError: a tensor is missing, damaged or of another shape, or the index is damaged or names what it may
            not.
    """
    try:
        dcp.load(state, storage_reader=_Reader(read_index(directory, averaged=averaged)), planner=DefaultLoadPlanner())
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        # DCP wraps what went wrong on each rank.
        failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        raise UnreadableError((str(cause).strip() or type(cause).__name__).splitlines()[0]) from error


class _Reader(StorageReader):
    """What DCP reads a checkpoint by."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one reading to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as DCP knows it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(entry.dtype),
                    Size(entry.shape),
                    [ChunkStorageMetadata(Size(chunk.offsets), Size(chunk.sizes)) for chunk in entry.chunks],
                )
                for name, entry in self._index.tensors.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed but the index."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As DCP planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As DCP planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what was planned."""
        chunks = {(name, chunk.offsets): chunk for name, entry in self._index.tensors.items() for chunk in entry.chunks}
        for item in plan.items:
            name, offset = item.storage_index.fqn, item.storage_index.offset
            target = planner.resolve_tensor(item).detach()
            region = Region(tuple(item.storage_offsets), tuple(item.lengths))
            if target.is_floating_point() != self._index.tensors[name].dtype.is_floating_point:
                raise UnreadableError(f"{name} is of {self._index.tensors[name].dtype}, the model's of {target.dtype}")
            read_parts(self._index, name, [(chunks[name, tuple(offset or ())], region, target)])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Checkpoints are opened by `load_tensors` alone."""
        return False
