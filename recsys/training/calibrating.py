"""Calibrators, fitted to what a model says of held-out rows, and what they change."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit
from torch import Tensor

from recsys.config import DomainConfig
from recsys.data.batch import Batch
from recsys.errors import UserError
from recsys.serving.calibration import Calibration, Calibrator, Isotonic, Method, Platt, rows_by_domain
from recsys.terminal import without_empty
from recsys.training.metrics import weighted_metrics

_NEAREST = 0.01
"""Logits between knots at least: a hundredth of the odds. Nearer blocks, of few rows, would be a cliff all the same."""

_ALIKE = 1e-30
"""Standard deviation of logits below which the slope that makes probabilities of them is beyond float32."""

_LEVEL = 1e-6
"""Logits that a line must rise by over a standard deviation of its inputs; less is lost in float32."""


class CalibrationError(UserError):
    """No calibrator can be fitted; the message names the split and the way out."""


class Examples(NamedTuple):
    """What a model says of rows that have a label.

    Attributes:
        logits: (N,).
        labels: (N,).
        weights: (N,) of the rows in the loss; 1 where the config names none.
        domains: (N,); 0 where the config names none.
    """

    logits: NDArray[np.float64]
    labels: NDArray[np.bool_]
    weights: NDArray[np.float64]
    domains: NDArray[np.int64]

    @classmethod
    def of(cls, logits: Tensor, batch: Batch) -> "Examples":
        """A batch, and the model's logits of it."""
        return cls(
            logits.double().numpy(),
            batch.labels.numpy() == 1,
            np.ones(len(logits)) if batch.weight is None else batch.weight.double().numpy(),
            batch.domain.numpy() if len(batch.domain) else np.zeros(len(logits), np.int64),
        )

    @classmethod
    def joined(cls, parts: Iterable["Examples"]) -> "Examples":
        """All of some parts, in order."""
        nothing = cls(np.empty(0), np.empty(0, np.bool_), np.empty(0), np.empty(0, np.int64))
        return cls(*map(np.concatenate, zip(nothing, *parts, strict=True)))

    def at(self, rows: NDArray[Any]) -> "Examples":
        """Those of some places, or where a mask says so."""
        return Examples(*(column[rows] for column in self))

    def classes(self) -> tuple[int, int]:
        """How many are positive, and how many negative."""
        positives = int(self.labels.sum())
        return positives, len(self.labels) - positives


class Fitted(NamedTuple):
    """Calibrators, and why domains have none of their own.

    Attributes:
        calibration: the calibrators.
        fitted_on: the `split`, how many `positives` and `negatives` it has, and the `minimum` of each.
        without: why, by the number of each domain that the rows have and that takes the calibrator of all rows.
    """

    calibration: Calibration
    fitted_on: Mapping[str, Any]
    without: Mapping[int, str]


def fit(rows: Examples, method: Method, *, split: str, minimum: int, domain: DomainConfig | None) -> Fitted:
    """Calibrators of all rows, and of each domain that has enough of them.

    Rows of weight 0 do not count. A domain whose logits do not rise with its labels has none of its own either, as its
    rows would be put in the wrong order, or in none.

    Args:
        rows: of the split.
        method: `platt` or `isotonic`.
        split: for messages.
        minimum: how many positives a calibrator needs at least, and how many negatives.
        domain: of the config; None where rows are calibrated alike.

    Raises:
        CalibrationError: all rows together are too few, of one class, or have logits that are not finite or do not
            rise with the labels.
    """
    rows = rows.at(rows.weights > 0)
    if not np.isfinite(rows.logits).all():
        raise CalibrationError(f"data.{split}: not all logits are finite; export a checkpoint from before it diverged")
    positives, negatives = rows.classes()
    if min(positives, negatives) < minimum:
        raise CalibrationError(
            f"data.{split} has {positives:,} positives and {negatives:,} negatives, and a calibrator needs {minimum:,} "
            "of each; lower --calibration-rows, write a larger split, or leave --calibration out"
        )
    overall = _FITS[method](rows)
    if overall is None:
        raise CalibrationError(
            f"data.{split}: the model's logits do not rise with the labels, so no calibrator makes probabilities of "
            "them; train further, or leave --calibration out"
        )
    domains: dict[int, Calibrator] = {}
    without: dict[int, str] = {}
    for number, places in rows_by_domain(rows.domains) if domain else ():
        of_domain = rows.at(places)
        if min(classes := of_domain.classes()) < minimum:
            without[number] = f"{classes[0]:,} positives, {classes[1]:,} negatives"
        elif own := _FITS[method](of_domain):
            domains[number] = own
        else:
            without[number] = "its logits do not rise with its labels"
    fitted_on = {"split": split, "positives": positives, "negatives": negatives, "minimum": minimum}
    return Fitted(Calibration(method, overall, domains), fitted_on, without)


def _platt(rows: Examples) -> Platt | None:
    """The line of the greatest likelihood of Platt's smoothed targets; None where it does not rise.

    The loss is convex (Lin, Lin and Weng 2007). Logits are centred and scaled meanwhile, as its second derivatives
    would be ill conditioned otherwise.
    """
    weights = rows.weights / rows.weights.mean()
    positives, negatives = weights[rows.labels].sum(), weights[~rows.labels].sum()
    targets = np.where(rows.labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    shares = weights / len(weights)
    centre = shares @ rows.logits
    spread = np.sqrt(shares @ (rows.logits - centre) ** 2)
    if spread <= max(1e-9 * np.abs(rows.logits).max(), _ALIKE):  # all alike, but for rounding
        return None
    inputs = np.stack([(rows.logits - centre) / spread, np.ones(len(shares))], 1)

    def loss(line: NDArray[np.float64]) -> float:
        found = inputs @ line
        return float(shares @ (np.logaddexp(0, found) - targets * found))

    def gradient(line: NDArray[np.float64]) -> NDArray[np.float64]:
        slopes: NDArray[np.float64] = inputs.T @ (shares * (expit(inputs @ line) - targets))
        return slopes

    def hessian(line: NDArray[np.float64]) -> NDArray[np.float64]:
        found = expit(inputs @ line)
        bends: NDArray[np.float64] = inputs.T @ ((shares * found * (1 - found))[:, None] * inputs)
        return bends

    start = np.array([0.0, logit(shares @ targets)])
    found = minimize(loss, start, method="trust-exact", jac=gradient, hess=hessian, options={"gtol": 1e-7})
    if not found.success:
        raise CalibrationError(f"no line fits the logits: {found.message}; take --calibration isotonic")
    # Near its least, the loss is the same number all around; its gradient still tells where that is.
    steepness, height = found.x - np.linalg.solve(hessian(found.x), gradient(found.x))
    if steepness <= _LEVEL:
        return None
    slope = steepness / spread
    return Platt(float(slope), float(height - slope * centre))


def _isotonic(rows: Examples) -> Isotonic | None:
    """The rates that never fall and are nearest to the labels, each at its block's mean logit; None where there is one.

    A row of each class is added at the lowest logit and at the highest, as Laplace's rule adds to the blocks at the
    ends, so that no rate is 0 or 1. Knots at means, instead of at both ends of each block, make no ties within blocks
    and no cliffs between them (centred isotonic regression, Oron and Flournoy 2017), on which the least difference of a
    logit would become a large one of a probability.
    """
    ends = [rows.logits.min(), rows.logits.min(), rows.logits.max(), rows.logits.max()]
    values, tie = np.unique(np.concatenate([rows.logits, ends]), return_inverse=True)
    weights = np.concatenate([rows.weights / rows.weights.mean(), np.ones(4)])
    labels = np.concatenate([rows.labels, [0, 1, 0, 1]])
    held = np.bincount(tie, weights)
    found = isotonic_regression(np.bincount(tie, weights * labels) / held, weights=held)
    starts = found.blocks[:-1]
    means = np.add.reduceat(held * values, starts) / np.add.reduceat(held, starts)
    means = means.clip(values[0], values[-1])  # beyond which rounding would take that of the last float32
    knots = [0]
    for block, mean in enumerate(means):
        if mean - means[knots[-1]] >= _NEAREST:  # a difference, as 0.01 is lost in the sum of a large logit
            knots.append(block)
    if len(knots) < 2:
        return None
    return Isotonic(tuple(means[knots].tolist()), tuple(logit(found.x[starts][knots]).tolist()))


_FITS = {"platt": _platt, "isotonic": _isotonic}


def calibrated(
    calibration: Calibration, logits: NDArray[np.float64], domains: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What an artefact must make of the model's logits (N,), by other code than that which serves."""
    found = _on(calibration.overall, logits)
    for number, calibrator in calibration.domains.items():
        of_domain = domains == number
        found[of_domain] = _on(calibrator, logits[of_domain])
    return found


def _on(calibrator: Calibrator, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    if isinstance(calibrator, Platt):
        return calibrator.slope * logits + calibrator.intercept
    return np.interp(logits, calibrator.logits, calibrator.calibrated)


def effects(fitted: Fitted, rows: Examples, domain: DomainConfig | None) -> dict[str, Any]:
    """Figures of rows before and after calibration, weighted as in the loss, for JSON.

    Args:
        fitted: on other rows.
        rows: that it is judged by.
        domain: of the config.

    Returns:
        `method`, `fitted_on`, `before` and `after` of all rows; and `domains` by name, of those that the rows have:
        which `calibrator` theirs is, `before` and `after`.
    """
    after = rows._replace(logits=calibrated(fitted.calibration, rows.logits, rows.domains))

    def of(places: NDArray[np.int64]) -> dict[str, Any]:
        sides = {"before": rows.at(places), "after": after.at(places)}
        return {
            name: weighted_metrics(side.logits, side.labels, side.weights).as_dict() for name, side in sides.items()
        }

    def calibrator(number: int) -> str:
        if number in fitted.calibration.domains:
            return "its own"
        return f"that of all rows: {fitted.without.get(number, 'no row to fit one on')}"

    told = {"method": fitted.calibration.method, "fitted_on": fitted.fitted_on, **of(np.arange(len(rows.labels)))}
    if domain:
        told["domains"] = {
            domain.labels[number]: {"calibrator": calibrator(number), **of(places)}
            for number, places in rows_by_domain(rows.domains)
        }
    return told


def rows_of(told: Mapping[str, Any]) -> list[dict[str, str]]:
    """What `effects` gives as the rows of a table: each figure before and after."""
    of_all = {"": "all rows", "calibrator": "-", **_shown(told)}
    of_domains = [
        {"": name, "calibrator": of_domain["calibrator"], **_shown(of_domain)}
        for name, of_domain in told.get("domains", {}).items()
    ]
    return without_empty([of_all, *of_domains])


def _shown(told: Mapping[str, Any]) -> dict[str, str]:
    before, after = told["before"], told["after"]
    figures = ("log_loss", "ne", "calibration", "auc")
    return {"examples": f"{before['examples']:,}"} | {
        figure.replace("_", " "): "-" if before[figure] is None else f"{before[figure]:.4f} -> {after[figure]:.4f}"
        for figure in figures
    }
