"""Vocabularies: what is looked up, kept in a file and refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import bags
from tiny import tiny_config

from recsys.config import Config, ConfigError, validate
from recsys.data.features import build_columns
from recsys.data.ids import VocabularyIds
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary, canonical, load_vocabularies, save_vocabularies
from recsys.prepare.vocabularies import ValueCounts, build_vocabularies


def vocabulary(values: list[Any]) -> Vocabulary:
    array = canonical(pa.array(values))
    return Vocabulary(array, pa.array(range(len(values), 0, -1), pa.int64()), "here")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True), st.lists(st.integers()))
def test_an_integer_has_the_row_after_its_place(values: list[int], others: list[int]) -> None:
    rows = {value: place for place, value in enumerate(values, start=1)}
    asked = values + [value for value in others if -(2**63) <= value < 2**63]
    found = vocabulary(values).lookup(pa.array(asked, pa.int64()))
    assert found.tolist() == [rows.get(value, 0) for value in asked]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), st.lists(st.sampled_from([*"abcxyz", None])))
def test_a_string_has_the_row_after_its_place_and_null_none(values: list[str], asked: list[str | None]) -> None:
    rows = {value: place for place, value in enumerate(values, start=1)}
    expected = [-1 if value is None else rows.get(value, 0) for value in asked]
    array = pa.array(asked, pa.string())
    for encoded in (array, array.cast(pa.large_string()), array.dictionary_encode()):
        assert vocabulary(values).lookup(encoded).tolist() == expected


def test_strings_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    known = vocabulary(["a"])
    assert known.lookup(pa.array(["b"])).tolist() == [0]
    keys = known._sorted[0]
    monkeypatch.setattr("recsys.data.vocabulary.hash_values", lambda values: keys.repeat(len(values)))
    assert known.lookup(pa.array(["b", "a"])).tolist() == [0, 1]


@pytest.mark.parametrize("values", [["ü", "", "b"], [5, -1, 2**62]])
def test_a_file_gives_back_what_was_written(tmp_path: Path, values: list[Any]) -> None:
    written = vocabulary(values)
    written.write(tmp_path / "deep" / "v.parquet")
    read = Vocabulary.read(tmp_path / "deep" / "v.parquet")
    assert read.values.to_pylist() == values and read.counts.to_pylist() == [3, 2, 1]
    assert read.digest == written.digest
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["v.parquet"]


def test_the_digest_tells_order_values_and_their_borders() -> None:
    digests = [vocabulary(values).digest for values in (["a", "b"], ["b", "a"], ["ab", ""], ["a", "b", "c"], [1, 2])]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()])
def test_a_vocabulary_of_no_values_makes_all_row_0(tmp_path: Path, kind: pa.DataType) -> None:
    """Which a converter leaves where no value occurs often enough."""
    pq.write_table(pa.table({"value": pa.array([], kind), "count": pa.array([], pa.int64())}), tmp_path / "v.parquet")
    vocabulary = Vocabulary.read(tmp_path / "v.parquet")
    values = pa.array(["7", None, "8"]).cast(kind)
    assert vocabulary.lookup(values).tolist() == [0, -1, 0]
    assert VocabularyIds(vocabulary).num_rows == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"value": ["a"]}), "is no vocabulary"),
        (pa.table({"value": [0.5], "count": [1]}), "is no vocabulary"),
        (pa.table({"value": ["a", "a"], "count": [1, 1]}), "a value twice"),
        (pa.table({"value": ["a", None], "count": [1, 1]}), "holds a null"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_vocabulary_is_refused_by_name(tmp_path: Path, table: pa.Table | None, message: str) -> None:
    if table is not None:
        pq.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(DataError, match=message) as error:
        Vocabulary.read(tmp_path / "v.parquet")
    assert str(tmp_path / "v.parquet") in str(error.value)
    assert "recsys.prepare vocabulary" in str(error.value)


def config_with(directory: Path, features: dict[str, Any], tables: int = 10) -> Config:
    raw = tiny_config(directory, directory / "out")
    del raw["features"]["dense"], raw["data"]["domain"], raw["data"]["reference"]
    raw["tables"] = {name: {"num_embeddings": tables, "embedding_dim": 4} for name in features}
    raw["features"]["sparse"] = {name: {"table": name, **feature} for name, feature in features.items()}
    return validate(Config, raw, source="test")


def by_vocabulary(file: Path, **options: Any) -> dict[str, Any]:
    return {"ids": {"type": "vocabulary", "file": str(file)}, **options}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A train split in two files and several row groups, and another split whose values must not count."""
    parts = [
        {"brand": ["b", "a", None, "b", "ü"], "liked": [["a", "b"], None, [], ["c"], ["c", "c"]], "n": [7, 7, 7, 5, 9]},
        {"brand": ["a", "b", "b"], "liked": [["a"], ["z"], ["y"]], "n": [5, None, -1]},
    ]
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
    for number, part in enumerate(parts):
        table = pa.table(part)
        if number:
            brands = table["brand"].combine_chunks().dictionary_encode()
            liked = pa.LargeListArray.from_arrays(pa.array([0, 1, 2, 3]), pa.array(["a", "z", "y"]).dictionary_encode())
            table = table.set_column(0, "brand", brands).set_column(1, "liked", liked)
        pq.write_table(table, tmp_path / "train" / f"{number}.parquet", row_group_size=2)
    pq.write_table(pa.table({"brand": ["held out"] * 9}), tmp_path / "valid" / "0.parquet")
    return tmp_path


def content(file: Path) -> list[tuple[Any, int]]:
    table = pq.read_table(file)
    return list(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True))


def test_a_vocabulary_counts_the_train_split_most_frequent_first(log: Path) -> None:
    file = log / "v" / "brand.parquet"
    told: list[tuple[int, int]] = []
    config = config_with(log, {"brand": by_vocabulary(file), "n": by_vocabulary(log / "n.parquet")})
    built = build_vocabularies(config, on_row_group=lambda *numbers: told.append(numbers))
    assert content(file) == [("b", 4), ("a", 2), ("ü", 1)]
    assert content(log / "n.parquet") == [(7, 3), (5, 2), (-1, 1), (9, 1)]
    assert {(of.file, of.features, of.found, of.kept, of.coverage) for of in built} == {
        (file, ("brand",), 3, 3, 1.0),
        (log / "n.parquet", ("n",), 4, 4, 1.0),
    }
    assert told == [(done, 5) for done in range(1, 6)]


def test_features_of_one_file_share_a_vocabulary_and_rare_values_stay_out(log: Path) -> None:
    file = log / "v.parquet"
    config = config_with(
        log,
        {"brand": by_vocabulary(file), "again": by_vocabulary(file, column="brand"), "liked": by_vocabulary(file)},
    )
    (built,) = build_vocabularies(config, ["liked"], min_count=3)
    assert content(file) == [("b", 5), ("a", 4), ("c", 3)]  # a column that two features read counts once
    assert (built.features, built.found, built.kept) == (("brand", "again", "liked"), 6, 3)
    assert built.coverage == 12 / 15
    vocabularies = load_vocabularies(config)
    assert vocabularies["brand"] is vocabularies["liked"]
    assert vocabularies["brand"].lookup(pa.array(["c", "z"])).tolist() == [3, 0]


def test_many_values_are_merged_as_they_come(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    values = random.integers(0, 50_000, 400_000)
    pq.write_table(pa.table({"n": values}), log / "train" / "many.parquet", row_group_size=20_000)
    for part in ("0", "1"):
        (log / "train" / f"{part}.parquet").unlink()
    sizes: list[int] = []
    add = ValueCounts.add

    def spied(self: ValueCounts, name: str, array: pa.Array, what: str) -> None:
        add(self, name, array, what)
        sizes.append(len(self))

    monkeypatch.setattr(ValueCounts, "add", spied)
    build_vocabularies(config_with(log, {"n": by_vocabulary(log / "n.parquet")}))
    distinct, numbers = np.unique(values, return_counts=True)
    assert dict(content(log / "n.parquet")) == dict(zip(distinct.tolist(), numbers.tolist(), strict=True))
    assert max(sizes) < 3 * 65_536 and len(sizes) == 20


def test_what_cannot_be_built_is_refused(log: Path) -> None:
    file = log / "v.parquet"
    config = config_with(log, {"brand": by_vocabulary(file), "plain": {}})
    with pytest.raises(ConfigError, match=r"features\.sparse\.plain takes no ids from a vocabulary; those .* brand"):
        build_vocabularies(config, ["plain"])
    with pytest.raises(DataError, match=r"v\.parquet: no value was found 5 times in data\.train; lower --min-count"):
        build_vocabularies(config, min_count=5)
    build_vocabularies(config)
    with pytest.raises(DataError, match=r"v\.parquet is there already; pass --overwrite"):
        build_vocabularies(config)
    build_vocabularies(config, min_count=4, overwrite=True)
    assert content(file) == [("b", 4)]
    with pytest.raises(ConfigError, match="no feature takes its ids from a vocabulary"):
        build_vocabularies(config_with(log, {"plain": {}}))
    absent = config_with(log, {"x": by_vocabulary(log / "x.parquet")})
    with pytest.raises(DataError, match=r"0\.parquet: no column 'x'; the file has brand, liked, n"):
        build_vocabularies(absent)
    mixed = config_with(log, {"brand": by_vocabulary(log / "m.parquet"), "n": by_vocabulary(log / "m.parquet")})
    with pytest.raises(DataError, match="column 'n' has type int64, but others of its vocabulary have not"):
        build_vocabularies(mixed)
    assert sorted(path.name for path in log.iterdir()) == ["train", "v.parquet", "valid"]


def test_a_table_must_have_a_row_for_each_value_and_one_more(log: Path) -> None:
    file = log / "v.parquet"
    build_vocabularies(config_with(log, {"brand": by_vocabulary(file)}))
    assert build_columns(config_with(log, {"brand": by_vocabulary(file)}, tables=4)).sparse["brand"].ids.num_rows == 4
    with pytest.raises(ConfigError, match=r"tables\.brand\.num_embeddings: 3 rows are too few for .* which need 4"):
        build_columns(config_with(log, {"brand": by_vocabulary(file)}, tables=3))


def test_saved_vocabularies_are_read_instead_of_the_files_and_held_to_their_digests(log: Path) -> None:
    file, saved = log / "v.parquet", log / "saved"
    config = config_with(log, {"brand": by_vocabulary(file), "plain": {}})
    build_vocabularies(config)
    save_vocabularies(load_vocabularies(config), saved)
    file.unlink()
    assert load_vocabularies(config, saved)["brand"].lookup(pa.array(["a"])).tolist() == [2]
    with pytest.raises(DataError, match=r"v\.parquet cannot be read"):
        load_vocabularies(config)
    vocabulary(["a", "b"]).write(saved / "brand.parquet")
    with pytest.raises(DataError, match=r"brand\.parquet is not the vocabulary that was saved: its digest differs"):
        load_vocabularies(config, saved)
    (saved / "digests.json").unlink()
    with pytest.raises(DataError, match=r"digests\.json cannot be read"):
        load_vocabularies(config, saved)


def test_saved_vocabularies_that_mean_harm_are_refused_before_they_are_read(log: Path) -> None:
    file, saved = log / "v.parquet", log / "saved"
    config = config_with(log, {"brand": by_vocabulary(file)}, tables=4)
    build_vocabularies(config)
    save_vocabularies(load_vocabularies(config), saved)
    vocabulary(list(range(5))).write(saved / "brand.parquet")
    with pytest.raises(DataError, match=r"brand\.parquet has 5 values for a table of 4 rows; restore it"):
        load_vocabularies(config, saved)
    (saved / "brand.parquet").unlink()
    (saved / "brand.parquet").symlink_to(file)
    with pytest.raises(DataError, match=r"brand\.parquet cannot be read: it is a link; restore it"):
        load_vocabularies(config, saved)
    (saved / "brand.parquet").unlink()
    os.mkfifo(saved / "brand.parquet")
    with pytest.raises(DataError, match=r"brand\.parquet cannot be read: it is no regular file; restore it"):
        load_vocabularies(config, saved)
    (saved / "digests.json").write_text('{"brand": "a", "brand": "b"}')
    with pytest.raises(DataError, match=r"digests\.json cannot be read: it is not JSON: an object has one key twice"):
        load_vocabularies(config, saved)


@pytest.mark.parametrize("values", [["apple", "pear", "plum"], [7, 8, 9]], ids=["strings", "integers"])
def test_a_damaged_vocabulary_is_read_or_refused_in_one_line(tmp_path: Path, values: list[Any]) -> None:
    """Names and strings that are no UTF-8 were tracebacks."""
    vocabulary(values).write(file := tmp_path / "v.parquet")
    good, refusals = file.read_bytes(), []
    for place in range(0, len(good), 3):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            Vocabulary.read(file)
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > len(good) // 12
    assert not [refusal for refusal in refusals if "\n" in refusal]


def test_values_are_counted_as_what_they_are_in_every_type(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    files: list[dict[str, Any]] = [
        {
            "word": ["a", "b"],
            "words": [["a", "c"], ["a"]],
            "text": ["x|y", "x"],
            "flag": [1, 1],
            "flags": [[1], [0, 1]],
        },
        {
            "word": pa.array(["a", None], pa.string_view()),
            "words": pa.array([["c", "a"], None], pa.list_view(pa.string_view())),
            "text": pa.array(["y|x", None]).dictionary_encode(),
            "flag": [True, None],
            "flags": pa.array([[True, True], None], pa.list_(pa.bool_(), 2)),
        },
        {name: pa.nulls(2) for name in ("word", "words", "text", "flag", "flags")},
        {
            "words": pa.array([[], None], pa.list_(pa.null())),
            **{n: pa.nulls(2) for n in ("word", "text", "flag", "flags")},
        },
    ]
    for number, table in enumerate(files):
        pq.write_table(pa.table({"label": [0, 1], **table}), tmp_path / "train" / f"{number}.parquet")
    names = ("word", "words", "text", "flag", "flags")
    options: dict[str, Any] = {"text": {"list_text": {"separator": "|"}}, "flags": {"minimum": 0}}
    config = config_with(tmp_path, {name: by_vocabulary(tmp_path / name, **options.get(name, {})) for name in names})
    build_vocabularies(config)
    assert {name: content(tmp_path / name) for name in names} == {
        "word": [("a", 2), ("b", 1)],
        "words": [("a", 3), ("c", 2)],
        "text": [("x", 3), ("y", 2)],
        "flag": [(1, 3)],
        "flags": [(1, 4), (0, 1)],
    }
    columns = build_columns(config)
    shards = ParquetShards(config.data.patterns("train"), columns, source="data.train")
    rows = [shards.read(RowSlice(group, 0, 2)) for group in range(4)]
    single = {
        name: [ids[place].tolist() for ids in (it.single for it in rows)] for place, name in enumerate(("word", "flag"))
    }
    assert single == {"word": [[1, 2], [1, -1], [-1, -1], [-1, -1]], "flag": [[1, 1], [1, -1], [-1, -1], [-1, -1]]}
    lists = {name: [bags(it.lists[place]) for it in rows] for place, name in enumerate(("words", "text", "flags"))}
    assert lists == {
        "words": [[[1, 2], [1]], [[2, 1], []], [[], []], [[], []]],
        "text": [[[1, 2], [1]], [[2, 1], []], [[], []], [[], []]],
        "flags": [[[1], [2, 1]], [[1, 1], []], [[], []], [[], []]],
    }
    request = pa.table({"word": pa.array(["b", "?"], pa.string_view()), **{n: pa.nulls(2) for n in names[1:]}})
    raw = build_columns(config, raw=True)
    served = raw.decode_features(request, raw.layout(raw.check_features(request.schema, "request")), "request")
    assert served.single.tolist() == [[2, 0], *[[-1, -1]] * 4]


def test_a_column_that_is_there_twice_is_named(log: Path, tmp_path: Path) -> None:
    config = config_with(log, {"brand": by_vocabulary(tmp_path / "brand.parquet")}, tables=9)
    part = next((log / "train").glob("*.parquet"))
    table = pq.read_table(part)
    pq.write_table(table.append_column("brand", table["brand"]), part)
    with pytest.raises(DataError, match=rf"{part.name}: 2 columns are named 'brand'; rename all but one"):
        build_vocabularies(config)
