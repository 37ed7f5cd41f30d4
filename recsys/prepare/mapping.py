"""Raw columns as shards hold them: rows of tables, by the mappings that training and serving apply."""

import numpy as np
import pyarrow as pa

from recsys.config import VocabularyIdsConfig
from recsys.data.arrow import flat, is_list
from recsys.data.ids import IdMapping, check_rows
from recsys.data.rows import offsets_of

ANY_ROW = 2**63
"""Rows of a table that holds every id; how many are needed is known when all ids are."""

VOCABULARIES = "vocabularies"
"""Where a data set has its vocabularies."""


def vocabulary_file(name: str) -> str:
    """The vocabulary of a table or a feature, inside its data set."""
    return f"{VOCABULARIES}/{name}.parquet"


def by_vocabulary(name: str) -> VocabularyIdsConfig:
    """Ids that shards already have, by the vocabulary of that name, whose values without a row are null."""
    file = f"${{here}}/{vocabulary_file(name)}"
    return VocabularyIdsConfig(type="vocabulary", file=file, out_of_vocabulary="empty", applied=True)


def mapped(values: pa.Array, mapping: IdMapping, what: str) -> pa.Array:
    """Map a column: int64 in the place of values, in lists where there are lists; nulls stay.

    Args:
        values: of a type that the mapping accepts, or lists of it without nulls inside. Those that have no row become
            null, and are left out of lists.
        mapping: of the column's feature.
        what: column and file, for messages.

    Raises:
        DataError: a value that the mapping refuses.
    """
    if not is_list(values.type):
        ids = mapping.map(values, what).ids.astype(np.int64, copy=False)
        check_rows(ids, mapping, what)
        return pa.array(ids, mask=ids < 0)
    lengths, items = flat(values)
    ids, offsets = mapping.map(items, what).ids.astype(np.int64, copy=False), offsets_of(lengths)
    if check_rows(ids, mapping, what):
        present = ids >= 0
        offsets, ids = offsets_of(present)[offsets], ids[present]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids), mask=values.is_null())
