"""Comparisons are those of the numbers that values stand for, whatever types hold them; `in` is some `==`."""

import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.arrow import plain, usual
from recsys.data.comparing import Comparison, among, compare
from recsys.data.labels import parse_expression

PYTHON: dict[Comparison, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
INTEGERS = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal128(5, 2), pa.decimal128(38, 18), pa.decimal128(20, 0), pa.decimal256(60, 3), pa.decimal64(18, 9)]
NUMBERS = [*INTEGERS, *FLOATS, *DECIMALS, pa.bool_()]

EDGES = [0, 1, -1, 2, 127, 128, 2**24 + 1, 2**31, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]
POINTS = [0.0, -0.0, 0.1, 0.5, -0.5, 0.3, 1.0, 2.5, 2.0**53, 9007199254740993.0, 2.0**63, -(2.0**63), 2.0**64, 1e300]
LITERALS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([*EDGES, *(-edge for edge in EDGES), 10**18, 10**30, 10**400]),
    st.sampled_from(POINTS),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
)


def values_of(kind: pa.DataType) -> st.SearchStrategy[list[Any]]:
    """Lists of values that a type holds, nulls and NaN among them, many at its edges."""
    if pa.types.is_boolean(kind):
        one: st.SearchStrategy[Any] = st.booleans()
    elif pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        held = [edge for edge in EDGES if limits.min <= edge <= limits.max]
        one = st.sampled_from(held) | st.integers(int(limits.min), int(limits.max)) | st.integers(0, 3)
    elif pa.types.is_floating(kind):
        special = [*POINTS[:8], float("nan"), float("inf"), -float("inf")]
        rounded = [float(np.dtype(kind.to_pandas_dtype()).type(point)) for point in special]
        one = st.sampled_from(rounded) | st.floats(width=kind.bit_width)
    elif pa.types.is_decimal(kind):
        most = 10**kind.precision - 1
        units = st.integers(-most, most) | st.integers(-3, 3).map(lambda n: n * 10 ** (kind.scale - (kind.scale > 0)))
        one = units.filter(lambda n: abs(n) <= most).map(lambda n: Decimal(f"{n}e-{kind.scale}"))
    else:
        one = st.text(alphabet="01.aü", max_size=3)
    return st.lists(st.none() | one, min_size=1, max_size=12)


def known(value: Any) -> bool:
    return value is not None and value == value


def exact(value: Any, beside: pa.DataType) -> Any:
    """The number that a literal is beside values of a type, or that a value is."""
    if isinstance(value, float) and np.isfinite(value):
        return Fraction(value) if pa.types.is_floating(beside) else Fraction(repr(value))
    return Fraction(value) if isinstance(value, Decimal | int) else value


def array_of(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if pa.types.is_float16(kind):
        values = [None if value is None else np.float16(value) for value in values]
    return pa.array(values, kind)


def truth(comparison: Comparison, one: Any, other: Any) -> bool | None:
    return bool(PYTHON[comparison](one, other)) if known(one) and known(other) else None


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_columns_compare_with_values_exactly(kind: pa.DataType, data: st.DataObject) -> None:
    values, literal = data.draw(values_of(kind)), data.draw(LITERALS)
    column = array_of(kind, values)
    for comparison in PYTHON:
        expected = [
            truth(comparison, exact(value, kind), exact(literal, kind)) if known(value) else None
            for value in column.to_pylist()
        ]
        text = f"c {comparison} {literal!r}"
        assert parse_expression(text, source="label").evaluate({"c": column}).to_pylist() == expected, text


@pytest.mark.parametrize("kind", [*NUMBERS, pa.string(), pa.large_string(), pa.string_view()], ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_membership_is_the_disjunction_of_equalities(kind: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(values_of(kind))
    literal = LITERALS if kind in NUMBERS else st.text(alphabet="01.aü", max_size=3)
    literals = data.draw(st.lists(literal, min_size=1, max_size=12))
    literals += data.draw(st.sampled_from([[], literals[:1] * 12]))  # few and many are computed in two ways
    column = {"c": array_of(kind, values)}
    listed = ", ".join(map(repr, literals))
    equal = " or ".join(f"c == {literal!r}" for literal in literals)
    for member, equalities in ((f"c in [{listed}]", equal), (f"c not in ({listed},)", f"not ({equal})")):
        found, expected = (parse_expression(text, source="label").evaluate(column) for text in (member, equalities))
        assert found.to_pylist() == expected.to_pylist(), member


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_columns_compare_with_columns_exactly(data: st.DataObject) -> None:
    kinds = data.draw(st.tuples(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS)))
    lists = [data.draw(values_of(kind)) for kind in kinds]
    length = min(map(len, lists))
    left, right = (array_of(kind, values[:length]) for kind, values in zip(kinds, lists, strict=True))
    columns = {"a": usual(left), "b": usual(right)}
    rounds = any(map(pa.types.is_floating, kinds))  # decimals beside floating numbers are floating numbers
    rows = [
        [float(value) if rounds and isinstance(value, Decimal) else value for value in row]
        for row in zip(left.to_pylist(), right.to_pylist(), strict=True)
    ]
    for comparison in PYTHON:
        expected = [truth(comparison, *(it if it is None else python(it) for it in row)) for row in rows]
        found = parse_expression(f"a {comparison} b", source="label").evaluate(columns)
        assert found.to_pylist() == expected, (comparison, rows)


def python(value: Any) -> Any:
    """A value that Python compares exactly with others."""
    return Fraction(value) if isinstance(value, Decimal) else value


MOMENTS = [pa.date32(), *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns"))]
DURATIONS = [pa.duration(unit) for unit in ("s", "ms", "us", "ns")]
CLOCKS = [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


@pytest.mark.parametrize("kinds", [MOMENTS, DURATIONS, CLOCKS], ids=["moments", "durations", "clocks"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_times_of_any_units_compare(kinds: list[pa.DataType], data: st.DataObject) -> None:
    pair = data.draw(st.tuples(st.sampled_from(kinds), st.sampled_from(kinds)))
    columns, ticks = {}, []
    for name, kind in zip("ab", pair, strict=True):
        wide = kind.bit_width
        low, high = (0, 80_000) if kinds is CLOCKS else (-(2 ** (wide - 1)), 2 ** (wide - 1) - 1)
        near = st.integers(0, 3) if kinds is CLOCKS else st.integers(-3, 3)
        if wide == 64 and kinds is not CLOCKS:
            near |= st.sampled_from([253_402_214_400, -62_135_596_800])
        values = data.draw(st.lists(st.none() | near | st.integers(low, high), min_size=4, max_size=4))
        columns[name] = pa.array(values, pa.int32() if wide == 32 else pa.int64()).view(kind)
        per = 86_400 * 10**9 if pa.types.is_date(kind) else NANOSECONDS[kind.unit]
        ticks.append([None if value is None else value * per for value in values])
    for comparison in PYTHON:
        expected = [truth(comparison, *row) for row in zip(*ticks, strict=True)]
        assert compare(comparison, columns["a"], columns["b"]).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "label", "expected"),
    [
        (pa.array([-0.0, 0.0, 1.0]), "c in (0, 1)", [True, True, True]),
        (pa.array([-0.0, 0.0, 1.0]), "c in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)", [True, True, False]),
        (pa.array([True, False, None]), "c in (2, 3)", [False, False, None]),
        (pa.array([True, False, None]), "c in (1, 3)", [True, False, None]),
        (pa.array([True, False, None]), "c == 1", [True, False, None]),
        (pa.array([True, False, None]), "1 > c", [False, True, None]),
        (pa.array([0, 1, 2]), "c == True", [False, True, False]),
        (pa.array([0.1, 1.0, None], pa.float32()), "c in (0.1, 1)", [False, True, None]),
        (pa.array([0.1, 1.0, None], pa.float32()), "c == 0.1", [False, False, None]),
        (pa.array([float("nan"), 1.0, None]), "c in (1,)", [None, True, None]),
        (pa.array([1, 2, None]), "c in ()", [False, False, None]),
        (pa.array([2**53 + 1, 2**53, None]), "c == 9007199254740992.0", [False, True, None]),
        (pa.array([2**64 - 1, 0, None], pa.uint64()), "c >= -1", [True, True, None]),
        (pa.array([2**64 - 1, 0, None], pa.uint64()), "c > 9223372036854775807", [True, False, None]),
        (pa.array([2**63 - 1, 0, None]), "c < 9223372036854775808", [True, True, None]),
        (pa.array([2**63 - 1, 0, None]), "c == 123456789012345678901234567890", [False, False, None]),
        (pa.array([1.5, 0.0, None]), "c != 123456789012345678901234567890", [True, True, None]),
        (pa.array([float("inf"), 0.0, None]), "c > 1e400", [False, False, None]),
        (pa.array([3, 0, None]), "c < 1e400", [True, True, None]),
        (pa.array([3, 0, None]), "c < -1e400", [False, False, None]),
        (pa.array([Decimal("0.10"), Decimal("1.00"), None]), "c in (0.1, 2)", [True, False, None]),
        (pa.array([Decimal("0.10"), Decimal("1.00"), None]), "c >= 0.1", [True, True, None]),
        (pa.array([Decimal("0.10000000000000000001"), None]), "c == 0.1", [False, None]),
        (pa.array([Decimal("0.10"), Decimal("1.00")]), "c < 1e-300", [False, False]),
        (pa.nulls(2), "c >= 4", [None, None]),
        (pa.nulls(2), "c in (4, 5)", [None, None]),
        (pa.nulls(2), "c", [None, None]),
        (pa.nulls(2), "not c", [None, None]),
        (pa.array(["a", "b", None], pa.string_view()), "c != 'a'", [False, True, None]),
        (pa.array(["a", "b", None]).dictionary_encode(), "c in ('a', 'z')", [True, False, None]),
        (pa.array([5, 1, None]), "1 < 2 <= c", [True, False, None]),
        (pa.array([5, 1, None]), "3 in (3, 4) and c == 5", [True, False, None]),
        (pa.array([b"a", b"b", None]), "c == 'a'", [True, False, None]),
    ],
)
def test_what_is_compared_is_what_is_written(values: pa.Array, label: str, expected: list[bool | None]) -> None:
    assert parse_expression(label, source="label").evaluate({"c": values}).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "label", "message"),
    [
        (pa.array(["0", "1"]), "c in (0,)", "column 'c': type string does not compare with 0"),
        (pa.array(["0", "1"]), f"c in ({', '.join(map(str, range(20)))})", "type string does not compare with 0"),
        (pa.array(["0", "1"]), "c in ('a', 1)", "type string does not compare with 1"),
        (pa.array([0, 1]), "c == '0'", "type int64 does not compare with '0'"),
        (pa.array([0, 1]), "c in ('0', 1)", "type int64 does not compare with '0'"),
        (pa.array([0.5, 1]), "c == 3 or 3 < 'a'", "3 does not compare with 'a'"),
        (pa.array([0, 1], pa.timestamp("ms")), "c >= 3", r"type timestamp\[ms\] does not compare with 3"),
        (pa.array([0, 1], pa.timestamp("ms")), "c >= '2024-01-01'", r"type timestamp\[ms\] does not compare with '20"),
        (pa.array([[0], [1]]), "c == c", "does not compare with type list"),
        (pa.array([0, 1]), "not c", "column 'c' has type int64, which is no truth value"),
    ],
)
def test_what_does_not_compare_is_refused_by_name(values: pa.Array, label: str, message: str) -> None:
    for column in (values, values.slice(0, 0)):  # as much of a schema as of rows
        with pytest.raises(pa.ArrowException, match=message):
            parse_expression(label, source="label").evaluate({"c": column})


def test_moments_in_zones_do_not_compare_with_moments_in_none() -> None:
    for unit in ("ms", "ns"):
        with pytest.raises(pa.ArrowException, match="zone"):
            compare("<", pa.array([1], pa.timestamp("ms")), pa.array([1], pa.timestamp(unit, "UTC")))
    zones = [pa.array([1], pa.timestamp(unit, zone)) for unit, zone in (("s", "UTC"), ("ns", "Asia/Tokyo"))]
    assert compare(">", *zones).to_pylist() == [True]


def test_decimals_of_too_many_digits_are_refused() -> None:
    wide, long = pa.array([None], pa.decimal256(76, 0)), pa.array([None], pa.decimal256(76, 76))
    with pytest.raises(pa.ArrowException, match="more than 76 digits"):
        compare("<", wide, long)


def test_a_long_list_is_looked_up_and_not_compared_value_by_value() -> None:
    column = plain(pa.array(np.arange(1000)))
    assert among(column, list(range(0, 100_000, 10))).to_numpy(zero_copy_only=False).sum() == 100
