"""One plain state dict of a checkpoint, as a file of the safetensors format.

The format is eight bytes, little-endian, the length of what follows: an object of JSON that gives each tensor's type,
shape and place; then the tensors' bytes, row by row and without gaps. It is written here because the library's writer
wants all tensors in memory at once, while a checkpoint of tables may be larger than that.
"""

import json
import math
import os
import secrets
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from recsys.checkpoint import layout
from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import CheckpointError
from recsys.checkpoint.pending import PREFIX, PendingRows
from recsys.checkpoint.report import open_tensors

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
    is_state = name.startswith("optimizer.") and not name.startswith(PREFIX)  # of what is settled
    return name if is_state else model_name(name)


class Source(NamedTuple):
    """A tensor that is to be written, a part at a time.

    Attributes:
        name: in the file.
        dtype: one that the format has.
        shape: of the whole.
        read: gives its parts, rows after rows, which together have its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Tensor]]


def unshard(
    directory: Path, output: Path, *, names: Callable[[str], str | None] = model_name
) -> dict[str, tuple[int, ...]]:
    """Write tensors of a checkpoint, whole, to one safetensors file; no more than the largest is in memory at a time.

    Of weights that have an average, it is this that is written, under the weight's name. The file appears whole or not
    at all, and replaces what was there. Its `__metadata__` has `format` (`pt`), `stage` and `step`.

    Args:
        directory: the checkpoint, of any number of ranks, any plan and any format; its digests are verified first.
        output: the file; folders above it are made.
        names: by the name in the checkpoint, the name in the file, or None for what is left out.

    Returns:
        The shapes of what was written, by name, in the order of the file.

    Raises:
        CheckpointError: the checkpoint is damaged, two tensors would have one name, or the file cannot be written.
    """
    meta = layout.verified(directory)
    reader = open_tensors(directory, averaged=True)
    pairs = [(new, name) for name in reader.names if (new := names(name)) is not None]
    if twice := next((new for new, count in Counter(new for new, _ in pairs).items() if count > 1), None):
        raise CheckpointError(f"{directory}: two tensors would be called {twice}; give them names of their own")

    def whole(name: str) -> list[Tensor]:
        return [pending.read(name)]

    try:
        pending = PendingRows(reader)
        sources = [
            Source(new, reader.dtype(name), tuple(reader.shape(name)), partial(whole, name)) for new, name in pairs
        ]
        return write_safetensors(output, sources, {"format": "pt", "stage": meta.stage, "step": str(meta.step)})
    except UnreadableError as error:
        raise CheckpointError(f"{directory} is damaged: {error}; take another checkpoint") from None


def write_safetensors(
    output: Path, sources: Iterable[Source], metadata: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Write tensors to one safetensors file, which appears whole or not at all and replaces what was there.

    Args:
        output: the file; folders above it are made.
        sources: the tensors, each of a name of its own.
        metadata: texts for the file's `__metadata__`.

    Returns:
        The shapes by name, in the order of the file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian, which this machine is not; write them on another")
    # Those of wide elements first, so that each lies where its type may.
    ordered = sorted(sources, key=lambda source: (-source.dtype.itemsize, source.name))
    header = _header(output, ordered, metadata)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            file.write(header)
            for source in ordered:
                _write(file, source)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(output)
        layout.flush(output.parent)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return {source.name: source.shape for source in ordered}


def _write(file: IO[bytes], source: Source) -> None:
    """Write a tensor's parts, of which none is held when the next tensor's are read."""
    for part in source.read():
        file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(output: Path, sources: list[Source], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' bytes."""
    told: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for source in sources:
        end = at + math.prod(source.shape) * source.dtype.itemsize
        told[source.name] = {
            "dtype": _TYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(f"{output} would hold too many tensors for one file: {len(sources):,}")
    return struct.pack("<Q", len(text)) + text
