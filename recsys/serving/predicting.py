"""Parquet in, Parquet out: an artefact's probabilities for files of any number of rows."""

import hashlib
import os
import posixpath
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from recsys.config import ConfigError
from recsys.data.features import check_names
from recsys.data.parquet import ShardTables
from recsys.data.storage import DataError, Place, locate, naming
from recsys.serving.scorer import RequestError, Scorer

PROBABILITY, LOGIT = "probability", "logit"

_ORIGIN = b"hilorec.artifact"
"""Metadata of a file of predictions: the SHA-256 of what the artefact says of itself."""


def predict(
    scorer: Scorer,
    patterns: Sequence[str],
    output: str,
    *,
    keep: Sequence[str] = (),
    logit: bool = False,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], object] = print,
) -> int:
    """Write the probability of each row of each file, in the order of the rows, and tell of how many rows.

    Each file becomes one of the same name, below `output` as it lay below the folder that all have in common. It
    appears whole; one that is there with as many rows of this artefact is left as it is, so that what was cut off can
    be called again.
    Labels are not needed. One row group is in memory at a time.

    Args:
        scorer: of the artefact.
        patterns: files, as in `recsys.data.storage.find_files`.
        output: path or URL of a folder.
        keep: columns that are written as well, as they stand.
        logit: whether the logit is written too.
        share: (r, n) writes every n-th file alone, from the r-th on.
        say: told of each file.

    Raises:
        DataError: a file or a value cannot be read or scored, or the output cannot be written.
        RequestError: a column to keep would be called like one that is written.
    """
    written = (PROBABILITY, LOGIT) if logit else (PROBABILITY,)
    keep = tuple(dict.fromkeys(keep))
    if clash := set(keep) & set(written):
        raise RequestError(f"--keep: {min(clash)} is what the predictions are called; rename the column")
    names = tuple(dict.fromkeys((*keep, *scorer.columns)))
    shards = ShardTables(patterns, names, source="--input")
    for file, schema in zip(shards.files, shards.schemas, strict=True):
        check_names(schema, names, file, "file")
        scorer.check_schema(schema, file)
    if not output:
        raise DataError("--output names no folder")
    folder = locate(output, source="--output").checked("--output")
    paths = [posixpath.abspath(file) for file in shards.files]  # so that none leads out of the folder
    base = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    origin = {_ORIGIN: hashlib.sha256(scorer.artifact.manifest.to_json().encode()).hexdigest().encode()}
    groups: dict[int, list[int]] = {number: [] for number in range(len(shards.files))}
    for group in range(len(shards.row_counts)):
        groups[shards.file_of(group)].append(group)
    rank, world_size = share
    rows = 0
    for number in list(groups)[rank::world_size]:
        target = folder / posixpath.relpath(paths[number], base)
        count = sum(shards.row_counts[group] for group in groups[number])
        schema = pa.schema([shards.schemas[number].field(name) for name in keep], origin)
        for name in written:
            schema = schema.append(pa.field(name, pa.float32(), nullable=False))
        if _is_done(target, count, schema):
            say(f"{target} has its {count:,} rows already")
            continue
        with target.writing() as path, pq.ParquetWriter(path, schema) as writer:
            for group in groups[number]:
                writer.write_table(_predicted(scorer, shards, group, names, keep, schema))
        rows += count
        say(f"{target}: {count:,} rows")
    return rows


@torch.inference_mode()
def _predicted(
    scorer: Scorer, shards: ShardTables, group: int, names: tuple[str, ...], keep: Sequence[str], schema: pa.Schema
) -> pa.Table:
    table = shards.table(group, names)
    logits = scorer.logits_of(table.select(scorer.columns), shards.where(group))
    columns = [table[name] for name in keep]
    figures = {PROBABILITY: logits.sigmoid(), LOGIT: logits}
    columns += [pa.array(figures[name].numpy()) for name in schema.names[len(keep) :]]
    return pa.table(columns, schema=schema)


def _is_done(target: Place, rows: int, schema: pa.Schema) -> bool:
    """Whether a file of so many rows is there, of the columns and the artefact that a schema tells of."""
    with naming(str(target)):
        kind = target.filesystem.get_file_info(target.path).type
    if kind == fs.FileType.NotFound:
        return False
    way_out = "take it away, or name another --output"
    if kind != fs.FileType.File:
        raise DataError(f"{target} is there and is no file; {way_out}")
    with naming(f"{target}, which is there already"), pq.ParquetFile(target.open()[0]) as file:
        found, told = file.metadata.num_rows, file.schema_arrow
    if (told.metadata or {}).get(_ORIGIN) != schema.metadata[_ORIGIN]:
        raise DataError(f"{target} is there and holds no predictions of this artefact; {way_out}")
    if told.names != schema.names:
        raise DataError(
            f"{target} is there with {', '.join(told.names)} instead of {', '.join(schema.names)}; {way_out}"
        )
    if found != rows:
        raise DataError(f"{target} is there with {found:,} rows instead of {rows:,}; {way_out}")
    return True


def share_of_this_process() -> tuple[int, int]:
    """This process among those that torchrun or TorchX started, which share the files out.

    Raises:
        ConfigError: the environment does not say which.
    """
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (all(text.isdecimal() for text in told) and int(told[0]) < int(told[1])):
        raise ConfigError(f"RANK={told[0]} and WORLD_SIZE={told[1]} are no process among others; unset both")
    return int(told[0]), int(told[1])
