"""Calibrators are those of their definitions, and of scikit-learn; what they cannot be fitted on is named."""

from math import log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from recsys.config import DomainConfig
from recsys.serving.calibration import Calibration, Isotonic, Platt
from recsys.training.calibrating import CalibrationError, Examples, calibrated, effects, fit, rows_of

LOGITS = [-3, -2.5, -2, -2, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4]
LABELS = [0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1]
WEIGHTS = [1, 2, 1, 0.5, 1, 1, 0.5, 1, 2, 1, 0.5, 1, 1, 0.5, 1]  # of mean 1
DOMAIN = DomainConfig(column="page", num_domains=4, names=("home", "search", "cart", "mail"))


def rows(logits: Any, labels: Any, weights: Any = None, domains: Any = None) -> Examples:
    size = len(logits)
    return Examples(
        np.array(logits, np.float64),
        np.array(labels) == 1,
        np.ones(size) if weights is None else np.array(weights, np.float64),
        np.zeros(size, np.int64) if domains is None else np.array(domains, np.int64),
    )


def fit_all(examples: Examples, method: Any) -> Calibration:
    return fit(examples, method, split="valid", minimum=1, domain=None).calibration


def sigmoid(logits: Any) -> Any:
    return np.exp(-np.logaddexp(0, -np.asarray(logits)))


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_two_logits_have_their_smoothed_rates(method: Any) -> None:
    """By hand: of four rows each, one and three positive. Platt's targets are 1/6 and 5/6, whose means are 1/3 and 2/3,
    which a line through two points meets; Laplace's rule has (1 + 1)/(4 + 2) and (3 + 1)/(4 + 2)."""
    overall = fit_all(rows([0] * 4 + [1] * 4, [0, 0, 0, 1, 0, 1, 1, 1]), method).overall
    if isinstance(overall, Platt):
        assert (overall.slope, overall.intercept) == pytest.approx((2 * log(2), -log(2)), abs=1e-12)
    else:
        assert overall.logits == (0, 1) and overall.calibrated == pytest.approx((-log(2), log(2)), abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "slope", "intercept"),
    [(None, 0.43659668152214, 0.05502760228132), (WEIGHTS, 0.40207616817768, -0.14593940121622)],
)
def test_platt_is_that_of_scikit_learn(weights: Any, slope: float, intercept: float) -> None:
    """`CalibratedClassifierCV`'s sigmoid in version 1.9.1, whose search ends within 1e-7."""
    overall = fit_all(rows(LOGITS, LABELS, weights), "platt").overall
    assert isinstance(overall, Platt)
    assert (overall.slope, overall.intercept) == pytest.approx((slope, intercept), abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "knots", "rates"),
    [
        (None, [-23 / 8, -5 / 3, 0, 1.5, 3.5], [0.25, 1 / 3, 0.5, 2 / 3, 0.8]),
        (WEIGHTS, [-2.8, -1.6, 1 / 9, 1.5, 32 / 9], [0.2, 0.4, 4 / 9, 0.6, 7 / 9]),
    ],
)
def test_isotonic_has_the_blocks_of_scikit_learn(weights: Any, knots: list[float], rates: list[float]) -> None:
    """`IsotonicRegression`'s in version 1.9.1, of the same rows and one of each class at both ends."""
    overall = fit_all(rows(LOGITS, LABELS, weights), "isotonic").overall
    assert isinstance(overall, Isotonic)
    assert overall.logits == pytest.approx(knots) and sigmoid(overall.calibrated) == pytest.approx(rates)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_weights_count_as_copies_of_rows_and_not_by_their_scale(method: Any) -> None:
    twice = [1 + 2 * (row % 2) for row in range(len(LOGITS))]
    copied = rows(np.repeat(LOGITS, twice), np.repeat(LABELS, twice))
    weighted = rows(LOGITS, LABELS, twice)
    scaled = rows([*LOGITS, 9.0], [*LABELS, 0], [*(np.array(twice) * 7.0), 0.0])
    points = np.linspace(-4, 5, 50)
    of_each = [fit_all(one, method) for one in (weighted, scaled)]
    np.testing.assert_allclose(*(calibrated(one, points, points) for one in of_each), atol=1e-9)
    # What smooths has the weight of a mean row, which is nearly nothing of many.
    many = [fit_all(Examples(*(np.tile(column, 3_000) for column in one)), method) for one in (copied, weighted)]
    np.testing.assert_allclose(*(sigmoid(calibrated(one, points, points)) for one in many), atol=2e-2)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=8, unique=True))
def test_what_is_calibrated_stays_so(method: Any, places: list[int]) -> None:
    """Of each logit as many rows as its probability says are positive, told by weights."""
    logits = np.repeat(np.array(places) / 10, 1_000)
    labels = np.tile([0, 1], len(logits) // 2)
    weights = np.where(labels == 1, sigmoid(logits), sigmoid(-logits))
    found = calibrated(fit_all(rows(logits, labels, weights), method), np.array(places) / 10, np.zeros(0))
    np.testing.assert_allclose(sigmoid(found), sigmoid(np.array(places) / 10), atol=4e-3)


@given(st.lists(st.tuples(st.floats(-30, 30, width=32), st.booleans()), min_size=2, max_size=60))
@example([(0.0, False)] * 3 + [(4.7679608161048566e-20, True), (-1.0, False)])
def test_calibrators_never_fall_and_are_never_certain(examples: list[tuple[float, bool]]) -> None:
    logits, labels = zip(*examples, strict=True)
    points = np.linspace(-40, 40, 1_001)
    for method in ("platt", "isotonic"):
        if len(set(labels)) == 1:
            with pytest.raises(CalibrationError, match=r" 0 (positives|negatives)"):
                fit_all(rows(logits, labels), method)
            continue
        try:
            calibration = fit_all(rows(logits, labels), method)
        except CalibrationError as error:
            refused = str(error)
        else:
            refused = ""
            found = calibrated(calibration, points, np.zeros(0))
            served = calibration.overall(torch.from_numpy(points)).numpy()
            assert np.isfinite(served).all() and (np.diff(served) >= 0).all()
            np.testing.assert_allclose(found, served, atol=1e-12)  # NumPy rounds at knots
            assert 0 < sigmoid(found).min() <= sigmoid(found).max() < 1 or method == "platt"
            assert method == "platt" or (np.diff(calibration.overall.logits) >= 0.01).all()  # type: ignore[union-attr]
        assert refused == "" or "do not rise" in refused


def test_log_loss_falls_on_rows_that_were_not_fitted_on() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(-1, 1.5, 40_000)
    labels = random.random(40_000) < sigmoid(0.6 * logits - 0.4)
    seen, unseen = rows(logits[:20_000], labels[:20_000]), rows(logits[20_000:], labels[20_000:])
    for method in ("platt", "isotonic"):
        fitted = fit(seen, method, split="valid", minimum=1_000, domain=None)  # type: ignore[arg-type]
        told = effects(fitted, unseen, None)
        before, after = told["before"], told["after"]
        assert after["log_loss"] < before["log_loss"] - 0.01
        assert abs(after["calibration"] - 1) < 0.03 < abs(before["calibration"] - 1)
        assert after["auc"] == before["auc"] if method == "platt" else abs(after["auc"] - before["auc"]) < 1e-3
        assert "domains" not in told and list(rows_of(told)[0]) == [
            "",
            "examples",
            "log loss",
            "ne",
            "calibration",
            "auc",
        ]


def test_domains_have_their_own_where_there_are_enough_rows() -> None:
    """Home has enough, cart none at all, search too few, and the logits of mail tell the opposite of its labels."""
    random = np.random.default_rng(1)
    domains = np.repeat([0, 1, 3], [4_000, 60, 1_000])
    logits = random.normal(0, 1, len(domains))
    slope = np.array([2.0, 1.0, 0.0, -1.0])[domains]
    examples = rows(logits, random.random(len(domains)) < sigmoid(slope * logits), None, domains)
    fitted = fit(examples, "platt", split="valid", minimum=100, domain=DOMAIN)
    assert set(fitted.calibration.domains) == {0}
    own = fitted.calibration.domains[0]
    assert own == fit_all(examples.at(domains == 0), "platt").overall != fitted.calibration.overall
    assert set(fitted.without) == {1, 3} and fitted.without[3] == "its logits do not rise with its labels"
    told = effects(fitted, rows([0.0, 1.0, 0.0], [0, 1, 0], None, [0, 0, 2]), DOMAIN)
    assert {name: of["calibrator"] for name, of in told["domains"].items()} == {
        "home": "its own",
        "cart": "that of all rows: no row to fit one on",
    }
    assert told["domains"]["cart"]["after"]["auc"] is None
    assert [row["auc"] for row in rows_of(told)][-1] == "-"
    told = effects(fitted, examples, DOMAIN)
    assert told["domains"]["search"]["calibrator"] == "that of all rows: {} positives, {} negatives".format(
        *examples.at(domains == 1).classes()
    )


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        (rows([], []), "data.valid has 0 positives and 0 negatives, and a calibrator needs 1 of each"),
        (rows([0, 1, 2], [1, 1, 1]), "data.valid has 3 positives and 0 negatives"),
        (rows([0, 1, 2], [0, 1, 1], [1, 0, 0]), "data.valid has 0 positives and 1 negatives"),
        (rows([0, 1], [1, 0]), "data.valid: the model's logits do not rise with the labels"),
        (rows([0.1] * 7, [1, 0, 1, 0, 0, 1, 1]), "data.valid: the model's logits do not rise with the labels"),
        (rows([0, np.nan], [1, 0]), "data.valid: not all logits are finite"),
    ],
)
@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_rows_that_fit_nothing_are_named(method: Any, examples: Examples, told: str) -> None:
    with pytest.raises(CalibrationError, match=told) as caught:
        fit_all(examples, method)
    assert "\n" not in str(caught.value)


def test_logits_far_apart_are_fitted() -> None:
    """Of a model that is sure of itself: its second derivatives are hardly any."""
    random = np.random.default_rng(2)
    logits = random.normal(300, 100, 5_000)
    labels = random.random(5_000) < sigmoid(0.01 * logits - 3)
    overall = fit_all(rows(logits, labels), "platt").overall
    assert isinstance(overall, Platt)
    assert (overall.slope, overall.intercept) == pytest.approx((0.01, -3), rel=0.1)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("scale", [1e16, 1e30, float(np.finfo(np.float32).max)])
def test_logits_of_any_size_are_fitted(method: Any, scale: float) -> None:
    """Beyond 2^53, knots 0.01 apart are one number; at the end of float32 a rounded mean would be beyond it."""
    random = np.random.default_rng(3)
    logits = random.uniform(-1, 1, 500)
    labels = random.random(500) < sigmoid(3 * logits)
    found, expected = (
        fit_all(rows(values, labels), method)(torch.from_numpy(values), np.empty(0, np.int64))
        for values in (logits * scale, logits)
    )
    np.testing.assert_allclose(found, expected, atol=0.1 if method == "isotonic" else 1e-5)


def test_knots_stay_within_float32() -> None:
    most = float(np.finfo(np.float32).max)
    for size in (3, 49):
        weights = np.random.default_rng(size).random(2 * size)
        overall = fit_all(rows([-most] * size + [most] * size, [0] * size + [1] * size, weights), "isotonic").overall
        assert isinstance(overall, Isotonic) and overall.logits == pytest.approx((-most, most), rel=1e-15)


@pytest.mark.parametrize(
    ("logits", "weights"),
    [
        (np.linspace(0, 1e-42, 100), np.ones(100)),
        (np.linspace(0, 1, 100), np.where(np.arange(100) < 40, 1, 1e-30)),
    ],
    ids=["no slope of float32 tells them apart", "all positives together weigh nothing"],
)
def test_a_line_that_float32_would_flatten_is_none(logits: Any, weights: Any) -> None:
    with pytest.raises(CalibrationError, match="logits do not rise with the labels"):
        fit_all(rows(logits, np.arange(100) >= 40, weights), "platt")
