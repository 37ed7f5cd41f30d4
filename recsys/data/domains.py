"""How many rows each domain has in each row group, which footers do not tell: one pass over columns."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.data.parquet import ParquetShards


class DomainCounts(NamedTuple):
    """Of a split, or of some of its row groups, n domains.

    Attributes:
        rows: (G, n) int64, of each row group; 0 in those that were left out. Rows of none, if the config has such, are
            behind those of the domains.
        labels: (2, n) int64, rows of label 0 and of label 1.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]


def count_domains(shards: ParquetShards, row_groups: Iterable[int], *, threads: int = 2) -> DomainCounts:
    """Count the rows of each domain, and their labels.

    Args:
        shards: with a domain and a label.
        row_groups: that are read; all others count as empty.
        threads: that read.

    Raises:
        DataError: as `ParquetShards.read`.
    """
    domain = shards.columns.domain
    assert domain is not None and shards.columns.label is not None
    columns = replace(shards.columns, reference=None, dense={}, sparse={}, weight=None)
    layout = columns.layout(frozenset())
    numbers = len(domain.labels)
    rows = np.zeros((len(shards.row_counts), numbers), np.int64)
    labels = np.zeros((2, numbers), np.int64)

    def count(group: int) -> NDArray[np.int64]:
        """(3, n) all rows, and those of label 0 and 1."""
        found = columns.decode(shards.table(group, columns.names), layout, shards.where(group))
        kinds = (found.domain, found.domain[found.labels == 0], found.domain[found.labels == 1])
        return np.stack([np.bincount(of_kind, minlength=numbers) for of_kind in kinds])

    read = [group for group in row_groups if shards.row_counts[group]]
    with ThreadPoolExecutor(threads, thread_name_prefix="domains") as pool:
        for group, counts in zip(read, pool.map(count, read), strict=True):
            rows[group] = counts[0]
            labels += counts[1:]
    return DomainCounts(rows, labels)
