"""One plain state dict of a checkpoint, as a file of the safetensors format.

The format is eight bytes, little-endian, the length of what follows: an object of JSON that gives each tensor's type,
shape and place; then the tensors' bytes, row by row and without gaps. It is written here because the library's writer
wants all tensors in memory at once, while a checkpoint of tables may be larger than that.
"""

import json
import os
import secrets
import struct
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from recsys.checkpoint import layout
from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import CheckpointError
from recsys.checkpoint.report import open_tensors
from recsys.checkpoint.tensors import TensorReader

_TYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_MAX_HEADER = 100_000_000
"""Bytes of JSON that readers of the format take."""


def model_name(name: str) -> str | None:
    """What a tensor of the model is called in a plain state dict, by its name in a checkpoint; None for all others."""
    return name.removeprefix("model.") if name.startswith("model.") else None


def model_or_optimizer_name(name: str) -> str | None:
    """As `model_name`, and the state of optimizers by the name that it has."""
    return name if name.startswith("optimizer.") else model_name(name)


def unshard(
    directory: Path, output: Path, *, names: Callable[[str], str | None] = model_name
) -> dict[str, tuple[int, ...]]:
    """Write tensors of a checkpoint, whole, to one safetensors file; no more than the largest is in memory at a time.

    The file appears whole or not at all, and replaces what was there. Its `__metadata__` has `format` (`pt`), `stage`
    and `step`.

    Args:
        directory: the checkpoint, of any number of ranks, any plan and any format; its digests are verified first.
        output: the file; folders above it are made.
        names: by the name in the checkpoint, the name in the file, or None for what is left out.

    Returns:
        The shapes of what was written, by name, in the order of the file.

    Raises:
        CheckpointError: the checkpoint is damaged, two tensors would have one name, or the file cannot be written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian, which this machine is not; write them on another")
    meta = layout.verified(directory)
    reader = open_tensors(directory)
    pairs = [(new, name) for name in reader.names if (new := names(name)) is not None]
    if twice := next((new for new, count in Counter(new for new, _ in pairs).items() if count > 1), None):
        raise CheckpointError(f"{directory}: two tensors would be called {twice}; give them names of their own")
    # Those of wide elements first, so that each lies where its type may.
    pairs.sort(key=lambda pair: (-reader.dtype(pair[1]).itemsize, pair[0]))
    header = _header(reader, pairs, {"format": "pt", "stage": meta.stage, "step": str(meta.step)})
    partial = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(header)
            for _, name in pairs:
                file.write(reader.read(name).reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(output)
        layout.flush(output.parent)
    except UnreadableError as error:
        raise CheckpointError(f"{directory} is damaged: {error}; take another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return {new: tuple(reader.shape(name)) for new, name in pairs}


def _header(reader: TensorReader, pairs: list[tuple[str, str]], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' bytes."""
    told: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for new, name in pairs:
        end = at + reader.shape(name).numel() * reader.dtype(name).itemsize
        dtype = _TYPES[reader.dtype(name)]
        told[new] = {"dtype": dtype, "shape": list(reader.shape(name)), "data_offsets": [at, end]}
        at = end
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(f"{reader.index.directory} has too many tensors for one file: {len(reader.names):,}")
    return struct.pack("<Q", len(text)) + text
