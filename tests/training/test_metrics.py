"""Metrics equal their definitions, on any world size; the binned AUC keeps within the bound that it reports."""

from math import log

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from recsys.runtime import Ranks
from recsys.training.metrics import (
    MOST_NE,
    BinaryMetrics,
    DivergedError,
    GroupedMetrics,
    Metrics,
    far_off,
    weighted_metrics,
)

quickly = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

EXAMPLES = st.lists(st.tuples(st.integers(-6, 6).map(lambda n: n / 2), st.booleans()), min_size=1, max_size=60)
"""Logits on a coarse grid, so that ties are frequent, and labels."""

pytestmark = pytest.mark.usefixtures("process_group")


def exact_auc(logits: Tensor, labels: Tensor) -> float | None:
    """Share of pairs of a positive and a negative that are in the right order, ties counting half."""
    positives, negatives = logits[labels == 1].double(), logits[labels == 0].double()
    if not len(positives) or not len(negatives):
        return None
    difference = positives[:, None] - negatives[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def measure(logits: Tensor, labels: Tensor, *, chunk: int = 7, exact_examples: int = 10**6, bins: int = 64) -> Metrics:
    metrics = BinaryMetrics(exact_examples=exact_examples, num_bins=bins)
    for part, truth in zip(logits.split(chunk), labels.split(chunk), strict=True):
        metrics.update(part, truth)
    return metrics.compute()


def tensors(examples: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([logit for logit, _ in examples]), torch.tensor([float(label) for _, label in examples])


def click_log(rows: int, *, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and labels that they predict well."""
    random = np.random.default_rng(4)
    logits = torch.from_numpy(random.normal(-1, spread, rows)).float()
    return logits, (torch.from_numpy(random.random(rows)) < logits.sigmoid()).float()


@quickly
@given(EXAMPLES)
def test_every_figure_equals_its_definition(examples: list[tuple[float, bool]]) -> None:
    logits, labels = tensors(examples)
    found = measure(logits, labels)
    probability = [1 / (1 + np.exp(-logit)) for logit, _ in examples]
    clicks, rows = sum(label for _, label in examples), len(examples)
    loss = -sum(log(p) if label else log(1 - p) for p, (_, label) in zip(probability, examples, strict=True)) / rows
    assert (found.examples, found.positives) == (rows, clicks)
    assert found.auc == pytest.approx(exact_auc(logits, labels))
    assert found.auc_error == 0
    assert found.log_loss == pytest.approx(loss)
    assert found.calibration == (pytest.approx(sum(probability) / clicks) if clicks else None)
    if 0 < clicks < rows:
        rate = clicks / rows
        assert found.ne == pytest.approx(loss / -(rate * log(rate) + (1 - rate) * log(1 - rate)))
    else:
        assert found.ne is None and found.auc is None


@quickly
@given(EXAMPLES, st.sampled_from([2, 3, 64, 1024]), st.sampled_from([1.0, 0.001, 20.0]))
def test_binned_auc_is_within_its_bound_of_the_exact_one(
    examples: list[tuple[float, bool]], bins: int, scale: float
) -> None:
    logits, labels = tensors(examples)
    logits = logits * scale + torch.linspace(0, scale, len(logits))
    found, exact = measure(logits, labels, exact_examples=1, bins=bins), exact_auc(logits, labels)
    if len(examples) == 1 or exact is None:
        assert (found.auc, found.auc_error) == (exact, 0)
        return
    assert found.auc is not None
    assert abs(found.auc - exact) <= found.auc_error + 1e-9
    assert found.auc_error <= 0.5


def test_many_bins_resolve_the_auc_well() -> None:
    logits, labels = click_log(5000)
    found, exact = measure(logits, labels, chunk=500, exact_examples=10, bins=1 << 16), exact_auc(logits, labels)
    assert found.auc == pytest.approx(exact, abs=1e-4)
    assert 0 < found.auc_error < 1e-4


@pytest.mark.parametrize(("label", "calibration"), [(0.0, None), (1.0, 0.5)])
@pytest.mark.parametrize("exact_examples", [100, 2])
def test_one_class_leaves_auc_and_ne_undefined(label: float, calibration: float | None, exact_examples: int) -> None:
    found = measure(torch.zeros(5), torch.full((5,), label), exact_examples=exact_examples)
    assert found.log_loss == pytest.approx(log(2))
    assert found == Metrics(5, int(5 * label), None, 0.0, found.log_loss, None, calibration)


def test_no_examples_leave_everything_undefined() -> None:
    nothing = Metrics(0, 0, None, 0.0, None, None, None)
    metrics = BinaryMetrics()
    assert metrics.compute() == nothing
    metrics.update(torch.empty(0), torch.empty(0))
    assert metrics.compute() == nothing
    metrics.update(*click_log(30))
    assert metrics.compute().examples == 30
    metrics.reset()
    assert metrics.compute() == nothing


@pytest.mark.parametrize("exact_examples", [10**6, 100])
def test_figures_do_not_depend_on_the_batches_and_computing_does_not_change_them(exact_examples: int) -> None:
    logits, labels = click_log(300)
    metrics = BinaryMetrics(exact_examples=exact_examples, num_bins=64)
    metrics.update(logits[:150], labels[:150])
    metrics.compute()
    metrics.update(logits[150:], labels[150:])
    first = metrics.compute()
    assert metrics.compute() == first
    for chunk in (1, 300):
        other = measure(logits, labels, chunk=chunk, exact_examples=exact_examples)
        assert (other.auc, other.auc_error) == (first.auc, first.auc_error)
        assert other.log_loss == pytest.approx(first.log_loss, rel=1e-12)


def test_auc_turns_binned_beyond_the_limit_and_not_at_it() -> None:
    logits, labels = click_log(100)
    assert measure(logits, labels, exact_examples=100).auc_error == 0
    assert measure(logits, labels, exact_examples=99).auc_error > 0


def test_memory_stays_bounded_beyond_the_limit() -> None:
    metrics = BinaryMetrics(exact_examples=50, num_bins=16)
    held = []
    for _ in range(40):
        metrics.update(*click_log(20))
        tensors_held = [metrics._bins, metrics._sums, *(tensor for pair in metrics._kept for tensor in pair)]
        held.append(sum(tensor.numel() for tensor in tensors_held if tensor is not None))
    assert max(held) <= 2 * (50 + 20) + 2 * 16 + 3
    assert metrics.compute().examples == 800


def test_figures_are_for_json_by_name() -> None:
    figures = measure(*click_log(30)).as_dict()
    assert list(figures) == ["examples", "positives", "auc", "auc_error", "log_loss", "ne", "calibration"]


# What a rank of n sees: rows rank::n, so that shares differ in size; the second scenario leaves all but rank 0 empty.
SCENARIOS = {
    "exact": 10**6,
    "one rank has all": 10**6,
    "binned": 64,
    "binned, one rank has all": 64,
    "at the limit": 400,
}


def shares(ranks: Ranks) -> dict[str, Metrics]:
    """Every scenario's figures as this rank computes them."""
    rank, world_size = ranks.rank, ranks.world_size
    found = {}
    for name, exact_examples in SCENARIOS.items():
        logits, labels = click_log(401 if name != "at the limit" else 400)
        metrics = BinaryMetrics(exact_examples=exact_examples, num_bins=256)
        if "one rank" not in name:
            logits, labels = logits[rank::world_size], labels[rank::world_size]
        elif rank:
            logits, labels = logits[:0], labels[:0]
        metrics.update(logits, labels)
        found[name] = metrics.compute()
    # A rank's own share is far below the limit, the total above it.
    metrics = BinaryMetrics(exact_examples=400, num_bins=256)
    metrics.update(*(tensor[rank::world_size] for tensor in click_log(401)))
    found["beyond the limit in total"] = metrics.compute()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_figures_are_the_same_on_every_world_size_and_rank(world_size: int) -> None:
    alone = shares(Ranks(0, 1, 0, 1, torch.device("cpu")))
    ranks = run_ranks(world_size, shares)
    assert all(found == ranks[0] for found in ranks)
    for name, wanted in alone.items():
        for figure, value in wanted.as_dict().items():
            assert ranks[0][name].as_dict()[figure] == pytest.approx(value, abs=1e-6, rel=1e-6), (name, figure)
    assert ranks[0]["at the limit"].auc_error == 0 == ranks[0]["one rank has all"].auc_error
    assert ranks[0]["beyond the limit in total"].auc_error > 0


@pytest.mark.parametrize("exact_examples", [10, 1])
def test_a_model_that_predicts_nan_is_not_measured(process_group: None, exact_examples: int) -> None:
    metrics = BinaryMetrics(exact_examples=exact_examples)
    metrics.update(torch.tensor([0.5, float("nan"), 1.0]), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(DivergedError, match="diverged; lower the stage's learning rates"):
        metrics.compute()


def grouped(ranks: Ranks, exact_examples: int) -> tuple[list[Metrics], list[Metrics]]:
    """The figures of four groups, the last of no rows, at once and each alone."""
    logits, labels = click_log(600)
    groups = torch.arange(600) % 7 % 3
    mine = slice(ranks.rank, None, ranks.world_size)
    metrics = GroupedMetrics(4, exact_examples=exact_examples, num_bins=4096)
    for part in zip(logits[mine].split(50), labels[mine].split(50), groups[mine].split(50), strict=True):
        metrics.update(*part)
    alone = []
    for group in range(4):
        of_group = groups[mine] == group
        one = BinaryMetrics(exact_examples=exact_examples if exact_examples > 600 else 1, num_bins=1024)
        one.update(logits[mine][of_group], labels[mine][of_group])
        alone.append(one.compute())
    return metrics.compute(), alone


@pytest.mark.parametrize("exact_examples", [1000, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_grouped_figures_are_those_of_each_group_alone(world_size: int, exact_examples: int) -> None:
    for together, alone in run_ranks(world_size, grouped, exact_examples):
        assert [metrics.examples for metrics in together] == [257, 172, 171, 0]
        for one, other in zip(together, alone, strict=True):
            for figure, value in other.as_dict().items():
                wanted = value if value is None else pytest.approx(value, abs=1e-9, rel=1e-9)
                assert one.as_dict()[figure] == wanted, figure
        assert (together[0].auc_error > 0) == (exact_examples < 600)


def test_the_bins_of_many_groups_take_no_more_memory_and_tell_their_error(process_group: None) -> None:
    random = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 3, (3000,), generator=random) * 21_000
    logits = torch.randn(3000, generator=random)
    labels = (torch.rand(3000, generator=random) < 0.4).float()
    metrics, exact = GroupedMetrics(2**16, exact_examples=10), GroupedMetrics(2**16)
    for one in (metrics, exact):
        one.update(logits, labels, groups)
    assert metrics._bins is not None and metrics._bins.numel() == 2 * 2**22
    found, truth = metrics.compute(), exact.compute()
    for group in (0, 21_000, 42_000):
        assert 0 < abs(found[group].auc - truth[group].auc) <= found[group].auc_error < 0.5  # type: ignore[operator]


def test_a_group_of_one_class_has_no_auc(process_group: None) -> None:
    metrics = GroupedMetrics(2)
    metrics.update(torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))
    one, other = metrics.compute()
    assert (one.auc, other.auc) == (None, None)
    assert (one.positives, other.positives) == (2, 0)


def test_nan_in_one_group_is_not_measured(process_group: None) -> None:
    metrics = GroupedMetrics(2)
    metrics.update(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    with pytest.raises(DivergedError):
        metrics.compute()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_no_figure(value: float, label: float) -> None:
    logits, labels = torch.tensor([0.5, value, -1.0]), torch.tensor([1.0, label, 0.0])
    with pytest.raises(DivergedError, match="NaN or infinite logits"):
        measure(logits, labels)
    grouped = GroupedMetrics(2)
    grouped.update(logits, labels, torch.tensor([0, 1, 0]))
    with pytest.raises(DivergedError, match="NaN or infinite logits"):
        grouped.compute()


def test_the_largest_logits_that_there_are_have_figures() -> None:
    found = measure(torch.tensor([3.4e38, -3.4e38]), torch.tensor([0.0, 1.0]))
    assert found.log_loss == pytest.approx(3.4e38) and found.ne == pytest.approx(3.4e38 / log(2))


def test_a_model_far_worse_than_the_label_rate_is_told() -> None:
    labels = torch.tensor([1.0, 0.0])
    bad = measure(torch.tensor([-4.0, 4.0]), labels)
    assert bad.ne is not None and bad.ne > MOST_NE
    assert str(far_off(bad)).startswith(f"ne is {bad.ne:.4g}, where always predicting the label rate has 1")
    assert far_off(measure(torch.tensor([-1.0, 1.0]), labels)) is None or 1.313 / log(2) > MOST_NE
    assert far_off(measure(torch.zeros(2), labels)) is None
    assert far_off(measure(torch.tensor([9.0]), torch.tensor([0.0]))) is None  # of one class there is no ne


@quickly
@given(EXAMPLES, st.data())
def test_weighted_figures_are_those_of_as_many_copies(examples: list[tuple[float, bool]], data: st.DataObject) -> None:
    logits, labels = tensors(examples)
    copies = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels))))
    found = weighted_metrics(logits.double().numpy(), labels.numpy() == 1, copies.double().numpy())
    expected = measure(logits.repeat_interleave(copies), labels.repeat_interleave(copies))
    assert (found.examples, found.positives) == (len(labels), int(labels.sum()))
    for figure in ("auc", "log_loss", "ne", "calibration"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure)), figure


def test_weighted_figures_of_what_is_not_finite_are_refused() -> None:
    with pytest.raises(DivergedError):
        weighted_metrics(np.array([0.0, np.nan]), np.array([True, False]), np.ones(2))


def test_what_is_gone_on_with_keeps_the_limits_that_it_began_with() -> None:
    """Those of a run that goes on may be others, and what is binned cannot be ranked any more."""
    logits, labels = click_log(400)
    began = BinaryMetrics(exact_examples=100, num_bins=32)
    began.update(logits[:300], labels[:300])
    gone_on = BinaryMetrics(exact_examples=1000, num_bins=64)
    gone_on.load_state(began.state())
    gone_on.update(logits[300:], labels[300:])
    wanted, found = measure(logits, labels, exact_examples=100, bins=32), gone_on.compute()
    assert (found.auc, found.auc_error) == (wanted.auc, wanted.auc_error)
    assert found.auc_error > 0
    gone_on = BinaryMetrics(exact_examples=1000, num_bins=64)
    began = BinaryMetrics(exact=False)
    began.update(logits, labels)
    began.compute()
    gone_on.load_state(began.state())
    assert gone_on.compute().auc == pytest.approx(exact_auc(logits, labels), abs=1e-3)


def binned_windows(ranks: Ranks) -> list[Metrics]:
    """The figures of two windows after one another, and of the second where a run was resumed within it."""
    found = []
    for rows in (401, 300):
        logits, labels = (tensor[:rows][ranks.rank :: ranks.world_size] for tensor in click_log(401))
        metrics = BinaryMetrics(exact=False, num_bins=4096)
        metrics.update(logits[:50], labels[:50])
        again = BinaryMetrics(exact=False, num_bins=4096)
        again.load_state(metrics.state())
        again.update(logits[50:], labels[50:])
        found.append(again.compute())
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_windows_are_binned_whatever_their_size_within_the_bound_that_they_tell(world_size: int) -> None:
    for figures in run_ranks(world_size, binned_windows):
        for rows, found in zip((401, 300), figures, strict=True):
            logits, labels = (tensor[:rows] for tensor in click_log(401))
            exact = exact_auc(logits, labels)
            assert found.auc is not None and exact is not None and found.examples == rows
            assert 0 < found.auc_error < 1e-3
            assert abs(found.auc - exact) <= found.auc_error + 1e-12
