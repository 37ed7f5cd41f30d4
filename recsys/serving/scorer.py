"""Raw values in, probabilities out, by the code that decoded them in training."""

from collections.abc import Iterable, Mapping, Set
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.checkpoint.layout import VOCABULARIES
from recsys.config import Config
from recsys.data.features import build_columns
from recsys.data.kinds import read_kinds
from recsys.data.rows import Rows, SparseLayout
from recsys.errors import UserError
from recsys.files import FileError, read_regular
from recsys.model.dense_arch import build_dense_arch
from recsys.model.experts import expert_layers
from recsys.serving.artifact import Artifact, ArtifactError
from recsys.serving.schema import ARROW_SCHEMA, read_as_meant, times_and_integers
from recsys.serving.tables import Table

_NESTING = (list, tuple, set, frozenset, Mapping, np.ndarray)
_MAX_SCHEMA = 16 << 20
_ROWS = "give an Arrow table or record batch, a mapping of columns by name, or a list of mappings, one for each row"


class RequestError(UserError):
    """Rows cannot be scored; the message names the row and the column, and what is wanted."""


class Scorer:
    """Scores rows of raw values as the model of an artefact does.

    Safe to call from several threads at once.

    Args:
        artifact: a directory that an export wrote.

    Raises:
        ArtifactError: it is damaged, or none.

    Attributes:
        columns: names of the columns that rows must have.
    """

    def __init__(self, artifact: str | Path | Artifact) -> None:
        self.artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
        directory, config = self.artifact.directory, self.artifact.config
        self._columns = build_columns(config, directory / VOCABULARIES, raw=True)
        self._kinds = read_kinds(directory)
        self._features = _Features(config, self.artifact.tables)
        self._dense_arch = _dense_arch(self.artifact)
        self.columns = self._columns.feature_names
        self._times_and_integers = times_and_integers(self._columns)

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
            RequestError: they are none of these, or a column is missing or unknown, or its values are of several types.
            DataError: a value is of another type than in training, null or not finite where the config does not fill
                it, or an id is out of range.
        """
        with torch.inference_mode():
            return self.logits_of(self._table(rows)).sigmoid().numpy()

    def logits_of(self, table: pa.Table, where: str = "rows to score") -> Tensor:
        """Logits (N,) of a table of raw values; `where` is what it is, for messages.

        Raises:
            DataError: as `score`.
        """
        layout = self.check_schema(table.schema, where)
        return self.logits(self._columns.decode_features(table, layout, where), layout)

    def check_schema(self, schema: pa.Schema, where: str) -> SparseLayout:
        """Refuse a table whose columns cannot be scored, and tell which features have lists.

        Raises:
            DataError: a column is missing, twice there, or of another type than in training.
        """
        lists = self._columns.check_features(schema, where)
        self._kinds.check(self._columns, schema, where, learn=False)
        return self._columns.layout(lists)

    @torch.inference_mode()
    def logits(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """Logits (N,) of decoded rows."""
        pooled = self._features.pooled(rows, layout)
        dense = torch.from_numpy(np.ascontiguousarray(rows.dense.T))
        logits: Tensor = self._dense_arch(pooled, dense)[0]
        return logits

    def _table(self, rows: Any) -> pa.Table:
        if isinstance(rows, pa.RecordBatch):
            return pa.Table.from_batches([rows])
        if isinstance(rows, pa.Table):
            return rows
        columns = rows if isinstance(rows, Mapping) else self._columns_of(rows)
        if missing := [name for name in self.columns if name not in columns]:
            raise RequestError(f"column {missing[0]!r} is missing; give nulls where there is nothing")
        if unknown := [name for name in columns if name not in self.columns]:
            raise RequestError(f"column {unknown[0]!r} is none of the model's, which are {', '.join(self.columns)}")
        arrays = {name: _array(name, columns[name]) for name in self.columns}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise RequestError(f"columns are of different lengths: {lengths}")
        for name, times in self._times_and_integers.items():
            arrays[name] = read_as_meant(arrays[name], times=times)
        return pa.table(arrays)

    def _columns_of(self, rows: Any) -> dict[str, list[Any]]:
        try:
            looked_at = iter(rows)
        except TypeError:  # also of what only looks as if it had parts, such as an array without dimensions
            raise RequestError(f"rows to score are of type {type(rows).__name__}; {_ROWS}") from None
        rows = list(looked_at)  # which may be there for one look only
        wanted = set(self.columns)
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise RequestError(f"row {number} is of type {type(row).__name__}; {_ROWS}")
            if row.keys() != wanted:
                if missing := [name for name in self.columns if name not in row]:
                    raise RequestError(f"row {number}: {missing[0]!r} is missing; give null where there is nothing")
                unknown = next(name for name in row if name not in wanted)
                raise RequestError(
                    f"row {number}: {unknown!r} is none of the model's columns, which are {', '.join(self.columns)}"
                )
        return {name: [row[name] for row in rows] for name in self.columns}


def _array(name: str, values: Any) -> pa.Array:
    """A column as an Arrow array of the type that its values speak for."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | bytearray | Set | Mapping):
        raise RequestError(f"column {name!r} is of type {type(values).__name__}; give a list of a value for each row")
    values = values if hasattr(values, "__len__") else list(values)
    try:
        array = _inferred(values)
    except (pa.ArrowException, TypeError, ValueError, LookupError, OverflowError) as error:
        told = " ".join(str(error).split())
        raise RequestError(f"column {name!r}{_first_odd(values)}: values of one type are needed ({told})") from None
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _inferred(values: Any) -> Any:
    _check_depth(values)
    try:
        array = pa.array(values)
    except OverflowError:  # of integers, Arrow tries those with a sign alone
        return pa.array(values, pa.uint64())
    if pa.types.is_date(array.type) and any(isinstance(value, datetime) for value in values):
        raise ValueError("after a date, Arrow would cut times to days")
    return array


def _check_depth(values: Any) -> None:
    """Refuse what nests deeper than lists: Arrow follows values as deep as they go, until the stack ends.

    Raises:
        ValueError: a value is a mapping, or a list within a list.
    """
    if isinstance(values, pa.Array | pa.ChunkedArray) or not _has_objects(values):
        return
    # Asked of types, which are few, since values are many.
    nesting = {kind for kind in set(map(type, values)) if issubclass(kind, _NESTING)}
    if not nesting:
        return
    lists = (value for value in values if type(value) in nesting and (type(value) is list or _has_objects(value)))
    within = set(map(type, chain.from_iterable(lists)))
    if any(issubclass(kind, Mapping) for kind in nesting) or any(issubclass(kind, _NESTING) for kind in within):
        raise ValueError("values are no mappings, and lists hold no lists")


def _has_objects(values: Any) -> bool:
    """Whether values may be any objects, and not numbers of an array alone."""
    return bool(getattr(getattr(values, "dtype", None), "hasobject", True))


def _first_odd(values: Any) -> str:
    """Which value is of another type than those before it, in words."""
    kinds: set[type] = set()
    for number, value in enumerate(values if getattr(values, "ndim", 1) else ()):
        if value is not None:
            kinds.add(type(value))
        if len(kinds) > 1:
            return f": row {number} is of type {type(value).__name__}"
    return ""


class _Features:
    """From decoded rows to the input of the dense arch.

    Args:
        config: names features and tables.
        tables: by name.
    """

    def __init__(self, config: Config, tables: Mapping[str, Table]) -> None:
        self._of = {
            name: (tables[feature.table], config.tables[feature.table].pooling == "mean")
            for name, feature in config.features.sparse.items()
        }

    def pooled(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """Pooled embeddings (N, W), in the order of the config's features."""
        single = dict(zip(layout.single, torch.from_numpy(rows.single), strict=True))
        lists = dict(zip((name for name in layout.keys if name in layout.lists), rows.lists, strict=True))
        parts = [
            table.of_lists(lists[name], mean=mean) if name in lists else table.of_single(single[name])
            for name, (table, mean) in self._of.items()
        ]
        return torch.cat(parts, 1) if parts else torch.empty(len(rows), 0)


def _dense_arch(artifact: Artifact) -> torch.nn.Module:
    config = artifact.config
    dims = {name: config.tables[feature.table].embedding_dim for name, feature in config.features.sparse.items()}
    with torch.device("meta"):
        dense_arch = build_dense_arch(config.model, dims, num_dense_features=len(config.features.dense))
    try:
        # Tensors of a mapped file cannot be written to; a copy of these few can, as some layers fold theirs.
        kinds = {name: value.dtype for name, value in dense_arch.state_dict().items()}
        dense_arch.load_state_dict({name: value.clone() for name, value in artifact.dense.items()}, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.directory}: the dense arch is not that of its config: {told}") from None
    if odd := [name for name, value in dense_arch.state_dict().items() if value.dtype != kinds[name]]:
        raise ArtifactError(f"{artifact.directory}: {odd[0]} of the dense arch is not of {kinds[odd[0]]}")
    for layer in expert_layers(dense_arch).values():
        layer.experts_active, layer.record_routing = True, False
    return dense_arch.eval().requires_grad_(False)
