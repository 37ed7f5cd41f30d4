"""What shards say of rows that a converter mapped: by which mapping, so that another is never taken for it.

Each column of rows carries its mapping in the metadata of its Arrow field, which Parquet files keep. Were a model
trained on rows by one vocabulary, and judged on rows by another, every figure would be wrong and nothing would fail.
"""

import json
from typing import Any, NamedTuple

import pyarrow as pa

from recsys.config import shortened
from recsys.data.arrow import KINDS_OF_VALUES, kind_of_values
from recsys.data.ids import BucketizedIds, DatetimeIds, HashedIds, IdMapping, PlainIds, VocabularyIds
from recsys.data.storage import DataError

_KEY, _VALUES = b"hilorec.ids", b"hilorec.values"


class AppliedIds(NamedTuple):
    """How raw values became the rows that shards hold.

    Attributes:
        mapping: of the values.
        minimum: to which they were raised before.
    """

    mapping: IdMapping
    minimum: int | None = None


def marked(field: pa.Field, applied: AppliedIds, values: pa.DataType) -> pa.Field:
    """A column of rows that says what they are by, and of what; integers that were rows as they came say nothing.

    Args:
        field: of the column.
        applied: how its rows were made.
        values: the type of what they were made of.
    """
    if isinstance(applied.mapping, PlainIds):
        return field
    told = {**(field.metadata or {}), _KEY: _described(applied).encode()}
    kind = kind_of_values(values)
    return field.with_metadata(told if kind is None else {**told, _VALUES: kind.encode()})


def kind_before(field: pa.Field) -> str | None:
    """Which of `recsys.data.arrow.KINDS_OF_VALUES` rows were made of, as far as their column says."""
    told = (field.metadata or {}).get(_VALUES, b"").decode(errors="replace")
    return told if told in KINDS_OF_VALUES else None


def check_mark(field: pa.Field, source: str, path: str, ids: IdMapping, applied: AppliedIds | None) -> None:
    """Refuse a column whose rows are by another mapping than its feature says; one that says nothing is believed.

    Args:
        field: of the column.
        source: what has the column, for messages.
        path: config path of the feature's ids.
        ids: maps what the column holds.
        applied: how its rows were made, where the config says that they were.

    Raises:
        DataError: the rows are by another mapping, or would be mapped again.
    """
    found = (field.metadata or {}).get(_KEY)
    if found is None:
        return
    if applied is None and not isinstance(ids, PlainIds):
        raise DataError(
            f"{source}: column {field.name!r} holds rows of a table already, which {path} would map again; set applied "
            "to true where shards hold rows, and ask about raw values"
        )
    if applied is not None and found != (wanted := _described(applied).encode()):
        raise DataError(
            f"{source}: column {field.name!r} holds rows by {_shown(found)}, but {path} is {_shown(wanted)}; take ids "
            "and vocabulary from the data set that the shards belong to, or convert them anew"
        )


def _described(applied: AppliedIds) -> str:
    told: dict[str, Any]
    match applied.mapping:
        case HashedIds(num_rows=buckets, salt=salt):
            told = {"type": "hash", "buckets": buckets, "salt": salt}
        case VocabularyIds(vocabulary=vocabulary, unknown_is_row_0=unknown_is_row_0):
            told = {"type": "vocabulary", "sha256": vocabulary.digest}
            told["out_of_vocabulary"] = "row_0" if unknown_is_row_0 else "empty"
        case BucketizedIds(boundaries=boundaries):
            told = {"type": "bucketize", "boundaries": list(boundaries)}
        case DatetimeIds(part=part, timezone=timezone):
            told = {"type": "datetime", "part": part, "timezone": timezone}
        case other:
            raise TypeError(f"{type(other).__name__} is no mapping that shards can tell")
    return json.dumps(told if applied.minimum is None else {**told, "minimum": applied.minimum})


def _shown(told: bytes) -> str:
    return shortened(told.decode(errors="replace"), 200)
