"""The index of a checkpoint in PyTorch's distributed format (DCP): which tensors there are, and where their bytes lie.

DCP's index is a pickle, `.metadata`. It is read as data and checked as a whole before anything uses it: what an
`Index` says is consistent in itself and with the files beside it, so whoever reads tensors by it allocates no more than
those hold.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recsys.checkpoint.pickles import Made, Name, PickleError, read_pickle
from recsys.files import FileError, open_regular, read_regular

INDEX = ".metadata"
AVERAGE = "average."
"""Begins the name of the average of a weight, whose own name begins with `model.` instead."""
MAX_BYTES = 256 << 20
MAX_OVERHEAD = 1 << 16
"""Bytes that `torch.save` may add to those of a tensor; it adds less than 2 KiB."""
_MAX_DIMENSIONS = 16

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
"""Of tensors in checkpoints, by what they are called in `torch`."""


class UnreadableError(Exception):
    """The tensors cannot be read; the message says why in one line."""


class Chunk(NamedTuple):
    """A part of a tensor, and where its bytes are.

    Attributes:
        offsets: of its first element in the tensor.
        sizes: in each dimension.
        file: of the checkpoint's folder.
        start: of what `torch.save` wrote, in bytes from the start of the file.
        length: of that.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Entry(NamedTuple):
    """A tensor.

    Attributes:
        dtype: one of `DTYPES`.
        shape: of the whole tensor.
        chunks: do not overlap and make up the tensor; those without elements are left out.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """What a checkpoint's index says.

    Attributes:
        directory: of the checkpoint.
        tensors: by name, in the order of the index.
        averaged: weights themselves, by the names under which `tensors` has their averages.
    """

    directory: Path
    tensors: Mapping[str, Entry]
    averaged: Mapping[str, Entry] = field(default_factory=dict)


def read_index(directory: Path, *, averaged: bool = False) -> Index:
    """Read the index of a checkpoint and look at the files that it speaks of.

    Args:
        directory: of the checkpoint.
        averaged: whether weights that have an average are to be this, as for whoever does not go on with the training.

    Raises:
        UnreadableError: there is none, it is not what DCP writes, it is not consistent, or a file is not there, is no
            regular one or is too short.
    """
    try:
        root = read_pickle(read_regular(directory / INDEX, MAX_BYTES), _NAMES)
        metadata = _state(root, "Metadata")
        places = _places(metadata.get("storage_data"))
        entries = metadata.get("state_dict_metadata")
        if type(entries) is not dict or not all(type(name) is str for name in entries):
            raise UnreadableError("the index has no tensors by name")
        tensors = {name: _entry(name, entry, places) for name, entry in entries.items()}
    except FileError as error:
        raise UnreadableError(str(error)) from None
    except PickleError as error:
        raise UnreadableError(f"the index cannot be read: {error}") from None
    _check_files(directory, tensors)
    index = Index(directory, tensors)
    return _averaged(index) if averaged else index


def _averaged(index: Index) -> Index:
    """Weights by what their averages say, where there are any; no averages beside them."""
    named = {name: f"{AVERAGE}{name.removeprefix('model.')}" for name in index.tensors if name.startswith("model.")}
    tensors = {
        name: index.tensors.get(named.get(name, name), entry)
        for name, entry in index.tensors.items()
        if not name.startswith(AVERAGE)
    }
    averaged = {name: index.tensors[name] for name, average in named.items() if average in index.tensors}
    return replace(index, tensors=tensors, averaged=averaged)


_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Name("torch", "Size")
_LAYOUT = Name("torch.serialization", "_get_layout")
_NAMES = frozenset(
    {
        Name("builtins", "getattr"),  # Python before 3.11.4 pickles a member of an enum so
        Name("pathlib", "PosixPath"),
        Name("pathlib._local", "PosixPath"),  # of Python 3.13
        _STORAGE_INFO,
        _SIZE,
        _LAYOUT,
    }
    | {
        Name(_METADATA, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    }
    | {Name("torch", name) for name in DTYPES}
)

_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")


def _state(value: Any, of: str) -> dict[Any, Any]:
    """The fields of a dataclass of DCP's."""
    name = _STORAGE_INFO if of == "_StorageInfo" else Name(_METADATA, of)
    if type(value) is not Made or value.of != name or value.arguments or type(value.state) is not dict:
        raise UnreadableError(f"the index has something else where {of} should be")
    return value.state


def _sizes(value: Any) -> tuple[int, ...]:
    """A `torch.Size`."""
    if type(value) is Made and value.of == _SIZE and len(value.arguments) == 1:
        (sizes,) = value.arguments
        if (
            type(sizes) is tuple
            and len(sizes) <= _MAX_DIMENSIONS
            and all(type(size) is int and size >= 0 for size in sizes)
        ):
            return sizes
    raise UnreadableError("the index has a size or an offset that is none")


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """File, start and length by name and offset."""
    if type(storage) is not dict:
        raise UnreadableError("the index does not say where tensors are")
    places = {}
    for key, value in storage.items():
        index, info = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
        file, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
        name = index.get("fqn")
        if type(name) is not str:
            raise UnreadableError("the index has a place of something without a name")
        if index.get("offset") is None:
            raise UnreadableError(f"{_shown(name)} is not a tensor; checkpoints hold nothing else")
        if type(file) is not str or not _FILE.fullmatch(file):
            raise UnreadableError(f"{_shown(name)} is said to be in a file that is none of a checkpoint")
        if not (type(start) is int and type(length) is int and start >= 0 and length >= 0):
            raise UnreadableError(f"{_shown(name)} is said to be at no place of {file}")
        if info.get("transform_descriptors"):
            raise UnreadableError(f"{_shown(name)} is stored in a way that no checkpoint of ours is")
        place = name, _sizes(index["offset"])
        if place in places:
            raise UnreadableError(f"{_shown(name)} has a part at two places")
        places[place] = file, start, length
    return places


def _entry(name: str, value: Any, places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]) -> Entry:
    shown = _shown(name)
    if type(value) is Made and value.of == Name(_METADATA, "BytesStorageMetadata"):
        raise UnreadableError(f"{shown} is not a tensor; checkpoints hold nothing else")
    told = _state(value, "TensorStorageMetadata")
    shape, parts, dtype = _sizes(told.get("size")), told.get("chunks"), _dtype(shown, told.get("properties"))
    if type(parts) is not list or not parts:
        raise UnreadableError(f"{shown} has no parts")
    chunks = []
    for part in parts:
        fields = _state(part, "ChunkStorageMetadata")
        offsets, sizes = _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise UnreadableError(f"{shown} has a part of other dimensions than its own")
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise UnreadableError(f"{shown} has a part beyond its end")
        if 0 in sizes:
            continue
        if (place := places.get((name, offsets))) is None:
            raise UnreadableError(f"{shown} has a part of which no file is said")
        chunk = Chunk(offsets, sizes, *place)
        if not 0 <= chunk.length - math.prod(sizes) * dtype.itemsize <= MAX_OVERHEAD:
            raise UnreadableError(f"{shown} has a part of {sizes} in {chunk.length:,} bytes of {chunk.file}")
        chunks.append(chunk)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or not _disjoint(chunks):
        raise UnreadableError(f"{shown} is not made up of its parts: some overlap or are missing")
    return Entry(dtype, shape, tuple(chunks))


def _dtype(shown: str, properties: Any) -> torch.dtype:
    """Of the properties of a tensor, which DCP writes as dtype, layout and what no longer counts."""
    name = Name(_METADATA, "TensorProperties")
    state = properties.state if type(properties) is Made and properties.of == name else None
    dtype, layout = state[:2] if type(state) is tuple and len(state) >= 2 else (None, None)
    is_dense = type(layout) is Made and layout.of == _LAYOUT and layout.arguments == ("torch.strided",)
    if is_dense and type(dtype) is Name and dtype.module == "torch" and dtype.name in DTYPES:
        return DTYPES[dtype.name]
    raise UnreadableError(f"{shown} is no dense tensor of a type that checkpoints have")


def _disjoint(chunks: Sequence[Chunk]) -> bool:
    """Whether no two parts overlap, if cuts right through part them as ours always do: by rows, columns or both.

    Comparing each with each would take hours where a hostile index has a hundred thousand.
    """
    groups = [list(chunks)] if len(chunks) > 1 else []
    for _ in range(2):
        for dimension in range(len(chunks[0].sizes) if chunks else 0):
            groups = [part for group in groups for part in _cut(group, dimension) if len(part) > 1]
    return not groups


def _cut(chunks: list[Chunk], dimension: int) -> Iterator[list[Chunk]]:
    """Parts in groups between which a cut across a dimension goes."""
    group: list[Chunk] = []
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[dimension]):
        if group and chunk.offsets[dimension] >= end:
            yield group
            group = []
        group.append(chunk)
        end = max(end, chunk.offsets[dimension] + chunk.sizes[dimension])
    yield group


def _check_files(directory: Path, tensors: Mapping[str, Entry]) -> None:
    """Look at every file that is spoken of; no two parts may share bytes, so no small file stands for much."""
    places: dict[str, list[tuple[int, int, str]]] = {}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            places.setdefault(chunk.file, []).append((chunk.start, chunk.start + chunk.length, name))
    for file, parts in places.items():
        try:
            with open_regular(directory / file) as opened:
                size = opened.seek(0, 2)
        except (FileError, OSError) as error:
            raise UnreadableError(str(error)) from None
        parts.sort()
        before = 0
        for start, end, name in parts:
            if start < before:
                raise UnreadableError(f"{_shown(name)} is said to share bytes of {file} with another tensor")
            before = end
        if before > size:
            raise UnreadableError(
                f"{directory / file} is cut off: it has {size:,} bytes, the index speaks of {before:,}"
            )


def _shown(name: str) -> str:
    """A tensor's name as one line of any terminal, cut where it is long."""
    text = name.encode("unicode_escape").decode()
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"
