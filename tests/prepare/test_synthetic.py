"""The synthetic click log is whole, the same each time, and what it says of itself."""

import hashlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tiny import tiny_config

from recsys.config import Config, ConfigError, validate
from recsys.data.storage import DataError
from recsys.prepare import synthetic, writing
from recsys.prepare.synthetic import require_embedded, write_synthetic

SMALL: dict[str, Any] = {
    "seed": 3,
    "train_rows": 20_000,
    "valid_rows": 3_000,
    "test_rows": 30_001,
    "files": 3,
    "row_group_rows": 2_048,
}


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def summary_of(directory: Path) -> dict[str, Any]:
    summary = writing.read_summary(directory)
    assert summary is not None
    return summary


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(directory, **SMALL)
    return directory


def test_same_arguments_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "again", **SMALL)
    assert hashes(tmp_path / "again") == hashes(data)


@pytest.mark.parametrize(
    ("hierarchy", "digest", "mean"),
    [(True, "e891298d293b6a33", 0.25045118), (False, "fccdfbd3e7bc5132", 0.25406369)],
)
def test_the_default_log_is_the_one_it_was(tmp_path: Path, hierarchy: bool, digest: str, mean: float) -> None:
    write_synthetic(tmp_path / "log", **SMALL, hierarchy=hierarchy)
    table = pq.read_table(tmp_path / "log/test").combine_chunks()
    columns = (table[name].combine_chunks() for name in table.column_names)
    # Labels, too, hold the probabilities; floating numbers themselves may differ by an ulp between processors.
    flat = (of.flatten() if pa.types.is_list(of.type) else of for of in columns)
    integers = (of.fill_null(-1).to_numpy().tobytes() for of in flat if pa.types.is_integer(of.type))
    assert hashlib.sha256(b"".join(integers)).hexdigest()[:16] == digest
    assert table["true_probability"].to_numpy().mean(dtype=np.float64) == pytest.approx(mean, abs=1e-7)
    # Logs that were written before there were these dials are not written again.
    assert not {"num_domains", "conflict"} & summary_of(tmp_path / "log")["spec"].keys()


def test_rows_of_a_split_depend_on_no_other_split(data: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "other", **{**SMALL, "valid_rows": 100})
    mine, other = hashes(data), hashes(tmp_path / "other")
    assert all(mine[path] == other[path] for path in mine if path.startswith(("train", "test")))


def test_another_seed_draws_other_rows(data: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "other", **{**SMALL, "seed": 4})
    assert hashes(tmp_path / "other")["train/part-00000.parquet"] != hashes(data)["train/part-00000.parquet"]


def test_a_complete_data_set_is_left_alone(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    write_synthetic(data, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_files_row_groups_and_sizes(data: Path) -> None:
    summary = summary_of(data)
    for split in ("train", "valid", "test"):
        files = sorted((data / split).iterdir())
        assert [path.name for path in files] == [f"part-{part:05d}.parquet" for part in range(3)]
        metadata = [pq.read_metadata(path) for path in files]
        rows = [one.num_rows for one in metadata]
        assert sum(rows) == SMALL[f"{split}_rows"] == summary["splits"][split]["rows"]
        assert max(rows) - min(rows) <= 1
    assert pq.read_metadata(data / "train/part-00000.parquet").num_row_groups == 4


def test_columns_are_as_dataset_json_says(data: Path) -> None:
    columns = summary_of(data)["columns"]
    table = pq.read_table(data / "train")
    assert table.column_names == list(columns)
    types = {
        "int64": pa.int64(),
        "int8": pa.int8(),
        "float32": pa.float32(),
        "list<int64>": pa.list_(pa.int64()),
    }
    for name, told in columns.items():
        column = table[name]
        assert column.type.equals(types[told["type"]]), name
        if "size" in told:
            ids = column.combine_chunks().flatten() if pa.types.is_list(column.type) else column
            assert ids.null_count == 0 or not pa.types.is_list(column.type), name
            limits = pc.min_max(ids).as_py()
            assert limits["min"] >= 0 and limits["max"] < told["size"], name
    assert set(table["label"].unique().to_pylist()) == {0, 1}


def test_missing_values_occur_where_they_are_told(data: Path) -> None:
    table = pq.read_table(data / "train")
    with_nulls = {name for name in table.column_names if table[name].null_count}
    assert with_nulls == {"profile_id", "region_id", "tag_ids", "recent_categories", "freshness", "discount"}
    for name in ("tag_ids", "recent_categories"):
        lengths = pc.list_value_length(table[name]).to_pylist()
        assert 0 in lengths and None in lengths and max(filter(None, lengths)) > 1
    for name in ("time_of_day", "session_depth", "freshness", "discount", "price"):
        assert np.isfinite(table[name].drop_null().to_numpy()).all()
    price = table["price"].to_numpy()
    assert price.max() > 20 * np.median(price)


def test_ids_are_skewed_and_domains_unequal(data: Path) -> None:
    table = pq.read_table(data / "train")
    counts = np.sort(np.bincount(table["item_id"].to_numpy()))[::-1]
    assert counts[:100].sum() > 0.25 * counts.sum()
    domains = np.bincount(table["domain"].to_numpy()) / table.num_rows
    assert domains == pytest.approx([0.45, 0.30, 0.15, 0.10], abs=0.02)


@pytest.mark.parametrize("num_domains", [2, 10, 30])
def test_shares_of_other_numbers_of_domains_are_as_stated(tmp_path: Path, num_domains: int) -> None:
    write_synthetic(tmp_path / "log", **SMALL, num_domains=num_domains, conflict=0.5)
    rows = np.bincount(pq.read_table(tmp_path / "log/test")["domain"].to_numpy(), minlength=num_domains)
    expected = 1 / np.arange(2, num_domains + 2)
    expected *= SMALL["test_rows"] / expected.sum()
    assert np.all(np.abs(rows - expected) < 4.5 * np.sqrt(expected))
    summary = summary_of(tmp_path / "log")
    assert summary["columns"]["domain"]["size"] == num_domains
    told = summary["splits"]["test"]
    assert [one["rows"] for one in told["domains"].values()] == rows.tolist()
    aucs = [one["bayes_auc"] for one in told["domains"].values()]
    assert told["bayes_wauc"] == pytest.approx(np.average(aucs, weights=rows), abs=1e-12)


def world(**dials: Any) -> synthetic._World:
    sizes = {**SMALL, "num_users": 2_000, "num_items": 1_000, "hierarchy": True, "num_domains": 10}
    return synthetic._World(synthetic._spec(**{**sizes, **dials}))


@pytest.mark.parametrize("conflict", [0.0, 0.2, 0.5, 1.0])
def test_the_cosine_of_tastes_is_as_stated(conflict: float) -> None:
    one, user = world(conflict=conflict), np.arange(2_000)
    tastes = [one.taste(user, np.full(2_000, domain)) for domain in range(4)]
    lengths = np.linalg.norm(one.user_taste, axis=1)
    for a, b in [(0, 1), (0, 3), (2, 1), (0, 2), (1, 3)]:
        cosine = (tastes[a] * tastes[b]).sum(axis=1) / lengths**2
        assert cosine == pytest.approx(1.0 if (a - b) % 2 == 0 else 1 - 2 * conflict, abs=1e-9)
        assert np.linalg.norm(tastes[b], axis=1) == pytest.approx(lengths)


@pytest.mark.parametrize("conflict", [0.0, 0.3, 0.5, 1.0])
def test_what_is_liked_in_an_even_domain_correlates_with_an_odd_one_as_stated(tmp_path: Path, conflict: float) -> None:
    write_synthetic(tmp_path / "log", **SMALL, num_domains=10, conflict=conflict)
    table = pq.read_table(tmp_path / "log/test").filter(pc.field("profile_id").is_valid())
    odd = table["domain"].to_numpy() % 2 == 1
    even_likes, odd_likes = (likes(table.filter(pa.array(of)))[0] for of in (~odd, odd))
    # 6 segments and 20 categories are few: between 0 and 1, the two sides of taste correlate by chance.
    assert np.corrcoef(even_likes.ravel(), odd_likes.ravel())[0, 1] == pytest.approx(1 - 2 * conflict, abs=0.15)


@pytest.mark.parametrize("conflict", [0.0, 0.5, 1.0])
def test_what_a_shared_taste_can_explain_is_as_stated(conflict: float) -> None:
    one = world(conflict=conflict)
    rng = np.random.default_rng(5)
    user, item = rng.integers(2_000, size=50_000), rng.integers(1_000, size=50_000)
    even, odd = (one.affinity(user, item, np.full(len(user), domain)) for domain in (0, 1))
    share = one.domains.shares[::2].sum()
    shared = share * even + (1 - share) * odd  # of all functions of user and item, the one nearest to the affinity
    lost = share * (even - shared) ** 2 + (1 - share) * (odd - shared) ** 2
    total = share * even**2 + (1 - share) * odd**2
    assert 1 - lost.mean() / total.mean() == pytest.approx(1 - 4 * conflict * share * (1 - share), abs=0.05)
    assert share == pytest.approx(0.57, abs=0.01)


def test_the_best_auc_hardly_depends_on_the_conflict_and_the_rows_not_at_all() -> None:
    drawn = [world(conflict=conflict).rows(np.random.default_rng(5), 50_000) for conflict in (0.0, 0.5, 1.0)]
    best = [synthetic._ceiling(rows.label, rows.probability)["bayes_auc"] for rows in drawn]
    assert max(best) - min(best) < 0.01 and min(best) > 0.8
    shown = [rows.table.drop_columns(["label", "true_probability"]) for rows in drawn]
    assert shown[0].equals(shown[1]) and shown[0].equals(shown[2])


@pytest.mark.parametrize(("child", "parent"), [("item_id", "brand_id"), ("brand_id", "category_id")])
def test_the_hierarchy_is_a_tree(data: Path, child: str, parent: str) -> None:
    pairs = pq.read_table(data / "train", columns=[child, parent]).group_by([child, parent]).aggregate([])
    assert pairs.num_rows == pc.count_distinct(pairs[child]).as_py()


def test_labels_follow_the_true_probability(data: Path) -> None:
    table = pq.read_table(data / "test")
    p, label = table["true_probability"].to_numpy().astype(np.float64), table["label"].to_numpy()
    assert label.mean() == pytest.approx(0.25, abs=0.02)
    for some in np.array_split(np.argsort(p), 10):
        spread = np.sqrt((p[some] * (1 - p[some])).sum()) / len(some)
        assert abs(label[some].mean() - p[some].mean()) < 4.5 * spread


@pytest.mark.parametrize("domain", [None, 3])
def test_the_ceiling_in_dataset_json_is_that_of_the_rows(data: Path, domain: int | None) -> None:
    table, told = pq.read_table(data / "test"), summary_of(data)["splits"]["test"]
    if domain is not None:
        table, told = table.filter(pc.field("domain") == domain), told["domains"][str(domain)]
    p, label = table["true_probability"].to_numpy().astype(np.float64), table["label"].to_numpy()
    assert told["rows"] == table.num_rows
    assert told["label_rate"] == pytest.approx(label.mean())
    positive, negative = p[label == 1][:, None], p[label == 0][None, :]
    assert told["bayes_auc"] == pytest.approx(
        (positive > negative).mean() + (positive == negative).mean() / 2, abs=1e-12
    )
    assert told["bayes_log_loss"] == pytest.approx(-np.log(np.where(label == 1, p, 1 - p)).mean(), abs=1e-12)


def test_auc_shares_ranks_between_ties_and_is_undefined_for_one_class() -> None:
    label, p = np.array([True, False, True, False]), np.array([0.5, 0.5, 0.9, 0.1], np.float32)
    assert synthetic._ceiling(label, p)["bayes_auc"] == 3.5 / 4
    assert synthetic._ceiling(np.array([True]), p[:1])["bayes_auc"] is None
    assert synthetic._ceiling(label[:0], p[:0])["bayes_log_loss"] is None


def likes(table: pa.Table) -> tuple[Any, Any, Any]:
    """Mean log odds of segment x category beyond the margins, and rows, both of that shape; the log odds of rows."""
    p = table["true_probability"].to_numpy().astype(np.float64)
    logit = np.log(p / (1 - p))
    row, column = table["profile_id"].to_numpy() % synthetic._SEGMENTS, table["category_id"].to_numpy()
    cell = row * synthetic.NUM_CATEGORIES + column
    shape = (synthetic._SEGMENTS, synthetic.NUM_CATEGORIES)
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    mean = np.bincount(cell, logit, minlength=counts.size).reshape(shape) / np.maximum(counts, 1)
    mean -= mean.mean(axis=1, keepdims=True)
    mean -= mean.mean(axis=0, keepdims=True)
    return mean, counts, logit


def affinity_of_categories(directory: Path) -> float:
    """Share of the variance of the true log odds that profile x category accounts for, beyond the margins."""
    table = pq.read_table(directory / "train").filter(pc.field("profile_id").is_valid() & (pc.field("domain") == 0))
    mean, counts, logit = likes(table)
    return float((counts * mean**2).sum() / counts.sum() / logit.var())


def test_only_with_hierarchy_do_categories_tell_what_users_like(data: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "flat", **SMALL, hierarchy=False)
    flat = affinity_of_categories(tmp_path / "flat")
    assert affinity_of_categories(data) > 0.2 and flat < 0.1


def test_another_spec_replaces_the_data_set_as_a_whole(tmp_path: Path) -> None:
    small = {**SMALL, "train_rows": 500, "valid_rows": 100, "test_rows": 100}
    write_synthetic(tmp_path / "data", **small)
    write_synthetic(tmp_path / "data", **{**small, "files": 1})
    assert len(list((tmp_path / "data/train").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("harm", ["missing", "cut", "summary"])
def test_a_damaged_data_set_is_written_again(tmp_path: Path, harm: str) -> None:
    small = {**SMALL, "train_rows": 500, "valid_rows": 100, "test_rows": 100}
    write_synthetic(tmp_path / "data", **small)
    good = hashes(tmp_path / "data")
    path = tmp_path / "data/test/part-00002.parquet"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        told = json.loads((tmp_path / "data/dataset.json").read_text())
        (tmp_path / "data/dataset.json").write_text(json.dumps({**told, "spec": None}))
    write_synthetic(tmp_path / "data", **small)
    assert hashes(tmp_path / "data") == good


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, summary: dict[str, Any]) -> None:
        assert not (tmp_path / "data").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(writing, "write_summary", full)
    with pytest.raises(OSError, match="No space"):
        write_synthetic(tmp_path / "data", **{**SMALL, "train_rows": 500})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else than a synthetic data set; name another folder"):
        write_synthetic(tmp_path, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_synthetic(tmp_path, **{**SMALL, "train_rows": 500})
    assert (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize(
    ("argument", "value", "least"),
    [
        ("seed", -1, 0),
        ("train_rows", 0, 1),
        ("files", 0, 1),
        ("row_group_rows", 0, 1),
        ("num_items", 100, 200),
        ("num_domains", 0, 1),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, argument: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least {least}, not {value}"):
        write_synthetic(tmp_path / "data", **{**SMALL, argument: value})
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("conflict", [-0.1, 1.1, float("nan")])
def test_a_conflict_out_of_range_is_named(tmp_path: Path, conflict: float) -> None:
    with pytest.raises(DataError, match=f"conflict must be from 0 to 1, not {conflict}"):
        write_synthetic(tmp_path / "data", **SMALL, conflict=conflict)


def test_fewer_rows_than_files_make_fewer_files(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "data", **{**SMALL, "valid_rows": 2})
    assert len(list((tmp_path / "data/valid").iterdir())) == 2


def _write(directory: Path, spec: dict[str, Any], start: Any) -> None:
    start.wait()
    write_synthetic(directory, **spec)


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)])
def test_processes_that_race_leave_one_whole_data_set(tmp_path: Path, seeds: tuple[int, int]) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    small = {**SMALL, "train_rows": 2_000}
    racers = [
        context.Process(target=_write, args=(tmp_path / "data", {**small, "seed": seed}, start)) for seed in seeds
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=60)
        assert racer.exitcode == 0
    summary = summary_of(tmp_path / "data")
    assert writing.is_complete(tmp_path / "data", summary)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    write_synthetic(tmp_path / "alone", **{**small, "seed": summary["spec"]["seed"]})
    assert hashes(tmp_path / "data") == hashes(tmp_path / "alone")


def taste_in_recent_categories(directory: Path) -> float:
    """Mean distance, 0 to 1, of a segment's distribution of recent categories from that of all."""
    table = pq.read_table(directory / "train").filter(
        pc.field("profile_id").is_valid() & pc.field("recent_categories").is_valid()
    )
    recent = table["recent_categories"].combine_chunks()
    segment = np.repeat(table["profile_id"].to_numpy() % synthetic._SEGMENTS, recent.value_lengths().to_numpy())
    counts = np.zeros((synthetic._SEGMENTS, synthetic.NUM_CATEGORIES))
    np.add.at(counts, (segment, recent.flatten().to_numpy()), 1)
    of_all = counts.sum(axis=0) / counts.sum()
    return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - of_all).sum(axis=1).mean() / 2)


def test_only_with_hierarchy_do_recent_categories_tell_of_the_user(data: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "flat", **SMALL, hierarchy=False)
    assert taste_in_recent_categories(data) > 0.2 and taste_in_recent_categories(tmp_path / "flat") < 0.03


def test_a_log_that_is_not_there_is_named_and_made_by_the_line_that_is_told(tmp_path: Path) -> None:
    given = {**SMALL, "train_rows": 500, "valid_rows": 100, "test_rows": 101, "hierarchy": False}
    given |= {"num_domains": 3, "conflict": 0.5}
    raw = tiny_config(tmp_path, tmp_path)
    raw["data"]["synthetic"] = {"directory": str(tmp_path / "a log; ls"), **given}
    config = validate(Config, raw, source="here")
    with pytest.raises(ConfigError, match="does not hold the log that the config describes") as error:
        require_embedded(config)
    assert not (tmp_path / "a log; ls").exists()
    _, _, command = str(error.value).partition("make it with ")
    module, *arguments = shlex.split(command.partition(", or set")[0])[2:]
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=tmp_path)
    require_embedded(config)
    raw["data"]["synthetic"]["conflict"] = 0.25
    with pytest.raises(ConfigError, match="does not hold the log"):
        require_embedded(validate(Config, raw, source="here"))


def test_a_pipe_in_place_of_a_file_of_the_log_is_not_waited_for(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "log", **{**SMALL, "train_rows": 500, "valid_rows": 100, "test_rows": 101})
    summary = summary_of(tmp_path / "log")
    assert writing.is_complete(tmp_path / "log", summary)
    part = writing.part_path(tmp_path / "log", "test", 0)
    part.unlink()
    os.mkfifo(part)
    assert not writing.is_complete(tmp_path / "log", summary)
    (tmp_path / "log" / writing.SUMMARY_FILE).unlink()
    os.mkfifo(tmp_path / "log" / writing.SUMMARY_FILE)
    assert writing.read_summary(tmp_path / "log") is None
