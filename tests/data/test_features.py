"""What features become: ids by each mapping, cut lists, weights, dense transforms, labels; what is counted."""

import re
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reading import dense_column, domain_column, sparse_column

from recsys.config import ConfigError, ListTextConfig
from recsys.data import labels
from recsys.data.batch import Part, build_batch
from recsys.data.features import Columns
from recsys.data.hashing import hash_ids
from recsys.data.ids import (
    BucketizedIds,
    DatetimeIds,
    HashedIds,
    IdMapping,
    Mapped,
    PlainIds,
    VocabularyIds,
    check_rows,
)
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.rows import Jagged, Rows
from recsys.data.shuffling import take
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary
from recsys.prepare.mapping import mapped


def named(value: object) -> str:
    """A test's id, the same in every process."""
    return f"VocabularyIds({value.vocabulary.source})" if isinstance(value, VocabularyIds) else str(value)


WORDS = VocabularyIds(Vocabulary(pa.array(["b", "a"], pa.large_string()), pa.array([2, 1]), "words.parquet"))
NUMBERS = VocabularyIds(Vocabulary(pa.array([50, 7]), pa.array([2, 1]), "numbers.parquet"))


def columns(**changed: Any) -> Columns:
    return Columns(**{"label": "label", "reference": None, "dense": {}, "sparse": {}, **changed})


def decode(of: Columns, table: dict[str, Any]) -> Rows:
    whole = pa.table({"label": [0, 1, 0], **table})
    return of.decode(whole, of.layout(of.check_schema(whole.schema, "f.parquet")), "f.parquet, row group 0")


def bags(rows: Rows, place: int = 0) -> list[list[int]]:
    jagged = rows.lists[place]
    return [part.tolist() for part in np.split(jagged.values, jagged.offsets[1:-1])]


def counts(rows: Rows) -> dict[tuple[str, str], list[int]]:
    return {key: happened.tolist() for key, happened in rows.counts.items()}


def ids_of(ids: IdMapping, values: pa.Array, rows: int = 10, **options: Any) -> Rows:
    return decode(columns(sparse={"f": sparse_column("c", rows, ids, **options)}), {"c": values})


@pytest.mark.parametrize(
    ("ids", "values", "expected"),
    [
        (PlainIds(10), [3, None, 9], [3, -1, 9]),
        (
            HashedIds(10, 7),
            ["x", None, "ü"],
            [*hash_ids(pa.array(["x"]), 10, 7), -1, *hash_ids(pa.array(["ü"]), 10, 7)],
        ),
        (HashedIds(10, 7), [-5, None, 5], [*hash_ids(pa.array([-5]), 10, 7), -1, *hash_ids(pa.array([5]), 10, 7)]),
        (WORDS, ["a", None, "z"], [2, -1, 0]),
        (NUMBERS, [7, None, 8], [2, -1, 0]),
        (BucketizedIds((1.0, 5.0)), [0.5, None, 5.0], [0, -1, 2]),
        (BucketizedIds((1.0, 5.0)), [1, None, 99], [1, -1, 2]),
    ],
    ids=named,
)
def test_ids_are_the_same_single_in_lists_and_encoded(ids: IdMapping, values: list[Any], expected: list[int]) -> None:
    array = pa.array(values)
    for single in (array, array.dictionary_encode()):
        assert ids_of(ids, single).single.tolist() == [expected]
    lists = [[values[0], values[2]], None, [values[2]]]
    wanted = [[expected[0], expected[2]], [], [expected[2]]]
    flat = pa.array([values[0], values[2], values[2]], array.type).dictionary_encode()
    offsets = pa.array([0, None, 2, 3])  # the second list is null
    for of_lists in (
        pa.array(lists, pa.list_(array.type)),
        pa.array(lists, pa.large_list(array.type)),
        pa.ListArray.from_arrays(offsets.cast(pa.int32()), flat),
        pa.LargeListArray.from_arrays(offsets, flat),
    ):
        assert bags(ids_of(ids, of_lists)) == wanted


@pytest.mark.parametrize("timezone", ["UTC", "Europe/Berlin"])
def test_dates_are_taken_apart_in_their_time_zone(timezone: str) -> None:
    moments = pa.array([datetime(2024, 2, 29, 23, 30), None, datetime(2024, 7, 31, 23, 30)], pa.timestamp("us"))
    parts = {"hour": [23, -1, 23], "weekday": [3, -1, 2], "day": [28, -1, 30], "month": [1, -1, 6]}
    if timezone != "UTC":  # an hour or two ahead, so the next day
        parts = {"hour": [0, -1, 1], "weekday": [4, -1, 3], "day": [0, -1, 0], "month": [2, -1, 7]}
    seconds = moments.cast(pa.timestamp("s")).cast(pa.int64())
    elsewhere = moments.cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us", "America/New_York"))
    for part, expected in parts.items():
        for values in (moments, moments.cast(pa.timestamp("ns")), seconds, elsewhere):
            assert ids_of(DatetimeIds(part, timezone), values, 31).single.tolist() == [expected]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (PlainIds(10), [1, 10, 11], "has 2 values out of range, such as 10; its table takes ids 0..9: raise num_emb"),
        (BucketizedIds((1.0,)), [0.0, float("nan"), 1.0], "has 1 value NaN, which is in no bucket"),
        (DatetimeIds("hour"), [0, 1_700_000_000_000, 0], "has 1 value that cannot be seconds since 1970, such as 17"),
        (HashedIds(10), [["a"], ["b", None], None], "has 1 nulls inside lists"),
    ],
)
def test_refused_values_name_file_feature_column_and_value(ids: IdMapping, values: list[Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        ids_of(ids, pa.array(values))
    assert str(error.value).startswith("f.parquet, row group 0: sparse feature f (column 'c') ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (PlainIds(10), list("abc"), "type string, which needs features.sparse.f.ids: {type: hash} or a vocabulary"),
        (HashedIds(10), [0.5, 1.0, 2.0], "type double; integers, strings or lists of them are needed"),
        (WORDS, [1, 2, 3], "type int64; strings or lists of strings, as in words.parquet, are needed"),
        (NUMBERS, list("abc"), "type string; integers or lists of integers, as in numbers.parquet, are needed"),
        (BucketizedIds((1.0,)), list("abc"), "type string; numbers or lists of numbers are needed"),
        (DatetimeIds("hour"), [0.5, 1.0, 2.0], "type double; timestamps or integers (seconds since 1970)"),
        (DatetimeIds("hour"), [date(2024, 1, 1)] * 3, "type date32[day]; timestamps or integers (seconds since 1970)"),
        (DatetimeIds("day"), list("abc"), "type string; timestamps, dates or integers (seconds since 1970)"),
        (
            PlainIds(10),
            [Decimal(1)] * 3,
            "type decimal128(1, 0); integers or lists of integers are needed; cast it when",
        ),
    ],
)
def test_refused_types_name_what_is_needed(ids: IdMapping, values: list[Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        ids_of(ids, pa.array(values))
    assert "f.parquet: column 'c' (sparse feature f) has " + message in str(error.value)


def test_integers_are_put_into_buckets_exactly() -> None:
    ids = BucketizedIds((-0.5, 2.0**53, 2.0**54, 2.0**63, 1e300))
    values = [-1, 0, 2**53 - 1, 2**53, 2**54 - 1, 2**54, 2**63 - 1, None]
    assert ids.map(pa.array(values), "here").ids.tolist() == [0, 1, 1, 2, 2, 3, 3, -1]
    assert ids.map(pa.array([0, 2**63 - 1, 2**63, 2**64 - 1], pa.uint64()), "here").ids.tolist() == [1, 3, 4, 4]
    assert ids.map(pa.array([-128, 127, None], pa.int8()), "here").ids.tolist() == [0, 1, -1]
    assert BucketizedIds((0.1, 0.3)).map(pa.array([Decimal("0.09"), Decimal("0.10"), None]), "h").ids.tolist() == [
        0,
        1,
        -1,
    ]


@pytest.mark.parametrize("ids", [PlainIds(2), HashedIds(10, 7), VocabularyIds(NUMBERS.vocabulary)], ids=named)
def test_booleans_are_the_integers_0_and_1(ids: IdMapping) -> None:
    values = [False, None, True]
    wanted = ids_of(ids, pa.array([0, None, 1])).single.tolist()
    array = pa.array(values)
    for single in (array, array.dictionary_encode()):
        assert ids_of(ids, single).single.tolist() == wanted
    lists = ids_of(ids, pa.array([[False, True], None, [True]]))
    assert bags(lists) == [[wanted[0][0], wanted[0][2]], [], [wanted[0][2]]]
    assert ids_of(ids, array, minimum=1).single.tolist() == ids_of(ids, pa.array([1, None, 1])).single.tolist()


@pytest.mark.parametrize("ids", [HashedIds(10, 7), WORDS], ids=named)
def test_views_of_strings_are_strings(ids: IdMapping) -> None:
    array = pa.array(["a", None, "z"])
    views = array.cast(pa.string_view())
    encoded = array.dictionary_encode()
    wanted = ids_of(ids, array).single.tolist()
    of_views = pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.string_view()))
    for single in (views, of_views):
        assert ids_of(ids, single).single.tolist() == wanted
    lists = [["a", "z"], None, ["z"]]
    expected = bags(ids_of(ids, pa.array(lists)))
    for kind in (pa.list_(pa.string_view()), pa.list_view(pa.string_view()), pa.large_list_view(pa.string())):
        assert bags(ids_of(ids, pa.array(lists, kind))) == expected
    texts = pa.array(["a|z", None, "z"], pa.string_view())
    for column in (texts, texts.cast(pa.string()).dictionary_encode()):
        of_text = ids_of(ids, column, list_text=ListTextConfig(separator="|"))
        assert bags(of_text) == expected


@pytest.mark.parametrize(
    "kind", [pa.list_view(pa.int32()), pa.large_list_view(pa.int64()), pa.list_(pa.int16(), 2)], ids=named
)
def test_views_of_lists_and_lists_of_one_length_are_lists(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.array([[9, 9], [1, 2], None, [3, 1]], kind)
    weights = pa.array([[9, 9], [0.5, 1.5], None, [2, 1]], pa.list_(pa.float32(), 2))
    of = columns(sparse={"f": sparse_column("c", 10, weights="w"), "g": sparse_column("c", 10)})
    rows = decode(of, {"c": lists.slice(1), "w": weights.slice(1)})
    assert bags(rows) == bags(rows, 1) == [[1, 2], [], [3, 1]]
    assert rows.lists[0].weights is not None and rows.lists[0].weights.tolist() == [0.5, 1.5, 2, 1]
    pq.write_table(pa.table({"label": [0, 0, 1, 0], "c": lists, "w": weights}), tmp_path / "f.parquet")
    read = ParquetShards([f"{tmp_path}/*.parquet"], of, source="data.train").read(RowSlice(0, 1, 4))
    assert bags(read) == [[1, 2], [], [3, 1]]
    if not pa.types.is_fixed_size_list(kind):
        backwards = type(lists).from_arrays([2, 0, 0], [1, 2, 0], pa.array([1, 2, 3], kind.value_type))
        assert bags(ids_of(PlainIds(10), backwards)) == [[3], [1, 2], []]


@pytest.mark.parametrize(
    "ids", [PlainIds(10), HashedIds(10), WORDS, NUMBERS, BucketizedIds((1.0,)), DatetimeIds("hour")], ids=named
)
def test_columns_of_nulls_alone_are_nulls_of_any_type(ids: IdMapping) -> None:
    assert ids_of(ids, pa.nulls(3)).single.tolist() == [[-1, -1, -1]]
    assert bags(ids_of(ids, pa.array([[], None, []], pa.list_(pa.null())))) == [[], [], []]
    rows = decode(columns(sparse={"f": sparse_column("c", 10, ids, weights="w")}), {"c": pa.nulls(3), "w": pa.nulls(3)})
    assert bags(rows) == [[], [], []]
    with pytest.raises(DataError, match="has 1 nulls inside lists"):
        ids_of(ids, pa.array([[], None, [None]], pa.list_(pa.null())))


def test_a_column_of_nulls_in_one_of_many_files_is_what_it_is_in_the_others(tmp_path: Path) -> None:
    whole = {
        "label": [0, 1],
        "weight": [1.0, 1.0],
        "one": ["a", None],
        "many": [["a", "b"], []],
        "text": ["a|b", "b"],
        "x": [0.5, 1.5],
        "at": pa.array([0, 3_600_000], pa.timestamp("ms")),
    }
    for name, changed in (("a", dict.fromkeys(("one", "many", "text", "x", "at"), pa.nulls(2))), ("b", {})):
        pq.write_table(pa.table({**whole, **changed}), tmp_path / f"{name}.parquet")
    of = columns(
        weight="weight",
        sparse={
            "one": sparse_column("one", 3, WORDS),
            "many": sparse_column("many", 3, WORDS, max_length=5),
            "text": sparse_column("text", 3, WORDS, list_text=ListTextConfig(separator="|")),
            "at": sparse_column("at", 24, DatetimeIds("hour"), minimum=None),
        },
        dense={"x": dense_column("x", 9.0, clip=(0.0, 20.0))},
    )
    shards = ParquetShards([f"{tmp_path}/*.parquet"], of, source="data.train")
    nulls, values = (shards.read(RowSlice(group, 0, 2)) for group in (0, 1))
    assert (nulls.single.tolist(), values.single.tolist()) == ([[-1, -1], [-1, -1]], [[2, -1], [0, 1]])
    assert [bags(nulls, place) for place in (0, 1)] == [[[], []], [[], []]]
    assert [bags(values, place) for place in (0, 1)] == [[[2, 1], []], [[2, 1], [1]]]
    assert (nulls.dense.tolist(), values.dense.tolist()) == ([[9, 9]], [[0.5, 1.5]])
    assert nulls.has_empty


@dataclass(frozen=True)
class Astray:
    """Ids of a mapping with a fault."""

    row: int
    num_rows: int = 24
    wanted: str = "integers"
    kinds: tuple[str, ...] = ()

    def accepts(self, kind: pa.DataType) -> bool:
        return True

    def map(self, values: pa.Array, what: str) -> Mapped:
        return Mapped(np.full(len(values), self.row), {})


@pytest.mark.parametrize("row", [-2, 24, 2**31 + 3, 515_396_075_542, -(2**40)])
@pytest.mark.parametrize("values", [[1, 2, 3], [[1], [2], []]], ids=["single", "lists"])
def test_every_id_that_a_mapping_hands_out_is_checked(row: int, values: list[Any]) -> None:
    with pytest.raises(DataError, match=rf"row group 0: sparse feature f \(column 'c'\) was mapped to row {row}, but"):
        ids_of(Astray(row), pa.array(values), 24)
    with pytest.raises(DataError, match=rf"here was mapped to row {row}, but Astray has rows 0\.\.23"):
        mapped(pa.array(values), Astray(row), "here")


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("num_rows", [1, 100, 128, 200, 40_000, 2**31, 2**63])
def test_ids_of_every_width_are_checked(kind: str, num_rows: int) -> None:
    limits = np.iinfo(kind)
    for ids in ([0], [-1, 0], [-2], [99, 0], [127], [128], [199], [255], [39_999], [2**31 - 1], [limits.max], []):
        if all(limits.min <= row <= limits.max for row in ids):
            array = np.array(ids, kind)
            if all(-1 <= row < num_rows for row in ids):
                assert check_rows(array, Astray(0, num_rows), "here") == (-1 in ids)
            else:
                with pytest.raises(DataError, match="was mapped to row"):
                    check_rows(array, Astray(0, num_rows), "here")


def test_ids_out_of_range_are_hashed_or_clipped_and_counted() -> None:
    values = pa.array([[3, 99, 12], None, [-1, 0]])
    hashed = ids_of(PlainIds(10, "hash"), values)
    elsewhere = hash_ids(pa.array([99, 12, -1]), 10).tolist()
    assert bags(hashed) == [[3, *elsewhere[:2]], [], [elsewhere[2], 0]]
    assert counts(hashed) == {("hashed", "f"): [2, 0, 1]}
    clipped = ids_of(PlainIds(10, "clip_to_oov"), values)
    assert bags(clipped) == [[3, 0, 0], [], [0, 0]]
    assert counts(clipped) == {("clipped", "f"): [2, 0, 1]}
    single = ids_of(PlainIds(10, "clip_to_oov"), pa.array([2**63, None, 4], pa.uint64()))
    assert single.single.tolist() == [[0, -1, 4]]
    assert counts(single) == {("clipped", "f"): [1, 0, 0]}
    assert counts(ids_of(PlainIds(10, "clip_to_oov"), pa.array([[1], None, [9, 0]]))) == {}


def test_what_a_vocabulary_lacks_is_counted() -> None:
    assert counts(ids_of(WORDS, pa.array(["a", None, "z"]))) == {("out_of_vocabulary", "f"): [0, 0, 1]}
    assert counts(ids_of(WORDS, pa.array([["z", "a", "z"], None, ["b"]]))) == {("out_of_vocabulary", "f"): [2, 0, 0]}


@pytest.mark.parametrize(
    ("keep", "expected", "kept"),
    [
        ("first", [[1, 2], [], [5, 6]], [0.1, 0.2, 0.5, 0.6]),
        ("last", [[1, 2], [], [6, 7]], [0.1, 0.2, 0.6, 0.7]),
    ],
)
def test_long_lists_are_cut_with_their_weights_and_counted(
    keep: str, expected: list[list[int]], kept: list[float]
) -> None:
    of = columns(sparse={"f": sparse_column("c", 10, weights="w", max_length=2, keep=keep)})  # type: ignore[arg-type]
    rows = decode(of, {"c": [[1, 2], None, [5, 6, 7]], "w": pa.array([[0.1, 0.2], [], [0.5, 0.6, 0.7]])})
    assert bags(rows) == expected
    assert rows.lists[0].weights is not None
    assert rows.lists[0].weights.tolist() == np.float32(kept).tolist()
    assert counts(rows) == {("cut", "f"): [0, 0, 1]}


def test_ids_that_are_cut_are_not_looked_at() -> None:
    rows = ids_of(PlainIds(10), pa.array([[1], [2, 99], [3]]), max_length=1)
    assert bags(rows) == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            [[1.0], [1.0, 2.0], []],
            r"has 1 lists whose weights \(column 'w'\) are not as many: the first has 2 ids and ",
        ),
        ([[1.0, None], [1.0, 2.0], []], r"has 1 value null, NaN or infinite among its weights \(column 'w'\)"),
        ([[1.0, float("inf")], [1.0, 2.0], None], "has 1 value null, NaN or infinite among its weights"),
        ([1.0, 2.0, 3.0], "lists of ids and lists of numbers are needed"),
    ],
)
def test_weights_that_do_not_go_with_the_ids_are_refused(weights: list[Any], message: str) -> None:
    of = columns(sparse={"f": sparse_column("c", 10, weights="w")})
    with pytest.raises(DataError, match=message):
        decode(of, {"c": [[1, 2], [3, 4], None], "w": pa.array(weights)})


def test_batches_weigh_the_ids_of_other_features_by_one() -> None:
    of = columns(sparse={"plain": sparse_column("a", 10), "f": sparse_column("c", 10, weights="w")})
    rows = decode(of, {"a": [1, None, 2], "c": [[1, 2], [], [3]], "w": [[0.5, 0.25], [], [2]]})
    batch = build_batch([Part(rows, 0, 3)], of.layout(frozenset({"f"})), 0, loss_scale=1.0, pin_memory=False)
    assert batch.sparse_features.values().tolist() == [1, 2, 1, 2, 3]
    assert batch.sparse_features.weights().tolist() == [1.0, 1.0, 0.5, 0.25, 2.0]


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"fill": 3.0}, [1, None, 2], [1, 3, 2]),
        ({"clip": (0.0, 5.0)}, [-2, 3, 1e300], [0, 3, 5]),
        ({"log1p": True}, [0, 1, 3], np.log1p([0, 1, 3])),
        ({"standardize": (2.0, 4.0)}, [2, 6, 0], [0, 1, -0.5]),
        ({}, [Decimal("0.1"), Decimal("-2.50"), Decimal("7")], [0.1, -2.5, 7]),
        (
            {"fill": 3.0},
            [Decimal("123456789012345678.123"), None, Decimal("-0.001")],
            [123456789012345678.123, 3, -0.001],
        ),
        ({"fill": 0.5}, [None, None, None], [0.5, 0.5, 0.5]),
        (
            {"fill": 99.0, "clip": (0.0, 7.0), "log1p": True, "standardize": (1.0, 0.5)},
            [-1, None, 3],
            (np.log1p([0, 7, 3]) - 1) / 0.5,
        ),
        ({"fill": 1.0, "not_finite": "fill", "log1p": True}, [float("nan"), None, 3], np.log1p([1, 1, 3])),
    ],
)
@pytest.mark.filterwarnings("error")
def test_dense_transforms_happen_in_their_order(options: dict[str, Any], values: list[Any], expected: Any) -> None:
    of = columns(dense={"x": dense_column("c", **{"fill": None, **options})})
    rows = decode(of, {"c": values})
    np.testing.assert_array_equal(rows.dense[0], np.float32(expected))
    found = [int(isinstance(value, float) and not np.isfinite(value)) for value in values]
    assert counts(rows) == ({("not_finite", "x"): found} if any(found) else {})


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"clip": (0.0, 5.0)}, [1.0, float("inf"), 2.0]),
        ({"clip": (0.0, 5.0)}, [1.0, float("nan"), 2.0]),
        ({"standardize": (0.0, 1.0)}, [1.0, float("nan"), 2.0]),
        ({"fill": 0.0, "not_finite": "fill", "log1p": True}, [1.0, -2.0, 2.0]),
    ],
)
def test_dense_values_that_are_not_finite_are_refused_before_anything_hides_them(
    options: dict[str, Any], values: list[float]
) -> None:
    of = columns(dense={"x": dense_column("c", **{"fill": None, **options})})
    with pytest.raises(DataError, match=r"row group 0: dense feature x \(column 'c'\) has 1 value NaN or infinite"):
        decode(of, {"c": values})


EVENTS = {
    "rating": [1, 4, None],
    "dwell": [1.5, float("nan"), 10.0],
    "clicked": [True, False, None],
    "source": pa.array(["a", "b", None]).dictionary_encode(),
}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("rating >= 4", [0, 1, None]),
        ("1 <= rating < 4", [1, 0, None]),
        ("not rating == 4", [1, 0, None]),
        ("rating > -1 and source in ('a', 'z')", [1, 0, None]),
        ("source not in ['a']", [0, 1, None]),
        ("clicked or dwell > 5", [1, None, 1]),  # NaN is unknown
        ("dwell != rating", [1, None, None]),
        ("clicked == False", [0, 1, None]),
        ("clicked and source != 'b' or rating == 4", [1, 1, None]),
        ("clicked", [1, 0, None]),
    ],
)
def test_labels_are_computed_and_unknown_ones_skipped(label: str, expected: list[int | None]) -> None:
    rows = decode(
        columns(label=label, label_null="skip", dense={"x": dense_column("c", None)}), {"c": [1, 2, 3], **EVENTS}
    )
    assert [None if np.isnan(value) else value for value in rows.labels.tolist()] == expected
    assert counts(rows) == {("skipped", "label"): [int(value is None) for value in expected]}
    batch = build_batch([Part(rows, 0, 3)], columns().layout(frozenset()), 1, loss_scale=0.25, pin_memory=False)
    known = [place for place, value in enumerate(expected) if value is not None]
    assert batch.labels.tolist() == [expected[place] for place in known]
    assert batch.dense_features[:, 0].tolist() == [place + 1 for place in known]
    assert (batch.loss_scale, batch.counts) == (0.25, {("skipped", "label"): 3 - len(known)})
    with pytest.raises(DataError, match=rf"label column {re.escape(repr(label))} has \d nulls; set data.label_null"):
        decode(columns(label=label), EVENTS)


@pytest.mark.parametrize(
    "label", ["rating + 1 > 4", "__import__('os') == 1", "f(rating) and clicked", "rating >", "3 < 4"]
)
def test_labels_that_are_no_such_expression_are_refused(label: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.label: "):
        decode(columns(label=label), EVENTS)


@pytest.mark.parametrize("label", ["source > 3", "rating and clicked", "not rating", "source in ('a', 3)"])
def test_labels_of_columns_that_do_not_compare_are_refused_on_opening(label: str) -> None:
    table = pa.table({**EVENTS, "c": [1, 2, 3]})
    with pytest.raises(DataError, match=r"f\.parquet: label .* cannot be computed"):
        columns(label=label).check_schema(table.schema, "f.parquet")


@pytest.mark.parametrize(
    ("label", "table", "expected"),
    [
        ("number > real", {"number": [2**53 + 1, 2**53, 0], "real": [2.0**53, 2.0**53, -0.5]}, [1, 0, 1]),
        ("big >= small", {"big": pa.array([2**64 - 1, 0, 5], pa.uint64()), "small": [0, -1, 6]}, [1, 1, 0]),
        ("number < 99999999999999999999", {"number": [1, 2**63 - 1, -(2**63)]}, [1, 1, 1]),
        (
            "one < other",
            {
                "one": pa.array([253_402_300_799_999, 0, 1], pa.timestamp("ms")),
                "other": pa.array([2**63 - 1, 1, 1_000_000], pa.timestamp("ns")),
            },
            [0, 1, 0],
        ),
        ("price in (0.1, 3)", {"price": [Decimal("0.10"), Decimal("3.00"), Decimal("0.11")]}, [1, 1, 0]),
        ("clicked == 1", {"clicked": [True, False, True]}, [1, 0, 1]),
        ("seen == True", {"seen": [1, 0, 2]}, [1, 0, 0]),
        ("cost", {"cost": [Decimal("1.00"), Decimal("0.00"), Decimal("1.00")]}, [1, 0, 1]),
    ],
)
def test_labels_are_right_where_no_type_holds_both_sides(label: str, table: Any, expected: list[int]) -> None:
    assert decode(columns(label=label), table).labels.tolist() == expected


def test_labels_of_nulls_alone_are_skipped_or_refused() -> None:
    for label in ("rating", "rating >= 4", "rating in (4, 5)", "not rating"):
        rows = decode(columns(label=label, label_null="skip"), {"rating": pa.nulls(3)})
        assert np.isnan(rows.labels).all() and counts(rows) == {("skipped", "label"): [1, 1, 1]}
        with pytest.raises(DataError, match=r"row group 0: label column .* has 3 nulls; set data.label_null to skip"):
            decode(columns(label=label), {"rating": pa.nulls(3)})


@pytest.mark.parametrize(
    ("changed", "table", "message"),
    [
        ({"label": "c"}, {"c": ["yes", "no", "no"]}, "make it 0 and 1 by an expression, such as `c == 'yes'`,"),
        ({"label": "c"}, {"c": pa.array([1, 2, 3], pa.timestamp("s"))}, "make it 0 and 1 by an expression or when"),
        (
            {"label": "c"},
            {"c": [0.0, float("nan"), 1.0]},
            "row group 0: label column 'c' has 1 value NaN; set data.label_n",
        ),
        ({"label": "c"}, {"c": [Decimal("0.99999999999999999999"), Decimal(1), None]}, "1 nulls; set data.label_null"),
        ({"label": "c"}, {"c": [Decimal("0.99999999999999999999"), Decimal(1), Decimal(0)]}, "such as 0.99999999999"),
        ({"reference": "c"}, {"c": [0.5, None, 1.0]}, "column 'c' has 1 nulls; write a probability, or leave data.ref"),
        ({"reference": "c"}, {"c": pa.nulls(3)}, "column 'c' has 3 nulls; write a probability"),
        ({"weight": "c"}, {"c": [0.5, None, 1.0]}, "column 'c' has 1 nulls; write a weight, such as 0 for rows that"),
        ({"weight": "c"}, {"c": pa.nulls(3)}, "column 'c' has 3 nulls; write a weight"),
        ({"domain": domain_column("c", 3)}, {"c": pa.nulls(3)}, "domain column 'c' has 3 nulls; give rows of no known"),
        ({"sparse": {"f": sparse_column("c", 10, HashedIds(10), minimum=3)}}, {"c": list("abc")}, "numbers are needed"),
    ],
)
def test_what_is_refused_names_its_column_and_the_way_out(changed: Any, table: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        decode(columns(**changed), table)
    assert str(error.value).startswith("f.parquet") and "column 'c'" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_arrow_cannot_compare_in_a_row_group_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of, table = columns(label="rating >= 4"), pa.table({"rating": [1, 5]})
    layout = of.layout(of.check_schema(table.schema, "f.parquet"))

    def refuse(*_: Any) -> Any:
        raise pa.ArrowInvalid("out of bounds\nof it")

    monkeypatch.setattr(labels, "compare", refuse)
    message = (
        r"^f\.parquet, row group 0: label 'rating >= 4' cannot be computed: column 'rating': out of bounds; compare"
    )
    with pytest.raises(DataError, match=message):
        of.decode(table, layout, "f.parquet, row group 0")


@pytest.mark.parametrize("label", ["a == '\ud800'", f"{'not ' * 200}a", f"{'-' * 50_000}1 < a", "(" * 5_000 + "a == 1"])
def test_labels_that_nothing_could_compute_are_refused_in_a_line(label: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.label: ") as error:
        decode(columns(label=label), {"a": [1, 2, 3]})
    assert len(str(error.value)) < 1000


def test_a_column_that_only_looks_like_words_is_a_column() -> None:
    assert decode(columns(label="is click-1"), {"is click-1": [1, 0, 1]}).labels.tolist() == [1, 0, 1]


def test_rows_are_weighed() -> None:
    of = columns(weight="w", dense={"x": dense_column("c", None)})
    rows = take(decode(of, {"c": [1, 2, 3], "w": [0.0, 2.5, 1.0]}), np.array([1, 2, 0]))
    batch = build_batch([Part(rows, 0, 2)], of.layout(frozenset()), 1, loss_scale=1.0, pin_memory=False)
    assert batch.weight is not None and batch.weight.tolist() == [2.5, 1.0]
    assert decode(columns(), {}).weight.tolist() == []


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e300])
@pytest.mark.filterwarnings("error")
def test_weights_of_rows_are_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(DataError, match=r"row group 0: weight column 'w' has 1 value negative or not finite, such as"):
        decode(columns(weight="w"), {"w": [1.0, weight, 0.0]})


def everything() -> Columns:
    return columns(
        label="rating >= 4",
        label_null="skip",
        weight="w",
        sparse={
            "user": sparse_column("user", 10, PlainIds(10, "hash")),
            "query": sparse_column("query", 50, HashedIds(50, 3)),
            "words": sparse_column("words", 3, WORDS, weights="scores", max_length=2, keep="last"),
            "price": sparse_column("price", 3, BucketizedIds((1.0, 2.0))),
            "hour": sparse_column("at", 24, DatetimeIds("hour")),
        },
        dense={"dwell": dense_column("dwell", 1.0, True, (0.0, 3.0), (1.0, 2.0), "fill")},
    )


def everything_table(rows: int) -> pa.Table:
    random = np.random.default_rng(rows)
    lists = [random.choice(["a", "b", "z"], random.integers(0, 4)).tolist() for _ in range(rows)]
    return pa.table(
        {
            "user": random.integers(0, 20, rows),
            "query": pa.array(random.choice(["red shoes", "hat", "ü"], rows), mask=random.random(rows) < 0.1),
            "words": lists,
            "scores": [random.random(len(one)) for one in lists],
            "price": pa.array(random.normal(1, 1, rows), mask=random.random(rows) < 0.1),
            "at": pa.array(random.integers(0, 2**31, rows), pa.timestamp("s")),
            "rating": pa.array(random.integers(1, 6, rows), mask=random.random(rows) < 0.1),
            "w": random.random(rows),
            "dwell": np.where(random.random(rows) < 0.1, np.inf, random.normal(1, 1, rows)),
        }
    )


def test_a_row_has_the_same_features_in_training_and_in_serving(tmp_path: Path) -> None:
    table, of = everything_table(300), everything()
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=100)
    shards = ParquetShards([f"{tmp_path}/*.parquet"], of, source="data.train")
    trained = [shards.read(RowSlice(group, 10, 90)) for group in range(3)]
    for group, rows in enumerate(trained):
        request = table.drop(["rating", "w"]).slice(group * 100 + 10, 80)  # in several chunks, as it may come
        request = pa.concat_tables([request.slice(0, 30), request.slice(30)])
        served = of.decode_features(request, of.layout(of.check_features(request.schema, "request")), "request")
        assert len(served) == 80 and len(served.labels) == len(served.weight) == 0
        assert_same(build(of, served), build(of, rows_without_label(rows)))
        assert {key for key in rows.counts if key[0] != "skipped"} == set(served.counts)


def rows_without_label(rows: Rows) -> Rows:
    """The same rows with none marked to be skipped."""
    kept = {key: happened for key, happened in rows.counts.items() if key[0] != "skipped"}
    return Rows(rows.labels, rows.reference, rows.domain, rows.dense, rows.single, rows.lists, rows.weight, kept)


def build(of: Columns, rows: Rows) -> Any:
    return build_batch([Part(rows, 0, len(rows))], of.layout(frozenset({"words"})), 1, loss_scale=1.0, pin_memory=False)


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one.dense_features, other.dense_features)
    for part in ("values", "lengths", "weights"):
        assert torch.equal(getattr(one.sparse_features, part)(), getattr(other.sparse_features, part)())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int16(), pa.string())], ids=named)
def test_strings_are_read_as_dictionaries_whatever_the_file_has(tmp_path: Path, kind: pa.DataType) -> None:
    plain = pa.array(["a", "b", None, "c"] * 10)
    flat = pa.array(["a", "b", "c"] * 10).cast(kind)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, None, *range(3, 31), *[30] * 10], pa.int32()), flat)
    table = pa.table({"label": [0, 1] * 20, "one": plain.cast(kind), "many": lists, "number": range(40)})
    sparse = {name: sparse_column(name, 100, HashedIds(100, 1)) for name in ("one", "many", "number")}
    of = columns(sparse=sparse)
    pq.write_table(table, tmp_path / "f.parquet")
    shards = ParquetShards([f"{tmp_path}/*.parquet"], of, source="data.train")
    one, many, _ = shards.table(0, ("one", "many", "number"), of.dictionary_names).schema.types
    assert pa.types.is_dictionary(one) and pa.types.is_dictionary(many.value_type)
    rows = shards.read(RowSlice(0, 3, 40))
    assert rows.single[0].tolist() == hash_ids(plain.slice(3), 100, 1).tolist()
    assert rows.lists[0].values.tolist() == hash_ids(flat, 100, 1)[3:].tolist()


def test_counts_follow_their_rows_through_shuffling_into_batches() -> None:
    of = everything()
    table = everything_table(200)
    rows = of.decode(table, of.layout(of.check_schema(table.schema, "f")), "f")
    shuffled = take(rows, np.random.default_rng(1).permutation(200))
    whole, parts = build(of, shuffled).counts, [Part(shuffled, start, start + 50) for start in range(0, 200, 50)]
    assert set(whole) == set(of.counted) and min(whole.values()) > 0
    summed = dict.fromkeys(whole, 0)
    for part in parts:
        batch = build_batch([part], of.layout(frozenset({"words"})), 1, loss_scale=1.0, pin_memory=False)
        for key, happened in batch.counts.items():
            summed[key] += happened
    assert summed == dict(whole)


def test_a_slice_of_nothing_is_no_rows() -> None:
    of = everything()
    table = everything_table(5)
    rows = of.decode(table.slice(0, 0), of.layout(of.check_schema(table.schema, "f")), "f")
    assert len(rows) == 0 and isinstance(rows.lists[0], Jagged)
    assert len(build(of, rows).labels) == 0
