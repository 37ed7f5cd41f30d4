"""Parquet shards to batches: footers, decoding, checks of every value, reading ahead of the step."""

import glob
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from recsys.config import UserError
from recsys.data.batch import Batch
from recsys.data.stream import Epoch, RowSlice, Window


class DataError(UserError):
    """The data cannot be trained on as they are; the message names file, row group and column, and the way out."""


class DenseColumn(NamedTuple):
    """A numeric column; nulls become `fill`, or are refused if it is None; then `log1p` takes log(1 + value)."""

    column: str
    fill: float | None
    log1p: bool = False


class SparseColumn(NamedTuple):
    """A column of ids or lists of ids, each in 0 .. num_embeddings - 1."""

    column: str
    num_embeddings: int


class DomainColumn(NamedTuple):
    """A column of integers without nulls, each in 0 .. num_domains - 1."""

    column: str
    num_domains: int


@dataclass(frozen=True)
class Columns:
    """What to read of each row.

    Attributes:
        label: a column of 0 and 1 without nulls: integer, boolean or floating.
        reference: a column of probabilities without nulls, or None.
        dense: by feature name.
        sparse: by feature name.
        domain: what parts the rows in reports, or None.
    """

    label: str
    reference: str | None
    dense: Mapping[str, DenseColumn]
    sparse: Mapping[str, SparseColumn]
    domain: DomainColumn | None = None

    @property
    def names(self) -> list[str]:
        """Every column once."""
        names = [self.label, *([self.reference] if self.reference else [])]
        names += [self.domain.column] if self.domain else []
        names += [spec.column for spec in self.dense.values()] + [spec.column for spec in self.sparse.values()]
        return list(dict.fromkeys(names))


class Jagged(NamedTuple):
    """Lists of ids: row i has `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> "Jagged":
        """The given rows, in the given order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        # Position within the result, moved by how far each row's values moved.
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Jagged(self.values[index], offsets)

    def slice(self, start: int, stop: int) -> "Jagged":
        """Rows start up to stop."""
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


@dataclass(frozen=True)
class Rows:
    """Decoded and checked rows: labels (N,), reference and domain (N,) or (0,), dense (N, F_d), a Jagged a feature."""

    labels: NDArray[np.float32]
    reference: NDArray[np.float64]
    domain: NDArray[np.int64]
    dense: NDArray[np.float32]
    sparse: tuple[Jagged, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """The given rows, in the given order."""
        reference = self.reference[rows] if len(self.reference) else self.reference
        domain = self.domain[rows] if len(self.domain) else self.domain
        sparse = tuple(jagged.take(rows) for jagged in self.sparse)
        return Rows(self.labels[rows], reference, domain, self.dense[rows], sparse)

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows start up to stop, sharing memory where possible."""
        return Rows(
            self.labels[start:stop],
            self.reference[start:stop],
            self.domain[start:stop],
            self.dense[start:stop],
            tuple(jagged.slice(start, stop) for jagged in self.sparse),
        )

    @staticmethod
    def none(columns: Columns) -> "Rows":
        """No rows of the given columns."""
        no_lists = Jagged(np.empty(0, np.int64), np.zeros(1, np.int64))
        dense = np.empty((0, len(columns.dense)), np.float32)
        sparse = (no_lists,) * len(columns.sparse)
        return Rows(np.empty(0, np.float32), np.empty(0), np.empty(0, np.int64), dense, sparse)

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        """All parts, one after another; at least one."""
        if len(parts) == 1:
            return parts[0]
        sparse = []
        for features in zip(*(part.sparse for part in parts), strict=True):
            ends = np.cumsum([0, *(jagged.offsets[-1] for jagged in features)])
            offsets = [jagged.offsets[1:] + end for jagged, end in zip(features, ends, strict=False)]
            values = np.concatenate([jagged.values for jagged in features])
            sparse.append(Jagged(values, np.concatenate([np.zeros(1, np.int64), *offsets])))
        return Rows(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.reference for part in parts]),
            np.concatenate([part.domain for part in parts]),
            np.concatenate([part.dense for part in parts]),
            tuple(sparse),
        )


@dataclass(frozen=True)
class _RowGroup:
    file: str
    index: int
    num_rows: int


class ParquetShards:
    """All row groups of a set of files, with their schemas checked.

    Args:
        patterns: globs or paths; the files of all, sorted and once each, are the data set.
        columns: what to read.
        source: config path of the patterns, for messages.

    Raises:
        DataError: a pattern matches no file, a file is no Parquet, a column is missing or of a type that cannot be
            read as what it is for, or there is no row at all.
    """

    def __init__(self, patterns: Sequence[str], columns: Columns, *, source: str) -> None:
        self.columns = columns
        self.files = self._find(patterns, source)
        with ThreadPoolExecutor(max_workers=16) as pool:
            footers = list(pool.map(self._open, self.files))
        self._row_groups = [
            _RowGroup(file, index, footer.row_group(index).num_rows)
            for file, footer in zip(self.files, footers, strict=True)
            for index in range(footer.num_row_groups)
        ]
        if not sum(self.row_counts):
            raise DataError(f"{source}: the {len(self.files)} files matching {', '.join(patterns)} hold no rows")

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of every row group, over all files."""
        return tuple(group.num_rows for group in self._row_groups)

    @staticmethod
    def _find(patterns: Sequence[str], source: str) -> list[str]:
        files: set[str] = set()
        for pattern in patterns:
            matches = glob.glob(pattern, recursive=True)
            if not matches:
                raise DataError(f"{source}: no file matches {pattern!r} (paths are relative to the working directory)")
            files.update(matches)
        return sorted(files)

    def _open(self, file: str) -> pq.FileMetaData:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {_first_line(error)}") from None
        self._check_schema(file, footer.schema.to_arrow_schema())
        return footer

    def _check_schema(self, file: str, schema: pa.Schema) -> None:
        for name in self.columns.names:
            found = schema.names.count(name)
            if found == 0:
                raise DataError(f"{file}: no column {name!r}; the file has {', '.join(schema.names)}")
            if found > 1:
                raise DataError(f"{file}: {found} columns are named {name!r}; rename all but one")
        checks = [(self.columns.label, "label", _is_number)]
        if self.columns.reference:
            checks.append((self.columns.reference, "reference", _is_number))
        if self.columns.domain:
            checks.append((self.columns.domain.column, "domain", _is_integer))
        checks += [(spec.column, f"dense feature {name}", _is_number) for name, spec in self.columns.dense.items()]
        checks += [(spec.column, f"sparse feature {name}", _is_ids) for name, spec in self.columns.sparse.items()]
        for name, role, accepts in checks:
            kind = schema.field(name).type
            if not accepts(kind):
                wanted = {_is_ids: "integers or lists of integers", _is_integer: "integers", _is_number: "numbers"}
                raise DataError(f"{file}: column {name!r} ({role}) has type {kind}; {wanted[accepts]} are needed")

    def read(self, slices: Sequence[RowSlice]) -> Rows:
        """Decode and check the given rows, in the given order.

        Raises:
            DataError: a label other than 0 or 1, a null where none may be, an id or domain out of range, a dense value
                that is not finite, or a file that can no longer be read or was replaced by another.
        """
        return Rows.concatenate([self._read(part) for part in slices])

    def _read(self, part: RowSlice) -> Rows:
        group = self._row_groups[part.row_group]
        where = f"{group.file}, row group {group.index}"
        try:
            with pq.ParquetFile(group.file) as file:
                self._check_schema(group.file, file.schema_arrow)
                table = file.read_row_group(group.index, columns=self.columns.names)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{where}: cannot be read: {_first_line(error)}") from None
        if len(table) != group.num_rows:
            raise DataError(
                f"{where}: has {len(table)} rows, but had {group.num_rows} when the run began; "
                "write new shards under new names instead of replacing those in use"
            )
        table = table.slice(part.start, part.stop - part.start).combine_chunks()
        columns = self.columns
        labels = _numbers(table, columns.label, None, where)
        if (wrong := (labels != 0) & (labels != 1)).any():
            raise DataError(
                f"{where}: label column {columns.label!r} has {_count(wrong)} other than 0 and 1, "
                f"such as {labels[wrong][0]}; make it binary when the shards are written"
            )
        reference = np.empty(0)
        if columns.reference:
            reference = _numbers(table, columns.reference, None, where).astype(np.float64)
            if not ((reference >= 0) & (reference <= 1)).all():
                raise DataError(f"{where}: reference column {columns.reference!r} has values outside 0..1")
        domain = _domains(table, columns.domain, where) if columns.domain else np.empty(0, np.int64)
        dense = np.empty((len(table), len(columns.dense)), dtype=np.float32)
        for index, (name, numeric) in enumerate(columns.dense.items()):
            values = _numbers(table, numeric.column, numeric.fill, where)
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is not finite is refused below
                dense[:, index] = np.log1p(values, dtype=np.float64) if numeric.log1p else values
            if (wrong := ~np.isfinite(dense[:, index])).any():
                raise DataError(
                    f"{where}: dense feature {name} (column {numeric.column!r}) has {_count(wrong)} NaN or infinite "
                    f"in float32{' after log1p' * numeric.log1p}; write nulls and give the feature a fill"
                )
        sparse = tuple(_ids(table, name, spec, where) for name, spec in columns.sparse.items())
        return Rows(labels.astype(np.float32), reference, domain, dense, sparse)


class Loader:
    """Batches of one rank for one epoch, read ahead in the background.

    Windows are decoded one ahead of the one being batched, batches are built `prefetch_batches` ahead of the step. Use
    as a context manager: leaving it stops the threads, also in mid-epoch. Iterating, once, yields exactly
    `epoch.num_steps` batches.

    Args:
        shards: what to read.
        epoch: the order; its row counts are those of `shards`.
        rank: whose batches.
        prefetch_batches: batches kept ready.
        pin_memory: build batches in page-locked memory.

    Attributes:
        wait_seconds: time the consumer spent waiting for batches, so far.
    """

    def __init__(
        self, shards: ParquetShards, epoch: Epoch, rank: int, *, prefetch_batches: int = 4, pin_memory: bool = False
    ) -> None:
        self._shards = shards
        self._epoch = epoch
        self._rank = rank
        self._pin_memory = pin_memory
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch_batches)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._iterated = False
        self.wait_seconds = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        if self._iterated or self._thread.ident is None:
            raise RuntimeError("a Loader yields its batches once, while it is entered as a context manager")
        self._iterated = True
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.wait_seconds += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # the consumer must see it, whatever it is, or it would wait for ever
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self) -> Iterator[Batch]:
        epoch, size = self._epoch, self._epoch.batch_size
        step = 0
        rest: Rows | None = None
        for rows in self._windows():
            start = 0
            if rest is not None:
                start = min(size - len(rest), len(rows))
                rest = Rows.concatenate([rest, rows.slice(0, start)])
                if len(rest) == size:
                    yield self._batch(rest, step)
                    step, rest = step + 1, None
            while rest is None and len(rows) - start >= size:
                yield self._batch(rows.slice(start, start + size), step)
                step, start = step + 1, start + size
            if rest is None and start < len(rows):
                rest = rows.slice(start, len(rows))
        if rest is not None:
            yield self._batch(rest, step)
            step += 1
        while step < epoch.num_steps:
            yield self._batch(Rows.none(self._shards.columns), step)
            step += 1

    def _windows(self) -> Iterator[Rows]:
        """Decoded windows, the next one always under way."""
        windows = self._epoch.windows(self._rank)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder") as pool:
            ahead: Future[Rows] | None = None
            for window in windows:
                following = pool.submit(self._decode, window)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _decode(self, window: Window) -> Rows:
        rows = self._shards.read(window.slices)
        return rows if window.permutation is None else rows.take(window.permutation)

    def _batch(self, rows: Rows, step: int) -> Batch:
        lengths = [np.diff(jagged.offsets) for jagged in rows.sparse]
        sparse_features = KeyedJaggedTensor(
            keys=list(self._shards.columns.sparse),
            values=torch.from_numpy(np.concatenate([jagged.values for jagged in rows.sparse])),
            lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int32)),
            stride=len(rows),
        )
        batch = Batch(
            dense_features=torch.from_numpy(rows.dense),
            sparse_features=sparse_features,
            labels=torch.from_numpy(rows.labels),
            reference=torch.from_numpy(rows.reference),
            domain=torch.from_numpy(rows.domain),
            loss_scale=self._epoch.world_size / self._epoch.global_batch_rows(step),
        )
        return batch.pin_memory() if self._pin_memory else batch


def _numbers(table: pa.Table, name: str, fill: float | None, where: str) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        if fill is None:
            raise DataError(
                f"{where}: column {name!r} has {column.null_count} nulls; "
                "give a dense feature a fill, or leave such rows out when the shards are written"
            )
        column = pc.fill_null(column.cast(pa.float64(), safe=False), fill)  # large integers are rounded
    values: NDArray[Any] = column.to_numpy()
    return values


def _domains(table: pa.Table, spec: DomainColumn, where: str) -> NDArray[np.int64]:
    column = table.column(spec.column)
    if column.null_count:
        raise DataError(
            f"{where}: domain column {spec.column!r} has {column.null_count} nulls; "
            "give rows of no known domain a number of their own when the shards are written"
        )
    values: NDArray[Any] = column.to_numpy()
    if (wrong := (values < 0) | (values >= spec.num_domains)).any():
        raise DataError(
            f"{where}: domain column {spec.column!r} has {_count(wrong)} out of range, such as {values[wrong][0]}; "
            f"there are domains 0..{spec.num_domains - 1}: raise data.domain.num_domains or map them when the shards "
            "are written"
        )
    return values.astype(np.int64, copy=False)


def _ids(table: pa.Table, name: str, spec: SparseColumn, where: str) -> Jagged:
    array = table.column(spec.column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        ids = array.flatten()  # leaves out what null lists may cover
        if ids.null_count:
            raise DataError(
                f"{where}: sparse feature {name} (column {spec.column!r}) has {ids.null_count} nulls inside lists; "
                "leave them out when the shards are written"
            )
    else:
        lengths = array.is_valid().to_numpy(zero_copy_only=False)
        ids = array.drop_null()
    values = ids.to_numpy(zero_copy_only=False)
    if len(values) and not (values.min() >= 0 and values.max() < spec.num_embeddings):
        wrong = (values < 0) | (values >= spec.num_embeddings)
        raise DataError(
            f"{where}: sparse feature {name} (column {spec.column!r}) has {_count(wrong)} out of range, "
            f"such as {values[wrong][0]}; its table takes ids 0..{spec.num_embeddings - 1}: "
            "raise num_embeddings or map the ids when the shards are written"
        )
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Jagged(values.astype(np.int64, copy=False), offsets)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))


def _is_ids(kind: pa.DataType) -> bool:
    return _is_integer(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def _count(mask: NDArray[np.bool_]) -> str:
    count = int(mask.sum())
    return f"{count} value{'s' * (count > 1)}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
