"""Hashes are the published ones, and stay what they are: a model that learned by them must find its rows again."""

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.hashing import MAX_SALT, hash_ids, hash_values

GOLDEN = [
    # XXH3-64 with seed 0, and the bucket of 1,000 with salt 7.
    ("", 3244421341483603138, 464),
    ("a", 16629034431890738719, 788),
    ("Zürich", 838883168505079630, 90),
    ("recommender", 11988959581589771735, 954),
    (0, 14374147212387527897, 977),
    (1, 3439722301264460078, 812),
    (-1, 5841669975847748627, 865),
    (2**40, 13032219650562972790, 543),
]


@pytest.mark.parametrize(("value", "hashed", "bucket"), GOLDEN)
def test_hashes_never_change(value: str | int, hashed: int, bucket: int) -> None:
    assert hash_values(pa.array([value])).tolist() == [hashed]
    assert hash_ids(pa.array([value]), 1000, 7).tolist() == [bucket]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(0, MAX_SALT))
def test_integers_have_the_librarys_hash_of_their_eight_bytes(values: list[int], salt: int) -> None:
    expected = [xxhash.xxh3_64_intdigest(value.to_bytes(8, "little", signed=True), salt) for value in values]
    assert hash_values(pa.array(values, pa.int64()), salt).tolist() == expected


@given(st.lists(st.text()), st.integers(0, MAX_SALT))
def test_strings_have_the_librarys_hash_of_their_utf8(values: list[str], salt: int) -> None:
    encodable = [value for value in values if value.isprintable()]
    expected = [xxhash.xxh3_64_intdigest(value.encode(), salt) for value in encodable]
    assert hash_values(pa.array(encodable, pa.string()), salt).tolist() == expected


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()])
def test_an_integers_width_does_not_matter(kind: pa.DataType) -> None:
    assert hash_ids(pa.array([1, 5, 100], kind), 999, 3).tolist() == hash_ids(pa.array([1, 5, 100]), 999, 3).tolist()


@pytest.mark.parametrize(
    "values", [pa.array(["b", None, "a", "b"]), pa.array([7, None, 9, 7]), pa.array(["b", None, "a", "b"]).slice(1)]
)
def test_encoding_does_not_matter_and_nulls_are_minus_one(values: pa.Array) -> None:
    plain = hash_ids(values, 50, 1)
    assert plain.tolist() == hash_ids(values.dictionary_encode(), 50, 1).tolist()
    assert (plain == -1).tolist() == values.is_null().to_pylist()
    if pa.types.is_string(values.type):
        assert plain.tolist() == hash_ids(values.cast(pa.large_string()), 50, 1).tolist()


def test_salts_part_what_meets_under_another() -> None:
    values = pa.array(np.arange(20_000))
    first, second = hash_ids(values, 100, 0), hash_ids(values, 100, 1)
    assert np.bincount(first, minlength=100).min() > 120  # 200 are expected in each
    assert abs((first == second).mean() - 0.01) < 0.005
    assert hash_ids(pa.array([], pa.string()), 10).tolist() == []
