"""Calibrated artefacts serve what was fitted on the valid split; calibrators are held to what they must be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_module, run_ranks
from runs import as_config, train_on
from test_card import cells, sections
from test_scorer import COLUMNS, export
from tiny import tiny_config, write_tiny_log

from recsys.checkpoint.layout import digest_of
from recsys.config import Config, ConfigError, load_checkpoint_config
from recsys.data.storage import DataError
from recsys.serving import Artifact, ArtifactError, Scorer
from recsys.serving.calibration import Calibration, Isotonic, Method, Platt
from recsys.serving.scorer import RequestError
from recsys.training import parity
from recsys.training.calibrating import Examples, calibrated, fit

ROW = {"user": 3, "item": 5, "tags": [1, 2], "x": 0.5, "z": 0.1, "domain": 0}
MINIMUM = 78
"""Which domains 0 and 2 of the valid split have, and domain 1 has not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint whose rows have weights, and some of them no label, exported by each method."""
    folder = tmp_path_factory.mktemp("calibration")
    write_tiny_log(folder / "log", {"train": 900, "valid": 640, "test": 251})
    raw = tiny_config(folder / "log", folder / "out")
    for file in [*(folder / "log" / "valid").iterdir(), *(folder / "log" / "test").iterdir()]:
        table = pq.read_table(file)
        labels = pa.array(table["label"].to_pylist(), pa.int8(), mask=np.arange(len(table)) % 20 == 7)
        pq.write_table(table.set_column(table.column_names.index("label"), "label", labels), file, row_group_size=70)
    raw["data"] |= {"weight": "truth", "label_null": "skip"}
    raw["tables"]["item"] = {"num_embeddings": 30, "embedding_dim": 8, "sharding": ["table_wise"]}
    raw["stages"] = {"joint": {"trains": "all", "steps": 12, "learning_rate": 0.02, "sparse_learning_rate": 0.2}}
    run_ranks(1, train_on, as_config(raw, folder))
    for name in ("none", "platt", "isotonic"):
        told = export(checkpoint_of(folder), folder / name, "--calibration", name, "--calibration-rows", str(MINIMUM))
        (folder / f"{name}.json").write_text(json.dumps(told))
    return folder


def checkpoint_of(folder: Path) -> Path:
    return folder / "out" / "checkpoints" / "step-12"


def rows_of(folder: Path, split: str) -> pa.Table:
    """Those that have a label."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted((folder / "log" / split).iterdir())])
    return table.filter(table["label"].is_valid())


def by_hand(calibrator: dict[str, Any], logit: float) -> float:
    """As a client in another language would, from `calibration.json` alone."""
    if "slope" in calibrator:
        return float(calibrator["slope"] * logit + calibrator["intercept"])
    knots = list(zip(calibrator["logits"], calibrator["calibrated"], strict=True))
    if logit <= knots[0][0]:
        return float(knots[0][1])
    for (low, of_low), (high, of_high) in pairwise(knots):
        if logit <= high:
            return float(of_low + (of_high - of_low) * (logit - low) / (high - low))
    return float(knots[-1][1])


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_what_is_served_was_fitted_on_the_valid_split_by_domain(folder: Path, method: Method) -> None:
    plain, scorer = Scorer(folder / "none"), Scorer(folder / method)
    valid = rows_of(folder, "valid")
    seen = Examples(
        plain.logits_of(valid).double().numpy(),
        valid["label"].to_numpy() == 1,
        valid["truth"].to_numpy().astype(np.float32).astype(np.float64),
        valid["domain"].to_numpy().astype(np.int64),
    )
    fitted = fit(seen, method, split="valid", minimum=MINIMUM, domain=plain.artifact.config.data.domain)
    assert set(fitted.calibration.domains) == {0, 2}
    test = rows_of(folder, "test")
    logits, domains = plain.logits_of(test).double().numpy(), test["domain"].to_numpy().astype(np.int64)
    found = scorer.logits_of(test).numpy()
    np.testing.assert_allclose(found, calibrated(fitted.calibration, logits, domains), rtol=0, atol=1e-4)
    told = json.loads((folder / method / "calibration.json").read_text())
    expected = [
        by_hand(told["domains"].get(str(domain), told["overall"]), logit)
        for domain, logit in zip(domains.tolist(), logits.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scorer.score(test), [1 / (1 + exp(-logit)) for logit in expected], rtol=0, atol=1e-6)
    assert np.abs(found - logits).max() > 0.1


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_the_figures_before_and_after_are_told_and_kept(folder: Path, method: Method) -> None:
    told = json.loads((folder / f"{method}.json").read_text())
    kept = json.loads((folder / method / "manifest.json").read_text())
    assert kept["parity"]["calibration"] == told["calibration"] and told["max_difference"] <= 1e-6
    assert "calibration.json" in kept["files"]
    effect = told["calibration"]
    assert effect["method"] == method and effect["fitted_on"]["split"] == "valid"
    assert effect["fitted_on"]["positives"] + effect["fitted_on"]["negatives"] == len(rows_of(folder, "valid")) < 640
    test = rows_of(folder, "test")
    labels, weights = test["label"].to_numpy(), test["truth"].to_numpy()
    for side, name in (("before", "none"), ("after", method)):
        p = Scorer(folder / name).score(test).astype(np.float64)
        loss = -np.average(np.where(labels == 1, np.log(p), np.log1p(-p)), weights=weights)
        assert effect[side]["log_loss"] == pytest.approx(loss, abs=1e-6)
        assert effect[side]["calibration"] == pytest.approx((weights @ p) / (weights @ labels), abs=1e-6)
        assert effect[side]["examples"] == len(test) == sum(of[side]["examples"] for of in effect["domains"].values())
    assert [of["calibrator"].split(":")[0] for of in effect["domains"].values()] == [
        "its own",
        "that of all rows",
        "its own",
    ]
    assert json.loads((folder / "none.json").read_text())["calibration"] is None
    assert not (folder / "none" / "calibration.json").exists()


def test_domains_are_asked_for_where_one_has_its_own(folder: Path, tmp_path: Path) -> None:
    scorer = Scorer(folder / "platt")
    assert set(scorer.columns) == {*COLUMNS, "domain"} and set(Scorer(folder / "none").columns) == set(COLUMNS)
    test = rows_of(folder, "test")
    found = scorer.score(test)
    np.testing.assert_array_equal(scorer.score(test.select(scorer.columns).to_pylist()), found)
    np.testing.assert_array_equal(scorer.score(test.select(scorer.columns).to_pydict()), found)
    assert scorer.score([]).shape == (0,)
    export(checkpoint_of(folder), tmp_path / "alike", "--calibration", "platt", "--calibration-rows", "130")
    alike = Scorer(tmp_path / "alike")
    assert set(alike.columns) == set(COLUMNS) and alike.artifact.calibration is not None
    assert alike.artifact.calibration.domains == {} and alike.score(test.select(COLUMNS)).shape == (len(test),)


@pytest.mark.parametrize(
    ("rows", "error", "told"),
    [
        ([{**ROW, "domain": None}], DataError, "domain column 'domain' has 1 nulls"),
        (
            [ROW, {**ROW, "domain": 3}],
            DataError,
            "'domain' has 1 value out of range, such as 3; there are domains 0..2",
        ),
        ([{**ROW, "domain": -1}], DataError, "out of range, such as -1"),
        ([{**ROW, "domain": "home"}], DataError, "column 'domain' .domain. has type string; integers are needed"),
        ([{**ROW, "domain": 0.5}], RequestError, "column 'domain': row 0 is 0.5; integers"),
        ([{name: ROW[name] for name in COLUMNS}], RequestError, "row 0: 'domain' is missing"),
        (pa.Table.from_pylist([ROW]).drop(["domain"]), DataError, "no column 'domain'; the table has user"),
    ],
)
def test_domains_that_training_would_refuse_are_refused(folder: Path, rows: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told) as caught:
        Scorer(folder / "platt").score(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_predictions_have_calibrated_logits_and_their_sigmoid(folder: Path, tmp_path: Path, method: str) -> None:
    files = ("--input", f"{folder}/log/test", "--output", str(tmp_path / "predicted"))
    (done,) = run_module(1, "recsys.predict", "--artifact", str(folder / method), *files, "--logit")
    assert done.code == 0, done.stderr
    found, rows = pq.read_table(tmp_path / "predicted"), pq.read_table(folder / "log/test")
    logits = found["logit"].to_numpy()
    np.testing.assert_allclose(logits, Scorer(folder / method).logits_of(rows), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["probability"].to_numpy(), 1 / (1 + np.exp(-logits)), rtol=0, atol=5e-7)


def test_tables_of_less_precision_are_within_their_bounds(folder: Path, tmp_path: Path) -> None:
    for precision in ("float16", "int8"):
        options = ("--calibration", "isotonic", "--calibration-rows", str(MINIMUM), "--tables", precision)
        told = export(checkpoint_of(folder), tmp_path / precision, *options)
        assert told["max_difference"] <= parity.BOUNDS[precision]  # type: ignore[index]


def test_figures_are_shown_as_a_table(folder: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", str(checkpoint_of(folder)), "--output", str(tmp_path / "new"))
    options = ("--calibration", "platt", "--calibration-rows", str(MINIMUM))
    (done,) = run_module(1, "recsys.export", *arguments, *options)
    assert done.code == 0, done.stderr
    assert "platt calibration, fitted on valid, on test" in done.stdout and "its own" in done.stdout
    before = json.loads((folder / "platt.json").read_text())["calibration"]["before"]
    assert f"{before['log_loss']:.4f} -> " in done.stdout


def test_the_card_says_whose_figures_are_calibrated_and_weighted(folder: Path) -> None:
    card = sections(folder / "platt")
    (domain,) = (row for row in cells(card["Columns"]) if row[0] == "(domain)")
    assert domain[1:] == ["`domain`", "int64", "which experts or calibrator", "refused"]
    assert "(domain)" not in sections(folder / "none")["Columns"]
    test = len(rows_of(folder, "test"))
    figures = [row[0] for row in cells(card["Figures"])]
    assert figures[-2:] == [
        f"{test} rows of test, the trainer's model, calibrated",
        f"{test} rows of test, this artefact",
    ]
    assert "as it was trained, calibrated, by" in card["Beside the trainer's model"]
    assert "as it was trained, by" in sections(folder / "none")["Beside the trainer's model"]
    assert "of valid. On test that changed, each row counted by its `truth`:" in card["Calibration"]
    assert [row[0] for row in cells(card["Calibration"])[1:]] == ["all rows", "`home`", "`search`", "`cart`"]


def test_the_card_says_when_figures_are_of_the_rows_that_were_fitted(folder: Path, tmp_path: Path) -> None:
    options = ("--calibration", "platt", "--calibration-rows", str(MINIMUM), "--split", "valid")
    export(checkpoint_of(folder), tmp_path / "seen", *options, "--format", "torch-export")
    card = sections(tmp_path / "seen")
    assert "On valid, the rows that it was fitted on, which tell nothing of others, that changed" in card["Calibration"]
    assert "- `dense.pt2`: by " in card["Beside the trainer's model"]
    assert "it gives logits before calibration, and holds a pickle" in card["Beside the trainer's model"]


def test_too_few_rows_are_refused_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", str(checkpoint_of(folder)), "--output", str(tmp_path / "new"))
    (done,) = run_module(1, "recsys.export", *arguments, "--calibration", "platt")
    assert done.code == 2 and done.stderr.startswith("error: data.valid has ") and done.stderr.count("\n") == 1
    assert "a calibrator needs 1,000 of each; lower --calibration-rows" in done.stderr
    assert list(tmp_path.iterdir()) == []


OPTIONS: dict[str, Any] = {"tables": "float32", "split": "test", "max_rows": 251, "bound": None, "calibration": "platt"}


@pytest.mark.parametrize(
    ("change", "minimum", "told"),
    [
        ({"valid": None}, 1, "data.valid is not set; calibrators are fitted on it"),
        ({"label": None}, 1, "data.label is null, and calibrators are fitted to labels"),
        ({}, 0, "--calibration-rows: 0 rows fit nothing"),
    ],
)
def test_what_leaves_nothing_to_fit_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, minimum: int, told: str
) -> None:
    def changed(checkpoint: Path) -> Config:
        config = load_checkpoint_config(checkpoint)
        return config.model_copy(update={"data": config.data.model_copy(update=change)})

    monkeypatch.setattr(parity, "load_checkpoint_config", changed)
    with pytest.raises(ConfigError, match=told):
        parity.export(checkpoint_of(folder), tmp_path / "new", **OPTIONS, calibration_rows=minimum)
    assert list(tmp_path.iterdir()) == []


def test_calibrators_that_are_served_otherwise_are_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate holds what is served against what was fitted: one domain's calibrator is written a little off."""
    added = parity.add_calibration

    def spoil(written: Path, calibration: Calibration) -> None:
        own = calibration.domains[2]
        assert isinstance(own, Platt)
        domains = {**calibration.domains, 2: replace(own, intercept=own.intercept + 1e-4)}
        added(written, replace(calibration, domains=domains))

    monkeypatch.setattr(parity, "add_calibration", spoil)
    with pytest.raises(ArtifactError, match="the export differs from its model by 2"):
        parity.export(checkpoint_of(folder), tmp_path / "new", **OPTIONS, calibration_rows=MINIMUM)
    assert list(tmp_path.iterdir()) == []


def resealed(artifact: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose calibration says something else, with its digest told."""
    shutil.copytree(artifact, target)
    told = json.loads((target / "calibration.json").read_text())
    changed = change(told)
    (target / "calibration.json").write_text(json.dumps(told if changed is None else changed))
    manifest = json.loads((target / "manifest.json").read_text())
    digest = digest_of(target / "calibration.json")
    manifest["files"]["calibration.json"] = digest._asdict()
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize(
    ("method", "change", "told"),
    [
        ("platt", lambda told: [], "method, overall and domains are needed"),
        ("platt", lambda told: told.update(method=["platt"]), "method must be one of platt, isotonic"),
        ("platt", lambda told: told.update(method="isotonic"), "of method isotonic must have logits and calibrated"),
        ("platt", lambda told: told.update(more=1), "method, overall and domains are needed, and nothing else"),
        ("platt", lambda told: told["overall"].update(slope=0), "the slope above 0"),
        ("platt", lambda told: told["overall"].update(slope=True), "must be numbers"),
        ("platt", lambda told: told["overall"].update(intercept="1"), "must be numbers"),
        ("platt", lambda told: told["overall"].update(intercept=10**200), "must be numbers"),
        ("platt", lambda told: told.update(overall=None), "must have slope and intercept"),
        ("platt", lambda told: told["domains"].update({"3": told["overall"]}), "of which the config has 3"),
        ("platt", lambda told: told["domains"].update({"00": told["overall"]}), "of which the config has 3"),
        ("platt", lambda told: told.update(domains=[]), "domains must be by their numbers"),
        ("isotonic", lambda told: told["overall"]["logits"].reverse(), "logits must rise"),
        ("isotonic", lambda told: told["overall"]["calibrated"].reverse(), "calibrated must not fall"),
        ("isotonic", lambda told: told["overall"]["calibrated"].append(9), "must be as many"),
        ("isotonic", lambda told: told["overall"].update(logits=[0], calibrated=[0]), "2 at least"),
        ("isotonic", lambda told: told["overall"].update(logits="01"), "must be lists of numbers"),
        ("isotonic", lambda told: told["domains"]["0"]["logits"].append(None), "must be lists of numbers"),
    ],
)
def test_a_calibration_that_is_none_is_refused(
    folder: Path, tmp_path: Path, method: str, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    spoilt = resealed(folder / method, tmp_path / "spoilt", change)
    with pytest.raises(ArtifactError, match=told) as caught:
        Artifact.open(spoilt)
    assert str(spoilt / "calibration.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_calibration_is_held_by_its_digest(folder: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(folder / "platt", tmp_path / "spoilt")
    path = spoilt / "calibration.json"
    text = path.read_text()
    path.write_text(text.replace("slope", "Slope", 1))
    with pytest.raises(ArtifactError, match=r"calibration.json is not what was written"):
        Artifact.open(spoilt)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"calibration.json"):
        Artifact.open(spoilt)
    path.write_text(text)
    manifest = json.loads((spoilt / "manifest.json").read_text())
    del manifest["files"]["calibration.json"]
    (spoilt / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"lists no calibration\.json"):
        Artifact.open(spoilt)


NUMBERS = st.floats(-50, 50, width=32)


@st.composite
def calibrators(draw: st.DrawFn, method: Method) -> Platt | Isotonic:
    if method == "platt":
        return Platt(draw(st.floats(0.01, 20)), draw(NUMBERS))
    knots = sorted(draw(st.sets(NUMBERS, min_size=2, max_size=6)))
    return Isotonic(tuple(knots), tuple(sorted(draw(NUMBERS) for _ in knots)))


@given(st.data(), st.sampled_from(["platt", "isotonic"]))
def test_what_serves_is_what_the_gate_has_and_never_falls(data: st.DataObject, method: Method) -> None:
    domains = data.draw(st.dictionaries(st.integers(0, 4), calibrators(method), max_size=4))
    calibration = Calibration(method, data.draw(calibrators(method)), domains)
    assert Calibration.parse(json.loads(calibration.to_json()), 5) == calibration
    rows = sorted(data.draw(st.lists(st.tuples(st.integers(0, 4), st.floats(-60, 60, width=32)), max_size=40)))
    of_rows = np.array([domain for domain, _ in rows], np.int64)
    logits = torch.tensor([logit for _, logit in rows], dtype=torch.float32)
    found = calibration(logits, of_rows)
    assert found.dtype == torch.float32
    expected = calibrated(calibration, logits.double().numpy(), of_rows)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    for domain in set(of_rows.tolist()):
        assert (np.diff(found.numpy()[of_rows == domain]) >= 0).all()
    shuffled = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(calibration(logits[shuffled], of_rows[shuffled]), found[shuffled])


def test_one_line_and_two_knots_by_hand() -> None:
    logits = torch.tensor([-2.0, 0.0, 0.5, 1.0, 9.0, torch.nan])
    line = Calibration("platt", Platt(2.0, -1.0))(logits, np.empty(0, np.int64))
    assert line[:5].tolist() == [-5, -1, 0, 1, 17] and line[5].isnan()
    knots = Calibration("isotonic", Isotonic((0.0, 1.0), (-log(2), log(2))))(logits, np.empty(0, np.int64))
    assert knots[:5].sigmoid().tolist() == pytest.approx([1 / 3, 1 / 3, 0.5, 2 / 3, 2 / 3]) and knots[5].isnan()


def test_rows_without_domains_are_no_answer() -> None:
    calibration = Calibration("platt", Platt(1.0, 0.0), {0: Platt(2.0, 0.0)})
    with pytest.raises(ValueError, match="2 logits, but the domains of 0 rows"):
        calibration(torch.zeros(2), np.empty(0, np.int64))


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_candidates_are_calibrated_by_the_domain_of_either_side(folder: Path, method: Method) -> None:
    scorer = Scorer(folder / method)
    items = [{"item": item, "tags": [item % 5], "z": 0.1 * item, "domain": item % 3} for item in range(12)]
    user = {"user": 3, "x": 0.5}
    expected = scorer.score([{**user, **item} for item in items])
    np.testing.assert_allclose(scorer.score_candidates(user, items), expected, rtol=0, atol=1e-6)
    for domain in range(3):
        shared = [{name: value for name, value in item.items() if name != "domain"} for item in items]
        context = {**user, "domain": domain}
        expected = scorer.score([{**context, **item} for item in shared])
        np.testing.assert_allclose(scorer.score_candidates(context, shared), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            scorer.score_candidates(context, pa.Table.from_pylist(shared)), expected, rtol=0, atol=1e-6
        )
    with pytest.raises(RequestError, match="'domain' is missing"):
        scorer.score_candidates(user, shared)
    with pytest.raises(DataError, match="candidates: no column 'domain'"):
        scorer.score_candidates(user, pa.Table.from_pylist(shared))
    with pytest.raises(DataError, match=r"context.*domain"):
        scorer.score_candidates({**user, "domain": 99}, shared)
