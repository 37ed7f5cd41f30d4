"""The artefact: a directory that holds all that a model needs to answer, and nothing that can run code.

| file | |
|---|---|
| `manifest.json` | format, precision of the tables, where it comes from, parity with the trainer, digests of files |
| `config.yaml`, `kinds.json`, `vocabularies/` | from a raw value to a row of a table |
| `dense.safetensors` | the dense arch |
| `tables.safetensors` | the embedding tables, by the config's names |
| `calibration.json` | calibrators of its logits, if there are any |
| `schema.json`, `schema.arrows`, `vectors.json`, `README.md` | for who asks it: rows, test vectors, and what it is |

It is written beside its name and renamed when it is whole.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from recsys.checkpoint import layout
from recsys.checkpoint.layout import CONFIG, VOCABULARIES, Digest
from recsys.checkpoint.pending import PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.checkpoint.unsharding import Source, unshard, write_safetensors
from recsys.config import Config, load_checkpoint_config
from recsys.data.kinds import KINDS
from recsys.errors import UserError
from recsys.files import FileError, open_regular, read_json
from recsys.model.names import weight_name
from recsys.serving.calibration import Calibration
from recsys.serving.tables import Precision, Table, blocks, stored, stored_dtype, stored_shape

FORMAT = 1
MANIFEST = "manifest.json"
DENSE = "dense.safetensors"
TABLES = "tables.safetensors"
CALIBRATION = "calibration.json"
_DENSE_ARCH = "model.dense_arch."
_MAX_MANIFEST = 64 << 20
_MAX_CALIBRATION = 256 << 20


class ArtifactError(UserError):
    """An artefact cannot be written or read; the message names the path and the way out."""


@dataclass(frozen=True)
class Manifest:
    """What an artefact says of itself.

    Attributes:
        name: of the config.
        tables: precision in which the tables are kept.
        step: optimizer steps of the checkpoint that it comes from.
        stage: its last stage.
        versions: of what wrote the checkpoint.
        parity: figures of the comparison with the trainer's model, by name; None where none was made.
        files: digest of every other file, by its path within the artefact.
        format: version of this layout.
    """

    name: str
    tables: Precision
    step: int
    stage: str
    versions: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    files: Mapping[str, Digest] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """As `manifest.json` has it."""
        files = {name: digest._asdict() for name, digest in sorted(self.files.items())}
        return json.dumps({**asdict(self), "files": files}, indent=2) + "\n"


@dataclass(frozen=True)
class Artifact:
    """An artefact whose files were held against their digests.

    Attributes:
        directory: of the artefact, absolute and without links.
        manifest: what it says of itself.
        config: of the run.
        dense: tensors of the dense arch by name; they lie in the file.
        tables: by the config's names; they lie in the file, which processes share.
        calibration: of the logits; None where they are served as they are.
    """

    directory: Path
    manifest: Manifest
    config: Config
    dense: Mapping[str, Tensor]
    tables: Mapping[str, Table]
    calibration: Calibration | None = None

    @classmethod
    def open(cls, directory: str | Path) -> "Artifact":
        """Look at every byte of an artefact, and map its tensors.

        Raises:
            ArtifactError: none is there, it is of another format, or a file is missing, altered or not what it should
                be; the message names the file.
            ConfigError: its config is none.
        """
        directory = Path(os.path.expanduser(directory)).resolve()  # for what is read later, and a link that is moved on
        manifest = read_manifest(directory)
        if wrong := layout.verify(directory, manifest.files):
            raise ArtifactError(f"{wrong}; the artefact is damaged, export it again")
        optional = (KINDS, VOCABULARIES, CALIBRATION)
        used = {CONFIG, DENSE, TABLES, *(name for name in _held(directory) if name.startswith(optional))}
        if unlisted := sorted(used - set(manifest.files)):
            raise ArtifactError(
                f"{directory / MANIFEST} lists no {unlisted[0]}; the artefact is damaged, export it again"
            )
        config = load_checkpoint_config(directory)
        weights = _mapped(directory / TABLES)
        tables = {}
        for name, table in config.tables.items():
            shape = stored_shape(table.num_embeddings, table.embedding_dim, manifest.tables)
            weight = weights.get(name)
            if weight is None or tuple(weight.shape) != shape or weight.dtype != stored_dtype(manifest.tables):
                raise ArtifactError(f"{directory / TABLES} does not hold table {name} as {shape} of {manifest.tables}")
            tables[name] = Table(weight, manifest.tables)
        calibration = _calibration(directory, config) if CALIBRATION in used else None
        return cls(directory, manifest, config, _mapped(directory / DENSE), tables, calibration)


def read_manifest(directory: Path) -> Manifest:
    """What an artefact says of itself.

    Raises:
        ArtifactError: no artefact is there, or it was written by another version.
    """
    path = directory / MANIFEST
    try:
        told = read_json(path, _MAX_MANIFEST)
    except FileError as error:
        raise ArtifactError(
            f"{directory} is no artefact ({error.reason}); write one by python -m recsys.export"
        ) from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not of format {FORMAT}, which this version reads; export the checkpoint again")
    kinds = {"name": str, "step": int, "stage": str, "versions": dict}
    wrong = [key for key, kind in kinds.items() if type(told.get(key)) is not kind]
    wrong += ["tables"] if told.get("tables") not in get_args(Precision) else []
    wrong += ["parity"] if not isinstance(told.get("parity"), dict | None) else []
    if wrong:
        raise ArtifactError(f"{path}: {wrong[0]} is not what it should be; export the checkpoint again")
    try:
        files = layout.read_digests(told.get("files"))
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}; export the checkpoint again") from None
    known = {one.name: told[one.name] for one in fields(Manifest) if one.name in told}
    return Manifest(**{**known, "files": files})


def write_artifact(checkpoint: Path, output: Path, *, tables: Precision = "float32") -> Path:
    """Write what a checkpoint's model needs to answer beside `output`, for `publish` to give it its name.

    No more than a block of rows of a table is in memory at a time.

    Args:
        checkpoint: of any number of ranks and any plan; its digests are verified first.
        output: where the artefact will be; nothing may be there.
        tables: precision in which the tables are kept.

    Returns:
        Where it is meanwhile: an artefact like any other, without figures of parity.

    Raises:
        ArtifactError: something is there, or the disk refuses.
        CheckpointError: the checkpoint is damaged.
    """
    if os.path.lexists(output):
        raise ArtifactError(f"{output} is there already; name another directory, or move it away")
    meta = layout.verified(checkpoint)
    config = load_checkpoint_config(checkpoint)
    written = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        written.mkdir(parents=True)
        unshard(
            checkpoint,
            written / DENSE,
            names=lambda name: name.removeprefix(_DENSE_ARCH) if name.startswith(_DENSE_ARCH) else None,
        )
        reader = PendingRows(TensorReader(checkpoint, averaged=True))
        sources = [
            Source(
                name,
                stored_dtype(tables),
                stored_shape(table.num_embeddings, table.embedding_dim, tables),
                partial(_stored_blocks, reader, weight_name(name), tables),
            )
            for name, table in config.tables.items()
        ]
        write_safetensors(written / TABLES, sources, {"format": "pt", "precision": tables})
        (written / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        for name in (KINDS, VOCABULARIES):
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, written / name)
            elif (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, written / name)
        _write_manifest(written, Manifest(config.name, tables, meta.step, meta.stage, dict(meta.versions)))
    except OSError as error:
        shutil.rmtree(written, ignore_errors=True)
        raise ArtifactError(f"{output} cannot be written: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    return written


def add_calibration(written: Path, calibration: Calibration) -> None:
    """Add calibrators to an artefact that `write_artifact` wrote.

    Raises:
        ArtifactError: the disk refuses.
    """
    path = written / CALIBRATION
    try:
        path.write_text(calibration.to_json(), encoding="utf-8")
        _write_manifest(written, read_manifest(written))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from None


def publish(written: Path, output: Path, parity: Mapping[str, Any]) -> None:
    """Give an artefact that was written its figures of parity and its name.

    Raises:
        ArtifactError: something has come to be there, or the disk refuses.
    """
    try:
        _write_manifest(written, replace(read_manifest(written), parity=parity))
        for path in (*written.rglob("*"), written):
            layout.flush(path)
        written.rename(output)
        layout.flush(output.parent)
    except OSError as error:
        raise ArtifactError(f"{output} cannot be written: {error.strerror or error}") from None


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest, and the digests of files that it does not list yet; tables are too large to be read again."""
    new = (name for name in _held(directory) if name not in {MANIFEST, *manifest.files})
    files = {**manifest.files, **{name: layout.digest_of(directory / name) for name in new}}
    (directory / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def _held(directory: Path) -> list[str]:
    """The files in an artefact, by their paths within it."""
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()]


def _stored_blocks(saved: PendingRows, name: str, precision: Precision) -> Iterator[Tensor]:
    for rows in blocks(saved.reader.shape(name)[0]):
        try:
            yield stored(saved.read(name, rows).float(), precision)
        except OverflowError as error:
            raise ArtifactError(f"{name} has {error}; keep the tables in a higher precision") from None


def _calibration(directory: Path, config: Config) -> Calibration:
    path = directory / CALIBRATION
    num_domains = len(config.data.domain.labels) if config.data.domain else 0
    try:
        return Calibration.parse(read_json(path, _MAX_CALIBRATION), num_domains)
    except FileError as error:
        raise ArtifactError(f"{path}: {error.reason}; export the checkpoint again") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}; export the checkpoint again") from None


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which stay in it until they are read."""
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (FileError, SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
