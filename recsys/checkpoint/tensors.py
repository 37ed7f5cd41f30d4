"""The tensors of a checkpoint as plain tensors, on one process: no process group, no TorchRec, no code that is loaded.

What DCP keeps of a part of a tensor is what `torch.save` writes: a zip of a few entries that are not compressed, one of
which describes the tensor and one of which is its bytes. Both are held against the index, and only then are the bytes
read, straight to where they go.
"""

import math
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys.checkpoint.index import DTYPES, MAX_OVERHEAD, Chunk, Index, UnreadableError, read_index
from recsys.checkpoint.pickles import Made, Name, PickleError, Reference, read_pickle
from recsys.files import FileError, open_regular

_BLOCK = 4 << 20
"""Bytes that are read at once, where rows are not longer."""


class TensorReader:
    """The tensors of a checkpoint, each put together from its parts when it is asked for.

    Args:
        directory: the checkpoint, written by any number of ranks.
        averaged: as `recsys.checkpoint.index.read_index` has it.

    Raises:
        UnreadableError: there is no index, or it and the files do not belong together.

    Attributes:
        names: of all tensors, in the order of the index.
    """

    def __init__(self, directory: Path, *, averaged: bool = False) -> None:
        self.index = read_index(directory, averaged=averaged)
        self.names = tuple(self.index.tensors)

    def unaveraged(self) -> "TensorReader":
        """Of the same checkpoint, whose weights are themselves, whatever averages they have."""
        reader = copy(self)
        reader.index = replace(self.index, tensors={**self.index.tensors, **self.index.averaged}, averaged={})
        return reader

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self.index.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        return self.index.tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor on the CPU, or some of its rows; beside it, a few MiB of memory are taken.

        Args:
            name: one of `names`; anything else is a KeyError.
            rows: of the first dimension, as they stand, so with a step of 1; None is all, of scalars too.

        Raises:
            UnreadableError: a part of it is not what the index says, or damaged, or there is no memory for it.
        """
        shape = self.shape(name)
        if rows is not None:
            start, stop = _bounds(shape, rows)
            shape = torch.Size((stop - start, *shape[1:]))
        try:
            out = torch.empty(shape, dtype=self.dtype(name))
        except RuntimeError:  # a file with holes may be larger than any memory
            raise UnreadableError(f"{name} of shape {tuple(shape)} does not fit in memory") from None
        self.read_into(name, out, rows)
        return out

    def check(self, name: str) -> None:
        """Hold all bytes of a tensor against their checksums, in a few MiB of memory.

        Raises:
            UnreadableError: as `read`.
        """
        # Copies to the meta device are none: blocks are read, counted in, and dropped.
        self.read_into(name, torch.empty(self.shape(name), dtype=self.dtype(name), device="meta"))

    def read_into(self, name: str, out: Tensor, rows: slice | None = None) -> None:
        """Fill a tensor of the same shape as what `read` gives, of any device, strides and type.

        Raises:
            UnreadableError: as `read`.
            ValueError: `out` has another shape.
        """
        entry = self.index.tensors[name]
        start, stop = (0, 0) if rows is None else _bounds(entry.shape, rows)
        wanted = entry.shape if rows is None else (stop - start, *entry.shape[1:])
        if tuple(out.shape) != wanted:
            raise ValueError(f"{name} has shape {wanted}, out {tuple(out.shape)}")
        parts = []
        for chunk in entry.chunks:
            region = Region((0,) * len(chunk.sizes), chunk.sizes)
            target = out.detach()
            if rows is not None:
                first = max(start, chunk.offsets[0])
                last = min(stop, chunk.offsets[0] + chunk.sizes[0])
                if first >= last:
                    continue
                region = Region((first - chunk.offsets[0], *region.offsets[1:]), (last - first, *chunk.sizes[1:]))
            for dimension, (offset, skipped, size) in enumerate(
                zip(chunk.offsets, region.offsets, region.sizes, strict=True)
            ):
                begin = offset + skipped - (start if dimension == 0 else 0)
                target = target.narrow(dimension, begin, size)
            parts.append((chunk, region, target))
        read_parts(self.index, name, parts)


class Region(NamedTuple):
    """A part of a chunk.

    Attributes:
        offsets: in the chunk.
        sizes: in each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def read_parts(index: Index, name: str, parts: Iterable[tuple[Chunk, Region, Tensor]]) -> None:
    """Fill targets with regions of chunks of a tensor; a chunk that is read whole is held against its checksum.

    Raises:
        UnreadableError: a chunk is not what the index says, or is damaged.
    """
    dtype = index.tensors[name].dtype
    for chunk, region, target in parts:
        with _naming(f"{name} in {index.directory / chunk.file}"), open_regular(index.directory / chunk.file) as file:
            _Stored.open(file, chunk, dtype).read(region, target)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Tell in whose bytes something is wrong."""
    try:
        yield
    except FileError as error:
        raise UnreadableError(str(error)) from None
    except OSError as error:
        raise UnreadableError(f"{what}: {error.strerror or error}") from None
    except (_DamagedError, PickleError) as error:
        raise UnreadableError(f"{what}: {error}") from None


class _DamagedError(Exception):
    """The bytes of a chunk are not what the index says."""


class _Stored(NamedTuple):
    """The bytes of a chunk.

    Attributes:
        file: opened.
        at: of its first element, in bytes from the start of the file.
        sizes: in each dimension.
        order: of its dimensions in memory, the outermost first.
        dtype: of its elements.
        checksum: CRC-32 of the bytes.
    """

    file: FileIO
    at: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    checksum: int

    @classmethod
    def open(cls, file: FileIO, chunk: Chunk, dtype: torch.dtype) -> "_Stored":
        """Find the bytes of a chunk, and hold what is said of them against the index."""
        window = _Window(file, chunk)
        entries = _entries(window)
        if entries.get("byteorder") is not None and window.stored(entries["byteorder"]) != sys.byteorder.encode():
            raise _DamagedError("it was written on a machine of another byte order")
        strides = _strides(window.stored(entries["data.pkl"]), chunk.sizes, dtype)
        order = tuple(sorted(range(len(strides)), key=lambda dimension: -strides[dimension]))
        data = entries["data/0"]
        if data.file_size != math.prod(chunk.sizes) * dtype.itemsize:
            raise _DamagedError(f"it holds {data.file_size:,} bytes, which is not the size of its tensor")
        return cls(file, chunk.start + window.start_of(data), chunk.sizes, order, dtype, data.CRC)

    def read(self, region: Region, target: Tensor) -> None:
        """Copy a region of the chunk to a tensor of its sizes."""
        # As it lies in memory, outermost dimension first; a scalar is a row of one.
        sizes, offsets, wanted = (
            [values[dimension] for dimension in self.order] or [value]
            for values, value in ((self.sizes, 1), (region.offsets, 0), (region.sizes, 1))
        )
        target = target.permute(self.order) if self.order else target.reshape(1)
        row = math.prod(sizes[1:]) * self.dtype.itemsize
        whole_rows = wanted[1:] == sizes[1:]
        direct = whole_rows and target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        step = max(1, _BLOCK // row)
        buffer = None if direct else torch.empty((min(step, wanted[0]), *sizes[1:]), dtype=self.dtype)
        checksum = 0
        for first in range(0, wanted[0], step):
            number = min(step, wanted[0] - first)
            block = target[first : first + number] if buffer is None else buffer[:number]
            memory = block.reshape(-1).view(torch.uint8).numpy().data
            self._fill(memory, self.at + (offsets[0] + first) * row)
            checksum = zlib.crc32(memory, checksum)
            if buffer is not None:
                for dimension in range(1, len(sizes)):
                    block = block.narrow(dimension, offsets[dimension], wanted[dimension])
                target[first : first + number].copy_(block)
        if wanted[0] == sizes[0] and whole_rows and checksum != self.checksum:
            raise _DamagedError("its bytes are not those that were written; restore the file")

    def _fill(self, memory: memoryview, at: int) -> None:
        while memory:
            if not (number := os.preadv(self.file.fileno(), [memory], at)):
                raise _DamagedError("the file ends before it does")
            memory, at = memory[number:], at + number


class _Window(RawIOBase):
    """The bytes of a chunk as a file of its own, for the reader of zips, of which no large part is read at once."""

    def __init__(self, file: FileIO, chunk: Chunk) -> None:
        self._file, self._chunk, self._at = file, chunk, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As files."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._chunk.length}[whence])
        return self._at

    def tell(self) -> int:
        """As files."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As files, up to a bound."""
        left = max(0, self._chunk.length - self._at)
        size = left if size < 0 else min(size, left)
        if size > 2 * MAX_OVERHEAD:
            raise _DamagedError(f"it says {size:,} bytes about itself")
        content = os.pread(self._file.fileno(), size, self._chunk.start + self._at)
        self._at += len(content)
        return content

    def start_of(self, entry: zipfile.ZipInfo) -> int:
        """Of an entry's bytes in the chunk, all of which lie in it."""
        self.seek(entry.header_offset)
        header = self.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:4] != b"PK\x03\x04":
            raise _DamagedError("it is no zip: an entry is not where it is said to be")
        start: int = self.tell() + sum(_HEADER.unpack(header))
        if start + entry.file_size > self._chunk.length:
            raise _DamagedError("it is no zip: an entry goes on beyond its end")
        return start

    def stored(self, entry: zipfile.ZipInfo) -> bytes:
        """The bytes of a small entry."""
        self.seek(self.start_of(entry))
        if zlib.crc32(content := self.read(entry.file_size)) != entry.CRC:
            raise _DamagedError("what it says about itself is not what was written; restore the file")
        return content


_HEADER = struct.Struct("<26xHH")


def _entries(window: _Window) -> dict[str, zipfile.ZipInfo]:
    """The entries of a chunk's zip by name, without the folder that all are in."""
    try:
        with zipfile.ZipFile(window) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise _DamagedError(f"it is no zip: {str(error)[:200]!r}") from None
    entries = {entry.orig_filename.partition("/")[2]: entry for entry in found}
    if len(entries) != len(found) or not entries.keys() >= {"data.pkl", "data/0"}:
        raise _DamagedError("it is no tensor that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in found):
        raise _DamagedError("it is compressed or encrypted, which no checkpoint of ours is")
    return entries


_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
assert _STORAGES.keys() == set(DTYPES.values())
_REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
_NAMES = frozenset(
    {_REBUILD, Name("collections", "OrderedDict"), *(Name("torch", storage) for storage in _STORAGES.values())}
)


def _strides(description: bytes, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The strides of the tensor that `torch.save` described, which must be of these sizes, dense, and of the type."""
    made: Any = read_pickle(description, _NAMES)
    if type(made) is not Made or made.of != _REBUILD or len(made.arguments) < 4:
        raise _DamagedError("it is something else than a tensor")
    storage, offset, found, strides = made.arguments[:4]
    if found != sizes:
        raise _DamagedError("its tensor is of another shape than the index says")
    told: Any = storage.to if type(storage) is Reference else None
    if type(told) is not tuple or len(told) != 5 or told[:3] != ("storage", Name("torch", _STORAGES[dtype]), "0"):
        raise _DamagedError(f"its tensor is of another type than the index says, {dtype}")
    if offset != 0 or told[4] != math.prod(sizes) or not _dense(sizes, strides):
        raise _DamagedError("its tensor is not stored densely")
    dense: tuple[int, ...] = strides
    return dense


def _dense(sizes: tuple[int, ...], strides: Any) -> bool:
    """Whether elements lie one after another, in whatever order of dimensions."""
    if type(strides) is not tuple or len(strides) != len(sizes) or not all(type(stride) is int for stride in strides):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1:  # of which the stride means nothing
            if stride != expected:
                return False
            expected *= size
    return True


def _bounds(shape: Sequence[int], rows: slice) -> tuple[int, int]:
    if not shape:
        raise ValueError("a scalar has no rows")
    start, stop, step = rows.indices(shape[0])
    if step != 1:
        raise ValueError(f"rows are read as they stand, not in steps of {step}")
    return start, max(start, stop)
