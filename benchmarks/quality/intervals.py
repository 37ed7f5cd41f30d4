"""What separates two sets of runs, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """How far runs lie from those of a baseline.

    Attributes:
        mean: the mean difference, in the figure's own unit.
        relative: `mean` as a share of the baseline's mean.
        interval: the 95 % confidence interval of `mean`; None where the runs are too few for one.
        pairs: how many pairs of runs with one seed were compared; 0 where no seed is common, so that means were.
    """

    mean: float
    relative: float
    interval: tuple[float, float] | None
    pairs: int


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Compare runs, by seed, with those of a baseline.

    Runs of one seed are paired, and the interval is Student's t over the paired differences. Where no seed is common,
    it is Welch's over the two means (B. L. Welch, Biometrika 34, 1947), whose variances need not be alike.

    Raises:
        ValueError: there are no runs on one of the sides.
    """
    if not values or not baseline:
        raise ValueError("a difference needs runs on both sides")
    common = [seed for seed in values if seed in baseline]
    if common:
        differences = [values[seed] - baseline[seed] for seed in common]
        base, centre = mean(baseline[seed] for seed in common), mean(differences)
        variances, counts = [_variance(differences)], [len(differences)]
    else:
        base = mean(baseline.values())
        centre = mean(values.values()) - base
        sides = (list(values.values()), list(baseline.values()))
        variances, counts = [_variance(side) for side in sides], [len(side) for side in sides]
    interval = None
    if min(counts) > 1:
        # Of one sample, Welch's degrees of freedom are Student's: n - 1.
        shares = [variance / count for variance, count in zip(variances, counts, strict=True)]
        error = math.sqrt(sum(shares))
        if error:
            freedom = sum(shares) ** 2 / sum(
                share**2 / (count - 1) for share, count in zip(shares, counts, strict=True)
            )
            error *= t_quantile((1 + CONFIDENCE) / 2, freedom)
        interval = (centre - error, centre + error)
    return Difference(centre, centre / base, interval, len(common))


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution.

    With `t = sqrt(freedom) tan(angle)` the density becomes `cos(angle) ** (freedom - 1)`, smooth on a bounded range:
    Simpson's rule integrates it and bisection inverts the integral, to about ten digits.

    Args:
        probability: in [0.5, 1).
        freedom: degrees of freedom, at least 1; they need not be whole.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile for probability {probability} and {freedom} degrees of freedom")
    half = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) * math.sqrt(math.pi) / 2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if 0.5 + 0.5 * _integral_of_cosine_power(freedom - 1, angle) / half < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _integral_of_cosine_power(power: float, end: float) -> float:
    """From 0 to `end`, by Simpson's rule; the peak is 1 / sqrt(power) wide."""
    intervals = 256 + 2 * math.ceil(8 * math.sqrt(power))
    points: list[float] = [math.cos(end * index / intervals) ** power for index in range(intervals + 1)]
    return (points[0] + 4 * sum(points[1::2]) + 2 * sum(points[2:-1:2]) + points[-1]) * end / intervals / 3


def _variance(values: Sequence[float]) -> float:
    return stdev(values) ** 2 if len(values) > 1 else 0.0
