"""A column of any type in any role is read or refused by its name: never another exception."""

from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from reading import dense_column, domain_column, sparse_column

from recsys.config import ListTextConfig
from recsys.data.features import Columns
from recsys.data.ids import BucketizedIds, DatetimeIds, HashedIds, PlainIds, VocabularyIds
from recsys.data.rows import Rows
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary

WORDS = VocabularyIds(Vocabulary(pa.array(["b", "a"], pa.large_string()), pa.array([2, 1]), "words.parquet"))
NUMBERS = VocabularyIds(Vocabulary(pa.array([50, 7]), pa.array([2, 1]), "numbers.parquet"))

SINGLE: list[tuple[pa.DataType, list[Any]]] = [
    *((kind, [0, 1]) for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64())),
    (pa.int64(), [-(2**63), 2**63 - 1]),
    (pa.uint64(), [0, 2**64 - 1]),
    *((kind, [0.0, 1.0]) for kind in (pa.float16(), pa.float32(), pa.float64())),
    (pa.float64(), [float("nan"), float("-inf")]),
    *((kind, [Decimal(0), Decimal(1)]) for kind in (pa.decimal32(5, 2), pa.decimal128(38, 9), pa.decimal256(70, 60))),
    (pa.bool_(), [False, True]),
    (pa.null(), [None, None]),
    *((kind, ["a", ""]) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, [b"ab", b"\xff\xff"]) for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2))),
    *((pa.timestamp(unit), [0, -(2**63)]) for unit in ("s", "ms", "us", "ns")),
    (pa.timestamp("us", "Asia/Tokyo"), [datetime(9999, 12, 31, 23), datetime(1, 1, 2)]),
    *((kind, [date(1, 1, 1), date(9999, 12, 31)]) for kind in (pa.date32(), pa.date64())),
    *((kind, [time(1), time(2)]) for kind in (pa.time32("s"), pa.time64("us"))),
    (pa.duration("ms"), [timedelta(1), timedelta(2)]),
    (pa.struct([("a", pa.int64())]), [{"a": 1}, {"a": None}]),
    (pa.map_(pa.string(), pa.int64()), [[("a", 1)], []]),
]
ROLES: dict[str, dict[str, Any]] = {
    **{
        f"{name}{suffix}": {"sparse": {"f": sparse_column("c", 24, ids, **options)}}
        for name, ids in {
            "plain": PlainIds(24),
            "hashed in range": PlainIds(24, "hash"),
            "clipped": PlainIds(24, "clip_to_oov"),
            "hash": HashedIds(24),
            "words": WORDS,
            "numbers": NUMBERS,
            "buckets": BucketizedIds((0.5, 2.0)),
            "hour": DatetimeIds("hour"),
            "day": DatetimeIds("day", "Europe/Berlin"),
        }.items()
        for suffix, options in {
            "": {},
            ", minimum": {"minimum": 0},
            ", cut": {"max_length": 1, "keep": "last"},
            ", text": {"list_text": ListTextConfig(separator="|")},
            ", ints in text": {"list_text": ListTextConfig(separator="|", items="ints")},
            ", weighted by itself": {"weights": "c"},
        }.items()
    },
    "dense": {"dense": {"x": dense_column("c", None)}},
    "filled": {"dense": {"x": dense_column("c", 0.5, clip=(0.0, 3.0), not_finite="fill")}},
    "weight": {"weight": "c"},
    "reference": {"reference": "c"},
    "domain": {"domain": domain_column("c", 3)},
    **{
        f"label {text}": {"label": text, "label_null": "skip"}
        for text in ("c", "not c", "c == 1", "0.1 < c", "c != 'a'", "c in (0, True, 2.5)", "c in ('a', 'b')", "c >= c")
    },
    "label against others": {"label": "c < i or c < f or c < d or c < t or c < s"},
    **{f"label against {one}": {"label": f"c < {one}", "label_null": "skip"} for one in "ifdts"},
}
OTHERS = {
    "i": pa.array([2**63 - 1, None, 0]),
    "f": pa.array([2.0**63, float("nan"), 0.1]),
    "d": pa.array([Decimal("0.1"), None, Decimal(-1)], pa.decimal128(38, 20)),
    "t": pa.array([2**63 - 1, None, 0], pa.timestamp("ns")),
    "s": pa.array(["a", None, "b"]),
}


def columns_of(kind: pa.DataType, values: list[Any]) -> list[pa.Array]:
    """A column of some values, with a null, alone, in lists of every kind and as a dictionary."""
    single = pa.array([*values, None], kind)
    lists = [pa.list_(kind), pa.large_list(kind), pa.list_view(kind), pa.large_list_view(kind), pa.list_(kind, 2)]
    found = [single, *(pa.array([values, None, values], of) for of in lists), pa.array([[None], [], values], lists[0])]
    with suppress(pa.ArrowNotImplementedError):
        found.append(single.dictionary_encode())
    return found


def outcome(of: Columns, table: pa.Table) -> Rows | str:
    try:
        return of.decode(table, of.layout(of.check_schema(table.schema, "f.parquet")), "f.parquet, row group 0")
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("role", ROLES)
def test_any_type_in_any_role_is_read_or_refused_by_name(role: str) -> None:
    of = Columns(**{"label": "label", "reference": None, "dense": {}, "sparse": {}, **ROLES[role]})
    read = 0
    for kind, values in SINGLE:
        for column in columns_of(kind, values):
            for part in (column, column.slice(1), column.slice(0, 2), column.slice(0, 0)):
                table = pa.table({"label": [0, 1, 0], **OTHERS}).slice(0, len(part)).append_column("c", part)
                found = outcome(of, table)
                if isinstance(found, str):
                    assert found.startswith("f.parquet") and "\n" not in found
                    assert "'c'" in found or "label" in found
                    continue
                read += 1
                assert len(found.labels) == len(part)
                assert all(-1 <= row < 31 for row in found.single.ravel().tolist())
                assert all(0 <= row < 31 for lists in found.lists for row in lists.values.tolist())
    assert read
