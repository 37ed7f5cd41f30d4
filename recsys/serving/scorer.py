"""Raw values in, probabilities out, by the code that decoded them in training."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set, ValuesView
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recsys.checkpoint.layout import VOCABULARIES
from recsys.config.faults import shortened
from recsys.data.arrow import is_string, value_type
from recsys.data.features import Columns, build_columns, check_names
from recsys.data.kinds import Kinds, read_kinds
from recsys.data.rows import Rows, SparseLayout
from recsys.data.storage import DataError
from recsys.errors import UserError
from recsys.files import FileError, read_regular
from recsys.model.dense_arch import build_dense_arch
from recsys.model.experts import domain_adaptation, domain_linears, expert_layers, merge_experts
from recsys.model.towers.normalization import Folds
from recsys.serving.artifact import Artifact, ArtifactError
from recsys.serving.candidates import Sharing, shared_rows
from recsys.serving.schema import ARROW_SCHEMA, read_as_meant, times_and_integers

_NO_ARRAY = (pa.ArrowException, TypeError, ValueError, LookupError, OverflowError)
_NESTING = (list, tuple, set, frozenset, Mapping, ValuesView, np.ndarray)
_MAX_SCHEMA = 16 << 20
_ROWS = "give an Arrow table or record batch, a mapping of columns by name, or a list of mappings, one for each row"

_NO_FEATURES = SparseLayout((), frozenset())

_Decoded = TypeVar("_Decoded")

_BATCH_ROWS = 2048
"""Of files that are predicted; what they become on the way is then a few MB for most models, and fits a cache."""

_CONTEXTS = 16
"""Sets of context columns of which what they make of the weights is kept."""


class RequestError(UserError):
    """Rows cannot be scored; the message names the row and the column, and what is wanted."""


class Scorer:
    """Scores rows of raw values as the model of an artefact does.

    Safe to call from several threads at once, and in any autocast, default type and default device, which change
    nothing. Pickled it is the path of its artefact, which is opened again.

    Args:
        artifact: a directory that an export wrote.
        compile: whether `score` runs the dense arch as `torch.compile` compiles it, for any number of rows, at the
            first call; that needs a C++ compiler. Probabilities differ by 1e-6 at most.

    Raises:
        ArtifactError: it is damaged, or none.

    Attributes:
        columns: names of the columns that rows must have; among them that of the domain, where the model adapts to it,
            or one is calibrated by itself.
        dense_arch: of the artefact, in evaluation.
        raw_columns: what is read of raw rows; `domain` is that by which they are calibrated, None where all are alike.
        dictionaries: as in `recsys.serving.predicting.Model`, like `batch_rows`, `reader_threads` and `origin`.
    """

    def __init__(self, artifact: str | Path | Artifact, *, compile: bool = False) -> None:
        self.artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
        directory, config = self.artifact.directory, self.artifact.config
        self._calibration = self.artifact.calibration
        columns = build_columns(config, directory / VOCABULARIES, raw=True)
        adapts = config.model.domain_experts is not None
        by_domain = adapts or (self._calibration is not None and self._calibration.domains)
        self.raw_columns = columns if by_domain else replace(columns, domain=None)
        self._domain = self.raw_columns.parts.get("data.domain")
        self.columns, self.dictionaries = self.raw_columns.feature_names, self.raw_columns.dictionary_names
        if self._domain is not None:
            self.columns = tuple(dict.fromkeys((*self.columns, *self._domain.names)))
        self._kinds = read_kinds(directory)
        self._features = _Features(self.artifact, self.raw_columns, self._kinds)
        self.dense_arch = _dense_arch(self.artifact)
        self._compile = compile
        self._compiled = torch.compile(self.dense_arch, dynamic=True) if compile else self.dense_arch
        self._division = lru_cache(_CONTEXTS)(self._divide)
        self.batch_rows, self.reader_threads = _BATCH_ROWS, config.data.reader_threads
        self.origin = f"artefact {hashlib.sha256(self.artifact.manifest.to_json().encode()).hexdigest()}"
        self._times_and_integers = times_and_integers(self.raw_columns)
        if self.raw_columns.domain is not None and self.raw_columns.domain.is_of_integers:
            self._times_and_integers.setdefault(self.raw_columns.domain.column, False)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), compile=self._compile), (self.artifact.directory,)

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow's schema of rows, as the artefact has it.

        Raises:
            ArtifactError: it has none.
        """
        path = self.artifact.directory / ARROW_SCHEMA
        try:
            if ARROW_SCHEMA not in self.artifact.manifest.files:
                raise FileError(path, "no digest is told of it")
            with pa.ipc.open_stream(read_regular(path, _MAX_SCHEMA)) as stream:
                return stream.schema
        except (FileError, pa.ArrowException, OSError) as error:
            told = " ".join(str(error).split())
            raise ArtifactError(f"{path} tells no schema ({told}); export the checkpoint again") from None

    def score(self, rows: Any) -> NDArray[np.float32]:
        """Probabilities (N,) of N rows of raw values.

        Args:
            rows: an Arrow table or record batch, a mapping of columns by name, or mappings, one for each row. A
                null is no id, or what the config fills a dense feature with. Columns that no feature reads are
                refused in mappings, where they speak for a mistake, and left alone in what is Arrow's. In mappings,
                times may be texts with their zone, and whole numbers may be written 3.0, as JSON may have it.

        Raises:
            RequestError: they are none of these, or a column is missing or unknown, or its values are of several types
                or ids that are neither integers nor, where they are wanted, times.
            DataError: a column is of another type than in training, a value null or not finite where the config does
                not fill it, or an id out of range; a domain that is asked for is null or none of the config's; or
                numbers are so large that the model makes NaN of them.
        """
        with torch.inference_mode():
            return probabilities(self.logits_of(self._table(rows, self.columns)), "rows to score").numpy()

    def score_candidates(self, context: Mapping[str, Any], candidates: Any) -> NDArray[np.float32]:
        """Probabilities (N,) of N candidates of one request: those that `score` has of rows with the context in each.

        The context is decoded and looked up once, and linears on the tower's input multiply it once. Their sums are
        rounded elsewhere, so that probabilities differ from those of `score` by 1e-6 at most.

        Args:
            context: a raw value by column.
            candidates: the other columns, in any form that `score` takes.

        Raises:
            RequestError: as `score`, or a column is in both, or a feature reads a column of each.
            DataError: as `score`.
        """
        if not isinstance(context, Mapping):
            raise RequestError(f"the context is of type {type(context).__name__}; give a mapping of a value by column")
        if unknown := [name for name in context if name not in self.columns]:
            raise RequestError(f"context: {self._odd(unknown[0])}")
        division = self._division(frozenset(context))
        with torch.inference_mode(), _in_full_precision():
            row = self._table({name: [context[name]] for name in context}, tuple(context)) if context else pa.table({})
            items = self._table(candidates, [name for name in self.columns if name not in context], context)
            parts = division.context.read(row, "context", one=True), division.items.read(items, "candidates")
            domains = self._domains(context, row, items)
            inputs = *map(shared_rows, *parts, division.sharings), *self._read_by_the_model(domains)
            logits: Tensor = self.dense_arch(*inputs)[0]
            if self._calibration is not None:
                logits = self._calibration(logits, domains)
            return probabilities(logits, "candidates").numpy()

    def _domains(self, context: Mapping[str, Any], row: pa.Table, items: pa.Table) -> NDArray[np.int64]:
        """Domains (N,) of the candidates, theirs or the context's; (0,) where nothing depends on them."""
        if self._domain is None:
            return np.empty(0, np.int64)
        shared = self._domain.names[0] in context
        table, where = (row, "context") if shared else (items, "candidates")
        check_names(table.schema, self._domain.names, where, "table")
        self._domain.check_schema(table.schema, where)
        domains = table.select(self._domain.names)
        if shared:
            return self._domain.decode(domains, _NO_FEATURES, where).domain.repeat(len(items))
        decode = self._domain.decode
        return naming_row(lambda part, of: decode(part, _NO_FEATURES, of), domains, where).domain

    def logits_of(self, table: pa.Table, where: str = "rows to score") -> Tensor:
        """Logits (N,) of a table of raw values, calibrated if the artefact is; `where` is what it is, for messages.

        Raises:
            DataError: as `score`.
        """
        layout = self.check_schema(table.schema, where)
        return self.logits(naming_row(lambda part, of: self.decode(part, layout, of), table, where), layout)

    def check_schema(self, schema: pa.Schema, where: str) -> SparseLayout:
        """Refuse a table whose columns cannot be scored, and tell which features have lists.

        Raises:
            DataError: a column is missing, twice there, or of another type than in training.
        """
        layout = self._features.check_schema(schema, where)
        if self._domain is not None:
            check_names(schema, self._domain.names, where, "table")
            self._domain.check_schema(schema, where)
        return layout

    def decode(self, table: pa.Table, layout: SparseLayout, where: str) -> Rows:
        """Check the values of a table whose schema has the layout, and lay its rows out for `logits`.

        Raises:
            DataError: as `score`.
        """
        rows = self.raw_columns.decode_features(table, layout, where)
        if self._domain is not None:
            found = self._domain.decode(table.select(self._domain.names), _NO_FEATURES, where)
            rows = replace(rows, domain=found.domain)
        return rows

    @torch.inference_mode()
    def logits(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """Logits (N,) of decoded rows, calibrated if the artefact is; rows tell their domains where it needs them."""
        with _in_full_precision():
            logits: Tensor = self._compiled(*self.inputs(rows, layout))[0]
        return logits if self._calibration is None else self._calibration(logits, rows.domain)

    @torch.inference_mode()
    def inputs(self, rows: Rows, layout: SparseLayout) -> tuple[Tensor, ...]:
        """What the dense arch is given of decoded rows.

        Returns:
            Pooled embeddings (N, W) and dense features (N, F_d); of a model that adapts to domains, these (N,) too.
        """
        return *self._features.inputs(rows, layout), *self._read_by_the_model(rows.domain)

    def _read_by_the_model(self, domains: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return () if domain_adaptation(self.dense_arch) is None else (torch.from_numpy(domains),)

    def _divide(self, context: frozenset[str]) -> "_Division":
        """The features that read columns of the context, and those that read the others."""
        columns, dims = self.raw_columns, self.artifact.config.embedding_dims
        reads = {name: [dense.column or name] for name, dense in columns.dense.items()}
        for name, (settings, *_) in columns.sparse.items():
            reads[name] = [settings.column or name, *([settings.weights] if settings.weights else [])]
        if self._domain is not None:
            reads["data.domain"] = list(self._domain.names)
        for name, (first, *others) in reads.items():
            if odd := [column for column in others if (column in context) is not (first in context)]:
                raise RequestError(
                    f"feature {name} reads {first!r} and {odd[0]!r}; give both in the context, or neither"
                )
        shared = {name for name, read in reads.items() if read[0] in context}
        of_context, of_items = (
            replace(columns, sparse=_among(columns.sparse, names), dense=_among(columns.dense, names))
            for names in (shared, reads.keys() - shared)
        )
        of_sparse = Sharing(name in shared for name in columns.sparse for _ in range(dims[name]))
        return _Division(
            _Features(self.artifact, of_context, self._kinds),
            _Features(self.artifact, of_items, self._kinds),
            (of_sparse, Sharing(name in shared for name in columns.dense)),
        )

    def _table(self, rows: Any, names: Sequence[str], context: Container[str] = ()) -> pa.Table:
        """Rows as a table that has some columns; of others it has none but Arrow's own, and none of the context."""
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        if isinstance(rows, pa.Table):
            if twice := [name for name in rows.column_names if name in context]:
                raise RequestError(f"column {self._odd(twice[0], context)}")
            return rows
        if not isinstance(rows, Mapping):
            try:
                looked_at = iter(rows)
            except TypeError:  # also of what only looks as if it had parts, such as an array without dimensions
                raise RequestError(f"rows to score are of type {type(rows).__name__}; {_ROWS}") from None
            rows = list(looked_at)  # which may be there for one look only
        columns = rows if isinstance(rows, Mapping) else self._columns_of(rows, names, context)
        if missing := [name for name in names if name not in columns]:
            raise RequestError(f"column {missing[0]!r} is missing; give nulls where there is nothing")
        if unknown := [name for name in columns if name not in names]:
            raise RequestError(f"column {self._odd(unknown[0], context)}")
        if not names:  # so that no column tells of how many rows
            if isinstance(rows, Mapping):
                raise RequestError("all columns are in the context; give an empty mapping for each candidate")
            return pa.table({"": pa.nulls(len(rows))})
        arrays = {name: _array(name, columns[name]) for name in names}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise RequestError(f"columns are of different lengths: {lengths}")
        for name in arrays.keys() & self._times_and_integers.keys():
            arrays[name] = _as_meant(name, arrays[name], times=self._times_and_integers[name])
        return pa.table(arrays)

    def _columns_of(self, rows: list[Any], names: Sequence[str], context: Container[str]) -> dict[str, list[Any]]:
        wanted = set(names)
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise RequestError(f"row {number} is of type {type(row).__name__}; {_ROWS}")
            if row.keys() != wanted:
                if missing := [name for name in names if name not in row]:
                    raise RequestError(f"row {number}: {missing[0]!r} is missing; give null where there is nothing")
                unknown = next(name for name in row if name not in wanted)
                raise RequestError(f"row {number}: {self._odd(unknown, context)}")
        return {name: [row[name] for row in rows] for name in names}

    def _odd(self, name: Any, context: Container[str] = ()) -> str:
        """What is wrong with a column that is not wanted, in words."""
        if name in context:
            return f"{name!r} is in the context already; give it in one of the two"
        return f"{name!r} is none of the model's columns, which are {', '.join(self.columns)}"


def probabilities(logits: Tensor, where: str) -> Tensor:
    """Those of logits (N,); `where` is whose, for messages.

    Raises:
        DataError: a logit is NaN.
    """
    found = logits.sigmoid()
    if bool((wrong := found.isnan()).any()):
        raise DataError(
            f"{where}: row {int(wrong.nonzero()[0])} has no probability, as its numbers are too large for the model, "
            "which makes NaN of them; give dense features a clip, or leave such rows out"
        )
    return found


def naming_row(decode: Callable[[pa.Table, str], _Decoded], table: pa.Table, where: str) -> _Decoded:
    """What `decode` makes of a table, and where that is an error, the error of the first row that is refused.

    Args:
        decode: given some of the rows, and what they are, for messages. Its errors are of rows, each by itself.
        table: the rows.
        where: what they are.

    Raises:
        DataError: as `decode`.
    """
    try:
        return decode(table, where)
    except DataError:
        row = _first_refused(len(table), lambda count: decode(table.slice(0, count), where), DataError)
        decode(table.slice(row, 1), f"{where}, row {row}")
        raise


def _first_refused(count: int, check: Callable[[int], object], *refusals: type[Exception]) -> int:
    """The first row for which a check of the first n of `count` rows fails; found by halves, as checks cost."""

    def fails(last: int) -> bool:
        try:
            check(last + 1)
        except refusals:
            return True
        return False

    return bisect_left(range(count), True, key=fails)


def _array(name: str, values: Any) -> pa.Array:
    """A column as an Arrow array of the type that its values speak for."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | bytearray | Set | Mapping):
        raise RequestError(f"column {name!r} is of type {type(values).__name__}; give a list of a value for each row")
    values = values if hasattr(values, "__len__") else list(values)
    try:
        array = _inferred(values)
    except _NO_ARRAY as error:
        told = " ".join(str(error).split())
        raise RequestError(f"column {name!r}{_first_odd(values)}: values of one type are needed ({told})") from None
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _inferred(values: Any) -> Any:
    _check_inferable(values)
    try:
        array = pa.array(values)
    except OverflowError:  # of integers, Arrow tries those with a sign alone
        return pa.array(values, pa.uint64())
    if pa.types.is_date(array.type) and any(isinstance(value, datetime) for value in values):
        raise ValueError("after a date, Arrow would cut times to days")
    return array


def _check_inferable(values: Any) -> None:
    """Refuse values on which Arrow's inference ends the process, or reads others than are meant, instead of raising.

    It follows lists and mappings as deep as they go, until the stack ends, and reads memory that is not there where a
    number of NumPy's comes after a time of NumPy's. Of times in tens of seconds or in weeks of 7 days it leaves out the
    10 and the 7, and of masked arrays within a column the mask.

    Raises:
        ValueError: a value is a mapping, a masked array, or a list within a list; or times and others of NumPy's are
            mixed, or in multiples of a unit.
    """
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return
    if not _has_objects(values):
        _check_times({values.dtype.type}, [values])
        return
    values = np.ma.getdata(values) if isinstance(values, np.ma.MaskedArray) else values  # whose mask Arrow knows
    # Asked of types, which are few, since values are many.
    kinds = set(map(type, values))
    _check_times(kinds, values)
    nesting = {kind for kind in kinds if issubclass(kind, _NESTING)}
    if not nesting:
        return
    if any(issubclass(kind, np.ma.MaskedArray) for kind in nesting):
        raise ValueError("a list is a masked array; give its values, with None for those that are masked")
    lists = [value for value in values if type(value) in nesting and (type(value) is list or _has_objects(value))]
    within = set(map(type, chain.from_iterable(lists)))
    if any(issubclass(kind, Mapping) for kind in nesting) or any(issubclass(kind, _NESTING) for kind in within):
        raise ValueError("values are no mappings, and lists hold no lists")
    arrays = []
    if any(issubclass(kind, np.ndarray) for kind in nesting):
        arrays = [value for value in values if isinstance(value, np.ndarray) and not _has_objects(value)]
        within |= {value.dtype.type for value in arrays}
    _check_times(within, chain(arrays, chain.from_iterable(lists)))


def _check_times(kinds: set[type], values: Iterable[Any]) -> None:
    """Refuse times of NumPy's of which Arrow makes others, among values of some kinds, which may be arrays of them."""
    of_numpy = {kind for kind in kinds if issubclass(kind, np.generic)}
    if np.datetime64 in of_numpy and len(of_numpy) > 1:
        raise ValueError("times are among numbers")
    if of_numpy.isdisjoint((np.datetime64, np.timedelta64)):
        return
    units = {value.dtype for value in values if isinstance(value, np.datetime64 | np.timedelta64 | np.ndarray)}
    if odd := [unit for unit in units if unit.kind in "mM" and np.datetime_data(unit)[1] != 1]:
        raise ValueError(f"times are of {odd[0]}, in multiples of a unit; give them in the unit itself")


def _has_objects(values: Any) -> bool:
    """Whether values may be any objects, and not numbers of an array alone."""
    return bool(getattr(getattr(values, "dtype", None), "hasobject", True))


def _first_odd(values: Any) -> str:
    """Which value Arrow does not take beside those before it, in words."""
    if not getattr(values, "ndim", 1):
        return ""
    listed = list(values)
    row = _first_refused(len(listed), lambda count: _inferred(listed[:count]), *_NO_ARRAY)
    return f": row {row} is of type {type(listed[row]).__name__}" if row < len(listed) else ""


def _as_meant(name: str, values: pa.Array, *, times: bool) -> pa.Array:
    """Ids as `read_as_meant` gives them.

    Raises:
        RequestError: they are floating numbers that are no integers, or texts that are no times where times are.
    """
    meant = read_as_meant(values, times=times)
    if not _is_odd(meant, times=times):
        return meant

    def check(count: int) -> None:
        first = values.take(pa.array(range(count)))  # of a slice, Arrow would cast what is behind it in lists too
        if _is_odd(read_as_meant(first, times=times), times=times):
            raise ValueError

    row = _first_refused(len(values), check, ValueError)
    wanted = "times with their zone, or all dates," if is_string(value_type(meant.type)) else "integers (below 2^53)"
    raise RequestError(f"column {name!r}: row {row} is {shortened(repr(values[row].as_py()), 60)}; {wanted} are needed")


def _is_odd(ids: pa.Array, *, times: bool) -> bool:
    """Whether ids that were read as they are meant are still what no mapping takes."""
    kind = value_type(ids.type)
    return bool(pa.types.is_floating(kind) or (times and is_string(kind)))


class _Features:
    """From tables of raw values to the input of the dense arch, of all features or some.

    Args:
        artifact: has the tables.
        columns: of the features.
        kinds: what they hold.

    Attributes:
        columns: of the features.
    """

    def __init__(self, artifact: Artifact, columns: Columns, kinds: Kinds) -> None:
        self.columns, self._kinds = columns, kinds
        config = artifact.config
        of = {name: config.features.sparse[name].table for name in columns.sparse}
        self._of = {
            name: (artifact.tables[table], config.tables[table].pooling == "mean") for name, table in of.items()
        }
        self._checked: tuple[pa.Schema, SparseLayout] | None = None

    def check_schema(self, schema: pa.Schema, where: str) -> SparseLayout:
        """As `Scorer.check_schema`; a schema that is that of the last call was checked then."""
        checked = self._checked
        if checked is not None and schema.equals(checked[0], check_metadata=True):
            return checked[1]
        layout = self._kinds.check_raw(self.columns, schema, where)
        self._checked = schema, layout
        return layout

    def read(self, table: pa.Table, where: str, *, one: bool = False) -> tuple[Tensor, Tensor]:
        """Pooled embeddings (N, W) and dense features (N, F_d) of a table of raw values, or of its one row."""
        layout = self.check_schema(table.schema, where)

        def decode(part: pa.Table, where: str) -> Rows:
            return self.columns.decode_features(part, layout, where)

        return self.inputs(decode(table, where) if one else naming_row(decode, table, where), layout)

    def inputs(self, rows: Rows, layout: SparseLayout) -> tuple[Tensor, Tensor]:
        """The same of decoded rows."""
        return self.pooled(rows, layout), torch.from_numpy(np.ascontiguousarray(rows.dense.T))

    def pooled(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """Pooled embeddings (N, W), in the order of the config's features."""
        single = dict(zip(layout.single, torch.from_numpy(rows.single), strict=True))
        lists = dict(zip((name for name in layout.keys if name in layout.lists), rows.lists, strict=True))
        parts = [
            table.of_lists(lists[name], mean=mean)
            if name in lists
            else table.of_single(single[name], has_empty=rows.has_empty)
            for name, (table, mean) in self._of.items()
        ]
        return torch.cat(parts, 1) if parts else torch.empty(len(rows), 0)


class _Division(NamedTuple):
    """Features of the context and of the candidates, and which columns of the dense arch's inputs are the context's."""

    context: _Features
    items: _Features
    sharings: tuple[Sharing, Sharing]


def _among(features: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: feature for name, feature in features.items() if name in names}


def _in_full_precision() -> AbstractContextManager[Any]:
    """Where products are of float32, whatever autocast the caller is in."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


class _Unfilled(TorchFunctionMode):
    """Leaves out the random numbers that loaded ones replace: to draw those on `meta`, torch imports its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _dense_arch(artifact: Artifact) -> torch.nn.Module:
    config = artifact.config
    with torch.device("meta"), _Unfilled():
        dense_arch = build_dense_arch(
            config.model,
            config.embedding_dims,
            num_dense_features=len(config.features.dense),
            num_domains=config.num_domains,
            with_others=config.has_other_domains,
        )
    try:
        # Tensors of a mapped file cannot be written to; a copy of these few can, as some layers fold theirs.
        built = dense_arch.state_dict()  # whose floating numbers are of the type that the caller has set
        kinds = {name: torch.float32 if of.is_floating_point() else of.dtype for name, of in built.items()}
        dense_arch.load_state_dict({name: value.clone() for name, value in artifact.dense.items()}, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.directory}: the dense arch is not that of its config: {told}") from None
    if odd := [name for name, value in dense_arch.state_dict().items() if value.dtype != kinds[name]]:
        raise ArtifactError(f"{artifact.directory}: {odd[0]} of the dense arch is not of {kinds[odd[0]]}")
    for layer in expert_layers(dense_arch).values():
        layer.experts_active, layer.record_routing = True, False
    with _in_full_precision():
        merge_experts(dense_arch)
        if (adaptation := domain_adaptation(dense_arch)) is not None:
            adaptation.grouped = False  # requests have few rows, whose order is not worth changing
            adaptation.fold(domain_linears(dense_arch).values())
        for part in [module for module in dense_arch.modules() if isinstance(module, Folds)]:
            part.fold_norms()
    return dense_arch.eval().requires_grad_(False)
