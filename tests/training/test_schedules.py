"""Learning rates over a stage, held to torch's own schedulers."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from recsys.config import StageConfig
from recsys.training.schedules import Plateau, schedule_factor

RATE = 0.25


def stage(**settings: Any) -> StageConfig:
    return StageConfig(trains="experts", epochs=9, learning_rate=RATE, **settings)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def then(kind: str, optimizer: torch.optim.Optimizer, steps: int, minimum: float) -> LRScheduler:
    """What torch has for a schedule after its warm-up."""
    if kind == "cosine":
        return CosineAnnealingLR(optimizer, steps, eta_min=minimum * RATE)
    if kind == "linear":
        return LinearLR(optimizer, start_factor=1.0, end_factor=minimum, total_iters=steps)
    return ConstantLR(optimizer, factor=1.0)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 10),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_the_schedules_are_those_of_torch(kind: str, warmup: int, after: int, minimum: float) -> None:
    config = stage(warmup_steps=warmup, schedule=kind, schedule_minimum=minimum if kind != "constant" else 0.0)
    optimizer, num_steps = sgd(), warmup + after
    warm_up = LambdaLR(optimizer, lambda step: (step + 1) / max(warmup, 1))
    scheduler = SequentialLR(optimizer, [warm_up, then(kind, optimizer, max(after, 1), minimum)], [warmup])
    expected = []
    for _ in range(num_steps + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    factors = [RATE * schedule_factor(config, step, num_steps) for step in range(num_steps + 1)]
    assert factors == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, float("nan")]), max_size=12),
    st.integers(1, 3),
    st.sampled_from([0.1, 0.5]),
    st.sampled_from([0.0, 0.2]),
)
def test_a_plateau_cuts_as_torch_does(losses: list[float], patience: int, factor: float, minimum: float) -> None:
    config = stage(
        schedule="plateau", schedule_minimum=minimum, plateau={"factor": factor, "patience": patience}, warmup_steps=2
    )
    optimizer, plateau, best = sgd(), Plateau(), 0.3
    scheduler = ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience - 1, threshold=0.0, min_lr=minimum * RATE, eps=0.0
    )
    scheduler.step(best)  # what the phase begins with
    for loss in losses:
        before = optimizer.param_groups[0]["lr"]
        is_better = loss < best
        best = loss if is_better else best
        is_cut = plateau.evaluated(config, is_better=is_better)
        scheduler.step(loss)
        now = optimizer.param_groups[0]["lr"]
        assert is_cut == (now < before)
        assert RATE * schedule_factor(config, 2, 9, plateau.share) == pytest.approx(now)
        assert RATE * schedule_factor(config, 0, 9, plateau.share) == pytest.approx(now / 2)


def test_a_minimum_that_is_raised_holds_from_the_next_step_on() -> None:
    raised, plateau = stage(schedule="plateau", schedule_minimum=0.2), Plateau(share=0.01)  # as of a run gone on with
    assert schedule_factor(raised, 2, 9, plateau.share) == 0.2
    assert not plateau.evaluated(raised, is_better=False)
    assert schedule_factor(raised, 2, 9, plateau.share) == 0.2


def test_only_the_schedule_plateau_goes_by_evaluations() -> None:
    plateau = Plateau()
    assert not any(plateau.evaluated(stage(patience=1), is_better=False) for _ in range(5))
    assert schedule_factor(stage(patience=1), 5, 9, 0.5) == 1
