"""From the columns of a table to checked rows: what each feature reads, of which types, and which values it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.location import DataError
from recsys.data.rows import Jagged, Rows, SparseLayout


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

    def check_schema(self, schema: pa.Schema, file: str) -> frozenset[str]:
        """Refuse a file whose columns cannot be read as what they are for; the sparse features that it has lists of.

        Raises:
            DataError: a column is missing, twice there, or of another type.
        """
        for name in self.names:
            found = schema.names.count(name)
            if found == 0:
                raise DataError(f"{file}: no column {name!r}; the file has {', '.join(schema.names)}")
            if found > 1:
                raise DataError(f"{file}: {found} columns are named {name!r}; rename all but one")
        checks = [(self.label, "label", _is_number)]
        if self.reference:
            checks.append((self.reference, "reference", _is_number))
        if self.domain:
            checks.append((self.domain.column, "domain", _is_integer))
        checks += [(spec.column, f"dense feature {name}", _is_number) for name, spec in self.dense.items()]
        checks += [(spec.column, f"sparse feature {name}", _is_ids) for name, spec in self.sparse.items()]
        for name, role, accepts in checks:
            kind = schema.field(name).type
            if not accepts(kind):
                wanted = {_is_ids: "integers or lists of integers", _is_integer: "integers", _is_number: "numbers"}
                raise DataError(f"{file}: column {name!r} ({role}) has type {kind}; {wanted[accepts]} are needed")
        return frozenset(name for name, spec in self.sparse.items() if _is_list(schema.field(spec.column).type))

    def decode(self, table: pa.Table, layout: SparseLayout, where: str, order: NDArray[np.int64] | None = None) -> Rows:
        """Check every value of a table and lay the rows out for batches.

        Args:
            table: of a schema that `check_schema` accepts.
            layout: which features have lists.
            where: file and row group, for messages.
            order: the rows to take, in this order; all as they stand if it is None. Each column is put into order right
                after it was checked, while it is in the cache.

        Raises:
            DataError: a label other than 0 or 1, a null where none may be, an id or domain out of range, a dense value
                that is not finite.
        """
        table = table.combine_chunks()
        labels = _numbers(table, self.label, None, where)
        if (wrong := (labels != 0) & (labels != 1)).any():
            raise DataError(
                f"{where}: label column {self.label!r} has {_count(wrong)} other than 0 and 1, "
                f"such as {labels[wrong][0]}; make it binary when the shards are written"
            )
        reference = np.empty(0)
        if self.reference:
            reference = _numbers(table, self.reference, None, where).astype(np.float64)
            if not ((reference >= 0) & (reference <= 1)).all():
                raise DataError(f"{where}: reference column {self.reference!r} has values outside 0..1")
        domain = _domains(table, self.domain, where) if self.domain else np.empty(0, np.int64)
        single = np.empty((len(layout.single), len(table)), self._id_type)
        for target, name in zip(single, layout.single, strict=True):
            _place(_ids(table, name, self.sparse[name], where), order, target)
        lists = tuple(
            _id_lists(table, name, self.sparse[name], self._id_type, where)
            for name in layout.keys
            if name in layout.lists
        )
        labels = labels.astype(np.float32)
        if order is not None:
            labels = labels[order]
            reference = reference[order] if self.reference else reference
            domain = domain[order] if self.domain else domain
            lists = tuple(jagged.take(order) for jagged in lists)
        return Rows(labels, reference, domain, self._dense(table, where, order), single, lists)

    def _dense(self, table: pa.Table, where: str, order: NDArray[np.int64] | None) -> NDArray[np.float32]:
        columns = np.empty((len(self.dense), len(table)), np.float32)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is not finite is refused below
            for target, spec in zip(columns, self.dense.values(), strict=True):
                values = _numbers(table, spec.column, spec.fill, where)
                _place(np.log1p(values, dtype=np.float64) if spec.log1p else values, order, target)
        if not np.isfinite(columns).all():
            for (name, spec), values in zip(self.dense.items(), columns, strict=True):
                if (wrong := ~np.isfinite(values)).any():
                    raise DataError(
                        f"{where}: dense feature {name} (column {spec.column!r}) has {_count(wrong)} NaN or infinite "
                        f"in float32{' after log1p' * spec.log1p}; write nulls and give the feature a fill"
                    )
        return columns

    @property
    def _id_type(self) -> type[np.int32 | np.int64]:
        """Narrow where it can be: ids are shuffled in memory, and half the bytes fit the cache twice as well."""
        largest = max((spec.num_embeddings for spec in self.sparse.values()), default=0)
        return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


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


def _ids(table: pa.Table, name: str, spec: SparseColumn, where: str) -> NDArray[Any]:
    """Ids of a column of single ones, -1 for nulls."""
    array = _whole(table, spec.column)
    _check_range(array, name, spec, where)
    if array.null_count:
        array = pc.fill_null(array.cast(pa.int64()), -1)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _id_lists(table: pa.Table, name: str, spec: SparseColumn, id_type: type[np.int32 | np.int64], where: str) -> Jagged:
    """Ids of a column of lists, or of single ones in a file of its own kind; a null is an empty list."""
    array = _whole(table, spec.column)
    if _is_list(array.type):
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
    _check_range(ids, name, spec, where)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # A copy, because torch takes no memory that is read-only, as Arrow's is.
    return Jagged(ids.to_numpy(zero_copy_only=False).astype(id_type), offsets)


def _place(values: NDArray[Any], order: NDArray[np.int64] | None, target: NDArray[Any]) -> None:
    """Write values, in an order, into an array of a type that holds them."""
    if order is None:
        target[:] = values
    else:
        # All of `order` is in range; "clip" spares the copy that the check of it would make of `out`.
        np.take(values.astype(target.dtype, copy=False), order, out=target, mode="clip")


def _check_range(ids: pa.Array, name: str, spec: SparseColumn, where: str) -> None:
    extremes = pc.min_max(ids)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    if low is None or (low >= 0 and high < spec.num_embeddings):
        return
    values = ids.drop_null().to_numpy(zero_copy_only=False)
    wrong = (values < 0) | (values >= spec.num_embeddings)
    raise DataError(
        f"{where}: sparse feature {name} (column {spec.column!r}) has {_count(wrong)} out of range, "
        f"such as {values[wrong][0]}; its table takes ids 0..{spec.num_embeddings - 1}: "
        "raise num_embeddings or map the ids when the shards are written"
    )


def _whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = table.column(name)
    if column.num_chunks == 1:
        return column.chunk(0)  # what combining would copy
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_ids(kind: pa.DataType) -> bool:
    return _is_integer(kind.value_type if _is_list(kind) else kind)


def _count(mask: NDArray[np.bool_]) -> str:
    count = int(mask.sum())
    return f"{count} value{'s' * (count > 1)}"
