"""How checkpoints lie on a disk, and when one is whole.

A checkpoint is a directory `step-<n>`. It is written as `step-<n>.partial`, with `meta.json`, which has the size and
the SHA-256 of every other file, last; then everything is flushed to the disk and the directory gets its name. One that
it replaces is moved aside first, as `step-<n>.replaced`, and deleted after; one that retention gives up is renamed to
`step-<n>.deleted` first. So whatever bears the name is whole, and a crash at any moment leaves one whole state at
least: `tidy` takes away what it left beside.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from recsys.config import CheckpointsConfig, shortened
from recsys.errors import UserError
from recsys.files import FileError, open_regular, read_json

FORMAT = 2
META = "meta.json"
CONFIG = "config.yaml"
PROGRESS = "progress.json"
PLAN = "plan.json"
VOCABULARIES = "vocabularies"

_PARTIAL, _REPLACED, _DELETED, _ASIDE = ".partial", ".replaced", ".deleted", ".aside"
_NAME = re.compile(r"step-(\d+)")
_CHUNK = 1 << 20
_MAX_META = 64 << 20


class CheckpointError(UserError):
    """A checkpoint cannot be read or does not fit; the message names the path and the way out."""


class Digest(NamedTuple):
    """Of a file: its size in bytes, and the SHA-256 of its contents in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself.

    Attributes:
        stage: last stage that had begun.
        step: optimizer steps done, over all stages.
        stage_step: those of the stage.
        world_size: number of ranks that wrote it; any number can read the model.
        kept: why retention leaves it: `stage` at a stage's end, else None.
        best_step: step of the checkpoint that holds the best state of the phase under way, if one is chosen.
        valid: figures of the valid split for these weights, where they were taken.
        versions: of what wrote it, by package; `commit` is the project's, where it is known.
        files: digest of every other file, by its path within the checkpoint; empty in format 1.
        format: version of this layout.
    """

    stage: str
    step: int
    stage_step: int
    world_size: int
    kept: str | None = None
    best_step: int | None = None
    valid: Mapping[str, float | int | None] | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[str, Digest] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """As `meta.json` has it."""
        files = {name: digest._asdict() for name, digest in sorted(self.files.items())}
        return json.dumps({**asdict(self), "files": files}, indent=2) + "\n"


def read_meta(directory: Path) -> CheckpointMeta:
    """What a checkpoint says of itself. Keys that this version does not know are left alone.

    Raises:
        CheckpointError: no complete checkpoint is there, or it was written by another version.
    """
    path = directory / META
    try:
        meta = read_json(path, _MAX_META)
    except FileError as error:
        found = sorted(str(path.parent) for path in directory.glob(f"**/{META}"))
        hint = (
            f"; there are {', '.join(found)}"
            if found
            else "; name a directory such as outputs/default/checkpoints/step-100"
        )
        raise CheckpointError(f"{directory} is no complete checkpoint ({error.reason}){hint}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} holds no object; name another checkpoint")
    if meta.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{directory} has checkpoint format {meta.get('format')!r}, this version reads 1 and {FORMAT}; "
            "use the version that wrote it"
        )
    try:
        return _as_meta(meta)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the file is damaged, name another checkpoint") from None


def _as_meta(meta: dict[str, Any]) -> CheckpointMeta:
    known = {name: meta[name] for name in (one.name for one in fields(CheckpointMeta)) if name in meta}
    kinds = {"stage": str, "step": int, "stage_step": int, "world_size": int}
    optional = {"kept": str, "best_step": int, "valid": dict, "versions": dict}
    for name, kind in (kinds | optional).items():
        value = known.get(name)
        is_told = type(value) is kind and not (isinstance(value, int) and value < 0)
        if not is_told and not (name in optional and value is None):
            raise ValueError(f"{name} is {shortened(repr(value))}")
    figures = (known.get("valid") or {}).values()
    if not all(value is None or type(value) in (int, float) for value in figures):
        raise ValueError(f"valid is {shortened(repr(known['valid']))}")
    known["files"] = read_digests(known.get("files")) if "files" in known or known["format"] == FORMAT else {}
    return CheckpointMeta(**known)


def read_digests(files: Any) -> dict[str, Digest]:
    """The digests of files by their path within a directory, as JSON has them.

    Raises:
        ValueError: it holds something else, none, or a path that leads elsewhere.
    """
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    return {name: _as_digest(name, told) for name, told in files.items()}


def _as_digest(name: str, told: Any) -> Digest:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is no path within the directory")
    if not isinstance(told, dict) or type(told.get("bytes")) is not int or not isinstance(told.get("sha256"), str):
        raise ValueError(f"files: {name!r} has no size and digest")
    return Digest(told["bytes"], told["sha256"])


def digest_of(path: Path) -> Digest:
    """The size and SHA-256 of a regular file.

    Raises:
        FileError: it cannot be opened, or is no regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size, digest = 0, hashlib.sha256()
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            digest.update(chunk)
    return Digest(size, digest.hexdigest())


def verify(directory: Path, files: Mapping[str, Digest], *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a directory's files in one line, None where they are what was written.

    Args:
        directory: of a checkpoint, or an artefact.
        files: the digest of each, by its path within the directory.
        share: (r, n) looks at every n-th file alone, from the r-th on.
    """
    rank, world_size = share
    for name, told in sorted(files.items())[rank::world_size]:
        path = directory / name
        try:
            size = path.stat(follow_symlinks=False).st_size
            found = digest_of(path) if size == told.bytes else None
        except FileError as error:
            return str(error)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
        if size != told.bytes:
            return f"{path} has {size:,} bytes instead of {told.bytes:,}"
        if found != told:
            return f"{path} is not what was written: its SHA-256 is another"
    return None


def verified(directory: Path, *, share: tuple[int, int] = (0, 1)) -> CheckpointMeta:
    """What a checkpoint says of itself, once its files are seen to be what was written; see `verify`.

    Raises:
        CheckpointError: none is there, or a file is missing, cut off or altered; the message names it.
    """
    meta = read_meta(directory)
    if wrong := verify(directory, meta.files, share=share):
        raise CheckpointError(f"{wrong}; the checkpoint is damaged, take another")
    return meta


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have their name, the newest first."""
    found = [(int(name[1]), path) for path in folder.glob("step-*") if (name := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def partial(directory: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return directory.with_name(directory.name + _PARTIAL)


def commit(directory: Path, files: Iterable[Path], meta: CheckpointMeta) -> None:
    """Give a checkpoint that is written its name, so that it survives a crash from here on.

    Args:
        directory: where it will be; what it replaces there is deleted.
        files: those written by this process that are not on the disk yet.
        meta: of the checkpoint, with the digests of all its files.
    """
    written, replaced = partial(directory), directory.with_name(directory.name + _REPLACED)
    (written / META).write_text(meta.to_json(), encoding="utf-8")
    for file in (*files, written / META):
        flush(file)
    for folder in {written, *((written / name).parent for name in meta.files)}:
        flush(folder)
    if directory.exists():
        directory.rename(replaced)
    written.rename(directory)
    flush(directory.parent)
    delete(replaced)


def set_aside_after(directory: Path) -> None:
    """Take their names from the checkpoints that are newer than one which a run goes on from.

    They were passed over as damaged, or an older one was asked for. With their names, retention would take them for the
    newest, and delete those that the run writes now.
    """
    newer = checkpoints(directory.parent)
    for path in newer[: newer.index(directory)]:
        aside = path.with_name(path.name + _ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def adopt(directory: Path, folder: Path) -> None:
    """Copy a checkpoint into another run's folder, where it appears when it is whole."""
    copy = folder / directory.name
    delete(partial(copy))
    shutil.copytree(directory, partial(copy))
    for path in (*partial(copy).rglob("*"), partial(copy)):
        flush(path)
    delete(copy)
    partial(copy).rename(copy)
    flush(folder)


def flush(path: Path) -> None:
    """Have the disk hold a file or a directory as it is now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tidy(folder: Path) -> None:
    """Take away what a crash has left: checkpoints that are not whole, and those that others were about to replace."""
    for path in folder.glob(f"step-*{_REPLACED}"):
        directory = path.with_name(path.name.removesuffix(_REPLACED))
        if directory.exists():
            delete(path)
        else:
            path.rename(directory)
    for ending in (_PARTIAL, _DELETED):
        for path in folder.glob(f"step-*{ending}"):
            delete(path)


def delete(directory: Path) -> None:
    """Delete a checkpoint; nothing happens where none is.

    It loses its name first, so that what a crash leaves is no checkpoint and is taken away by `tidy`.
    """
    gone = directory
    if _NAME.fullmatch(directory.name):
        gone = directory.with_name(directory.name + _DELETED)
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            directory.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(folder: Path, config: CheckpointsConfig, *, is_over: bool = False) -> list[Path]:
    """Delete the checkpoints that a config does not have kept, and tell which they were; see `retained`."""
    gone = superseded(folder, config, is_over=is_over)
    for directory in gone:
        delete(directory)
    return gone


def superseded(folder: Path, config: CheckpointsConfig, *, is_over: bool = False) -> list[Path]:
    """The checkpoints in a folder that a config does not have kept, the newest first.

    Those that cannot be read are never among them.
    """
    metas = {}
    for directory in checkpoints(folder):
        with suppress(CheckpointError):
            metas[directory] = read_meta(directory)
    steps = retained(list(metas.values()), config, is_over=is_over)
    return [directory for directory, meta in metas.items() if meta.step not in steps]


def retained(
    metas: Sequence[CheckpointMeta], config: CheckpointsConfig, *, is_over: bool = False
) -> dict[int, list[str]]:
    """The steps whose checkpoints are kept, and why.

    Those are stages' ends, the `keep_best` whose figures on the valid split are best, every step that
    `keep_every_steps` divides and, until the run is over, the last `keep_last`, and what any of these would go back to.
    """
    newest = sorted(metas, key=lambda meta: meta.step, reverse=True)
    figure = config.keep_best_by

    def value(meta: CheckpointMeta) -> float:
        assert meta.valid is not None
        told = meta.valid.get(figure)
        if told is None:
            return math.inf
        return -told if figure == "auc" else told

    best = sorted((meta for meta in newest if meta.valid), key=value)[: config.keep_best]
    every = config.keep_every_steps
    kept = {
        "stage": [meta for meta in newest if meta.kept is not None],
        "best": best,
        "every": [meta for meta in newest if every is not None and meta.step % every == 0],
        "last": newest[: 0 if is_over else config.keep_last],
    }
    why: dict[int, list[str]] = {}
    for reason, of in kept.items():
        for meta in of:
            why.setdefault(meta.step, []).append(reason)
    back_to = [meta.best_step for meta in newest if meta.step in why and meta.best_step is not None and not is_over]
    for step in back_to:
        why.setdefault(step, ["to go back to"])
    return why
