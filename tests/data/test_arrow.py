"""Nulls among numbers are filled as Arrow would fill them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.arrow import filled

KINDS = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]


@pytest.mark.parametrize("kind", [*KINDS, pa.float32(), pa.float64()], ids=str)
@given(
    st.lists(st.none() | st.integers(0, 100), max_size=40), st.integers(0, 100), st.integers(0, 9), st.integers(0, 9)
)
def test_nulls_are_filled(kind: pa.DataType, values: list[int | None], fill: int, skipped: int, left: int) -> None:
    array = pa.array(values, kind).slice(skipped, max(len(values) - skipped - left, 0))
    found = filled(array, fill)
    assert found.dtype == np.dtype(kind.to_pandas_dtype())
    assert found.tolist() == array.fill_null(fill).to_pylist()


def test_a_fill_may_be_negative_or_no_number_and_values_keep_their_bits() -> None:
    assert filled(pa.array([1, None, -7], pa.int16()), -1).tolist() == [1, -1, -7]
    found = filled(pa.array([None, -0.0, float("inf"), 5e-324]), float("nan"))
    assert np.isnan(found[0]) and np.signbit(found[1]) and found[2:].tolist() == [float("inf"), 5e-324]
