"""What kinds of Arrow types there are to the reader, and values out of lists."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def is_string(kind: pa.DataType) -> bool:
    """Whether values of a type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Whether values of a type are integers."""
    return bool(pa.types.is_integer(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type are integers, floating or boolean."""
    return bool(is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values in a column: those of its lists, those of its dictionary."""
    if is_list(kind):
        kind = kind.value_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = table.column(name)
    if column.num_chunks == 1:
        return column.chunk(0)  # what combining would copy
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def flat(lists: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """Length of each list, 0 for nulls, and the values of all."""
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
    numbers = plain(numbers)
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
