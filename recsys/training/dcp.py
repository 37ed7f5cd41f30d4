"""Reading PyTorch's distributed checkpoints (DCP) without running code.

DCP's index is a pickle. It is read by an unpickler that knows by name what such an index consists of and nothing else,
and entries that are not tensors are refused.
"""

import enum
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem


class UnreadableError(Exception):
    """The tensors cannot be read; the message says why in one line."""


def load_tensors(directory: Path, state: dict[str, Any], *, alone: bool = False) -> None:
    """Fill every tensor of `state` in place from the one of its name; a collective call unless `alone`.

    Args:
        directory: a checkpoint, written by any number of ranks.
        state: tensors and sharded tensors by name.
        alone: whether this rank reads by itself.

    Raises:
        UnreadableError: a tensor is missing or of another shape, or the index is damaged or names what it may not.
    """
    reader = _Reader(directory)
    try:
        reader.read_metadata()  # DCP itself takes an index that it cannot read for one that is not there
        dcp.load(state, storage_reader=reader, planner=_TensorsOnly(), no_dist=alone)
    except (dcp.CheckpointException, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        # DCP wraps what went wrong on each rank.
        failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        raise UnreadableError((str(cause).strip() or type(cause).__name__).splitlines()[0]) from error


def tensor_sizes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of every tensor of a checkpoint, by its name.

    Raises:
        UnreadableError: the index is damaged or names what it may not.
    """
    try:
        metadata = _Reader(directory).read_metadata().state_dict_metadata
        return {
            name: (told.size, told.properties.dtype)
            for name, told in metadata.items()
            if isinstance(told, TensorStorageMetadata)
        }
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UnreadableError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


class _Unpickler(pickle.Unpickler):
    """Knows by name what DCP's index consists of and nothing else, so that a checkpoint cannot run code.

    Whole modules are not enough: a name may have dots, and so reach what the module imports.
    """

    _ALLOWED = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("torch", "Size"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
        }
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
                *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):
            return _member  # Python before 3.11.4 pickles a member of an enum so
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint of ours has")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            metadata: Metadata = _Unpickler(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor; checkpoints hold nothing else")


def _member(of: Any, name: str) -> enum.Enum:
    """A member of an enum, and nothing else that `getattr` could reach."""
    if not (isinstance(of, type) and issubclass(of, enum.Enum) and name in of.__members__):
        raise pickle.UnpicklingError(f"the index takes {name} from {of!r}, which no checkpoint of ours does")
    return of[name]
