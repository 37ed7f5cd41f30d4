"""Figures by a column: group by group against scipy, the same on any number of ranks, whatever the column holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module, run_ranks
from runs import as_config, train_on
from scipy.stats import bernoulli, mannwhitneyu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, write_tiny_log

from recsys.training.by_column import _encoded, group_figures
from recsys.training.by_domain import LARGEST, WORST


def drawn(sizes: list[int], seed: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
    """Groups, logits with ties, and labels of rows that are not in the order of their groups."""
    random = np.random.default_rng(seed)
    groups = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = (random.random(len(groups)) < 0.4).astype(np.float32)
    return groups, np.round(random.normal(size=len(groups)) + labels, 1).astype(np.float32), labels


def test_figures_of_groups_are_those_of_their_rows_alone() -> None:
    sizes = [30, 1, 200, 7, 2, 55]
    groups, logits, labels = drawn(sizes)
    labels[groups == 4] = 1
    figures = group_figures(groups, [f"g{n}" for n in range(len(sizes))], logits, labels)
    assert figures.names == ["g2", "g5", "g0", "g3", "g4", "g1"]
    aucs = []
    for place, name in enumerate(figures.names):
        of = groups == int(str(name)[1:])
        mine, truth = logits[of], labels[of] == 1
        assert (figures.rows[place], figures.positives[place]) == (len(mine), truth.sum())
        probabilities = 1 / (1 + np.exp(-mine.astype(np.float64)))
        assert figures.log_loss[place] == pytest.approx(-bernoulli.logpmf(truth, probabilities).mean())
        if truth.any():
            assert figures.calibration[place] == pytest.approx(probabilities.sum() / truth.sum())
        if truth.all() or not truth.any():
            assert np.isnan(figures.auc[place])
            continue
        statistic = mannwhitneyu(mine[truth], mine[~truth]).statistic
        aucs.append((len(mine), statistic / (truth.sum() * (~truth).sum())))
        assert figures.auc[place] == pytest.approx(aucs[-1][1])
    assert figures.gauc == pytest.approx(sum(n * auc for n, auc in aucs) / sum(n for n, _ in aucs))
    assert figures.mean_auc == pytest.approx(np.mean([auc for _, auc in aucs]))
    assert figures.one_class == 2
    assert figures.line("g").endswith("; 2 of one class are left out")


def test_columns_of_more_than_two_gib_are_numbered() -> None:
    texts = pa.array(["a" * (1 << 24), None, "b" * (1 << 24)], pa.large_string())
    codes, dictionary = _encoded(pa.chunked_array([texts] * 66))
    assert codes.tolist() == [0, 1, 2] * 66
    assert dictionary == texts.to_pylist()


def test_no_rows_have_no_groups() -> None:
    empty = np.empty(0, np.float32)
    figures = group_figures(np.empty(0, np.int64), [], empty, empty)
    assert figures.as_dict() == {"values": 0, "gauc": None, "mean_auc": None, "one_class": 0, "groups": []}
    assert figures.table()[0] == []


def test_of_many_groups_the_largest_and_the_worst_are_shown() -> None:
    sizes = list(range(100, 40, -1))
    groups, logits, labels = drawn(sizes)
    figures = group_figures(groups, list(map(str, range(len(sizes)))), logits, labels)
    rows, title = figures.table()
    assert [row[""] for row in rows[:LARGEST]] == list(map(str, range(LARGEST)))
    others = {str(n): figures.auc[n] for n in range(LARGEST, len(sizes))}
    assert {row[""] for row in rows[LARGEST:]} == set(sorted(others, key=lambda name: others[name])[:WORST])
    assert title == ": the 12 largest, and the 8 worst of the other 48"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose test files have columns that no feature reads, and rows without label."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_log(folder)
    for path in sorted((folder / "test").glob("*.parquet")):
        table = pq.read_table(path)
        random = np.random.default_rng(len(table) + int(path.stem[-1]))
        cities = pa.array([[None, "Oslo", "Zürich", "0"][n] for n in random.integers(0, 4, len(table))])
        table = table.append_column("city", cities).append_column(
            "big", pa.array(random.integers(0, 3, len(table)) + 2**60)
        )
        table = table.append_column("view", cities.cast(pa.string_view()))
        table = table.append_column("key", key := pa.array([b"\xff"] * len(table)))
        table = table.append_column("torn", key.view(pa.string()))
        table = table.append_column("lost", pa.array([0] * len(table), pa.timestamp("us", "Nowhere/Else")))
        table = table.append_column("twin", cities).append_column("twin", cities)
        label = pa.array(table["label"].to_numpy(), pa.int8(), mask=random.random(len(table)) < 0.2)
        table = table.set_column(table.column_names.index("label"), "label", label)
        path.unlink()
        path = folder / "test" / f"shop={int(path.stem[-1]) // 2}" / path.name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, row_group_size=20)
    raw = tiny_config(folder, folder / "out")
    raw["metrics"] = {"by": ["domain", "item"]}
    raw["data"] |= {"label_null": "skip", "test": f"{folder}/test/**/*.parquet"}
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 5, "warmup_steps": 0}}
    run_ranks(1, train_on, as_config(raw, folder))
    return folder


def evaluated(trained: Path, world_size: int, *columns: str) -> Any:
    by = [argument for column in columns for argument in ("--by", column)]
    checkpoint = str(trained / "out" / "checkpoints" / "step-5")
    done = run_module(world_size, "recsys.evaluate", "--checkpoint", checkpoint, "--json", *by)[0]
    return json.loads(done.stdout) if done.code == 0 else done.stderr


def test_a_column_that_no_feature_reads_is_told_alike_on_any_number_of_ranks(trained: Path) -> None:
    columns = ("city", "big", "domain", "shop", "view")
    one, two, three = (evaluated(trained, world_size, *columns) for world_size in (1, 2, 3))
    of_city = one["by"]["city"]
    assert {group["value"] for group in of_city["groups"]} == {None, "Oslo", "Zürich", "0"}
    assert sum(group["rows"] for group in of_city["groups"]) == one["model"]["examples"] < 251
    assert {group["value"] for group in one["by"]["big"]["groups"]} == {str(2**60 + n) for n in range(3)}
    assert {group["value"] for group in one["by"]["shop"]["groups"]} == {"0", "1"}  # which is on their path alone
    assert one["by"]["view"] == of_city
    by_number = {group["value"]: group for group in one["by"]["domain"]["groups"]}
    for number, of_domain in enumerate(one["domains"].values()):
        assert by_number[str(number)]["auc"] == pytest.approx(of_domain["auc"], abs=1e-12)
        assert by_number[str(number)]["log_loss"] == pytest.approx(of_domain["log_loss"], rel=1e-6)
    assert one["by"]["domain"]["gauc"] == pytest.approx(one["over_domains"]["wauc"])
    for other in (two, three):
        for column in columns:
            mine, its = ({g["value"]: g for g in told["by"][column]["groups"]} for told in (one, other))
            assert mine.keys() == its.keys()
            for value, group in mine.items():
                figures = [key for key in group if key != "value"]
                assert [its[value][key] for key in figures] == pytest.approx([group[key] for key in figures], rel=1e-5)


def test_training_tells_by_columns_what_evaluation_does(trained: Path) -> None:
    summary = json.loads((trained / "out/summary.json").read_text())
    assert evaluated(trained, 2)["by"].keys() == {"domain", "item"}  # those of the run
    assert summary["by"] == evaluated(trained, 1, "domain", "item", "domain")["by"]  # asked for twice, told once
    lines = [json.loads(line) for line in (trained / "out/evaluations.jsonl").read_text().splitlines()]
    valid, test = ([line for line in lines if line["source"] == of][-1] for of in ("joint", "final"))
    assert valid["by"].keys() == {"domain", "item"} and valid["by"]["item"]["gauc"] > 0
    over = {of: {key: told for key, told in by.items() if key != "groups"} for of, by in summary["by"].items()}
    assert test["by"] == over
    events = EventAccumulator(str(trained / "out/tensorboard")).Reload()
    assert events.Scalars("test_gauc/item")[-1].value == pytest.approx(summary["by"]["item"]["gauc"])


def test_a_run_by_a_column_that_a_split_lacks_does_not_begin(trained: Path) -> None:
    raw = tiny_config(trained, trained / "other") | {"metrics": {"by": ["city"]}}
    raw["data"]["test"] = None
    folder = trained / "lacking"
    folder.mkdir()
    as_config(raw, folder)
    (done,) = run_module(1, "recsys.train", "--config", str(folder / "config-under-test.yaml"))
    (line,) = done.stderr.splitlines()
    assert done.code == 2 and "/valid/" in line
    assert ": no column 'city', by which there are to be figures (metrics.by or --by); it has user" in line


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("town", "no column 'town', by which there are to be figures (metrics.by or --by); it has user, item"),
        ("tags", "column 'tags' is of list"),
        ("key", "column 'key' is of binary"),
        ("twin", "/part-0.parquet: 2 columns are named 'twin'"),
        ("torn", "/part-0.parquet, row group 0: column 'torn' has texts that are no UTF-8"),
        ("lost", "column 'lost' is of timestamp[us, tz=Nowhere/Else]: Cannot locate or parse timezone"),
    ],
)
def test_columns_that_cannot_be_are_named(trained: Path, column: str, told: str) -> None:
    error = evaluated(trained, 1, column)
    assert told in error and len(error.strip().splitlines()) == 1
