"""Test vectors of an artefact: raw values and rows, with what becomes of them, for whoever writes a client."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.config import DenseFeatureConfig
from recsys.data.arrow import is_integer, is_list, is_string, usual, value_type, whole
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import BucketizedIds, DatetimeIds, HashedIds, IdMapping, PlainIds, VocabularyIds
from recsys.data.parquet import ShardTables
from recsys.serving.schema import RawTypes, accepted_numbers
from recsys.serving.scorer import Scorer, probabilities

VECTORS = "vectors.json"
_ROWS = 36
_HELD = 8
_TEXTS = ("", "a", "7", "no such value", "Ä é 漢字", "long " * 60)
_INTEGERS = (0, 7, -1, 2**62 + 1, 2**63 - 1, -(2**63))
_SECONDS = (0, -1, 86_399, 951_782_400, 1_711_846_799, 1_711_846_800, 2_153_692_800, 4_107_542_400)
"""Ends of days and years, of a February that had a 29th, of a summer time; after 2037, from which rules alone tell."""


def vectors(scorer: Scorer, columns: Columns, types: RawTypes, shards: ShardTables) -> dict[str, Any]:
    """What `vectors.json` holds.

    Args:
        scorer: of the artefact.
        columns: of its raw rows.
        types: of its raw columns.
        shards: rows that are held out. Columns that they do not have raw get values that are made up.

    Returns:
        `sparse`: by feature, values of its column and, of each, the rows of the table, with weights where it has some;
        `dense`: by feature, values and what becomes of them; `rows`: whole rows with logit and probability.
    """
    held = _held_out(columns, types, shards)
    table = _whole_rows(columns, types, held)
    logits = scorer.logits_of(table, "test vectors")
    found = probabilities(logits, "test vectors")
    scored = zip(map(_as_json, table.to_pylist()), logits.tolist(), found.tolist(), strict=True)
    return {
        "sparse": {name: _of_sparse(name, columns, types, held) for name in columns.sparse},
        "dense": {name: _of_dense(name, columns, types, held) for name in columns.dense},
        "rows": [{"row": row, "logit": logit, "probability": probability} for row, logit, probability in scored],
    }


def _held_out(columns: Columns, types: RawTypes, shards: ShardTables) -> pa.Table:
    """The first rows of the raw columns that shards have, without those that JSON has no number for."""
    applied = {
        sparse.settings.column or name
        for name, sparse in columns.sparse.items()
        if sparse.settings.ids is not None and sparse.settings.ids.applied
    }
    listed = {sparse.settings.column or name for name, sparse in columns.sparse.items() if sparse.settings.list_text}
    parsed = {name for name in listed if not all(is_string(schema.field(name).type) for schema in shards.schemas)}
    names = [name for name in types if name not in applied | parsed]
    if not names:
        return pa.table({"": pa.nulls(_ROWS)}).select([])
    pieces: list[pa.Table] = []
    for group in range(len(shards.row_counts)):
        if sum(map(len, pieces)) >= _ROWS:
            break
        table = shards.table(group, names).slice(0, _ROWS)
        arrays = {name: usual(whole(table, name)).cast(types[name][0], safe=False) for name in names}
        pieces.append(pa.table(arrays))
    table = pa.concat_tables(pieces).slice(0, _ROWS)
    return table.filter(pa.array([_is_json(row) for row in table.to_pylist()], pa.bool_()))


def _whole_rows(columns: Columns, types: RawTypes, held: pa.Table) -> pa.Table:
    """Rows of all raw columns."""
    arrays: dict[str, pa.Array] = {name: whole(held, name) for name in held.column_names}
    for name, sparse in columns.sparse.items():
        column = sparse.settings.column or name
        if column in arrays:
            continue
        kind = types[column][0]
        if sparse.settings.weights is not None:  # as many ids as there are weights
            items = cycle(_examples(sparse, value_type(kind)))
            lists = [list(islice(items, len(row or ()))) for row in arrays[sparse.settings.weights].to_pylist()]
            values = _listed(lists, sparse)
        else:
            values = list(islice(cycle(_values(sparse, kind, [])), len(held)))
        arrays[column] = pa.array(values, kind)
    return pa.table({name: arrays[name] for name in types})


def _of_sparse(name: str, columns: Columns, types: RawTypes, held: pa.Table) -> dict[str, Any]:
    sparse, part = columns.sparse[name], columns.parts[f"features.sparse.{name}"]
    column, weights = sparse.settings.column or name, sparse.settings.weights
    told: dict[str, Any] = {"column": column, "values": [], "rows": []}
    told |= {"weights_column": weights, "weights": [], "row_weights": []} if weights else {}
    for kind in types[column]:
        values = _values(sparse, kind, _distinct(held, column) if weights is None else [])
        arrays = {column: pa.array(values, kind)}
        if weights:
            counts = [len(_items(value, sparse)) for value in values]
            given = [[0.5 + place / 4 for place in range(count)] for count in counts]
            arrays[weights] = pa.array(given, types[weights][0])
            told["weights"] += given
        table = pa.table(arrays)
        layout = part.layout(part.check_features(table.schema, "test vectors"))
        rows = part.decode_features(table, layout, "test vectors")
        told["values"] += [_as_json(value) for value in values]
        if not rows.lists:
            told["rows"] += [[row] if row >= 0 else [] for row in rows.single[0].tolist()]
            continue
        (jagged,) = rows.lists
        told["rows"] += [ids.tolist() for ids in np.split(jagged.values, jagged.offsets[1:-1])]
        if jagged.weights is not None:
            told["row_weights"] += [of.tolist() for of in np.split(jagged.weights, jagged.offsets[1:-1])]
    return told


def _of_dense(name: str, columns: Columns, types: RawTypes, held: pa.Table) -> dict[str, Any]:
    settings, part = columns.dense[name], columns.parts[f"features.dense.{name}"]
    column = settings.column or name
    kind = types[column][0]
    values = [*_distinct(held, column), *_numbers(settings, kind)]
    table = pa.table({column: pa.array(values, kind)})
    found = part.decode_features(table, part.layout(frozenset()), "test vectors").dense[0]
    return {"column": column, "values": values, "results": found.tolist()}


def _numbers(settings: DenseFeatureConfig, kind: pa.DataType) -> list[Any]:
    """Numbers at which something happens, among those that are accepted."""
    low, high, null = accepted_numbers(settings)
    nothing = [None] if null else []
    if pa.types.is_boolean(kind):
        return [False, True, *nothing]
    wanted = [0.0, 1.0, -1.0, 0.3, 1e6]
    for edge in (settings.minimum, *(settings.clip or ())):
        wanted += [] if edge is None else [edge, edge - 1, edge + 1]
    if is_integer(kind):
        wanted = [int(number) for number in wanted if _fits(int(number), kind)]
    return [*(number for number in dict.fromkeys(wanted) if low <= number <= high), *nothing]


def _values(sparse: SparseColumn, kind: pa.DataType, held: Sequence[Any]) -> list[Any]:
    """Values of a column: some that are held out, null, and those at which something happens."""
    examples = _examples(sparse, value_type(kind))
    if not is_list(kind) and sparse.settings.list_text is None:
        return [*held, *examples, None]
    longest = sparse.settings.max_length or 0
    lists = [[], examples[:1], examples[:3], examples, list(islice(cycle(examples), longest + 2))]
    return [*held, *_listed(lists, sparse), None]


def _listed(lists: Iterable[list[Any]], sparse: SparseColumn) -> list[Any]:
    """Lists as a column holds them: themselves, or in texts."""
    text = sparse.settings.list_text
    return list(lists) if text is None else [text.separator.join(map(str, values)) for values in lists]


def _items(value: Any, sparse: SparseColumn) -> list[Any]:
    """What `_listed` made a value of."""
    text = sparse.settings.list_text
    if text is None:
        return list(value or ())
    return value.split(text.separator) if value else []


def _examples(sparse: SparseColumn, kind: pa.DataType) -> list[Any]:
    """Values of a type, in no list, at which something happens."""
    settings, text = sparse.settings, sparse.settings.list_text
    if pa.types.is_boolean(kind):
        return [False, True]
    as_text = is_string(kind) and (text is None or text.items == "strings")
    if text is not None and not as_text:
        kind = pa.int64()
    found = _at_edges(sparse.ids, kind, is_text=as_text)
    if settings.minimum is not None and is_integer(kind):
        found = [value for value in found if value >= settings.minimum]
        found += [settings.minimum, settings.minimum - 1]
    if is_integer(kind):
        found = [value for value in found if _fits(value, kind)]
    if text is not None and as_text:
        found = [value for value in found if value and text.separator not in value]
    return list(dict.fromkeys(found)) or ["0"]


def _at_edges(ids: IdMapping, kind: pa.DataType, *, is_text: bool) -> list[Any]:
    match ids:
        case PlainIds(num_rows=rows, out_of_range=policy):
            return [0, rows - 1, *([] if policy == "error" else [rows, rows + 7, -1, 2**62])]
        case VocabularyIds(vocabulary=vocabulary):
            known = [*vocabulary.values.slice(0, 3).to_pylist(), *vocabulary.values[-1:].to_pylist()]
            return [*known, *(_TEXTS if is_text else _INTEGERS)]
        case HashedIds():
            return [*(_TEXTS if is_text else _INTEGERS)]
        case BucketizedIds(boundaries=boundaries):
            near = [number for edge in boundaries[:4] for number in (math.nextafter(edge, -math.inf), edge, edge + 1)]
            return [math.floor(number) for number in near] if is_integer(kind) else near
        case DatetimeIds():
            if is_integer(kind):
                return list(_SECONDS)
            moments = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=second) for second in _SECONDS]
            return [moment.date() for moment in moments] if pa.types.is_date(kind) else moments
    raise TypeError(f"{type(ids).__name__} is no mapping that test vectors know")


def _fits(number: int, kind: pa.DataType) -> bool:
    limits = np.iinfo(kind.to_pandas_dtype())
    return int(limits.min) <= number <= int(limits.max)


def _distinct(held: pa.Table, column: str) -> list[Any]:
    """A few of the values that are held out, without nulls, each once."""
    if column not in held.column_names:
        return []
    values = {repr(value): value for value in held[column].to_pylist() if value is not None}
    return list(values.values())[:_HELD]


def _as_json(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {name: _as_json(of) for name, of in value.items()}
    if isinstance(value, list):
        return [_as_json(of) for of in value]
    return value.isoformat() if isinstance(value, datetime | date) else value


def _is_json(value: Any) -> bool:
    """Whether JSON has a value: all but numbers that are not finite."""
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return not isinstance(value, float) or math.isfinite(value)
