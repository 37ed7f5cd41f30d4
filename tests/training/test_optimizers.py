"""Learning rates over a stage."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import StageConfig
from recsys.training.optimizers import schedule_factor


def stage(**settings: Any) -> StageConfig:
    return StageConfig(trains="experts", steps=100, learning_rate=1.0, **settings)


@given(st.integers(1, 50), st.sampled_from(["constant", "cosine"]))
def test_warm_up_rises_by_equal_steps_to_the_full_rate(warmup: int, schedule: str) -> None:
    config = stage(warmup_steps=warmup, schedule=schedule)
    factors = [schedule_factor(config, step, 100) for step in range(warmup + 1)]
    assert factors[:-1] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[-1] == factors[-2] == 1


def test_constant_schedule_stays_at_the_full_rate() -> None:
    assert {schedule_factor(stage(), step, 100) for step in range(100)} == {1.0}
    assert {schedule_factor(stage(warmup_steps=10), step, 100) for step in range(10, 100)} == {1.0}


@given(st.integers(0, 40), st.integers(50, 200))
def test_cosine_falls_from_the_full_rate_to_zero_at_the_end(warmup: int, num_steps: int) -> None:
    config = stage(schedule="cosine", warmup_steps=warmup)
    factors = [schedule_factor(config, step, num_steps) for step in range(warmup, num_steps + 1)]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert 0 < factors[-2] < 0.05
    assert all(later < earlier for earlier, later in pairwise(factors))
    assert schedule_factor(config, (warmup + num_steps) // 2, num_steps) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_stage_of_warm_up_only_ends_at_the_full_rate(schedule: str) -> None:
    config = stage(schedule=schedule, warmup_steps=5)
    assert [schedule_factor(config, step, 5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
