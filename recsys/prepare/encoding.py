"""From the values of a column to the rows of an embedding table: as they are, hashed, or by a counted vocabulary."""

from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.hashing import hash_ids
from recsys.data.storage import DataError

_COMPACT_ROWS = 1 << 18


class Ids(Protocol):
    """Maps values to ids."""

    @property
    def size(self) -> int:
        """Rows that a table needs for all ids handed out so far."""

    def of(self, values: pa.Array) -> pa.Int64Array:
        """The ids of values, of the same length; null where the value is."""


class KeptIds:
    """Ids that are rows of a table already: whole numbers from 0."""

    def __init__(self) -> None:
        self.size = 1

    def of(self, values: pa.Array) -> pa.Int64Array:
        """The values themselves."""
        self.size = max(self.size, (pc.max(values).as_py() or 0) + 1)
        return values


class HashedIds:
    """Buckets of `recsys.data.hashing.hash_ids`; different values may share one."""

    def __init__(self, buckets: int, seed: int) -> None:
        self.size, self._seed = buckets, seed

    def of(self, values: pa.Array) -> pa.Int64Array:
        """The values' buckets; each different value is hashed once a call."""
        ids = hash_ids(values, self.size, self._seed)
        return pa.array(ids, mask=ids < 0)


class VocabularyIds:
    """Ids from 1 in the order of a vocabulary; any value that it lacks is row 0.

    Args:
        values: different texts.
    """

    def __init__(self, values: pa.Array) -> None:
        self.size, self._values = len(values) + 1, values

    def of(self, values: pa.Array) -> pa.Int64Array:
        """The values' places in the vocabulary."""
        encoded = values.dictionary_encode()
        places = pc.index_in(encoded.dictionary.cast(self._values.type), self._values)
        ids = pc.add(places.fill_null(-1).cast(pa.int64()), 1)
        return ids.take(encoded.indices)


class ValueCounts:
    """How often each value of several vocabularies occurs.

    Memory grows with the number of different values alone, which `limit` bounds: each takes its bytes and 16 more,
    twice that as counts wait to be merged and four times while they are.

    Args:
        names: of the vocabularies.
        limit: different values of all vocabularies together.
    """

    def __init__(self, names: set[str], limit: int) -> None:
        self._merged = {name: _counts(pa.array([], pa.large_string())) for name in names}
        self._pending: dict[str, list[pa.Table]] = {name: [] for name in names}
        self._limit = limit

    def add(self, name: str, values: pa.Array) -> None:
        """Counts values, nulls aside.

        Raises:
            DataError: there are more different values than the limit.
        """
        pending = self._pending[name]
        pending.append(_counts(values.drop_null().cast(pa.large_string())))
        # Merging when as much is pending as there is already keeps the whole work linear in the values.
        if sum(map(len, pending)) > max(_COMPACT_ROWS, len(self._merged[name])):
            self._merge(name)

    def vocabulary(self, name: str, min_count: int) -> pa.Table:
        """The values that occur at least `min_count` times.

        Returns:
            Columns `value` and `count`, by descending count, ties by value.
        """
        self._merge(name)
        counts = self._merged[name]
        counts = counts.filter(pc.greater_equal(counts["count"], min_count))
        return counts.sort_by([("count", "descending"), ("value", "ascending")])

    def _merge(self, name: str) -> None:
        table = pa.concat_tables([self._merged[name], *self._pending[name]])
        merged = table.group_by("value").aggregate([("count", "sum")])
        self._merged[name] = merged.select(["value", "count_sum"]).rename_columns(["value", "count"])
        self._pending[name] = []
        if (found := sum(map(len, self._merged.values()))) > self._limit:
            sizes = {one: len(counts) for one, counts in self._merged.items()}
            largest = max(sizes, key=lambda one: sizes[one])
            raise DataError(
                f"more than {self._limit:,} different values to count ({found:,} so far, {sizes[largest]:,} of them in "
                f"table {largest!r}); hash that table's ids, or raise --max-values as memory allows"
            )


def _counts(values: pa.Array) -> pa.Table:
    value, count = pc.value_counts(values).flatten()
    return pa.table({"value": value, "count": count})
