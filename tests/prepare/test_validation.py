"""Faults are planted in a clean log, and each is to be found and named; a clean log is to pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import tiny_config, write_tiny_log

from recsys.config import Config, load_config
from recsys.data import labels
from recsys.prepare.synthetic import write_synthetic
from recsys.prepare.validation import (
    PSI_THRESHOLD,
    SHOWN,
    Report,
    stability_index,
    stability_noise,
    validate,
)

ROOT = Path(__file__).parents[2]
ROWS = {"train": 6_000, "valid": 1_500, "test": 1_500}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_tiny_log(tmp_path / "log", ROWS, files=3, row_group_rows=500)
    return tmp_path / "log"


def check(log: Path, sample: int | None = None, **changes: Any) -> Report:
    """Validates the log; `changes` are settings by path, its dots written as double underscores."""
    return validate(config_of(log, **changes), sample)


def config_of(log: Path, **changes: Any) -> Config:
    file = log.parent / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(log, log.parent / "out")))
    return load_config(file, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()])


def rewrite(log: Path, split: str, change: Callable[[pa.Table], pa.Table], part: str = "*") -> None:
    for file in sorted((log / split).glob(f"part-{part}.parquet")):
        pq.write_table(change(pq.read_table(file)), file, row_group_size=500)


def replaced(column: str, values: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(column), column, values(table[column]))

    return change


def planted(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """A table with one value replaced."""

    def values(given: pa.ChunkedArray) -> pa.Array:
        listed = given.to_pylist()
        listed[row] = value
        return pa.array(listed)

    return replaced(column, values)


def test_a_clean_log_passes_without_a_word(log: Path) -> None:
    report = check(log)
    assert (report.errors, report.warnings) == ([], [])
    assert [(name, it.rows, it.rows_read, it.files) for name, it in report.splits.items()] == [
        (name, rows, rows, 3) for name, rows in ROWS.items()
    ]


@pytest.mark.parametrize("rows", [300, 3_000])
def test_a_small_synthetic_log_passes_without_a_word(tmp_path: Path, rows: int) -> None:
    write_synthetic(tmp_path / "s", seed=3, train_rows=rows, valid_rows=rows // 5, test_rows=rows // 5, files=6)
    splits = [f"data.{split}={tmp_path}/s/{split}" for split in ("train", "valid", "test")]
    report = validate(load_config(ROOT / "configs/default.yaml", ["data.synthetic=null", *splits]))
    assert (report.errors, report.warnings) == ([], [])


def test_figures_are_those_of_the_columns(log: Path) -> None:
    report = check(log)
    table = pq.read_table(sorted((log / "train").glob("*.parquet")))
    train = report.splits["train"]
    assert train.label_rate == pytest.approx(pc.mean(table["label"]).as_py())
    item, tags, x, scale = train.sparse["item"], train.sparse["tags"], train.dense["x"], train.dense["scale"]
    assert item.null_rate == table["item"].null_count / len(table)
    assert (item.least, item.greatest, item.distinct) == (0, 29, 30)
    lengths = pc.fill_null(pc.list_value_length(table["tags"]), 0).to_numpy()
    assert (tags.mean_length, tags.longest) == (pytest.approx(lengths.mean()), lengths.max())
    assert tags.null_rate == (lengths == 0).mean()
    filled = pc.fill_null(table["x"], 0.0).to_numpy()
    assert x.null_rate == table["x"].null_count / len(table)
    z = table["z"].to_numpy()
    for told, values in ((x, filled), (scale, z)):
        assert (told.mean, told.std) == (pytest.approx(values.mean(), abs=1e-6), pytest.approx(values.std()))
        assert (told.least, told.greatest) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert report.tables["user"].rows == report.tables["user"].seen == 40


def test_lists_that_are_cut_and_values_that_are_clipped_are_counted(log: Path) -> None:
    report = check(log, features__sparse__tags__max_length=1, features__dense__scale__clip=[-1, 1])
    table = pq.read_table(sorted((log / "train").glob("*.parquet")))
    lengths = pc.fill_null(pc.list_value_length(table["tags"]), 0).to_numpy()
    tags, scale = report.splits["train"].sparse["tags"], report.splits["train"].dense["scale"]
    assert (tags.cut_rate, tags.longest) == ((lengths > 1).mean(), 3)
    assert scale.clipped_rate == (np.abs(table["z"].to_numpy()) > 1).mean()
    assert (scale.least, scale.greatest) == (-1, 1)


@pytest.mark.parametrize(
    ("column", "value", "of", "words"),
    [
        ("user", 40, "features.sparse.user", ("1 value out of range, such as 40", "0..39")),
        ("user", -7, "features.sparse.user", ("1 value out of range, such as -7",)),
        ("tags", [3, None], "features.sparse.tags", ("1 nulls inside lists",)),
        ("z", float("nan"), "features.dense.scale", ("column 'z'", "1 value NaN or infinite")),
        ("label", 2, "data.label", ("1 value other than 0 and 1, such as 2",)),
        ("label", None, "data.label", ("1 nulls", "data.label_null")),
        ("domain", 3, "data.domain", ("1 value out of range, such as 3",)),
        ("truth", 1.5, "data.reference", ("values outside 0..1",)),
    ],
)
def test_what_training_refuses_is_an_error_that_names_the_place(
    log: Path, column: str, value: Any, of: str, words: tuple[str, ...]
) -> None:
    rewrite(log, "valid", planted(column, 470, value), part="1")
    (found,) = check(log).errors
    assert (found.split, found.of) == ("valid", of)
    assert found.message.startswith(f"{log}/valid/part-1.parquet, row group 0: ") and "\n" not in found.message
    for word in words:
        assert word in found.message


def test_faults_do_not_hide_each_other(log: Path) -> None:
    # The label, two features and the domain of one row group; the last feature of all row groups of train.
    for column, value in (("label", 5), ("user", 99), ("z", float("inf")), ("domain", 9)):
        rewrite(log, "train", planted(column, 3, value), part="2")
    rewrite(log, "train", replaced("tags", lambda tags: pa.array([[77]] * len(tags))))
    errors = check(log).errors
    assert {it.of for it in errors} == {
        "data.label",
        "data.domain",
        *("features.sparse.user", "features.sparse.tags", "features.dense.scale"),
    }
    tags = [it.message for it in errors if it.of == "features.sparse.tags"]
    assert len(tags) == SHOWN + 1 and all("500 values out of range, such as 77" in message for message in tags[:-1])
    assert tags[-1] == f"data.train: features.sparse.tags: {12 - SHOWN} more files or row groups like these"


def test_columns_and_files_that_cannot_be_read_are_each_told(log: Path) -> None:
    rewrite(log, "train", lambda table: table.drop_columns(["user"]), part="0")
    rewrite(log, "train", replaced("z", lambda z: z.cast(pa.string())), part="1")
    (log / "valid/part-0.parquet").write_bytes(b"PAR1 is not all that it takes PAR1")
    rewrite(log, "test", lambda table: table.slice(0, 0))
    report = check(log)
    messages = {(it.split, it.of): it.message for it in report.errors}
    assert len(messages) == len(report.errors) == 4
    assert messages["train", "features.sparse.user"].startswith(f"{log}/train/part-0.parquet: no column 'user'")
    assert messages["train", "features.dense.scale"].startswith(f"{log}/train/part-1.parquet: column 'z' (dense")
    assert "valid/part-0.parquet: not a readable Parquet file" in messages["valid", "data.valid"]
    assert (
        messages["test", "data.test"].startswith("data.test: the 3 files")
        and "no rows" in messages["test", "data.test"]
    )
    # The other files are looked at all the same.
    assert {name: (split.files, split.rows_read) for name, split in report.splits.items()} == {
        "train": (3, 6_000),
        "valid": (2, 1_000),
    }


def test_a_split_none_of_whose_files_can_be_opened_is_told_file_by_file(log: Path) -> None:
    for file in (log / "test").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    report = check(log)
    assert list(report.splits) == ["train", "valid"]
    assert [it.message.split(":")[0] for it in report.errors] == [
        f"{log}/test/part-{number}.parquet" for number in range(3)
    ]


def test_a_column_that_is_damaged_does_not_hide_the_others(log: Path) -> None:
    path = log / "train/part-1.parquet"
    names = pq.read_schema(path).names
    column = pq.read_metadata(path).row_group(0).column(names.index("z"))
    with path.open("r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(bytes(60))
    rewrite(log, "train", planted("user", 3, 99), part="2")
    report = check(log)
    assert [(it.split, it.of) for it in report.errors] == [
        ("train", "features.dense.scale"),
        ("train", "features.sparse.user"),
    ]
    assert report.errors[0].message.startswith(f"{path}, row group 0: column 'z' cannot be read: ")
    assert report.splits["train"].rows_read == 6_000


def test_a_footer_that_says_more_rows_than_there_are_is_found(log: Path) -> None:
    path = log / "valid/part-1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 333), path)
    content, old, new = path.read_bytes(), b"\x16\x9a\x05", b"\x16\xd0\x0f"  # 333, 1000
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:start] + content[start:].replace(old, new))
    errors = check(log).errors
    assert {it.of for it in errors} >= {"data.label", "data.domain", "features.sparse.user", "features.dense.x"}
    for it in errors:
        assert it.message.startswith(f"{path}, row group 0: column '") and "write the file again" in it.message


@pytest.mark.parametrize("sample", [None, 900])
def test_strings_and_weighted_lists_are_read_as_training_reads_them(log: Path, sample: int | None) -> None:
    for split in ROWS:
        rewrite(log, split, replaced("item", lambda item: item.cast(pa.string())))
        rewrite(
            log,
            split,
            lambda table: table.append_column(
                "w", [[None if it is None else [0.5] * len(it) for it in table["tags"].to_pylist()]]
            ),
        )
    changes = {
        "features__sparse__item__ids": {"type": "hash"},
        "features__sparse__tags__weights": "w",
        "tables__tag__pooling": "sum",
    }
    report = check(log, sample, **changes)
    assert (report.errors, report.warnings) == ([], [])
    assert 15 <= report.splits["train"].sparse["item"].distinct <= 30  # some meet in one row
    rewrite(log, "valid", planted("w", 7, [0.5] * 9), part="2")
    (found,) = check(log, **changes).errors
    assert found.of == "features.sparse.tags" and "weights (column 'w') are not as many" in found.message


def test_a_constant_label_is_an_error(log: Path) -> None:
    rewrite(log, "test", replaced("label", lambda label: pa.array(np.zeros(len(label), np.int8))))
    (found,) = check(log).errors
    assert (found.split, found.of) == ("test", "data.label")
    assert found.message.startswith("data.test: in the 1,500 rows that were read, the label is always 0")
    # In a sample it may be chance.
    sampled = check(log, 600)
    assert sampled.errors == [] and next(it.of for it in sampled.warnings) == "data.label"


def test_a_split_without_any_label_is_an_error(log: Path) -> None:
    rewrite(log, "valid", replaced("label", lambda label: pa.nulls(len(label), pa.int8())))
    report = check(log, data__label_null="skip")
    (found,) = report.errors
    assert "no row has a label" in found.message and report.splits["valid"].skipped == 1_500


def test_a_feature_of_nulls_is_an_error_and_a_constant_one_a_warning(log: Path) -> None:
    rewrite(log, "train", replaced("item", lambda item: pa.nulls(len(item), pa.int64())))
    rewrite(log, "train", replaced("z", lambda z: pa.array(np.full(len(z), 2.5))))
    report = check(log)
    (found,) = report.errors
    assert found.of == "features.sparse.item" and "is null in every one" in found.message
    (constant,) = [it for it in report.warnings if it.split == "train"]
    assert constant.of == "features.dense.scale" and "is always 2.5" in constant.message


def test_a_file_without_rows_is_a_warning(log: Path) -> None:
    rewrite(log, "valid", lambda table: table.slice(0, 0), part="1")
    (found,) = check(log).warnings
    assert found.message.startswith(f"{log}/valid/part-1.parquet has no rows")


def test_a_table_of_which_most_rows_never_occur_is_a_warning(log: Path) -> None:
    assert check(log, tables__user__num_embeddings=60).warnings == []
    (found,) = check(log, tables__user__num_embeddings=400).warnings
    assert found.of == "tables.user" and "40 of its 400 rows occur, among 6,000 ids; lower its num" in found.message
    ids = {"type": "hash", "buckets": 400, "applied": True}
    (found,) = check(log, tables__user__num_embeddings=400, features__sparse__user__ids=ids).warnings
    assert found.message.endswith("its ids were mapped at conversion: convert with fewer buckets")
    assert check(log, tables__user__num_embeddings=10_000).warnings == []  # 6,000 ids cannot show it


def test_many_ids_put_aside_are_a_warning(log: Path) -> None:
    changes = {"tables__user__num_embeddings": 20, "features__sparse__user__out_of_range": "clip_to_oov"}
    warnings = check(log, **changes).warnings
    assert [(it.split, it.of) for it in warnings] == [(split, "features.sparse.user") for split in ROWS]
    assert "of the ids are beyond the table and became row 0" in warnings[0].message


def test_rows_of_one_split_in_another_are_a_warning(log: Path) -> None:
    copied = pq.read_table(log / "train/part-1.parquet").slice(100, 60)
    rewrite(log, "test", lambda table: pa.concat_tables([table, copied]), part="2")
    report = check(log)
    (found,) = report.warnings
    assert found.split == "test" and "3.85% of its rows are in data.train too" in found.message
    assert "(60 of 1,560 compared)" in found.message
    assert [it.shared for it in report.duplicates] == [0, 0, 60, 0]


def test_rows_that_are_alike_by_nature_are_none(log: Path) -> None:
    config = config_of(log, data__reference=None, features__dense={"flag": {"column": "user"}})
    bare = config.model_copy(
        update={
            "features": config.features.model_copy(
                update={"dense": {}, "sparse": {"item": config.features.sparse["item"]}}
            )
        }
    )
    report = validate(bare)
    shares = {(it.split, it.other): it.shared / it.compared for it in report.duplicates}
    assert shares["train", "train"] > 0.9 and shares["valid", "train"] > 0.9
    assert not [it for it in report.warnings if "value for value" in it.message]


def test_splits_that_drift_are_a_warning(log: Path) -> None:
    rewrite(log, "test", replaced("z", lambda z: pc.add(z, 1.0)))
    rewrite(log, "valid", replaced("item", lambda item: pa.array([i % 5 for i in range(len(item))])))
    report = check(log)
    found = {(it.split, it.of): it.message for it in report.warnings}
    assert set(found) == {("test", "features.dense.scale"), ("valid", "features.sparse.item")}
    assert found["test", "features.dense.scale"].startswith("data.test: features.dense.scale: its values differ")
    largest = report.drift[0]
    assert largest.warns and largest.psi > PSI_THRESHOLD and largest.psi > largest.noise


def test_a_label_rate_that_drifts_is_a_warning_where_psi_is_small(log: Path) -> None:
    def fewer(label: pa.ChunkedArray) -> pa.Array:
        given = label.to_numpy()
        return pa.array(np.where(np.arange(len(given)) % 2, given, 0).astype(np.int8))

    rewrite(log, "test", replaced("label", fewer))
    (found,) = check(log).warnings
    assert (found.split, found.of) == ("test", "data.label") and " beside " in found.message


def test_a_file_that_drifts_is_named(log: Path) -> None:
    rewrite(log, "train", replaced("x", lambda x: pa.nulls(len(x), pa.float32())), part="1")
    report = check(log)
    files = [it for it in report.drift if not it.data.startswith("data.")]
    assert {it.of for it in files} == {"features.dense.x"} and files[0].data == f"{log}/train/part-1.parquet"
    assert files[0].share == 1.0
    found = [it for it in report.warnings if it.message.startswith(str(log))]
    assert [it.split for it in found] == ["train"]
    assert found[0].message.startswith(f"{log}/train/part-1.parquet: features.dense.x: its nulls differ")


def test_noise_is_exceeded_as_often_as_is_said() -> None:
    random = np.random.default_rng(7)
    shares = random.dirichlet(np.ones(10))
    for rows, chance in ((400, 0.05), (4_000, 0.05), (4_000, 0.01)):
        noise = stability_noise(rows, 50_000, 10, chance)
        exceeded = [
            stability_index(*(random.multinomial(n, shares).astype(float) for n in (rows, 50_000))) > noise
            for _ in range(2_000)
        ]
        assert np.mean(exceeded) == pytest.approx(chance, abs=0.02)


def test_small_files_of_one_distribution_do_not_warn(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log", ROWS, files=100, row_group_rows=70)
    report = check(tmp_path / "log")
    assert report.warnings == [] and {it.data for it in report.drift} == {"data.valid", "data.test"}


def test_a_sample_agrees_with_the_whole(log: Path) -> None:
    whole, sampled = check(log), check(log, 3_000)
    for split, rows in {"train": 3_000, "valid": 1_500, "test": 1_500}.items():
        one, other = whole.splits[split], sampled.splits[split]
        assert (one.rows, one.row_groups) == (other.rows, other.row_groups)
        assert other.rows_read == rows
        assert other.label_rate == pytest.approx(one.label_rate, abs=3 * 0.5 / rows**0.5)
        for name, dense in one.dense.items():
            assert other.dense[name].mean == pytest.approx(dense.mean, abs=3 * dense.std / rows**0.5)
            assert dense.least <= other.dense[name].least and other.dense[name].greatest <= dense.greatest
        for name, sparse in one.sparse.items():
            assert other.sparse[name].null_rate == pytest.approx(sparse.null_rate, abs=3 * 0.5 / rows**0.5)
            assert other.sparse[name].distinct == sparse.distinct
    assert (sampled.errors, sampled.warnings) == ([], [])


def test_a_sample_is_spread_over_all_files(log: Path) -> None:
    for part in "012":
        rewrite(log, "train", planted("user", 10, 41), part=part)
        rewrite(log, "train", replaced("label", lambda label: pa.array([3] * len(label))), part=part)
    errors = check(log, 24).errors
    labels = [it for it in errors if it.of == "data.label"]
    assert len(labels) == SHOWN + 1 and "9 more" in labels[-1].message  # all twelve row groups, two rows of each


def test_threads_change_nothing(log: Path) -> None:
    assert check(log, data__reader_threads=1).as_dict() == check(log, data__reader_threads=5).as_dict()


def test_the_json_has_its_keys(log: Path) -> None:
    rewrite(log, "valid", planted("user", 3, 99), part="0")
    told = json.loads(json.dumps(check(log).as_dict()))
    assert told["version"] == 1
    assert set(told) == {
        *("version", "splits", "tables", "drift", "duplicates", "errors", "warnings"),
        "distinct_standard_error",
    }
    train = told["splits"]["train"]
    assert set(train) == {"files", "row_groups", "rows", "rows_read", "label_rate", "skipped", "sparse", "dense"}
    assert set(train["sparse"]["tags"]) == {
        *("table", "null_rate", "least", "greatest", "values", "distinct"),
        *("mean_length", "longest", "cut_rate", "counted"),
    }
    assert set(train["dense"]["x"]) == {
        *("null_rate", "not_finite_rate", "clipped_rate", "mean", "std", "least", "greatest"),
    }
    assert set(told["errors"][0]) == {"split", "of", "message"}
    assert set(told["tables"]["user"]) == {"rows", "seen"}
    assert set(told["duplicates"][0]) == {"split", "other", "shared", "compared"}
    assert set(told["drift"][0]) == {
        *("of", "measure", "data", "rows", "psi", "noise", "share", "train_share", "warns"),
    }


@pytest.mark.parametrize(
    ("values", "label", "message"),
    [
        ([2**53 + 1, -1] * 250, "label == 1 or z > 1e300", None),
        (pa.array([2**64 - 1, 0] * 250, pa.uint64()), "label == 1 and user < z", None),
        (["0", "1"] * 250, "label == 1 or z in (0, 1)", "column 'z': type string does not compare with 0"),
        (pa.array([0] * 500, pa.timestamp("ms")), "label == 1 and z < 5", "does not compare with 5"),
    ],
)
def test_a_label_that_cannot_be_computed_leaves_the_rest_of_the_report(
    log: Path, values: Any, label: str, message: str | None
) -> None:
    for file in sorted((log / "valid").glob("*.parquet")):
        table = pq.read_table(file)
        place = table.schema.get_field_index("z")
        pq.write_table(table.set_column(place, "z", pa.array(values)[: len(table)]), file)
    report = check(log, data__label=label)
    found = [error for error in report.errors if error.of == "data.label"]
    assert [error.split for error in found] == ["valid"] * 3 * (message is not None)
    for part, error in enumerate(found):
        assert error.message.startswith(f"{log}/valid/part-{part}.parquet: label {label!r} cannot be computed: ")
        assert message is not None and message in error.message and "\n" not in error.message
    assert set(report.splits) == set(ROWS) and report.splits["valid"].sparse["item"].values > 0


def test_a_label_that_one_row_group_cannot_give_leaves_the_rest_of_the_report(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = labels.compare

    def refuse(comparison: Any, left: Any, right: Any) -> Any:
        if len(left) and left[0].as_py() is None:
            raise pa.ArrowInvalid("out of bounds")
        return compare(comparison, left, right)

    monkeypatch.setattr(labels, "compare", refuse)
    rewrite(log, "valid", planted("x", 0, None), part="1")
    rewrite(log, "valid", planted("x", 0, 0.0), part="[02]")
    rewrite(log, "train", planted("x", 0, 0.0))
    report = check(log, data__label="x > 0", data__label_null="skip")
    found = [error for error in report.errors if error.split == "valid" and error.of == "data.label"]
    assert [error.message for error in found] == [
        f"{log}/valid/part-1.parquet, row group 0: label 'x > 0' cannot be computed: column 'x': out of bounds; "
        "compare like with like, or cast columns when the shards are written"
    ]
    assert report.splits["valid"].rows_read == ROWS["valid"]


@pytest.mark.parametrize("sample", [None, 900])
def test_unusual_types_are_read_as_what_they_hold(log: Path, sample: int | None) -> None:
    source = {"features__sparse__item__ids": {"type": "hash"}}
    for split in ROWS:
        rewrite(log, split, replaced("item", lambda given: given.cast(pa.string())))
    expected = check(log, sample, **source)
    changes: dict[str, pa.DataType] = {
        "item": pa.string_view(),
        "user": pa.int16(),
        "tags": pa.list_view(pa.int64()),
        "z": pa.decimal128(38, 20),
        "label": pa.bool_(),
    }
    for column, kind in changes.items():

        def change(given: pa.ChunkedArray, kind: pa.DataType = kind) -> pa.Array:
            return pa.array(given.to_pylist(), kind) if pa.types.is_list_view(kind) else given.cast(kind, safe=False)

        for split in ROWS:
            rewrite(log, split, replaced(column, change))
    found = check(log, sample, **source)
    assert (found.errors, found.warnings) == (expected.errors, expected.warnings)
    assert found.errors == []
    for split in ROWS:
        assert found.splits[split].sparse == expected.splits[split].sparse
        assert found.splits[split].label_rate == expected.splits[split].label_rate
        assert found.splits[split].dense["scale"].mean == pytest.approx(expected.splits[split].dense["scale"].mean)


def test_a_file_whose_columns_are_of_no_type_has_nulls(log: Path) -> None:
    for column in ("item", "tags", "x"):
        rewrite(log, "train", replaced(column, lambda given: pa.nulls(len(given))), part="1")
    report = check(log)
    assert report.errors == []
    train = report.splits["train"]
    for rate in (train.sparse["item"].null_rate, train.sparse["tags"].null_rate, train.dense["x"].null_rate):
        assert 1 / 3 < rate < 0.9


def test_an_unreadable_file_is_all_that_is_said_of_a_split_without_rows(log: Path) -> None:
    for part in "12":
        rewrite(log, "test", lambda table: table.slice(0, 0), part=part)
    (log / "test/part-0.parquet").write_bytes(b"no Parquet")
    (found,) = [it for it in check(log).errors if it.split == "test"]
    assert found.message.startswith(f"{log}/test/part-0.parquet: not a readable Parquet file")


def test_a_file_under_two_names_is_a_warning_and_read_once(log: Path) -> None:
    (log / "train/part-9.parquet").symlink_to("part-1.parquet")
    report = check(log, data__valid=[f"{log}/valid/*.parquet", f"{log}/./valid/part-0.parquet"])
    assert [(name, it.files, it.rows) for name, it in report.splits.items()] == [
        (name, 3, rows) for name, rows in ROWS.items()
    ]
    assert report.errors == []
    assert [(it.split, it.message) for it in report.warnings] == [
        (
            "train",
            "data.train: files that have several names are read once; left out: "
            f"{log}/train/part-9.parquet (as {log}/train/part-1.parquet)",
        ),
        (
            "valid",
            "data.valid: files that have several names are read once; left out: "
            f"{log}/./valid/part-0.parquet (as {log}/valid/part-0.parquet)",
        ),
    ]


def test_a_feature_of_text_in_one_split_and_of_numbers_in_another_is_an_error(log: Path) -> None:
    rewrite(log, "valid", replaced("item", lambda item: item.cast(pa.string())))
    rewrite(log, "test", replaced("item", lambda item: item.cast(pa.int8())))
    errors = check(log, features__sparse__item__ids={"type": "hash"}).errors
    assert [(it.split, it.of) for it in errors] == [("valid", "features.sparse.item")] * 3
    assert errors[0].message.startswith(
        f"{log}/valid/part-0.parquet: column 'item' (sparse feature item) holds strings, but numbers in "
        f"{log}/train/part-0.parquet, so that one value would have two rows; write the column alike"
    )
