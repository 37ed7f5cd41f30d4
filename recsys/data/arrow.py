"""What kinds of Arrow types there are to the reader, and values out of lists."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_EXACT_INTEGER = 2**53
_EXACT_POWER = 22  # of ten: up to which float64 has all


def is_string(kind: pa.DataType) -> bool:
    """Whether values of a type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Whether values of a type are integers."""
    return bool(pa.types.is_integer(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type are integers, floating, decimal or boolean."""
    return bool(is_countable(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_countable(kind: pa.DataType) -> bool:
    """Whether values of a type are integers, or booleans, which are 0 and 1."""
    return bool(is_integer(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values in a column: those of its lists, those of its dictionary."""
    if is_list(kind):
        kind = kind.value_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def usual_type(kind: pa.DataType) -> pa.DataType:
    """The type to which `usual` brings values of a type."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_date64(kind):
        return pa.date32()
    if pa.types.is_dictionary(kind):
        values = usual_type(kind.value_type)
        if pa.types.is_null(values):
            return values
        return kind if values == kind.value_type else pa.dictionary(kind.index_type, values, kind.ordered)
    if is_list(kind):
        values = usual_type(kind.value_type)
        if values == kind.value_type:
            return kind
        return pa.list_(values) if pa.types.is_list(kind) else pa.large_list(values)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(usual_type(kind.value_type))
    return kind


def usual(values: pa.Array) -> pa.Array:
    """Values in a type that all else here knows: views and lists of a fixed size as ordinary strings and lists."""
    kind = usual_type(values.type)
    if kind == values.type:
        return values
    if pa.types.is_null(kind):
        return pa.nulls(len(values))
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(values.indices, usual(values.dictionary), ordered=kind.ordered)
    if not is_list(kind):
        return values.cast(kind, safe=False)
    # Not by a cast, which takes the lists of a slice of views, and of views of strings, for others than they are.
    lengths, items = flat(values)
    of = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32() if pa.types.is_list(kind) else pa.int64())
    return of.from_arrays(offsets, usual(items), mask=values.is_null() if values.null_count else None)


def integers(values: pa.Array) -> pa.Array:
    """Booleans, or a dictionary of them, as 0 and 1; all else as it is."""
    if not pa.types.is_boolean(value_type(values.type)):
        return values
    return plain(values).cast(pa.int8())


def floats(values: pa.Array) -> pa.Array:
    """Decimals as the nearest float64, and nulls of no type as nulls of that; other numbers as they are."""
    if pa.types.is_null(values.type):
        return values.cast(pa.float64())
    if not pa.types.is_decimal(values.type):
        return values
    scale = values.type.scale
    if pa.types.is_decimal128(values.type) and 0 <= scale <= _EXACT_POWER:
        # One division of two exact numbers is rounded once. Arrow's own cast is not always the nearest.
        words = np.frombuffer(values.buffers()[1] or b"", np.int64).reshape(-1, 2)
        low, high = words[values.offset : values.offset + len(values)].T
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        low, high = np.where(valid, low, 0), np.where(valid, high, 0)
        if ((high == low >> 63) & (low >= -_EXACT_INTEGER) & (low <= _EXACT_INTEGER)).all():
            return pa.array(low / 10.0**scale, mask=~valid)
    if scale > values.type.precision:  # which Arrow cannot write, and Parquet does not allow
        return values.cast(pa.float64())
    return values.cast(pa.string()).cast(pa.float64())


def whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = table.column(name)
    if column.num_chunks == 1:
        return column.chunk(0)  # what combining would copy
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def usual_table(table: pa.Table) -> pa.Table:
    """A table with all columns in types that all else here knows: Arrow itself takes no rows of views."""
    return pa.table([usual(whole(table, name)) for name in table.column_names], table.column_names)


def flat(lists: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """Length of each list, 0 for nulls, and the values of all; a column of type null has nulls alone."""
    if pa.types.is_null(lists.type):
        return np.zeros(len(lists), np.int64), lists.slice(0, 0)
    lengths = filled(pc.list_value_length(lists), 0)
    return lengths.astype(np.int64, copy=False), lists.flatten()  # which leaves out what null lists may cover


def plain(values: pa.Array) -> pa.Array:
    """Values that come as a dictionary as they are without."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def filled(numbers: pa.Array, value: float) -> NDArray[Any]:
    """Integers or floating numbers, or a dictionary of them, nulls replaced by a number that their type holds."""
    found: NDArray[Any]
    numbers = plain(numbers) if pa.types.is_dictionary(numbers.type) else numbers
    if not numbers.null_count:
        found = numbers.to_numpy()
        return found
    validity, data = numbers.buffers()
    kept = np.unpackbits(np.frombuffer(validity, np.uint8), count=numbers.offset + len(numbers), bitorder="little")
    held = pa.Array.from_buffers(numbers.type, len(numbers), [None, data], offset=numbers.offset).to_numpy()
    # By the bits, without a branch at each value, which fails to be foreseen where nulls are many.
    bits = np.dtype(f"u{held.itemsize}")
    instead = np.array(value, held.dtype).view(bits)
    found = np.negative(kept[numbers.offset :].astype(bits))  # all ones where there is a value
    found &= held.view(bits) ^ instead
    found ^= instead
    return found.view(held.dtype)


def split_texts(texts: pa.Array, separator: str) -> pa.Array:
    """The lists of strings that texts hold; an empty text holds none, and is null."""
    return pc.split_pattern(pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts), separator)


def raised(numbers: pa.Array, minimum: float) -> pa.Array:
    """Numbers, those below a minimum raised to it; nulls, NaN and infinities as they are, so that none is hidden."""
    numbers = floats(integers(plain(numbers)))
    kind = numbers.type
    if is_integer(kind) and minimum < np.iinfo(kind.to_pandas_dtype()).min:
        return numbers
    if not holds(kind, minimum):  # integers of few bytes are widened
        kind = pa.int64() if is_integer(kind) and holds(pa.int64(), minimum) else pa.float64()
    numbers, least = numbers.cast(kind, safe=False), pa.scalar(minimum).cast(kind)
    below = pc.less(numbers, least)
    if not pc.any(below, min_count=0).as_py():
        return numbers
    if pa.types.is_floating(kind):
        below = pc.and_(below, pc.is_finite(numbers))
    return pc.if_else(below, least, numbers)


def holds(kind: pa.DataType, value: float) -> bool:
    """Whether a value of a type can be just this number."""
    if pa.types.is_floating(kind):
        return bool(pa.types.is_float64(kind) or (pa.types.is_float32(kind) and np.float32(value) == value))
    if not is_integer(kind):
        return False
    limits = np.iinfo(kind.to_pandas_dtype())
    return float(value).is_integer() and bool(limits.min <= value <= limits.max)


KINDS_OF_VALUES = ("numbers", "strings", "dates", "others")


def kind_of_values(kind: pa.DataType) -> str | None:
    """Which of `KINDS_OF_VALUES` a column holds, in lists or not; None if nothing but nulls."""
    while hasattr(kind, "value_type"):  # of lists of any sort, of dictionaries
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        return "numbers"
    if is_string(kind) or pa.types.is_string_view(kind):
        return "strings"
    return "dates" if pa.types.is_date(kind) or pa.types.is_timestamp(kind) else "others"
