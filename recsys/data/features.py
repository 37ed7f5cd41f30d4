"""From the columns of a table to checked rows: what each feature reads, of which types, and what becomes of it.

Training, evaluation and serving go through `Columns.decode_features`, so that a row has the same features in each.
Neither torch nor TorchRec is needed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.config import Config, ConfigError, DenseFeatureConfig, DomainConfig, SparseFeatureConfig
from recsys.data.applied import AppliedIds, check_mark
from recsys.data.arrow import (
    filled,
    flat,
    floats,
    holds,
    is_integer,
    is_list,
    is_number,
    is_string,
    plain,
    raised,
    usual,
    usual_type,
    value_type,
)
from recsys.data.comparing import among
from recsys.data.hashing import hash_ids
from recsys.data.ids import HashedIds, IdMapping, PlainIds, VocabularyIds, build_ids, check_rows, count, listed
from recsys.data.labels import Expression, parse_expression
from recsys.data.rows import Counts, Jagged, Rows, SparseLayout, offsets_of
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary, load_vocabularies

LABEL = "label"
"""What the label is called where things are counted by feature."""


class SparseColumn(NamedTuple):
    """A sparse feature.

    Attributes:
        settings: of what is read.
        ids: how the values that are read become rows of the table.
        applied: how raw values became those, where a converter mapped them.
    """

    settings: SparseFeatureConfig
    ids: IdMapping
    applied: AppliedIds | None = None


class RowOrder(Protocol):
    """An order to put rows into while they are decoded."""

    def place(self, values: NDArray[Any], target: NDArray[Any]) -> None:
        """Write one value for each row, in this order, into an array of a type that holds them."""

    def lists(self, jagged: Jagged) -> Jagged:
        """The rows' lists in this order."""


class FileOrder:
    """Rows as they stand."""

    def place(self, values: NDArray[Any], target: NDArray[Any]) -> None:
        """As `RowOrder`."""
        target[:] = values

    def lists(self, jagged: Jagged) -> Jagged:
        """As `RowOrder`."""
        return jagged


AS_THEY_STAND = FileOrder()


@dataclass(frozen=True)
class Columns:
    """What to read of each row.

    Attributes:
        label: a column of 0 and 1 (integer, boolean or floating), or an expression, see `recsys.data.labels`; None
            where rows have none.
        reference: a column of probabilities without nulls, or None.
        dense: by feature name.
        sparse: by feature name.
        domain: an integer column of each row's domain, or None.
        label_null: whether rows of no label are refused, or left out of the batch.
        weight: a column of weights of the rows in the loss, finite and not negative, or None.
        vocabularies: of each feature that has one, whether or not what is read is mapped by it.
    """

    label: str | None
    reference: str | None
    dense: Mapping[str, DenseFeatureConfig]
    sparse: Mapping[str, SparseColumn]
    domain: DomainConfig | None = None
    label_null: Literal["error", "skip"] = "error"
    weight: str | None = None
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every column once."""
        names = [*(self._label.columns if self._label else ()), *([self.reference] if self.reference else ())]
        names += [self.domain.column] if self.domain else []
        names += [self.weight] if self.weight else []
        return tuple(dict.fromkeys((*names, *self.feature_names)))

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Every column that a feature reads, once."""
        names = [dense.column or name for name, dense in self.dense.items()]
        names += [sparse.settings.column or name for name, sparse in self.sparse.items()]
        weights = [sparse.settings.weights for sparse in self.sparse.values() if sparse.settings.weights]
        return tuple(dict.fromkeys(names + weights))

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

    @cached_property
    def dictionary_names(self) -> tuple[str, ...]:
        """The columns whose strings are best read as dictionaries: each distinct one is mapped once."""
        return tuple(
            sparse.settings.column or name
            for name, sparse in self.sparse.items()
            if isinstance(sparse.ids, HashedIds | VocabularyIds) and sparse.settings.list_text is None
        )

    @property
    def counted(self) -> tuple[tuple[str, str], ...]:
        """Kind and feature of all that may be counted; empty where every value is taken as it is, or refused."""
        counted = [(kind, name) for name, sparse in self.sparse.items() for kind in sparse.ids.kinds]
        counted += [("cut", name) for name, sparse in self.sparse.items() if sparse.settings.max_length is not None]
        counted += [("not_finite", name) for name, dense in self.dense.items() if dense.not_finite == "fill"]
        return (*counted, *([("skipped", LABEL)] if self.label_null == "skip" else []))

    def layout(self, lists: frozenset[str]) -> SparseLayout:
        """The layout of rows in which the named features have lists."""
        weighted = any(sparse.settings.weights for sparse in self.sparse.values())
        largest = max((sparse.ids.num_rows for sparse in self.sparse.values()), default=0)
        id_type = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
        return SparseLayout(tuple(self.sparse), lists, weighted, id_type)

    def check_schema(self, schema: pa.Schema, file: str) -> frozenset[str]:
        """Refuse a file whose columns cannot be read as what they are for; the sparse features that it has lists of.

        Raises:
            DataError: a column is missing, twice there, or of another type.
        """
        check_names(schema, self.names, file, "file")
        for name, role in ((self.reference, "reference"), (self.weight, "weight")):
            if name and not (is_number(kind := schema.field(name).type) or pa.types.is_null(kind)):
                raise _wrong_type(file, name, role, kind, "numbers")
        if self.domain:
            kind = usual_type(schema.field(self.domain.column).type)
            kind = value_type(kind) if pa.types.is_dictionary(kind) else kind
            of_integers, hashed = self.domain.is_of_integers, self.domain.hashed
            takes = ((of_integers or hashed) and is_integer(kind)) or (not of_integers and is_string(kind))
            if not (takes or pa.types.is_null(kind)):
                wanted = "integers" if of_integers else "integers or strings" if hashed else "strings"
                raise _wrong_type(file, self.domain.column, "domain", kind, wanted)
        if label := self._label:
            try:
                empty = {name: pa.array([], usual_type(schema.field(name).type)) for name in label.columns}
                kind = label.evaluate(empty).type
            except pa.ArrowException as error:
                raise _no_label(file, label, error) from None
            if not (is_number(kind) or pa.types.is_null(kind)):
                example = f", such as `{label.text} == 'yes'`," if is_string(value_type(kind)) else ""
                raise DataError(
                    f"{file}: column {label.text!r} (label) has type {kind}; numbers are needed: make it 0 and 1 by an "
                    f"expression{example} or when the shards are written"
                )
        return self.check_features(schema, file)

    def check_features(self, schema: pa.Schema, source: str) -> frozenset[str]:
        """As `check_schema`, of the features' columns alone; `source` is what has the schema, for messages."""
        check_names(schema, self.feature_names, source, "table")
        for name, dense in self.dense.items():
            column = dense.column or name
            if not (is_number(kind := schema.field(column).type) or pa.types.is_null(kind)):
                raise _wrong_type(source, column, f"dense feature {name}", kind, "numbers")
        return frozenset(name for name in self.sparse if self._has_lists(name, schema, source))

    def _has_lists(self, name: str, schema: pa.Schema, source: str) -> bool:
        """Whether a sparse feature's column, which must be of a type that it takes, has lists."""
        settings, ids, applied = self.sparse[name]
        column = settings.column or name
        kind = usual_type(schema.field(column).type)
        text = settings.list_text if is_string(value_type(kind)) and not is_list(kind) else None
        items = (pa.string() if text.items == "strings" else pa.int64()) if text else value_type(kind)
        nothing = pa.types.is_null(items)
        check_mark(schema.field(column), source, f"features.sparse.{name}.ids", ids, applied)
        if not (ids.accepts(items) or nothing):
            hint = (
                f", which needs features.sparse.{name}.ids: {{type: hash}} or a vocabulary; without,"
                if isinstance(ids, PlainIds) and HashedIds(1).accepts(items)
                else ";"
            )
            raise _wrong_type(source, column, f"sparse feature {name}", kind, ids.wanted, hint)
        if settings.minimum is not None and not (is_number(items) or nothing):
            raise _wrong_type(source, column, f"sparse feature {name}, which has a minimum", kind, "numbers")
        if settings.weights is not None:
            weights = usual_type(schema.field(settings.weights).type)
            of_ids = is_list(kind) or text or pa.types.is_null(kind)
            of_numbers = is_list(weights) and (is_number(weights.value_type) or pa.types.is_null(weights.value_type))
            if not (of_ids and (of_numbers or pa.types.is_null(weights))):
                raise DataError(
                    f"{source}: sparse feature {name} has ids of type {kind} (column {column!r}) and weights of "
                    f"type {weights} (column {settings.weights!r}); lists of ids and lists of numbers are needed"
                )
        return is_list(kind) or text is not None or settings.weights is not None

    def decode(self, table: pa.Table, layout: SparseLayout, where: str, order: RowOrder = AS_THEY_STAND) -> Rows:
        """Check every value of a table and lay the rows out for batches.

        Args:
            table: of a schema that `check_schema` accepts.
            layout: which features have lists.
            where: file and row group, for messages.
            order: in which to put the rows. Each column is put into order right after it was checked, while it is in
                the cache.

        Raises:
            DataError: a label other than 0 or 1, a null where none may be, an id or domain out of range, a dense value
                or weight that is not finite, a negative weight.
        """
        decoding = _Decoding(self, table, layout, where, order)
        rows = decoding.features()
        return replace(
            rows,
            labels=decoding.labels(self._label, self.label_null) if self._label else rows.labels,
            reference=decoding.reference(self.reference) if self.reference else rows.reference,
            domain=decoding.domains(self.domain) if self.domain else rows.domain,
            weight=decoding.weights(self.weight) if self.weight else rows.weight,
            counts=decoding.counts,
        )

    def decode_features(self, table: pa.Table, layout: SparseLayout, where: str) -> Rows:
        """As `decode`, of the features alone: rows without label, reference, domain and weight.

        Args:
            table: of a schema that `check_features` accepts; need not come from a file.
            layout: which features have lists.
            where: what the table is, for messages.

        Raises:
            DataError: a null where none may be, an id out of range, a dense value that is not finite.
        """
        return _Decoding(self, table, layout, where, AS_THEY_STAND).features()

    @cached_property
    def _label(self) -> Expression | None:
        return parse_expression(self.label, source="data.label") if self.label else None


def build_columns(config: Config, vocabularies: Path | None = None, *, raw: bool = False) -> Columns:
    """What a config reads of each row.

    Args:
        config: the run's.
        vocabularies: a folder that `save_vocabularies` wrote, such as that of a checkpoint; None takes the files that
            the config names.
        raw: whether rows hold raw values, as those that a model is asked about do, even where the shards hold rows of
            tables already (`ids.applied`).

    Raises:
        ConfigError: the label is no expression, or a table has fewer rows than its ids need.
        DataError: a vocabulary cannot be read, or is not the one that was saved.
    """
    read = load_vocabularies(config, vocabularies)
    sparse = {}
    for name, feature in config.features.sparse.items():
        num_embeddings = config.tables[feature.table].num_embeddings
        of_raw = build_ids(feature, num_embeddings, read.get(name))
        if num_embeddings < of_raw.num_rows:
            raise ConfigError(
                f"tables.{feature.table}.num_embeddings: {num_embeddings} rows are too few for the ids of "
                f"features.sparse.{name}, which need {of_raw.num_rows}"
            )
        settings = feature if raw else feature.stored
        ids = of_raw if settings is feature else build_ids(settings, num_embeddings, None)
        applied = None if settings is feature else AppliedIds(of_raw, feature.minimum)
        sparse[name] = SparseColumn(settings, ids, applied)
    data = config.data
    return Columns(
        label=data.label,
        reference=data.reference,
        dense=config.features.dense,
        sparse=sparse,
        domain=data.domain,
        label_null=data.label_null,
        weight=data.weight,
        vocabularies=read,
    )


class _Decoding:
    """One slice of a row group on its way from Arrow to arrays.

    Args:
        columns: what is read.
        table: the slice.
        layout: which features have lists.
        where: file and row group, for messages.
        order: in which to put the rows.

    Attributes:
        arrays: each column in one piece.
        counts: what was cut, replaced or left out so far, in order.
    """

    def __init__(self, columns: Columns, table: pa.Table, layout: SparseLayout, where: str, order: RowOrder) -> None:
        self.columns, self.layout, self.where, self.order = columns, layout, where, order
        self.table = table = table.combine_chunks()
        self.arrays = {
            name: usual(chunks.chunk(0) if chunks.num_chunks else pa.array([], chunks.type))
            for name, chunks in zip(table.schema.names, table.columns, strict=True)
        }
        self.counts: Counts = {}

    def features(self) -> Rows:
        """The rows, with features alone."""
        columns, layout = self.columns, self.layout
        single = np.empty((len(layout.single), len(self.table)), layout.id_type)
        has_empty = False
        for target, name in zip(single, layout.single, strict=True):
            has_empty |= self.ids(name, target)
        lists = tuple(self.id_lists(name) for name in layout.keys if name in layout.lists)
        dense = np.empty((len(columns.dense), len(self.table)), np.float32)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is not finite is refused below
            for row, (name, settings) in zip(dense, columns.dense.items(), strict=True):
                self.dense(name, settings, row)
        return Rows(
            labels=np.empty(0, np.float32),
            reference=np.empty(0),
            domain=np.empty(0, np.int64),
            dense=dense,
            single=single,
            lists=lists,
            counts=self.counts,
            has_empty=has_empty,
        )

    def ids(self, name: str, target: NDArray[Any]) -> bool:
        """Write the ids of a column of single values, -1 for nulls; whether there are any of those."""
        settings, mapping, _ = self.columns.sparse[name]
        values, what = self.arrays[settings.column or name], self.what(name)
        if pa.types.is_null(values.type):
            target[:] = -1
            return True
        if settings.minimum is not None:
            values = raised(values, settings.minimum)
        ids, counted = mapping.map(values, what)
        for kind, mask in counted.items():
            self.count(kind, name, mask)
        has_empty = check_rows(ids, mapping, what)
        self.order.place(ids, target)
        return has_empty

    def id_lists(self, name: str) -> Jagged:
        """Ids of a column of lists, or of single ones in a file of its own kind; a null is an empty list."""
        settings, mapping, _ = self.columns.sparse[name]
        column = settings.column or name
        what = self.what(name)
        array = listed(self.arrays[column], settings.list_text, what)
        if is_list(array.type):
            lengths, values = flat(array)
        else:
            lengths, values = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64), array.drop_null()
        weights = self.list_weights(settings.weights, lengths, what) if settings.weights else None
        counts: Counts = {}
        if settings.max_length is not None and (lengths > settings.max_length).any():
            kept = np.minimum(lengths, settings.max_length)
            counts["cut", name] = (lengths - kept).astype(np.int32)
            starts = offsets_of(lengths)[:-1] + (lengths - kept if settings.keep == "last" else 0)
            index = np.arange(kept.sum()) + np.repeat(starts - offsets_of(kept)[:-1], kept)
            lengths, values, weights = kept, values.take(pa.array(index)), None if weights is None else weights[index]
        if values.null_count:
            raise DataError(
                f"{what} has {values.null_count} nulls inside lists; leave them out when the shards are written"
            )
        ids: NDArray[Any] = np.empty(0, self.layout.id_type)
        counted: Mapping[str, NDArray[np.bool_]] = {}
        if len(values):
            if settings.minimum is not None:
                values = raised(values, settings.minimum)
            ids, counted = mapping.map(values, what)
        offsets = offsets_of(lengths)
        for kind, mask in counted.items():
            counts[kind, name] = np.diff(offsets_of(mask)[offsets]).astype(np.int32)
        for (kind, _), happened in counts.items():
            self.count(kind, name, happened)
        if check_rows(ids, mapping, what):  # values that have no row
            present = ids >= 0
            offsets, ids = offsets_of(present)[offsets], ids[present]
            weights = None if weights is None else weights[present]
        jagged = Jagged(ids.astype(self.layout.id_type, copy=False), offsets, weights)
        return self.order.lists(jagged)

    def what(self, name: str) -> str:
        """A sparse feature and its place, for messages."""
        return f"{self.where}: sparse feature {name} (column {self.columns.sparse[name].settings.column or name!r})"

    def dense(self, name: str, settings: DenseFeatureConfig, target: NDArray[np.float32]) -> None:
        """Write a dense feature's values, transformed."""
        column = settings.column or name
        what = f"{self.where}: dense feature {name} (column {column!r})"
        values = self.numbers(column, settings.fill, "give a dense feature a fill", settings.minimum)
        if settings.not_finite == "fill":
            wrong = ~np.isfinite(values.astype(np.float32, copy=False))
            if wrong.any():
                self.count("not_finite", name, wrong)
                values = np.where(wrong, np.float64(settings.fill), values)  # the config asks for a fill
        if settings.clip is not None:
            _check_finite(values, what, "")  # which clipping would hide
            values = np.clip(values.astype(np.float64), *settings.clip)
        if settings.log1p:
            values = np.log1p(values, dtype=np.float64)
        if settings.standardize is not None:
            values = (values.astype(np.float64) - settings.standardize.mean) / settings.standardize.std
        self.order.place(values, target)
        _check_finite(target, what, " in float32" + " after log1p" * settings.log1p)

    def labels(self, label: Expression, label_null: Literal["error", "skip"]) -> NDArray[np.float32]:
        """(N,) of 0 and 1, and NaN for rows to skip."""
        try:
            column = label.evaluate(self.arrays)
        except pa.ArrowException as error:
            raise _no_label(self.where, label, error) from None
        what = f"{self.where}: label column {label.text!r}"
        if column.null_count and label_null == "error":
            raise DataError(
                f"{what} has {column.null_count} nulls; set data.label_null to skip, or leave such rows out when the "
                "shards are written"
            )
        found = filled(floats(column).cast(pa.float64(), safe=False), np.nan)
        wrong = (found != 0) & (found != 1)
        if pa.types.is_decimal(column.type):  # of which others are as near to 0 and 1 in float64
            wrong = ~filled(among(column, [0, 1]).cast(pa.int8()), 1).astype(bool) | np.isnan(found)
        missing = np.isnan(found)
        if label_null == "skip":
            wrong &= ~missing
        elif missing.any():
            raise DataError(
                f"{what} has {count(missing)} NaN; set data.label_null to skip, or leave such rows out when the shards "
                "are written"
            )
        if wrong.any():
            raise DataError(
                f"{what} has {count(wrong)} other than 0 and 1, such as {column[int(np.argmax(wrong))].as_py()}; make "
                f"it binary by an expression, such as `{label.text} >= 4`, or when the shards are written"
            )
        if missing.any():
            self.count("skipped", LABEL, missing)
        return self.ordered(found, np.float32)

    def reference(self, name: str) -> NDArray[np.float64]:
        """(N,) probabilities."""
        way_out = "write a probability, or leave data.reference out"
        values = self.numbers(name, None, way_out).astype(np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(f"{self.where}: reference column {name!r} has values outside 0..1")
        return self.ordered(values, np.float64)

    def domains(self, domain: DomainConfig) -> NDArray[np.int64]:
        """(N,) numbers of domains; rows of none have the number behind theirs, if the config has that."""
        column = plain(self.arrays[domain.column])
        what = f"{self.where}: domain column {domain.column!r}"
        if column.null_count and domain.unseen == "error":
            raise DataError(
                f"{what} has {column.null_count} nulls; give rows of no known domain a number of their own when the "
                "shards are written, or set data.domain.unseen to backbone"
            )
        numbers = _domain_numbers(column, domain)
        if (unknown := numbers < 0).any():
            if domain.unseen == "error":
                there = f"domains 0..{domain.num_domains - 1}: raise data.domain.num_domains,"
                if domain.values is not None:
                    there = f"{domain.num_domains} data.domain.values: add it,"
                example = column[int(np.argmax(unknown))].as_py()
                raise DataError(
                    f"{what} has {count(unknown)} out of range, such as {example}; there are {there} set "
                    "data.domain.unseen to backbone, or map them when the shards are written"
                )
            numbers = np.where(unknown, domain.num_domains, numbers)
        return self.ordered(numbers, np.int64)

    def weights(self, name: str) -> NDArray[np.float32]:
        """(N,) weights of the rows in the loss."""
        given = self.numbers(name, None, "write a weight, such as 0 for rows that shall not count")
        with np.errstate(over="ignore"):
            weights = given.astype(np.float32)
        if (wrong := ~(np.isfinite(weights) & (weights >= 0))).any():
            raise DataError(
                f"{self.where}: weight column {name!r} has {count(wrong)} negative or not finite, such as "
                f"{given[wrong][0]}"
            )
        return self.ordered(weights, np.float32)

    def list_weights(self, name: str, lengths: NDArray[np.int64], what: str) -> NDArray[np.float32]:
        """A weight for each id of lists of the given lengths."""
        found, values = flat(self.arrays[name])
        if (wrong := found != lengths).any():
            first = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{what} has {int(wrong.sum())} lists whose weights (column {name!r}) are not as many: the first has "
                f"{lengths[first]} ids and {found[first]} weights; mend them when the shards are written"
            )
        weights: NDArray[np.float32] = floats(values).cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        if (wrong := ~np.isfinite(weights)).any():  # nulls became NaN
            raise DataError(f"{what} has {count(wrong)} null, NaN or infinite among its weights (column {name!r})")
        return weights

    def numbers(self, name: str, fill: float | None, way_out: str, minimum: float | None = None) -> NDArray[Any]:
        """A column of numbers, those below a minimum raised to it, nulls filled, or refused with a way out."""
        column = floats(self.arrays[name])
        if minimum is not None:
            column = raised(column, minimum)
        if column.null_count:
            if fill is None:
                raise DataError(
                    f"{self.where}: column {name!r} has {column.null_count} nulls; {way_out}, or leave such rows out "
                    "when the shards are written"
                )
            if not holds(column.type, fill):
                column = column.cast(pa.float64(), safe=False)  # large integers are rounded
            return filled(column, fill)
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)  # only booleans are copied
        return values

    def ordered(self, values: NDArray[Any], kind: type[Any]) -> NDArray[Any]:
        """One value for each row, in order, of a type that holds them."""
        target = np.empty(len(values), kind)
        self.order.place(values, target)
        return target

    def count(self, kind: str, name: str, happened: NDArray[Any]) -> None:
        """Note how often something happened in each row."""
        self.counts[kind, name] = self.ordered(happened, np.int32)


def _check_finite(values: NDArray[Any], what: str, how: str) -> None:
    if (wrong := ~np.isfinite(values)).any():
        raise DataError(
            f"{what} has {count(wrong)} NaN or infinite{how}; write nulls and give the feature a fill, or set its "
            "not_finite to fill"
        )


def check_names(schema: pa.Schema, names: Iterable[str], source: str, holder: str) -> None:
    """Refuse what has not each of some columns once.

    Args:
        schema: what is looked at.
        names: of the columns.
        source: what has the schema, for messages.
        holder: what that is called.

    Raises:
        DataError: a column is missing, or there more than once.
    """
    for name in names:
        found = schema.names.count(name)
        if found == 0:
            raise DataError(f"{source}: no column {name!r}; the {holder} has {', '.join(schema.names)}")
        if found > 1:
            raise DataError(f"{source}: {found} columns are named {name!r}; rename all but one")


def _wrong_type(source: str, column: str, role: str, kind: pa.DataType, wanted: str, hint: str = ";") -> DataError:
    needed = f"{wanted} are needed; cast it when the shards are written"
    return DataError(f"{source}: column {column!r} ({role}) has type {kind}{hint} {needed}")


def _no_label(where: str, label: Expression, error: pa.ArrowException) -> DataError:
    cause = str(error).splitlines()[0]
    return DataError(
        f"{where}: label {label.text!r} cannot be computed: {cause}; compare like with like, or cast columns when the "
        "shards are written"
    )


def _domain_numbers(column: pa.Array, domain: DomainConfig) -> NDArray[np.int64]:
    """(N,) numbers of domains, -1 where a value, or null, is of none."""
    if pa.types.is_null(column.type):
        return np.full(len(column), -1, np.int64)
    if domain.hashed:
        return hash_ids(column, domain.num_domains).astype(np.int64)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if is_string(column.type):
        places = pc.index_in(column.cast(pa.large_string()), value_set=pa.array(domain.values, pa.large_string()))
        return filled(places, -1).astype(np.int64)
    given = filled(column, 0)
    inside = valid & (given <= np.iinfo(np.int64).max)
    given = given.astype(np.int64)
    if domain.values is None:
        return np.where(inside & (given >= 0) & (given < domain.num_domains), given, -1)
    values = np.array(domain.values, np.int64)
    order = np.argsort(values)
    places = order[np.searchsorted(values, given, sorter=order).clip(max=len(values) - 1)]
    return np.where(inside & (values[places] == given), places, -1)
