"""How many ids sparse features have in the mean row, told without reading all rows."""

from dataclasses import replace

import numpy as np

from recsys.data.parquet import ParquetShards

_ROWS = 1 << 13
"""Rows that are read where footers do not tell."""


def mean_lengths(shards: ParquetShards) -> dict[str, float]:
    """Mean number of ids of each sparse feature in a row; the same on every rank.

    Of lists it is what footers count (`ShardTables.values_per_row`). Footers know nothing of lists that are texts: of
    these the first rows are read. `max_length` bounds both, and a feature of at most one id counts as one.

    Raises:
        DataError: as `ParquetShards.read`.
    """
    features = {name: column.settings for name, column in shards.columns.sparse.items()}
    lists = {name: features[name].column or name for name in features if name in shards.layout.lists}
    texts = {name for name in lists if features[name].list_text is not None}
    counted = shards.values_per_row(tuple({lists[name]: None for name in lists if name not in texts}))
    means = {name: counted[column] for name, column in lists.items() if name not in texts}
    means |= _of_texts(shards, texts) if texts else {}
    return {
        name: min(means.get(name, 1.0), np.inf if feature.max_length is None else feature.max_length)
        for name, feature in features.items()
    }


def _of_texts(shards: ParquetShards, names: set[str]) -> dict[str, float]:
    sparse = {name: column for name, column in shards.columns.sparse.items() if name in names}
    columns = replace(shards.columns, label=None, reference=None, dense={}, sparse=sparse, domain=None, weight=None)
    layout = columns.layout(frozenset(names))
    group = next(number for number, rows in enumerate(shards.row_counts) if rows)
    table = shards.table(group, columns.names).slice(0, _ROWS)
    rows = columns.decode(table, layout, shards.where(group))
    return {name: len(ids.values) / len(table) for name, ids in zip(sparse, rows.lists, strict=True)}
