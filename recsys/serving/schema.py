"""What rows must look like to be scored, for those who write them: as a JSON Schema of one row, and as Arrow's schema.

What the JSON Schema accepts is scored. It is somewhat narrower than `Scorer`, which also takes what JSON has no number
for and lists that are cut; docs/serving.md says what no JSON Schema can say.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import DenseFeatureConfig, DomainConfig, ListTextConfig
from recsys.data.arrow import is_integer, is_list, is_number, is_string, usual_type, value_type
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import LAST_SECOND, BucketizedIds, DatetimeIds, HashedIds, IdMapping, PlainIds, VocabularyIds

JSON_SCHEMA = "schema.json"
ARROW_SCHEMA = "schema.arrows"

RawTypes = Mapping[str, tuple[pa.DataType, ...]]
"""By column, the types of which one is that of raw values; more than one where nothing tells."""

MOMENT = pa.timestamp("us", "UTC")

_FLOAT32 = 3.4028234663852886e38
_INT64, _UINT64 = 2**63, 2**64
_EXACT = 2**53
"""Up to which float64 has every integer, and Arrow takes integers beside floating numbers in one list."""

_DAY_30, _DAY_31 = "(?:0[1-9]|[12][0-9]|30)", "(?:0[1-9]|[12][0-9]|3[01])"
_DATE = (
    f"(?!9999)(?:[1-9][0-9]{{3}}-(?:(?:0[13578]|1[02])-{_DAY_31}|(?:0[469]|11)-{_DAY_30}|02-(?:0[1-9]|1[0-9]|2[0-8]))|"
    "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_MOMENT = rf"{_DATE}T{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"


def raw_types(
    columns: Columns, stored: Iterable[pa.Schema], kinds: Mapping[str, str], lists: frozenset[str]
) -> dict[str, tuple[pa.DataType, ...]]:
    """The types of raw values, as far as shards tell them.

    Args:
        columns: of raw rows; the domain is one of them if they have one.
        stored: schemas of shards.
        kinds: what features hold, as `recsys.data.kinds.Kinds.as_dict` has it.
        lists: features that have lists.
    """
    stored = list({id(schema): schema for schema in stored}.values())

    def found(name: str) -> tuple[pa.DataType, ...]:
        types = [value_type(usual_type(schema.field(name).type)) for schema in stored if name in schema.names]
        return tuple({_widest(kind): None for kind in types if not pa.types.is_null(kind)})[:1]

    types = {name: found(name) or (pa.float64(),) for name in _dense_columns(columns)}
    for name, sparse in columns.sparse.items():
        settings = sparse.settings
        column = settings.column or name
        applied = settings.ids is not None and settings.ids.applied
        if settings.list_text is not None:
            types[column] = (pa.string(),)
        else:
            values = (() if applied else found(column)) or _of_mapping(sparse.ids, kinds.get(name))
            types[column] = tuple(pa.list_(kind) for kind in values) if name in lists else values
        if settings.weights is not None:
            types[settings.weights] = (pa.list_((found(settings.weights) or (pa.float64(),))[0]),)
    if columns.domain is not None:
        either = found(columns.domain.column) or (pa.string(), pa.int64())
        own = (pa.int64(),) if columns.domain.is_of_integers else either if columns.domain.hashed else (pa.string(),)
        types.setdefault(columns.domain.column, own)
        return {name: types[name] for name in dict.fromkeys((*columns.feature_names, columns.domain.column))}
    return {name: types[name] for name in columns.feature_names}


def arrow_schema(columns: Columns, types: RawTypes) -> pa.Schema:
    """Arrow's schema of rows: the first of each column's types, and whether there may be nulls."""
    refusing = {dense.column or name for name, dense in columns.dense.items() if not accepted_numbers(dense)[2]}
    refusing |= {columns.domain.column} if columns.domain and columns.domain.unseen == "error" else set()
    return pa.schema([pa.field(name, kinds[0], name not in refusing) for name, kinds in types.items()])


def json_schema(columns: Columns, types: RawTypes, title: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of one row, an object of the raw columns."""
    uses: dict[str, list[dict[str, Any]]] = {name: [] for name in types}
    if (domain := columns.domain) is not None:
        about = {"description": "domain, to which the model or its calibration adapts"}
        uses[domain.column].append({**about, **_domain(domain, types[domain.column])})
    for name, dense in columns.dense.items():
        column = dense.column or name
        uses[column].append({"description": f"dense feature {name}", **_number(dense, types[column][0])})
    for name, sparse in columns.sparse.items():
        settings = sparse.settings
        column = settings.column or name
        told = f"sparse feature {name}, table {settings.table}"
        uses[column].append({"description": told, **_ids(sparse, types[column])})
        if settings.weights is not None:
            weight = {"type": "number", "minimum": -_EXACT, "maximum": _EXACT}
            weights = {"type": ["array", "null"], "items": weight, **_bound(sparse)}
            uses[settings.weights].append({"description": f"a weight for each id of {name}", **weights})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": "One row of raw values, as Scorer.score takes a list of them",
        "type": "object",
        "properties": {name: one[0] if len(one) == 1 else {"allOf": one} for name, one in uses.items()},
        "required": list(types),
        "additionalProperties": False,
    }


def accepted_numbers(settings: DenseFeatureConfig) -> tuple[float, float, bool]:
    """Least and greatest number from which a dense feature is made, and whether it may be null.

    The transforms are followed back from the numbers that float32 has, within those that 64 bits can count.
    """
    low, high = -_FLOAT32, _FLOAT32
    if (scaled := settings.standardize) is not None:
        low, high = scaled.mean + scaled.std * low, scaled.mean + scaled.std * high
    if settings.log1p:
        low, high = max(math.expm1(min(low, 700.0)), math.nextafter(-1.0, 0.0)), math.expm1(min(high, 700.0))
    if settings.clip is not None:
        low, high = _raised_to(settings.clip[0], low), -_raised_to(-settings.clip[1], -high)
    null = settings.fill is not None and low <= settings.fill <= high
    if settings.minimum is not None:
        low = _raised_to(settings.minimum, low)
    return max(low, -_INT64), min(high, _UINT64 - 1), null


def times_and_integers(columns: Columns) -> dict[str, bool]:
    """Columns of ids that are no floating numbers, and whether they are times, for `read_as_meant`."""
    found: dict[str, bool] = {}
    for name, sparse in columns.sparse.items():
        if sparse.settings.list_text is None and not sparse.ids.accepts(pa.float64()):
            column = sparse.settings.column or name
            found[column] = found.get(column, False) or isinstance(sparse.ids, DatetimeIds)
    return found


def read_as_meant(values: pa.Array, *, times: bool) -> pa.Array:
    """Ids that came by JSON, which has texts for times, and one kind of number, of which 3.0 is the integer 3.

    Numbers from 2^53 on stay floating, and are refused: an integer may have been rounded to them, as pandas rounds
    those of a column in which one is missing.

    Args:
        values: as Arrow reads them.
        times: whether texts are dates or times; a time says its zone.

    Returns:
        Values that are something else as they are, for the mapping to refuse.
    """
    kind = value_type(values.type)
    targets: tuple[pa.DataType, ...] = ()
    if times and is_string(kind):
        targets = (MOMENT, pa.date32())
    elif pa.types.is_floating(kind) and _counts_exactly(values.flatten() if is_list(values.type) else values):
        targets = (pa.int64(),)
    for target in targets:
        try:
            return values.cast(pa.list_(target) if is_list(values.type) else target)
        except pa.ArrowInvalid:
            continue
    return values


def _counts_exactly(numbers: pa.Array) -> bool:
    """Whether floating numbers are so small that no integer among them was rounded on its way."""
    extremes = pc.min_max(numbers).as_py().values()
    return all(number is None or abs(number) < _EXACT for number in extremes)


def _raised_to(least: float, low: float) -> float:
    """From where on numbers are accepted, if those below `least` become that, and are accepted from `low` on."""
    return -math.inf if least >= low else low


def _dense_columns(columns: Columns) -> list[str]:
    return [dense.column or name for name, dense in columns.dense.items()]


def _widest(kind: pa.DataType) -> pa.DataType:
    """The type of a kind that holds the values of all."""
    if is_integer(kind):
        return pa.uint64() if pa.types.is_uint64(kind) else pa.int64()
    if pa.types.is_timestamp(kind):
        return MOMENT
    if is_string(kind):
        return pa.string()
    return pa.float64() if is_number(kind) and not pa.types.is_boolean(kind) else kind


def _of_mapping(ids: IdMapping, kind: str | None) -> tuple[pa.DataType, ...]:
    """What a mapping takes, of what a feature is known to hold."""
    match ids:
        case VocabularyIds(vocabulary=vocabulary):
            return (_widest(vocabulary.values.type),)
        case BucketizedIds():
            return (pa.float64(),)
        case HashedIds():
            return {"strings": (pa.string(),), "numbers": (pa.int64(),)}.get(kind or "", (pa.string(), pa.int64()))
        case DatetimeIds():
            return {"dates": (MOMENT,), "numbers": (pa.int64(),)}.get(kind or "", (MOMENT, pa.int64()))
    return (pa.int64(),)


def _domain(domain: DomainConfig, types: Sequence[pa.DataType]) -> dict[str, Any]:
    """What values a row may have of the column of domains."""
    if domain.unseen == "error" and domain.values is not None:
        return {"enum": list(domain.values)}
    if domain.unseen == "error" and not domain.hashed:
        return {"type": "integer", "minimum": 0, "maximum": domain.num_domains - 1}
    kinds = ["string" if is_string(kind) else "integer" for kind in types]
    bounds = {"minimum": -_INT64, "maximum": _INT64 - 1} if "integer" in kinds else {}
    return {"type": [*kinds, "null"] if domain.unseen == "backbone" else kinds, **bounds}


def _number(settings: DenseFeatureConfig, kind: pa.DataType) -> dict[str, Any]:
    low, high, null = accepted_numbers(settings)
    if pa.types.is_boolean(kind):
        return {"type": ["boolean", "null"] if null else "boolean"}
    return {"type": ["number", "null"] if null else "number", "minimum": low, "maximum": high}


def _bound(sparse: SparseColumn) -> dict[str, int]:
    longest = sparse.settings.max_length
    return {} if longest is None else {"maxItems": longest}


def _ids(sparse: SparseColumn, types: tuple[pa.DataType, ...]) -> dict[str, Any]:
    settings = sparse.settings
    if settings.list_text is not None:
        return {"type": ["string", "null"], **_text(settings.list_text, sparse)}
    kinds = [_value(sparse, value_type(kind), in_list=is_list(kind)) for kind in types]
    if is_list(types[0]):
        kinds = [{"type": "array", "items": kind, **_bound(sparse)} for kind in kinds]
    if len(kinds) > 1:
        return {"anyOf": [*kinds, {"type": "null"}]}
    return {**kinds[0], "type": [kinds[0]["type"], "null"]}


def _value(sparse: SparseColumn, kind: pa.DataType, *, in_list: bool) -> dict[str, Any]:
    """An id that is there."""
    if is_string(kind):
        return {"type": "string"}
    if pa.types.is_boolean(kind):
        return {"type": "boolean"}
    if pa.types.is_timestamp(kind):
        return {"type": "string", "format": "date-time", "pattern": _whole(_MOMENT)}
    if pa.types.is_date(kind):
        return {"type": "string", "format": "date", "pattern": _whole(_DATE)}
    if isinstance(sparse.ids, BucketizedIds):
        low, high = (-_EXACT, _EXACT) if in_list else (-_INT64, _UINT64 - 1)
        return {"type": "number", "minimum": low, "maximum": high}
    low, high = _integers(sparse, _INT64 - 1 if in_list else _UINT64 - 1)
    return {"type": "integer", "minimum": low, "maximum": high}


def _integers(sparse: SparseColumn, most: int) -> tuple[int, int]:
    """Least and greatest integer that has a row."""
    low, high = -_INT64, most
    if isinstance(sparse.ids, PlainIds) and sparse.ids.out_of_range == "error":
        low, high = 0, sparse.ids.num_rows - 1
    if isinstance(sparse.ids, DatetimeIds):
        low, high = -LAST_SECOND, LAST_SECOND
    least = sparse.settings.minimum
    return (low if least is None or least < low else -_INT64), high


def _text(settings: ListTextConfig, sparse: SparseColumn) -> dict[str, str]:
    """A text that holds a list; an empty one holds none."""
    if settings.items == "strings":
        return {}
    low, high = _integers(sparse, _INT64 - 1)
    one = f"(?:{integer_texts(high)}|-{integer_texts(-low)})" if low < 0 else f"(?:{integer_texts(high)})"
    # Only what has a meaning in a pattern may be escaped there.
    separator = re.sub(r"([\^$\\.*+?()\[\]{}|/])", r"\\\1", settings.separator)
    return {"pattern": _whole(f"(?:{one}(?:{separator}{one})*)?")}


def integer_texts(most: int) -> str:
    """A pattern of the integers 0 .. `most`, without leading zeros."""
    digits = str(most)
    options = [f"[1-9][0-9]{{0,{len(digits) - 2}}}"] if len(digits) > 1 else []
    for place, digit in enumerate(digits):
        least = 0 if place or len(digits) == 1 else 1
        if int(digit) > least:
            rest = f"[0-9]{{{len(digits) - place - 1}}}" if place + 1 < len(digits) else ""
            options.append(f"{digits[:place]}[{least}-{int(digit) - 1}]{rest}")
    return "(?:" + "|".join([*(["0"] if len(digits) > 1 else []), *options, digits]) + ")"


def _whole(pattern: str) -> str:
    """A pattern of a whole text; to some readers, `$` is also before a last line break."""
    return rf"^{pattern}$(?!\n)"
