"""Parquet in, Parquet out: the probabilities of a model for files of any number of rows."""

import os
import posixpath
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs
from torch import Tensor

from recsys.config import ConfigError
from recsys.data.features import check_names
from recsys.data.parquet import ShardTables
from recsys.data.rows import Rows, SparseLayout
from recsys.data.storage import DataError, Place, locate, naming, would_find
from recsys.serving.scorer import RequestError, naming_row, probabilities

PROBABILITY, LOGIT = "probability", "logit"

_ORIGIN = b"hilorec.origin"
"""Metadata of a file of predictions: whose they are."""

_INPUT = b"hilorec.input"
"""And of which file: the digest of its footer."""


class Model(Protocol):
    """What scores raw rows: the `Scorer` of an artefact, or a checkpoint's model over its ranks.

    Attributes:
        origin: what it comes from, a word, and the SHA-256 of what that says of itself.
        columns: names of the columns that rows must have.
        dictionaries: those among them whose strings are best read as dictionaries.
        batch_rows: how many rows are scored at a time.
        reader_threads: how many threads read ahead.
    """

    origin: str
    columns: tuple[str, ...]
    dictionaries: tuple[str, ...]
    batch_rows: int
    reader_threads: int

    def check_schema(self, schema: pa.Schema, where: str) -> SparseLayout:
        """Refuse a table whose columns cannot be scored, and tell which features have lists."""

    def decode(self, table: pa.Table, layout: SparseLayout, where: str) -> Rows:
        """Check the values of a table and lay its rows out; several threads call it at once."""

    def logits(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """Logits (N,) float32 of decoded rows; called batch after batch, by one thread."""


def predict(
    model: Model,
    patterns: Sequence[str],
    output: str,
    *,
    keep: Sequence[str] = (),
    logit: bool = False,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], object] = print,
    begin: Callable[[int], object] = lambda batches: None,
) -> int:
    """Write the probability of each row of each file, in the order of the rows, and tell of how many rows.

    Each file becomes one of the same name, below `output` as it lay below the folder that all have in common. It
    appears whole; one that is there with this model's predictions of that very file is left as it is, so that what was
    cut off can be called again.
    Labels are not needed. A row group for each reading thread is in memory, beside the one that is being scored.

    Args:
        model: which scores.
        patterns: files, as in `recsys.data.storage.find_files`.
        output: path or URL of a folder.
        keep: columns that are written as well, as they stand.
        logit: whether the logit is written too.
        share: (r, n) writes every n-th file alone, from the r-th on.
        say: told of each file, and by the first share of names that are left out.
        begin: told how many batches the model will be asked for, before the first.

    Raises:
        DataError: a file or a value cannot be read or scored, or the output cannot be written.
        RequestError: a column to keep would be called like one that is written.
    """
    written = (PROBABILITY, LOGIT) if logit else (PROBABILITY,)
    keep = tuple(dict.fromkeys(keep))
    if clash := set(keep) & set(written):
        raise RequestError(f"--keep: {min(clash)} is what the predictions are called; rename the column")
    source = _Source(model, patterns, keep)
    for warning in source.warnings if share[0] == 0 else ():
        say(warning)
    todo = []
    for number, target in source.targets(output, share):
        schema = source.schema(number, written)
        count = source.num_rows(number)
        if _is_done(target, count, schema):
            say(f"{target} has its {count:,} rows already")
        else:
            todo.append((number, target, schema))
    begin(sum(source.num_batches(number) for number, _, _ in todo))
    rows = 0
    with closing(source.read([number for number, _, _ in todo])) as groups:
        for number, target, schema in todo:
            with _writing(target, schema) as write:
                for _ in source.groups[number]:
                    write(_predicted(model, next(groups), schema))
            rows += source.num_rows(number)
            say(f"{target}: {source.num_rows(number):,} rows")
    return rows


class _Group(NamedTuple):
    """A row group: the columns to keep, the rows to score, and where they are, for messages."""

    kept: pa.Table
    rows: Rows
    layout: SparseLayout
    where: str


class _Source:
    """The files to predict.

    Args:
        model: which scores.
        patterns: of the files.
        keep: columns that are written as well.

    Attributes:
        groups: of each file, the numbers of its row groups over all files.
        warnings: what the user should know of the files, a line each.
    """

    def __init__(self, model: Model, patterns: Sequence[str], keep: tuple[str, ...]) -> None:
        self._model, self._patterns, self._keep = model, patterns, keep
        self._names = tuple(dict.fromkeys((*keep, *model.columns)))
        self._shards = shards = ShardTables(patterns, self._names, source="--input", may_be_empty=True)
        self.warnings = shards.warnings
        self._layouts: list[SparseLayout] = []
        for file, schema in zip(shards.files, shards.schemas, strict=True):
            check_names(schema, self._names, file, "file")
            self._layouts.append(model.check_schema(schema, file))
        self.groups: list[list[int]] = [[] for _ in shards.files]
        for group in range(len(shards.row_counts)):
            self.groups[shards.file_of(group)].append(group)

    def targets(self, output: str, share: tuple[int, int]) -> list[tuple[int, Place]]:
        """The numbers of the files of a share, each with where its predictions belong."""
        if not output:
            raise DataError("--output names no folder")
        folder = locate(output, source="--output").checked("--output")
        paths = [posixpath.abspath(file) for file in self._shards.files]  # so that none leads out of the folder
        base = posixpath.commonpath([posixpath.dirname(path) for path in paths])
        below = [posixpath.relpath(path, base) for path in paths]
        for name in below:
            if kept := set(self._keep) & set(folder._replace(path=name).partitions):
                raise RequestError(f"--keep: {min(kept)} is on the path of {folder / name} as well; leave it out")
        if found := would_find(self._patterns, [folder / name for name in below], source="--input"):
            raise DataError(f"--output: {found[0]} is where --input looks for files; name another folder")
        rank, world_size = share
        return [(number, folder / below[number]) for number in range(rank, len(below), world_size)]

    def schema(self, number: int, written: Sequence[str]) -> pa.Schema:
        """Of a file's predictions."""
        origin = {_ORIGIN: self._model.origin.encode(), _INPUT: self._shards.digests[number].encode()}
        kept = [self._shards.schemas[number].field(name) for name in self._keep]
        return pa.schema([*kept, *(pa.field(name, pa.float32(), nullable=False) for name in written)], origin)

    def num_rows(self, number: int) -> int:
        """Of a file."""
        return sum(self._shards.row_counts[group] for group in self.groups[number])

    def num_batches(self, number: int) -> int:
        """Of a file; none spans two row groups."""
        return sum(-(-self._shards.row_counts[group] // self._model.batch_rows) for group in self.groups[number])

    def read(self, numbers: Sequence[int]) -> Generator[_Group]:
        """The row groups of some files, one after another, read ahead by threads."""
        with ThreadPoolExecutor(self._model.reader_threads, thread_name_prefix="reader") as pool:
            ahead: deque[Future[_Group]] = deque()
            try:
                for group in (group for number in numbers for group in self.groups[number]):
                    ahead.append(pool.submit(self._read, group))
                    if len(ahead) > self._model.reader_threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, group: int) -> _Group:
        # What is kept stands as it does in the file, of the type that it has there.
        dictionaries = [name for name in self._model.dictionaries if name not in self._keep]
        table, layout = self._shards.table(group, self._names, dictionaries), self._layouts[self._shards.file_of(group)]
        raw, where = table.select(self._model.columns), self._shards.where(group)
        rows = naming_row(lambda part, of: self._model.decode(part, layout, of), raw, where)
        return _Group(table.select(self._keep), rows, layout, where)


def _predicted(model: Model, group: _Group, schema: pa.Schema) -> pa.Table:
    kept, rows, layout, where = group
    starts = range(0, len(rows), model.batch_rows)
    parts = [model.logits(rows.part(start, min(start + model.batch_rows, len(rows))), layout) for start in starts]
    logits = torch.cat(parts) if parts else torch.empty(0)
    figures = {PROBABILITY: probabilities(logits, where), LOGIT: logits}
    columns = [*kept.columns, *(pa.array(figures[name].numpy()) for name in schema.names[kept.num_columns :])]
    return pa.table(columns, schema=schema)


@contextmanager
def _writing(target: Place, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Give what writes a row group of a file, which appears, whole, when the block ends without error.

    Raises:
        DataError: it cannot be written.
    """
    with target.writing() as path:
        with naming(str(target)):
            writer = pq.ParquetWriter(path, schema)

        def write(table: pa.Table) -> None:
            with naming(str(target)):
                writer.write_table(table)

        try:
            yield write
        except BaseException:
            with suppress(OSError, pa.ArrowException):  # on a full disk, say, of which is told already
                writer.close()
            raise
        with naming(str(target)):
            writer.close()


def _is_done(target: Place, rows: int, schema: pa.Schema) -> bool:
    """Whether a file of so many rows is there, of the columns and the model that a schema tells of."""
    with naming(str(target)):
        kind = target.filesystem.get_file_info(target.path).type
    if kind == fs.FileType.NotFound:
        return False
    way_out = "take it away, or name another --output"
    if kind != fs.FileType.File:
        raise DataError(f"{target} is there and is no file; {way_out}")
    with naming(f"{target}, which is there already"), pq.ParquetFile(target.open()[0]) as file:
        found, told = file.metadata.num_rows, file.schema_arrow
    origin = schema.metadata[_ORIGIN]
    if (told.metadata or {}).get(_ORIGIN) != origin:
        raise DataError(f"{target} is there and holds no predictions of this {origin.split()[0].decode()}; {way_out}")
    if told.names != schema.names:
        raise DataError(
            f"{target} is there with {', '.join(told.names)} instead of {', '.join(schema.names)}; {way_out}"
        )
    if found != rows:
        raise DataError(f"{target} is there with {found:,} rows instead of {rows:,}; {way_out}")
    if told.metadata.get(_INPUT) != schema.metadata[_INPUT]:
        raise DataError(f"{target} is there with predictions of what the file of that name was before; {way_out}")
    return True


def share_of_this_process() -> tuple[int, int]:
    """This process among those that torchrun or TorchX started, which share the files out.

    Raises:
        ConfigError: the environment does not say which.
    """
    told = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (all(text.isdecimal() and len(text) < 10 for text in told) and int(told[0]) < int(told[1])):
        raise ConfigError(f"RANK={told[0]} and WORLD_SIZE={told[1]} are no process among others; unset both")
    return int(told[0]), int(told[1])


def processes_here() -> int:
    """How many processes share this machine: LOCAL_WORLD_SIZE, or WORLD_SIZE, or one.

    Raises:
        ConfigError: they tell no such number.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    if not (told.isdecimal() and len(told) < 10 and int(told)):
        raise ConfigError(f"LOCAL_WORLD_SIZE={told} is no number of processes; unset it")
    return int(told)
