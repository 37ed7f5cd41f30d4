"""What there is: the checkpoints of a run, what is in one, and whether it is what was written."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.checkpoint import layout
from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import CheckpointError, CheckpointMeta
from recsys.checkpoint.tensors import TensorReader
from recsys.config import ConfigError, load_checkpoint_config
from recsys.files import FileError, read_json

MAX_JSON = 64 << 20
"""Bytes of a file of JSON in a checkpoint."""


@dataclass(frozen=True)
class Listed:
    """A checkpoint among those of a run.

    Attributes:
        directory: of the checkpoint.
        bytes: of its files.
        meta: what it says of itself, None where it says nothing that can be read.
        kept: why retention keeps it, by the config of the run's newest checkpoint.
        wrong: why it is not whole in one line, None where sizes are what was written; digests are not looked at.
    """

    directory: Path
    bytes: int
    meta: CheckpointMeta | None
    kept: Sequence[str]
    wrong: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = {"checkpoint": str(self.directory), "bytes": self.bytes}
        if self.meta is not None:
            told |= {name: getattr(self.meta, name) for name in ("step", "stage", "world_size", "format", "valid")}
        return {**told, "kept": list(self.kept), "wrong": self.wrong}

    def as_row(self) -> dict[str, str]:
        """For a table."""
        meta = self.meta
        valid = (meta.valid if meta else None) or {}

        def figure(name: str) -> str:
            return "-" if (value := valid.get(name)) is None else f"{value:.6f}"

        return {
            "checkpoint": self.directory.name,
            "stage": meta.stage if meta else "-",
            "MiB": f"{self.bytes / 2**20:,.2f}",
            "ranks": str(meta.world_size) if meta else "-",
            "valid auc": figure("auc"),
            "valid log loss": figure("log_loss"),
            "kept as": ", ".join(self.kept) or "-",
            "whole": "no" if self.wrong else "yes",
        }


def checkpoints_folder(folder: Path) -> Path:
    """Where the checkpoints are of a run that is named by its `output_dir` or by that folder itself."""
    below = folder / "checkpoints"
    return below if below.is_dir() else folder


def list_checkpoints(folder: Path) -> list[Listed]:
    """All checkpoints in a folder, the newest first, then those that were not finished.

    Raises:
        CheckpointError: there are none.
    """
    directories = layout.checkpoints(folder)
    unfinished = sorted(path for path in folder.glob("step-*") if path not in directories and path.is_dir())
    if not directories and not unfinished:
        raise CheckpointError(f"{folder} holds no checkpoint; name a run's output_dir, or its checkpoints folder")
    metas: dict[Path, CheckpointMeta] = {}
    told = "is being written, replaced or deleted, or a run that did so was cut off"
    wrong = {path: f"{path} {told}" for path in unfinished}
    for directory in directories:
        try:
            metas[directory] = layout.read_meta(directory)
            if differing := _wrong_size(directory, metas[directory]):
                wrong[directory] = differing
        except CheckpointError as error:
            wrong[directory] = str(error)
    kept: Mapping[int, Sequence[str]] = {}
    if metas:
        newest = next(iter(metas))
        try:
            config = load_checkpoint_config(newest).checkpoints
            is_over = (folder.parent / "summary.json").exists()
            kept = layout.retained(list(metas.values()), config, is_over=is_over)
        except ConfigError as error:
            wrong.setdefault(newest, " ".join(str(error).split()))
    return [
        Listed(
            directory,
            sum(file.lstat().st_size for file in directory.rglob("*") if file.is_file()),
            meta := metas.get(directory),
            kept.get(meta.step, ()) if meta else (),
            wrong.get(directory),
        )
        for directory in (*directories, *unfinished)
    ]


def _wrong_size(directory: Path, meta: CheckpointMeta) -> str | None:
    """The first file that has not the size with which it was written, if any."""
    for name, told in sorted(meta.files.items()):
        path = directory / name
        try:
            size = path.lstat().st_size
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
        if size != told.bytes:
            return f"{path} has {size:,} bytes instead of {told.bytes:,}"
    return None


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        name: of the tensor.
        group: `tables`, `dense`, `average.tables` or `average.dense` for averages of these, `optimizer.<which>`, or
            `ranks` for what each rank has of its own.
        shape: of the whole.
        dtype: as torch calls it, such as `float32`.
        bytes: of its elements.
        parts: in which it is stored.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    parts: int


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        directory: of the checkpoint.
        meta: what it says of itself.
        progress: how far its run had come; None in format 1.
        position: which rows of the epoch under way had been read; None in format 1.
        plan: by table, where it was; None in format 1.
        tensors: in the order of the index.
    """

    directory: Path
    meta: CheckpointMeta
    progress: Mapping[str, Any] | None
    position: Mapping[str, Any] | None
    plan: Mapping[str, Mapping[str, Any]] | None
    tensors: Sequence[Stored]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("format", "stage", "step", "stage_step", "world_size", "kept", "best_step", "valid")
        return {
            "checkpoint": str(self.directory),
            **{name: getattr(self.meta, name) for name in names},
            "files": {name: digest._asdict() for name, digest in self.meta.files.items()},
            "progress": self.progress,
            "position": self.position,
            "plan": self.plan,
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


def inspect(directory: Path) -> Contents:
    """What is in a checkpoint; of its tensors, the index alone is read.

    Raises:
        CheckpointError: it is none, or not one that can be read.
    """
    meta = layout.read_meta(directory)
    reader = open_tensors(directory)
    stored = _objects(directory / layout.PROGRESS) or {}
    return Contents(
        directory,
        meta,
        stored.get("progress"),
        stored.get("position"),
        _objects(directory / layout.PLAN),
        [
            Stored(
                name,
                group_of(name),
                entry.shape,
                str(entry.dtype).removeprefix("torch."),
                reader.shape(name).numel() * entry.dtype.itemsize,
                len(entry.chunks),
            )
            for name, entry in reader.index.tensors.items()
        ],
    )


def group_of(name: str) -> str:
    """The group of a tensor, as `Stored` has it."""
    first, *others = name.split(".")
    if first in ("model", "average"):
        part = "dense" if others[:1] == ["dense_arch"] else "tables"
        return part if first == "model" else f"{first}.{part}"
    if first == "optimizer":
        return ".".join([first, *others[:1]]).removesuffix("_steps")
    return "ranks"


def open_tensors(directory: Path, *, averaged: bool = False) -> TensorReader:
    """The tensors of a checkpoint; `averaged` as `recsys.checkpoint.index.read_index` has it.

    Raises:
        CheckpointError: its index cannot be read, or does not go with its files.
    """
    try:
        return TensorReader(directory, averaged=averaged)
    except UnreadableError as error:
        raise CheckpointError(f"{directory}: its tensors cannot be read: {error}; take another checkpoint") from None


def read_object(path: Path) -> Mapping[str, Any] | None:
    """An object of a checkpoint's JSON, None where there is no such file, as in format 1.

    Raises:
        CheckpointError: it is something else.
    """
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, MAX_JSON)
    except FileError as error:
        raise CheckpointError(f"{error}; the file is damaged, take another checkpoint") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no object; the file is damaged, take another checkpoint")
    return found


def _objects(path: Path) -> Mapping[str, Mapping[str, Any]] | None:
    """As `read_object`, an object of objects."""
    found = read_object(path)
    if found is not None and not all(isinstance(value, dict) for value in found.values()):
        raise CheckpointError(f"{path} holds no object of objects; the file is damaged, take another checkpoint")
    return found


@dataclass(frozen=True)
class Verified:
    """What was held against what, and was found right.

    Attributes:
        files: whose SHA-256 is that of `meta.json`; 0 in format 1, which has none.
        unlisted: files of which `meta.json` says nothing; in format 1 all.
        tensors: all of whose bytes were read and have the CRC-32 with which they were written.
    """

    files: int
    unlisted: Sequence[str]
    tensors: int


def verify(directory: Path) -> Verified:
    """Read a checkpoint as a whole, and hold its bytes against what was written.

    Raises:
        CheckpointError: a file is missing, cut off or altered, or a tensor cannot be read; the message names it.
    """
    meta = layout.verified(directory)
    reader = open_tensors(directory)
    for name in reader.names:
        try:
            reader.check(name)
        except UnreadableError as error:
            raise CheckpointError(f"{directory} is damaged: {error}; take another checkpoint") from None
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
    unlisted = [name for name in names if name not in meta.files and name != layout.META]
    return Verified(len(meta.files), unlisted, len(reader.names))
