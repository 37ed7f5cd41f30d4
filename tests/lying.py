"""Parquet files whose footers say other numbers than their pages hold."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def varint(number: int) -> bytes:
    """A number as footers have it."""
    number, found = 2 * number, b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


ROWS = 777
FEW = {
    "label": pa.array([0, 1, 1] * (ROWS // 3)),
    "truth": pa.array([0.5] * ROWS),
    "domain": pa.array([1] * ROWS),
    "x": pa.array(np.arange(ROWS, dtype=np.float32)),
    "user": pa.array(range(ROWS), pa.int32()),
    "tags": pa.array([[row % 50] for row in range(ROWS)]),
}
ALL, COUNT = tuple(range(len(FEW) + 2)), len(FEW)


def saying(said: int, places: tuple[int, ...] = ALL, **options: Any) -> bytes:
    """A file whose footer says another number: of rows (place 0), values of each column, rows of the row group."""
    sink = io.BytesIO()
    pq.write_table(pa.table(FEW), sink, store_schema=False, write_statistics=False, **options)
    content = sink.getvalue()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    i64 = b"\x16"  # of the field after the one before
    parts = content[start:-8].split(i64 + varint(ROWS))
    assert len(parts) == len(ALL) + 1
    footer = parts[0]
    for place, part in enumerate(parts[1:]):
        footer += i64 + varint(said if place in places else ROWS) + part
    return content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
