"""Two checkpoints held against each other: configs, plans, what features hold, and every tensor, element by element."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.checkpoint import layout
from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import CheckpointError
from recsys.checkpoint.report import open_tensors, read_object
from recsys.checkpoint.tensors import TensorReader
from recsys.config import Difference, differences, load_checkpoint_config

_OBJECTS = (layout.PROGRESS, layout.PLAN, "kinds.json", f"{layout.VOCABULARIES}/digests.json")
_OF_TIME = ("seconds", "waited", "checkpoint")
"""Keys of the progress that differ between runs of the same results."""
_BLOCK = 1 << 22
"""Elements that are compared at once, where rows are not longer."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that two checkpoints have alike in shape and type, but not in value.

    Attributes:
        name: of the tensor.
        largest: |difference| of two elements, of those that are finite in both.
        differing: elements that differ; NaN differs from all but NaN.
        elements: in all.
    """

    name: str
    largest: float
    differing: int
    elements: int

    @property
    def share(self) -> float:
        """Of elements that differ, 0..1."""
        return self.differing / self.elements


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        keys: of configs, progress (without times), plans, kinds and vocabularies' digests, by file.
        only_first: tensors that the second lacks.
        only_second: tensors that the first lacks.
        shapes: of tensors that have other shapes or types, as texts, by name.
        values: tensors whose elements differ.
        equal: number of tensors that are the same, element by element.
    """

    keys: Mapping[str, Sequence[Difference]]
    only_first: Sequence[str]
    only_second: Sequence[str]
    shapes: Mapping[str, tuple[str, str]]
    values: Sequence[TensorDifference]
    equal: int

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (any(self.keys.values()) or self.only_first or self.only_second or self.shapes or self.values)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {**vars(self), "values": [{**asdict(value), "share": value.share} for value in self.values]}
        told["keys"] = {file: [one._asdict() for one in found] for file, found in self.keys.items()}
        return {"is_equal": self.is_equal, **told}


def compare(first: Path, second: Path) -> Comparison:
    """Hold two checkpoints against each other, in memory for some MiB of each.

    Raises:
        CheckpointError: one is none, or damaged.
        ConfigError: the config of one cannot be read.
    """
    for directory in (first, second):
        layout.verified(directory)
    one, other = open_tensors(first), open_tensors(second)
    both = [name for name in one.names if name in other.index.tensors]
    kinds = {name: (_kind(one, name), _kind(other, name)) for name in both}
    shapes = {name: pair for name, pair in kinds.items() if pair[0] != pair[1]}
    compared = [_compared(one, other, name) for name in both if name not in shapes]
    values = [found for found in compared if found.differing]
    return Comparison(
        dict(_keys(first, second)),
        [name for name in one.names if name not in other.index.tensors],
        [name for name in other.names if name not in one.index.tensors],
        shapes,
        values,
        len(compared) - len(values),
    )


def _keys(first: Path, second: Path) -> Iterator[tuple[str, list[Difference]]]:
    """What differs in each file of keys and values."""
    configs = [load_checkpoint_config(directory).model_dump(mode="json") for directory in (first, second)]
    objects = {name: [read_object(directory / name) or {} for directory in (first, second)] for name in _OBJECTS}
    pairs: dict[str, Any] = {layout.CONFIG: configs, **objects}
    for file, (then, now) in pairs.items():
        found = [one for one in differences(then, now) if one.path.rpartition(".")[2] not in _OF_TIME]
        if found:
            yield file, found


def _kind(reader: TensorReader, name: str) -> str:
    return f"{str(reader.dtype(name)).removeprefix('torch.')} {tuple(reader.shape(name))}"


def _compared(one: TensorReader, other: TensorReader, name: str) -> TensorDifference:
    largest, differing = 0.0, 0
    for rows in _blocks(one.shape(name)):
        a, b = _read(one, name, rows), _read(other, name, rows)
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        if not bool(same.all()):
            differing += int((~same).sum())
            apart = (a.double() - b.double()).abs()
            finite = apart[apart.isfinite()]
            largest = max(largest, finite.max().item() if len(finite) else 0.0)
    return TensorDifference(name, largest, differing, one.shape(name).numel())


def _blocks(shape: torch.Size) -> list[slice | None]:
    if not shape or not shape.numel():
        return [None]
    step = max(1, _BLOCK // (shape.numel() // shape[0]))
    return [slice(first, first + step) for first in range(0, shape[0], step)]


def _read(reader: TensorReader, name: str, rows: slice | None) -> Tensor:
    try:
        return reader.read(name, rows)
    except UnreadableError as error:
        raise CheckpointError(f"{reader.index.directory} is damaged: {error}; take another checkpoint") from None
