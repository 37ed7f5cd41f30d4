"""From the columns of a table to checked rows: what each feature reads, of which types, and what becomes of it.

Training, evaluation and serving go through `Columns.decode_features`, so that a row has the same features in each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.data.arrow import filled, flat, is_integer, is_list, is_number, value_type, whole
from recsys.data.ids import HashedIds, IdMapping, PlainIds, VocabularyIds, count
from recsys.data.labels import Expression, parse_expression
from recsys.data.rows import Counts, Jagged, Rows, SparseLayout, offsets_of
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary


class DenseColumn(NamedTuple):
    """A numeric column, transformed in the order of the attributes.

    Attributes:
        column: its name.
        fill: what nulls become; None refuses them.
        log1p: take log(1 + value), after `clip`.
        clip: least and greatest value.
        standardize: mean to subtract and deviation to divide by, last of all.
        not_finite: whether NaN and infinities are refused or become `fill`, as nulls do.
    """

    column: str
    fill: float | None
    log1p: bool = False
    clip: tuple[float, float] | None = None
    standardize: tuple[float, float] | None = None
    not_finite: Literal["error", "fill"] = "error"


class SparseColumn(NamedTuple):
    """A column of values, or lists of values, that become rows of a table.

    Attributes:
        column: its name.
        num_embeddings: rows of the table.
        ids: how values become rows.
        weights: a column of a weight for each value, in lists of the same lengths; None has none.
        max_length: longer lists are cut to so many values.
        keep: which end of a list that is cut remains.
    """

    column: str
    num_embeddings: int
    ids: IdMapping = PlainIds()
    weights: str | None = None
    max_length: int | None = None
    keep: Literal["first", "last"] = "first"


class DomainColumn(NamedTuple):
    """A column of integers without nulls, each in 0 .. num_domains - 1."""

    column: str
    num_domains: int


LABEL = "label"
"""What the label is called where things are counted by feature."""


@dataclass(frozen=True)
class Columns:
    """What to read of each row.

    Attributes:
        label: a column of 0 and 1 (integer, boolean or floating), or an expression, see `recsys.data.labels`; None
            where rows have none.
        reference: a column of probabilities without nulls, or None.
        dense: by feature name.
        sparse: by feature name.
        domain: what parts the rows in reports, or None.
        label_null: whether rows of no label are refused, or left out of the batch.
        weight: a column of weights of the rows in the loss, finite and not negative, or None.
    """

    label: str | None
    reference: str | None
    dense: Mapping[str, DenseColumn]
    sparse: Mapping[str, SparseColumn]
    domain: DomainColumn | None = None
    label_null: Literal["error", "skip"] = "error"
    weight: str | None = None

    @property
    def names(self) -> list[str]:
        """Every column once."""
        names = [*(self._label.columns if self._label else []), *([self.reference] if self.reference else [])]
        names += [self.domain.column] if self.domain else []
        names += [self.weight] if self.weight else []
        return list(dict.fromkeys(names + self.feature_names))

    @property
    def feature_names(self) -> list[str]:
        """Every column that a feature reads, once."""
        names = [spec.column for spec in self.dense.values()] + [spec.column for spec in self.sparse.values()]
        return list(dict.fromkeys(names + [spec.weights for spec in self.sparse.values() if spec.weights]))

    @property
    def parts(self) -> dict[str, "Columns"]:
        """All that is read, one by one, by its config path.

        Decoding every part refuses just what decoding the whole does, but a fault of one does not hide the others'.
        """
        nothing = replace(self, label=None, reference=None, dense={}, sparse={}, domain=None, weight=None)
        parts = {"data.label": replace(nothing, label=self.label)} if self.label else {}
        parts |= {"data.reference": replace(nothing, reference=self.reference)} if self.reference else {}
        parts |= {"data.domain": replace(nothing, domain=self.domain)} if self.domain else {}
        parts |= {"data.weight": replace(nothing, weight=self.weight)} if self.weight else {}
        parts |= {f"features.sparse.{name}": replace(nothing, sparse={name: it}) for name, it in self.sparse.items()}
        return parts | {f"features.dense.{name}": replace(nothing, dense={name: it}) for name, it in self.dense.items()}

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The vocabulary of each sparse feature that has one."""
        return {name: spec.ids.vocabulary for name, spec in self.sparse.items() if isinstance(spec.ids, VocabularyIds)}

    def dictionary_paths(self, schema: pq.ParquetSchema) -> list[str]:
        """The columns of a file's that are best read as dictionaries: strings of which each distinct one is mapped."""
        names = [spec.column for spec in self.sparse.values() if isinstance(spec.ids, HashedIds | VocabularyIds)]
        leaves = [schema.column(index) for index in range(len(schema))]
        return [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY" and any(f"{leaf.path}.".startswith(f"{name}.") for name in names)
        ]

    @property
    def counted(self) -> tuple[tuple[str, str], ...]:
        """Kind and feature of all that may be counted; empty where every value is taken as it is, or refused."""
        counted = [(kind, name) for name, spec in self.sparse.items() for kind in spec.ids.kinds]
        counted += [("cut", name) for name, spec in self.sparse.items() if spec.max_length is not None]
        counted += [("not_finite", name) for name, spec in self.dense.items() if spec.not_finite == "fill"]
        return (*counted, *([("skipped", LABEL)] if self.label_null == "skip" else []))

    def layout(self, lists: frozenset[str]) -> SparseLayout:
        """The layout of rows in which the named features have lists."""
        return SparseLayout(tuple(self.sparse), lists, any(spec.weights for spec in self.sparse.values()))

    def check_schema(self, schema: pa.Schema, file: str) -> frozenset[str]:
        """Refuse a file whose columns cannot be read as what they are for; the sparse features that it has lists of.

        Raises:
            DataError: a column is missing, twice there, or of another type.
        """
        _check_names(schema, self.names, file, "file")
        for name, role in ((self.reference, "reference"), (self.weight, "weight")):
            if name and not is_number(kind := schema.field(name).type):
                raise _wrong_type(file, name, role, kind, "numbers")
        if self.domain and not is_integer(kind := schema.field(self.domain.column).type):
            raise _wrong_type(file, self.domain.column, "domain", kind, "integers")
        if self._label:
            try:
                kind = self._label.evaluate(schema.empty_table()).type
            except pa.ArrowException as error:
                cause = str(error).splitlines()[0]
                raise DataError(f"{file}: label {self.label!r} cannot be computed: {cause}") from None
            if not is_number(kind):
                raise _wrong_type(file, self._label.text, "label", kind, "numbers")
        return self.check_features(schema, file)

    def check_features(self, schema: pa.Schema, source: str) -> frozenset[str]:
        """As `check_schema`, of the features' columns alone; `source` is what has the schema, for messages."""
        _check_names(schema, self.feature_names, source, "table")
        for name, dense in self.dense.items():
            if not is_number(kind := schema.field(dense.column).type):
                raise _wrong_type(source, dense.column, f"dense feature {name}", kind, "numbers")
        for name, spec in self.sparse.items():
            kind = schema.field(spec.column).type
            if not spec.ids.accepts(value_type(kind)):
                hashed = isinstance(spec.ids, PlainIds) and HashedIds().accepts(value_type(kind))
                hint = (
                    f", which needs features.sparse.{name}.ids: {{type: hash}} or a vocabulary; without,"
                    if hashed
                    else ";"
                )
                raise _wrong_type(source, spec.column, f"sparse feature {name}", kind, spec.ids.wanted, hint)
            if spec.weights is None:
                continue
            weights = schema.field(spec.weights).type
            if not (is_list(weights) and is_list(kind) and is_number(weights.value_type)):
                raise DataError(
                    f"{source}: sparse feature {name} has ids of type {kind} (column {spec.column!r}) and weights of "
                    f"type {weights} (column {spec.weights!r}); lists of ids and lists of numbers are needed"
                )
        return frozenset(name for name, spec in self.sparse.items() if is_list(schema.field(spec.column).type))

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
                or weight that is not finite, a negative weight.
        """
        table = table.combine_chunks()
        rows = self.decode_features(table, layout, where, order)
        labels = self._labels(self._label, table, where) if self._label else np.empty(0, np.float32)
        reference = np.empty(0)
        if self.reference:
            reference = _numbers(table, self.reference, None, where).astype(np.float64)
            if not ((reference >= 0) & (reference <= 1)).all():
                raise DataError(f"{where}: reference column {self.reference!r} has values outside 0..1")
        domain = _domains(table, self.domain, where) if self.domain else np.empty(0, np.int64)
        weight = _weights(table, self.weight, where) if self.weight else np.empty(0, np.float32)
        counts = dict(rows.counts)
        if order is not None:
            labels = labels[order] if self._label else labels
            reference = reference[order] if self.reference else reference
            domain = domain[order] if self.domain else domain
            weight = weight[order] if self.weight else weight
        if self.label_null == "skip" and (missing := np.isnan(labels)).any():
            counts["skipped", LABEL] = missing.astype(np.int32)
        return replace(rows, labels=labels, reference=reference, domain=domain, weight=weight, counts=counts)

    def decode_features(
        self, table: pa.Table, layout: SparseLayout, where: str, order: NDArray[np.int64] | None = None
    ) -> Rows:
        """As `decode`, of the features alone: rows without label, reference, domain and weight.

        Args:
            table: of a schema that `check_features` accepts; need not come from a file.
            layout: which features have lists.
            where: what the table is, for messages.
            order: as for `decode`.

        Raises:
            DataError: a null where none may be, an id out of range, a dense value that is not finite.
        """
        table = table.combine_chunks()
        counts: dict[tuple[str, str], NDArray[np.int32]] = {}
        single = np.empty((len(layout.single), len(table)), self._id_type)
        has_empty = False
        for target, name in zip(single, layout.single, strict=True):
            ids = _ids(table, name, self.sparse[name], where, counts)
            has_empty |= bool(ids.min(initial=0) < 0)
            _place(ids, order, target)
        lists = tuple(
            _id_lists(table, name, self.sparse[name], self._id_type, where, counts)
            for name in layout.keys
            if name in layout.lists
        )
        dense = self._dense(table, where, order, counts)
        if order is not None:
            lists = tuple(jagged.take(order) for jagged in lists)
            counts = {key: happened[order] for key, happened in counts.items()}
        return Rows(
            labels=np.empty(0, np.float32),
            reference=np.empty(0),
            domain=np.empty(0, np.int64),
            dense=dense,
            single=single,
            lists=lists,
            counts=counts,
            has_empty=has_empty,
        )

    @cached_property
    def _label(self) -> Expression | None:
        return parse_expression(self.label, source="data.label") if self.label else None

    def _labels(self, label: Expression, table: pa.Table, where: str) -> NDArray[np.float32]:
        """(N,) of 0 and 1, and NaN for rows to skip."""
        column = label.evaluate(table)
        if column.null_count:
            if self.label_null == "error":
                raise DataError(
                    f"{where}: label column {self.label!r} has {column.null_count} nulls; set data.label_null to skip, "
                    "or leave such rows out when the shards are written"
                )
            column = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan)
        labels: NDArray[Any] = column.to_numpy()
        wrong = (labels != 0) & (labels != 1)
        if self.label_null == "skip" and labels.dtype.kind == "f":
            wrong &= ~np.isnan(labels)
        if wrong.any():
            raise DataError(
                f"{where}: label column {self.label!r} has {count(wrong)} other than 0 and 1, "
                f"such as {labels[wrong][0]}; make it binary by an expression, such as `{self.label} >= 4`, "
                "or when the shards are written"
            )
        return labels.astype(np.float32)

    def _dense(
        self, table: pa.Table, where: str, order: NDArray[np.int64] | None, counts: Counts
    ) -> NDArray[np.float32]:
        columns = np.empty((len(self.dense), len(table)), np.float32)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is not finite is refused below
            for target, (name, spec) in zip(columns, self.dense.items(), strict=True):
                values = _numbers(table, spec.column, spec.fill, where)
                _place(_transformed(values, name, spec, where, counts), order, target)
                _check_finite(target, name, spec, where, " in float32" + " after log1p" * spec.log1p)
        return columns

    @cached_property
    def _id_type(self) -> type[np.int32 | np.int64]:
        """Narrow where it can be: ids are shuffled in memory, and half the bytes fit the cache twice as well."""
        largest = max((spec.num_embeddings for spec in self.sparse.values()), default=0)
        return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


def _numbers(table: pa.Table, name: str, fill: float | None, where: str) -> NDArray[Any]:
    column = whole(table, name)
    if column.null_count:
        if fill is None:
            raise DataError(
                f"{where}: column {name!r} has {column.null_count} nulls; "
                "give a dense feature a fill, or leave such rows out when the shards are written"
            )
        if not _holds(column.type, fill):
            column = column.cast(pa.float64(), safe=False)  # large integers are rounded
        return filled(column, fill)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)  # only booleans are copied
    return values


def _holds(kind: pa.DataType, value: float) -> bool:
    """Whether a value of a type can be just this number."""
    if pa.types.is_float32(kind):
        return bool(np.float32(value) == value)
    if not is_integer(kind):
        return False
    limits = np.iinfo(kind.to_pandas_dtype())
    return value.is_integer() and bool(limits.min <= value <= limits.max)


def _transformed(values: NDArray[Any], name: str, spec: DenseColumn, where: str, counts: Counts) -> NDArray[Any]:
    """A dense feature from its column's values, nulls filled."""
    if spec.not_finite == "fill":
        wrong = ~np.isfinite(values.astype(np.float32, copy=False))
        if wrong.any():
            counts["not_finite", name] = wrong.astype(np.int32)
            values = np.where(wrong, np.float64(spec.fill), values)  # the config asks for a fill
    if spec.clip is not None:
        _check_finite(values, name, spec, where, "")  # which clipping would hide
        values = np.clip(values.astype(np.float64), *spec.clip)
    if spec.log1p:
        values = np.log1p(values, dtype=np.float64)
    if spec.standardize is not None:
        mean, deviation = spec.standardize
        values = (values.astype(np.float64) - mean) / deviation
    return values


def _check_finite(values: NDArray[Any], name: str, spec: DenseColumn, where: str, how: str) -> None:
    if (wrong := ~np.isfinite(values)).any():
        raise DataError(
            f"{where}: dense feature {name} (column {spec.column!r}) has {count(wrong)} NaN or infinite{how}; "
            "write nulls and give the feature a fill, or set its not_finite to fill"
        )


def _domains(table: pa.Table, spec: DomainColumn, where: str) -> NDArray[np.int64]:
    column = whole(table, spec.column)
    if column.null_count:
        raise DataError(
            f"{where}: domain column {spec.column!r} has {column.null_count} nulls; "
            "give rows of no known domain a number of their own when the shards are written"
        )
    values: NDArray[Any] = column.to_numpy()
    if (wrong := (values < 0) | (values >= spec.num_domains)).any():
        raise DataError(
            f"{where}: domain column {spec.column!r} has {count(wrong)} out of range, such as {values[wrong][0]}; "
            f"there are domains 0..{spec.num_domains - 1}: raise data.domain.num_domains or map them when the shards "
            "are written"
        )
    return values.astype(np.int64, copy=False)


def _weights(table: pa.Table, name: str, where: str) -> NDArray[np.float32]:
    given = _numbers(table, name, None, where)
    with np.errstate(over="ignore"):
        weights = given.astype(np.float32)
    if (wrong := ~(np.isfinite(weights) & (weights >= 0))).any():
        raise DataError(
            f"{where}: weight column {name!r} has {count(wrong)} negative or not finite, such as {given[wrong][0]}"
        )
    return weights


def _ids(table: pa.Table, name: str, spec: SparseColumn, where: str, counts: Counts) -> NDArray[Any]:
    """Ids of a column of single ones, -1 for nulls."""
    ids, counted = spec.ids.map(whole(table, spec.column), spec.num_embeddings, _what(name, spec, where))
    for kind, mask in counted.items():
        counts[kind, name] = mask.astype(np.int32)
    return ids


def _id_lists(
    table: pa.Table, name: str, spec: SparseColumn, id_type: type[np.int32 | np.int64], where: str, counts: Counts
) -> Jagged:
    """Ids of a column of lists, or of single ones in a file of its own kind; a null is an empty list."""
    array, what = whole(table, spec.column), _what(name, spec, where)
    if is_list(array.type):
        lengths, values = flat(array)
    else:
        lengths, values = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64), array.drop_null()
    weights = _list_weights(table, spec.weights, lengths, what) if spec.weights else None
    if spec.max_length is not None and (lengths > spec.max_length).any():
        kept = np.minimum(lengths, spec.max_length)
        counts["cut", name] = (lengths - kept).astype(np.int32)
        starts = offsets_of(lengths)[:-1] + (lengths - kept if spec.keep == "last" else 0)
        index = np.arange(kept.sum()) + np.repeat(starts - offsets_of(kept)[:-1], kept)
        lengths, values, weights = kept, values.take(pa.array(index)), None if weights is None else weights[index]
    if values.null_count:
        raise DataError(
            f"{what} has {values.null_count} nulls inside lists; leave them out when the shards are written"
        )
    ids, counted = spec.ids.map(values, spec.num_embeddings, what)
    offsets = offsets_of(lengths)
    for kind, mask in counted.items():
        counts[kind, name] = np.diff(offsets_of(mask)[offsets]).astype(np.int32)
    return Jagged(ids.astype(id_type, copy=False), offsets, weights)


def _place(values: NDArray[Any], order: NDArray[np.int64] | None, target: NDArray[Any]) -> None:
    """Write values, in an order, into an array of a type that holds them."""
    if order is None:
        target[:] = values
    else:
        # All of `order` is in range; "clip" spares the copy that the check of it would make of `out`.
        np.take(values.astype(target.dtype, copy=False), order, out=target, mode="clip")


def _list_weights(table: pa.Table, name: str, lengths: NDArray[np.int64], what: str) -> NDArray[np.float32]:
    found, values = flat(whole(table, name))
    if (wrong := found != lengths).any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{what} has {int(wrong.sum())} lists whose weights (column {name!r}) are not as many: row {row} has "
            f"{lengths[row]} ids and {found[row]} weights; mend them when the shards are written"
        )
    weights: NDArray[np.float32] = values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    if (wrong := ~np.isfinite(weights)).any():  # nulls became NaN
        raise DataError(f"{what} has {count(wrong)} null, NaN or infinite among its weights (column {name!r})")
    return weights


def _what(name: str, spec: SparseColumn, where: str) -> str:
    return f"{where}: sparse feature {name} (column {spec.column!r})"


def _check_names(schema: pa.Schema, names: list[str], source: str, holder: str) -> None:
    for name in names:
        found = schema.names.count(name)
        if found == 0:
            raise DataError(f"{source}: no column {name!r}; the {holder} has {', '.join(schema.names)}")
        if found > 1:
            raise DataError(f"{source}: {found} columns are named {name!r}; rename all but one")


def _wrong_type(source: str, column: str, role: str, kind: pa.DataType, wanted: str, hint: str = ";") -> DataError:
    return DataError(f"{source}: column {column!r} ({role}) has type {kind}{hint} {wanted} are needed")
