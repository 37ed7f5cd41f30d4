"""Comparisons of columns with values and with each other, as the numbers that they stand for.

Arrow compares after a cast to a common type, which fails or rounds where none holds both: integers beyond 2^53 with
floating numbers, unsigned with signed, decimals with 0.1, moments in seconds with moments in nanoseconds. Here each
pair is compared exactly. Two rules say what is meant where that could be doubted:

- A value that is written with a point is that decimal (0.1 is a tenth) beside decimals, and the float64 nearest to it
  beside floating numbers; a float32 of 0.1 is therefore not 0.1.
- A column of decimals beside one of floating numbers is compared as float64.
"""

import math
import operator
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.arrow import filled, floats, integers, is_integer, is_number, is_string

Value = bool | int | float | str
Comparison = Literal["<", "<=", ">", ">=", "==", "!="]

_ARROW: dict[Comparison, Callable[[Any, Any], pa.Array]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_PYTHON: dict[Comparison, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_MIRRORED: dict[Comparison, Comparison] = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}

_DIGITS = 76
"""That a decimal can have."""

_FEW = 8
"""Values in a list up to which each is compared by itself."""

_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_NANOSECONDS_A_DAY = 86_400 * 10**9


def compare(comparison: Comparison, left: pa.Array | Value, right: pa.Array | Value) -> pa.Array | pa.Scalar:
    """Compare a column with a value or a column.

    Args:
        comparison: what is asked.
        left: (N,) values of a type that `usual` gives, no dictionary and without NaN; or a value.
        right: likewise.

    Returns:
        (N,) booleans, null where either is; or one boolean of two values.

    Raises:
        pa.ArrowException: types that do not compare.
    """
    if not isinstance(left, pa.Array):
        if isinstance(right, pa.Array):
            return compare(_MIRRORED[comparison], right, left)
        if isinstance(left, str) != isinstance(right, str):
            raise _unlike(repr(left), repr(right))
        return pa.scalar(_PYTHON[comparison](left, right))
    if pa.types.is_null(left.type):
        return pa.nulls(len(left), pa.bool_())
    if not isinstance(right, pa.Array):
        return _compare_value(comparison, left, right)
    if pa.types.is_null(right.type):
        return pa.nulls(len(left), pa.bool_())
    if is_number(left.type) and is_number(right.type):
        return _compare_numbers(comparison, integers(left), integers(right))
    ticks, others = _ticks(left.type), _ticks(right.type)
    if ticks is not None and others is not None and ticks[0] == others[0] and ticks[1] != others[1]:
        return _compare_moments(comparison, left, right, ticks[1], others[1])
    try:
        return _ARROW[comparison](left, right)
    except pa.ArrowNotImplementedError:
        raise _unlike(f"type {left.type}", f"type {right.type}") from None


def among(column: pa.Array | Value, values: Sequence[Value]) -> pa.Array | pa.Scalar:
    """Whether each of (N,) values equals one of some: the disjunction of equalities, null where a value is null."""
    if not isinstance(column, pa.Array):
        return pa.scalar(any(compare("==", column, value).as_py() for value in values))
    if not values:
        return _constant(column, False)
    if len(values) <= _FEW or not (is_number(column.type) or is_string(column.type)):
        return reduce(pc.or_kleene, [compare("==", column, value) for value in values])
    column = integers(column)
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    listed = pa.array([held for value in values for held in _held(column.type, value)], column.type)
    return pc.if_else(column.is_valid(), pc.is_in(column, value_set=listed), None)


def _held(kind: pa.DataType, value: Value) -> list[Any]:
    """What values of a type equal a value: none, one, or the two zeros."""
    if isinstance(value, str) != is_string(kind):
        raise _unlike(f"type {kind}", repr(value))
    if isinstance(value, str):
        return [value]
    if pa.types.is_floating(kind):
        nearest = _float64(value)
        return [] if nearest != value else [nearest] if nearest else [0.0, -0.0]
    below, exact = _on_grid(kind, value)
    least, greatest = _limits(kind)
    return [_grid_value(kind, below)] if exact and least <= below <= greatest else []


def _compare_value(comparison: Comparison, column: pa.Array, value: Value) -> pa.Array:
    kind = column.type
    if isinstance(value, str):
        if is_number(kind):
            raise _unlike(f"type {kind}", repr(value))
        try:
            return _ARROW[comparison](column, pa.scalar(value))
        except pa.ArrowNotImplementedError:
            raise _unlike(f"type {kind}", repr(value)) from None
    if pa.types.is_floating(kind):
        column, nearest = column.cast(pa.float64()), _float64(value)
        if nearest == value:
            return _ARROW[comparison](column, nearest)
        # The value lies between two floating numbers that are next to each other, and this is one of them.
        return _between(comparison, column, nearest, includes=nearest < value)
    if not is_number(kind):
        raise _unlike(f"type {kind}", repr(value))
    column = integers(column)
    kind = column.type
    below, exact = _on_grid(kind, value)
    least, greatest = _limits(kind)
    if not least <= below <= greatest:
        return _constant(column, _PYTHON[comparison](0, 1 if below > greatest else -1))
    if exact:
        return _ARROW[comparison](column, pa.scalar(_grid_value(kind, below), kind))
    return _between(comparison, column, pa.scalar(_grid_value(kind, below), kind), includes=True)


def _between(comparison: Comparison, column: pa.Array, bound: Any, *, includes: bool) -> pa.Array:
    """Compare with a value that no value of the column equals: all up to `bound`, itself included or not, are less."""
    if comparison in ("==", "!="):
        return _constant(column, comparison == "!=")
    if comparison in ("<", "<="):
        return (pc.less_equal if includes else pc.less)(column, bound)
    return (pc.greater if includes else pc.greater_equal)(column, bound)


def _constant(column: pa.Array, found: bool) -> pa.Array:
    """One truth for all values, null for nulls."""
    return pc.if_else(column.is_valid(), found, None)


def _on_grid(kind: pa.DataType, value: float) -> tuple[int, bool]:
    """The multiple of an integer's or decimal's last digit that is next below a number, and whether it is the number.

    Of infinities, one beyond all that any type holds.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return int(math.copysign(10 ** (_DIGITS + 1), value)), False
    scale = kind.scale if pa.types.is_decimal(kind) else 0
    # A floating number as it is written, by the fewest digits that tell it from its neighbours.
    units = Fraction(repr(value) if isinstance(value, float) else value) * Fraction(10) ** scale
    return math.floor(units), units.denominator == 1


def _limits(kind: pa.DataType) -> tuple[int, int]:
    """The least and greatest multiple of an integer's or decimal's last digit."""
    if pa.types.is_decimal(kind):
        return 1 - 10**kind.precision, 10**kind.precision - 1
    limits = np.iinfo(kind.to_pandas_dtype())
    return int(limits.min), int(limits.max)


def _grid_value(kind: pa.DataType, units: int) -> int | Decimal:
    if not pa.types.is_decimal(kind):
        return units
    return Decimal((units < 0, tuple(map(int, str(abs(units)))), -kind.scale))  # exact in any context


def _float64(value: float) -> float:
    """The nearest, infinities where it is beyond all."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _compare_numbers(comparison: Comparison, left: pa.Array, right: pa.Array) -> pa.Array:
    """Two columns of numbers, none of them boolean."""
    if pa.types.is_decimal(left.type) or pa.types.is_decimal(right.type):
        if pa.types.is_floating(left.type) or pa.types.is_floating(right.type):
            left, right = floats(left), floats(right)
        else:
            return _ARROW[comparison](*_common_decimals(left, right))
    if is_integer(left.type) and is_integer(right.type):
        if pa.types.is_uint64(left.type) == pa.types.is_uint64(right.type):
            return _ARROW[comparison](left, right)
        if pa.types.is_uint64(right.type):
            return _compare_numbers(_MIRRORED[comparison], right, left)
        unsigned, signed = filled(left, 0), filled(right.cast(pa.int64()), 0)
        order = _order(unsigned, signed.view(np.uint64), None)
        order[signed < 0] = 1
        return _by_order(comparison, order, left, right)
    if is_integer(right.type):
        return _compare_numbers(_MIRRORED[comparison], right, left)
    right = right.cast(pa.float64())
    if not (pa.types.is_int64(left.type) or pa.types.is_uint64(left.type)):
        return _ARROW[comparison](left.cast(pa.float64()), right)
    whole, number = filled(left, 0), filled(right, 0.0)
    below = np.floor(number)
    least, past = (0.0, 2.0**64) if pa.types.is_uint64(left.type) else (-(2.0**63), 2.0**63)
    inside = (below >= least) & (below < past)
    order = _order(whole, np.where(inside, below, 0).astype(whole.dtype), number > below)
    order[number < least] = 1
    order[number >= past] = -1
    return _by_order(comparison, order, left, right)


def _common_decimals(left: pa.Array, right: pa.Array) -> tuple[pa.Array, pa.Array]:
    both = [it if pa.types.is_decimal(it.type) else it.cast(pa.decimal128(20, 0)) for it in (left, right)]
    scale = max(0, *(it.type.scale for it in both))
    digits = max(it.type.precision - it.type.scale for it in both) + scale
    if digits > _DIGITS:
        raise pa.ArrowTypeError(f"types {left.type} and {right.type} compare only in more than {_DIGITS} digits")
    one, other = (it.cast(pa.decimal256(max(1, digits), scale)) for it in both)
    return one, other


def _ticks(kind: pa.DataType) -> tuple[str, int] | None:
    """The family of times that a type belongs to, and the nanoseconds in its unit."""
    if pa.types.is_date32(kind):
        return "moments", _NANOSECONDS_A_DAY
    if pa.types.is_timestamp(kind):
        return "moments", _NANOSECONDS[kind.unit]
    if pa.types.is_time(kind):
        return "times of day", _NANOSECONDS[kind.unit]
    if pa.types.is_duration(kind):
        return "durations", _NANOSECONDS[kind.unit]
    return None


def _compare_moments(comparison: Comparison, left: pa.Array, right: pa.Array, tick: int, other: int) -> pa.Array:
    if tick < other:
        return _compare_moments(_MIRRORED[comparison], right, left, other, tick)
    if pa.types.is_timestamp(left.type) and (left.type.tz is None) != (right.type.tz is None):
        raise _unlike(f"type {left.type}", f"type {right.type}, of which only one has a time zone,")
    coarse, fine = (filled(_numbers(it), 0).astype(np.int64, copy=False) for it in (left, right))
    per = tick // other
    below = fine // per
    return _by_order(comparison, _order(coarse, below, fine != below * per), left, right)


def _numbers(times: pa.Array) -> pa.Array:
    return times.view(pa.int32() if times.type.bit_width == 32 else pa.int64())


def _order(one: NDArray[Any], other: NDArray[Any], more: NDArray[np.bool_] | None) -> NDArray[np.int8]:
    """-1 where the one is less, 1 where it is greater; of those that are equal, less where the other has more."""
    less = one < other
    if more is not None:
        less |= (one == other) & more
    return (one > other).astype(np.int8) - less.astype(np.int8)


def _by_order(comparison: Comparison, order: NDArray[np.int8], left: pa.Array, right: pa.Array) -> pa.Array:
    found = pa.array(_PYTHON[comparison](order, 0))
    if not (left.null_count or right.null_count):
        return found
    return pc.if_else(pc.and_(left.is_valid(), right.is_valid()), found, None)


def _unlike(one: str, other: str) -> pa.ArrowTypeError:
    return pa.ArrowTypeError(f"{one} does not compare with {other}")
