"""Differences and their intervals against worked examples and printed tables."""

import math

import pytest

from benchmarks.quality.intervals import difference, t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [  # from printed tables, which have three digits
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 30, 2.042),
        (0.95, 7, 1.895),
        (0.995, 9, 3.250),
        (0.9995, 2, 31.599),
        (0.975, 120, 1.980),
        (0.975, 1e6, 1.960),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: float, quantile: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(quantile, abs=6e-4)


def test_quantiles_have_the_closed_forms_of_one_and_two_degrees_of_freedom() -> None:
    for probability in (0.5, 0.6, 0.975, 0.999):
        middle = 2 * probability - 1
        assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * middle / 2), rel=1e-8, abs=1e-12)
        two = middle * math.sqrt(2 / (1 - middle**2))
        assert t_quantile(probability, 2) == pytest.approx(two, rel=1e-8, abs=1e-12)
    assert t_quantile(0.975, 2) < t_quantile(0.975, 1.5) < t_quantile(0.975, 1)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.975, 0.5)])
def test_quantiles_out_of_range_are_refused(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, freedom)


def test_runs_of_one_seed_are_paired() -> None:
    found = difference({17: 0.82, 18: 0.84, 19: 0.89}, {19: 0.86, 18: 0.82, 17: 0.81, 20: 0.5})
    # Differences 0.01, 0.02, 0.03: mean 0.02, standard deviation 0.01, t of two degrees of freedom 4.3027.
    assert found.mean == pytest.approx(0.02)
    assert found.relative == pytest.approx(0.02 / 0.83)  # of the mean over the pairs' seeds: seed 20 has no part
    assert found.interval == pytest.approx(
        (0.02 - 4.302653 * 0.01 / math.sqrt(3), 0.02 + 4.302653 * 0.01 / math.sqrt(3))
    )
    assert found.pairs == 3


def test_without_a_common_seed_the_means_are_compared_as_welch_does() -> None:
    found = difference({1: 2.0, 2: 4.0, 3: 6.0}, {17: 1.0, 18: 2.0})
    # Variances 4 and 0.5 over 3 and 2 runs; 1.58333^2 / (1.33333^2 / 2 + 0.25^2 / 1) = 2.63504 degrees of freedom.
    error = t_quantile(0.975, 2.635036) * math.sqrt(4 / 3 + 0.25)
    assert (found.mean, found.relative, found.pairs) == (2.5, pytest.approx(2.5 / 1.5), 0)
    assert found.interval == pytest.approx((2.5 - error, 2.5 + error), rel=1e-5)


def test_an_interval_needs_two_runs_and_has_no_width_where_runs_agree() -> None:
    assert difference({17: 0.8}, {17: 0.7, 18: 0.6}).interval is None
    assert difference({1: 0.8}, {17: 0.7, 18: 0.6}).interval is None
    assert difference({17: 0.75, 18: 0.5}, {17: 0.5, 18: 0.25}).interval == (0.25, 0.25)
    with pytest.raises(ValueError, match="both sides"):
        difference({}, {17: 0.7})
