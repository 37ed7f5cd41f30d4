"""Rows that a JSON Schema accepts, rows that may be anything, and requests that are none."""

import json
from collections import OrderedDict, UserDict, deque
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

Json = dict[str, Any]


def accepted(schema: Json) -> st.SearchStrategy[Any]:
    """Values that a schema of one column accepts."""
    if "allOf" in schema:
        validator = Draft202012Validator(schema)
        return st.one_of([accepted(of) for of in schema["allOf"]]).filter(validator.is_valid)
    if "anyOf" in schema:
        return st.one_of([accepted(of) for of in schema["anyOf"]])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_of_kind(kind, schema) for kind in kinds])


def _of_kind(kind: str, schema: Json) -> st.SearchStrategy[Any]:
    match kind:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        case "string":
            return st.text(max_size=12)
        case "array":
            size = min(schema.get("maxItems", 6), 6)
            if schema["items"]["type"] == "integer":  # all of a list written alike, see docs/serving.md
                return st.one_of([st.lists(of, max_size=size) for of in _integers(schema["items"])])
            return st.lists(accepted(schema["items"]), max_size=size)
        case "integer":
            return st.one_of(_integers(schema))
    low, high = schema["minimum"], schema["maximum"]
    return st.integers(int(low), int(high)) | st.floats(float(low), np.nextafter(float(high), -np.inf), allow_nan=False)


def _integers(schema: Json) -> list[st.SearchStrategy[Any]]:
    """Integers, and such as are written 3.0."""
    low, high = schema["minimum"], schema["maximum"]
    return [st.integers(low, high), st.integers(max(low, 1 - 2**53), min(high, 2**53 - 1)).map(float)]


def rows(schema: Json, weights: dict[str, str]) -> st.SearchStrategy[Json]:
    """Rows that a schema accepts, as many weights as ids in each.

    Args:
        schema: of a row.
        weights: by column of weights, that of the ids.
    """

    def even(row: Json) -> Json:
        for name, ids in weights.items():
            row[name] = [0.5] * len(row[ids] or ()) if row[name] is None else [*row[name], *[1.5] * 9]
            row[name] = row[name][: len(row[ids] or ())]
        return row

    return st.fixed_dictionaries({name: accepted(of) for name, of in schema["properties"].items()}).map(even)


NUMBERS = st.integers() | st.integers(-3, 50) | st.floats(1 - 2.0**53, 2.0**53 - 1)
TIMES = st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.isoformat())
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | TIMES | st.dates().map(str)
ANY_JSON = st.recursive(SCALARS, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=4), of))


class Sequenced:
    """What has a length and items, as columns of other libraries do, and is no list."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> Any:
        return self.values[place]


class Arrayed(Sequenced):
    """What numpy can read besides."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)


class Framed:
    """What has columns by name and no rows by number, as data frames do."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __getitem__(self, name: str) -> Any:
        return {"a": [1]}[name]


class Exported:
    """What gives itself to Arrow."""

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return pa.array([1, 2]).__arrow_c_array__(requested_schema)


def _nested(depth: int) -> list[Any]:
    found: list[Any] = [1]
    for _ in range(depth):
        found = [found]
    return found


ODD: list[Any] = [
    float("nan"),
    float("inf"),
    -0.0,
    5e-324,
    1e300,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    "\ud800",
    "a\0b",
    "\U0010ffff" * 50,
    "2024-02-30T00:00:00Z",
    "9999-12-31T23:59:59-23:59",
    "0000-01-01",
    b"bytes",
    bytearray(b"x"),
    memoryview(b"xy"),
    1j,
    Decimal("NaN"),
    Decimal("1e500"),
    Decimal("0.5"),
    Fraction(1, 3),
    date(1, 1, 1),
    datetime(1, 1, 1),
    datetime(9999, 12, 31, 23, 59, 59, 999_999),
    datetime(2024, 1, 1, tzinfo=UTC),
    timedelta(days=99_999),
    (1, 2),
    frozenset({1}),
    {"a": 1},
    [[[1]]],
    _nested(60),
    _nested(20_000),
    [1, "a"],
    [None, 1],
    [1, None],
    [{}],
    object(),
    object,
    len,
    Ellipsis,
    NotImplemented,
    range(3),
    iter([1]),
    Path("a"),
    np.float32(1.5),
    np.int8(3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.str_("a"),
    np.bytes_(b"a"),
    np.datetime64("NaT"),
    np.datetime64("2024-01-01"),
    np.datetime64(2**62, "s"),
    np.timedelta64(1, "D"),
    np.longdouble(1),
    np.complex64(1),
    np.array([1, 2]),
    np.array([[1, 2]]),
    np.array(3),
    np.array([1, "a", None], object),
    np.ma.masked_array([1, 2], [True, False]),
    np.zeros(2, [("a", int)]),
    torch.tensor(1),
    torch.tensor([1.0, 2.0], requires_grad=True),
    pa.scalar(1),
    pa.scalar(None, pa.int8()),
    pa.scalar("a"),
    pa.scalar([1, 2]),
    pa.array([1, 2]),
    pa.array(["a"]).dictionary_encode(),
    pa.chunked_array([[1], [2]]),
    pa.NA,
    Sequenced([1, 2]),
    Arrayed([1, 2]),
    Framed(),
    Exported(),
]
"""Values of no JSON, and such as come close to one."""


def _generator(values: list[Any]) -> Iterator[Any]:
    yield from values


def requests(schema: Json, weights: dict[str, str]) -> st.SearchStrategy[Any]:
    """Requests of every shape: rows that are accepted, rows with some values of any kind, and what is none."""
    names = list(schema["properties"])
    values = ANY_JSON | st.sampled_from(ODD)
    row = rows(schema, weights)
    spoilt = st.builds(
        lambda whole, changes, lost: {name: of for name, of in {**whole, **changes}.items() if name not in lost},
        row,
        st.dictionaries(st.sampled_from([*names, "unknown"]) | st.sampled_from(names), values, max_size=2),
        st.lists(st.sampled_from(names), max_size=1) | st.just([]),
    )
    many = st.lists(row | spoilt | row, max_size=4)
    columns = st.builds(
        lambda some, changes: {**{name: [of.get(name) for of in some] for name in names}, **changes},
        many,
        st.dictionaries(st.sampled_from(names), values | st.lists(values, max_size=4), max_size=1),
    )
    shapes = [list, tuple, deque, _generator, iter, lambda of: np.array(of, object), lambda of: dict(enumerate(of))]
    as_rows = st.builds(lambda shape, of: shape(of), st.sampled_from(shapes), many)
    wraps = [MappingProxyType, OrderedDict, UserDict, lambda of: of, lambda of: {**of, "more": [1]}]
    as_columns = st.builds(lambda wrap, of: wrap(of), st.sampled_from(wraps), columns)
    return as_rows | as_columns | as_columns.map(_as_table) | values


def _ends_arrow(value: Any) -> bool:
    """Whether Arrow's inference could end the process: of lists without end, or of NumPy's times among its numbers."""
    level = [value]
    for _ in range(100):
        kinds = {of.dtype.type if isinstance(of, np.ndarray) else type(of) for of in level}
        if np.datetime64 in kinds and any(issubclass(kind, np.generic) for kind in kinds - {np.datetime64}):
            return True
        level = [of for one in level if isinstance(one, list) for of in one]
    return bool(level)


def _as_table(columns: Any) -> Any:
    """An Arrow table where that can be; what cannot be one as it is."""
    if any(map(_ends_arrow, columns.values())):
        return columns
    try:
        return pa.table(dict(columns))
    except (pa.ArrowException, TypeError, ValueError, LookupError, OverflowError, RecursionError, RuntimeError):
        return columns


def schema_of(artifact: Path) -> Json:
    """The JSON Schema of an artefact's rows, which must be one."""
    found: Json = json.loads((artifact / "schema.json").read_text())
    Draft202012Validator.check_schema(found)
    return found
