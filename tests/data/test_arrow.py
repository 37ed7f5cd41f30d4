"""Nulls are filled as Arrow would fill them; unusual types hold what they held in usual ones; decimals are nearest."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.arrow import filled, flat, floats, is_list, usual, usual_type

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


ITEMS = {
    pa.int16(): st.integers(-5, 5),
    pa.string_view(): st.text(max_size=15),
    pa.string(): st.text(max_size=3),
    pa.decimal64(9, 2): st.integers(-999, 999).map(lambda n: Decimal(n) / 100),
}


@pytest.mark.parametrize("item", ITEMS, ids=str)
@pytest.mark.parametrize("of", ["list", "large_list", "list_view", "large_list_view", "fixed", "single"])
@given(data=st.data())
def test_usual_types_hold_the_same_values(item: pa.DataType, of: str, data: st.DataObject) -> None:
    makers = {"list": pa.list_, "large_list": pa.large_list, "list_view": pa.list_view}
    makers |= {"large_list_view": pa.large_list_view, "fixed": lambda it: pa.list_(it, 2), "single": lambda it: it}
    value = st.none() | ITEMS[item]
    if of != "single":
        value = st.none() | st.lists(value, min_size=2 * (of == "fixed"), max_size=2 if of == "fixed" else 4)
    array = pa.array(data.draw(st.lists(value, max_size=8)), makers[of](item))
    start = data.draw(st.integers(0, 4))
    array = array.slice(start, max(0, len(array) - start - data.draw(st.integers(0, 2))))
    found = usual(array)
    found.validate(full=True)
    assert found.type == usual_type(array.type) == usual_type(found.type)
    assert found.to_pylist() == array.to_pylist()
    if is_list(found.type):
        for lists in (array, found):
            lengths, values = flat(lists)
            assert lengths.tolist() == [len(one or []) for one in array.to_pylist()]
            assert values.to_pylist() == [value for one in array.to_pylist() for value in one or []]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_views_that_overlap_and_run_backwards_are_lists(starts: list[int], data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(0, 6 - start)) for start in starts]
    views = pa.ListViewArray.from_arrays(pa.array(starts, pa.int32()), pa.array(sizes, pa.int32()), pa.array(range(6)))
    assert usual(views).to_pylist() == [
        list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)
    ]


DECIMALS = [
    pa.decimal128(15, 2),
    pa.decimal128(38, 18),
    pa.decimal128(38, 30),
    pa.decimal128(20, 0),
    pa.decimal128(3, -5),
    pa.decimal256(76, 40),
]


@pytest.mark.parametrize("kind", DECIMALS, ids=str)
@given(data=st.data())
def test_decimals_are_the_nearest_floating_numbers(kind: pa.DataType, data: st.DataObject) -> None:
    most = 10**kind.precision - 1
    units = st.integers(-most, most) | st.integers(-min(most, 10**15), min(most, 10**15))
    values = data.draw(st.lists(st.none() | units.map(lambda n: Decimal(f"{n}e{-kind.scale}")), max_size=8))
    array = pa.array(values, kind).slice(data.draw(st.integers(0, 2)))
    expected = [None if value is None else float(value) for value in array.to_pylist()]
    assert floats(array).to_pylist() == expected


def test_nulls_of_no_type_are_floating_nulls() -> None:
    assert floats(pa.nulls(2)).equals(pa.array([None, None], pa.float64()))
    lengths, values = flat(pa.nulls(2))
    assert (lengths.tolist(), len(values)) == ([0, 0], 0)
