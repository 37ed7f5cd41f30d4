"""Hashing values into the rows of a table: the same everywhere and for ever, for a model keeps what it learned by it.

The hash is XXH3-64 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md) with the salt as its seed, of a string's
UTF-8 bytes, or of an integer's 8 bytes, two's complement, little-endian; the bucket is the hash modulo their number.
The string "7" and the integer 7 are different values.
"""

from collections.abc import Callable
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from recsys.data.arrow import is_integer, is_string

MAX_SALT = 2**64 - 1

_FEW = 32
"""Strings that are mapped one by one sooner than the distinct ones among them are found."""


def hash_ids(values: pa.Array, num_buckets: int, salt: int = 0) -> NDArray[np.int64]:
    """The bucket of each value, 0 .. `num_buckets` - 1; -1 for nulls.

    Args:
        values: (N,) integers or strings, or a dictionary of either.
        num_buckets: at least 1.
        salt: 0 .. `MAX_SALT`; two salts give independent buckets.

    Returns:
        (N,) buckets.
    """

    def buckets(distinct: pa.Array) -> NDArray[np.int64]:
        return (hash_values(distinct, salt) % np.uint64(num_buckets)).astype(np.int64)

    return map_values(values, buckets)


def hash_values(values: pa.Array, salt: int = 0) -> NDArray[np.uint64]:
    """XXH3-64 of each of (N,) integers or strings without nulls; shape (N,)."""
    if is_integer(values.type):
        return _hash_integers(values.cast(pa.int64(), safe=False).to_numpy().view(np.uint64), salt)
    binary = pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary()
    encoded = values.view(binary).to_numpy(zero_copy_only=False)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded, repeat(salt)), np.uint64, len(encoded))


def map_values(values: pa.Array, function: Callable[[pa.Array], NDArray[np.int64]]) -> NDArray[np.int64]:
    """What `function` makes of each value, -1 for nulls.

    Of more than a few strings, and of what comes as a dictionary, the function is asked for distinct values alone.

    Args:
        values: (N,) integers or strings, or a dictionary of either.
        function: from (M,) values without nulls to (M,) numbers.
    """
    if is_string(values.type) and len(values) > _FEW:
        values = values.dictionary_encode()
    if not pa.types.is_dictionary(values.type):
        return _map_valid(values, function)
    distinct = np.append(_map_valid(values.dictionary, function), -1)
    codes = pc.fill_null(values.indices.cast(pa.int64()), len(distinct) - 1)
    mapped: NDArray[np.int64] = distinct[codes.to_numpy(zero_copy_only=False)]
    return mapped


def _map_valid(values: pa.Array, function: Callable[[pa.Array], NDArray[np.int64]]) -> NDArray[np.int64]:
    if not values.null_count:
        return function(values)
    mapped = np.full(len(values), -1, np.int64)
    mapped[values.is_valid().to_numpy(zero_copy_only=False)] = function(values.drop_null())
    return mapped


def _hash_integers(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """XXH3-64 of 8 bytes each, as the library has it (the specification's inputs of 4 to 8 bytes), on whole arrays."""
    mask = 2**64 - 1
    swapped = int.from_bytes((salt & 0xFFFFFFFF).to_bytes(4, "little"), "big")
    # Bytes 8..16 and 16..24 of the default secret.
    flip = ((0x1CAD21F72C81017C ^ 0xDB979083E96DD4DE) - (salt ^ (swapped << 32))) & mask
    mixed = (values >> np.uint64(32)) | (values << np.uint64(32))
    mixed ^= np.uint64(flip)
    mixed ^= _rotated(mixed, 49) ^ _rotated(mixed, 24)
    mixed *= np.uint64(0x9FB21C651E98DF25)
    mixed ^= (mixed >> np.uint64(35)) + np.uint64(8)
    mixed *= np.uint64(0x9FB21C651E98DF25)
    mixed ^= mixed >> np.uint64(28)
    return mixed


def _rotated(values: NDArray[np.uint64], left: int) -> NDArray[np.uint64]:
    return (values << np.uint64(left)) | (values >> np.uint64(64 - left))
