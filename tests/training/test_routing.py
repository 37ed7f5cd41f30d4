"""Expert health: figures of known routings, the same for any cut into steps, windows and ranks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.model.experts import expert_layers
from recsys.model.experts.hilomoe import HiLoMoELinear, Routing
from recsys.runtime import Ranks
from recsys.training.routing import RoutingStatistics, RoutingSummary, dead_experts

M, L, K, DOMAINS = 2, 3, 4, 3


def linears(num_layers: int = L, num_experts: int = K) -> nn.Sequential:
    return nn.Sequential(*(HiLoMoELinear(2, 2, num_layers, num_experts) for _ in range(M)))


def random_scores(rows: int, seed: int = 0, num_layers: int = L, num_experts: int = K) -> list[Tensor]:
    """(N, L, K) for each linear."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, num_layers, num_experts, generator=generator).mul(2).softmax(-1) for _ in range(M)]


def put(module: nn.Module, scores: Sequence[Tensor]) -> None:
    for layer, of_linear in zip(expert_layers(module).values(), scores, strict=True):
        layer.routing = Routing(torch.zeros_like(of_linear), of_linear)


def summarise(scores: Sequence[Tensor], domain: Tensor | None = None) -> dict[str, RoutingSummary]:
    """The statistics of one step."""
    module = linears(*scores[0].shape[1:])
    statistics = RoutingStatistics(module, num_domains=0 if domain is None else DOMAINS)
    put(module, scores)
    statistics.update(torch.empty(0, dtype=torch.int64) if domain is None else domain)
    return statistics.window()


def summary_of(scores: Tensor) -> RoutingSummary:
    return summarise([scores] * M)["0"]


def test_uniform_scores_have_full_entropy_no_variation_and_no_dead_expert(process_group: None) -> None:
    summary = summary_of(torch.full((6, L, K), 1 / K))
    torch.testing.assert_close(summary.load(), torch.full((L, K), 1 / K, dtype=torch.float64))
    assert summary.mean_entropy().tolist() == pytest.approx([math.log(K)] * L)
    assert summary.variation().tolist() == pytest.approx([0.0] * L)
    assert summary.dead() == [[]] * L


def test_collapse_has_no_entropy_the_largest_variation_one_path_and_all_others_dead(process_group: None) -> None:
    summary = summary_of(F.one_hot(torch.tensor([[0, 1, 3]] * 6), K).float())
    assert summary.mean_entropy().tolist() == [0.0] * L
    assert summary.variation().tolist() == pytest.approx([math.sqrt(K - 1)] * L)
    assert summary.dead() == [[2, 3, 4], [1, 3, 4], [1, 2, 3]]
    assert summary.distinct_paths() == 1


def test_figures_equal_their_formulas(process_group: None) -> None:
    scores = random_scores(50)
    for found, wanted in zip(summarise(scores).values(), scores, strict=True):
        load = wanted.double().mean(0)
        torch.testing.assert_close(found.load(), load)
        torch.testing.assert_close(found.mean_entropy(), torch.special.entr(wanted.double()).sum(-1).mean(0))
        torch.testing.assert_close(found.variation(), load.std(-1, correction=0) * K)
        assert found.distinct_paths() == len(wanted.argmax(-1).unique(dim=0))


def test_an_expert_is_dead_below_one_percent_of_a_uniform_load(process_group: None) -> None:
    scores = torch.full((8, L, K), 0.0)
    scores[..., 0], scores[..., 1], scores[..., 2] = 0.9 / 100 / K, 1.1 / 100 / K, 0.5
    scores[..., 3] = 1 - scores.sum(-1)
    routing = summarise([scores, torch.full_like(scores, 1 / K)])
    assert routing["0"].dead() == [[1]] * L
    assert list(dead_experts(routing)) == [f"0 layer {layer}: expert 1 is" for layer in (1, 2, 3)]
    several = summarise([F.one_hot(torch.tensor([[2, 2, 2]] * 6), K).float()] * M)
    assert list(dead_experts(several))[:2] == ["0 layer 1: experts 1, 2, 4 are", "0 layer 2: experts 1, 2, 4 are"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_domains_have_the_mean_scores_of_their_own_rows(process_group: None, tokens: int) -> None:
    domain = torch.tensor([0, 2, 2, 0, 0])  # none of domain 1
    scores = random_scores(5 * tokens)
    load = summarise(scores, domain)["1"].domain_load()
    for number in (0, 2):
        wanted = scores[1].unflatten(0, (5, tokens))[domain == number].flatten(0, 1).double().mean(0) * K
        torch.testing.assert_close(load[number], wanted)
    assert load[1].isnan().all()
    torch.testing.assert_close(summarise(scores, domain)["1"].load(), summarise(scores)["1"].load())


def test_windows_add_up_to_the_epoch(process_group: None) -> None:
    module, steps = linears(), [random_scores(rows, seed=rows) for rows in (7, 0, 5, 9)]
    domains = [torch.arange(len(step[0])) % DOMAINS for step in steps]
    statistics = RoutingStatistics(module, num_domains=DOMAINS)
    windows = []
    for number, (step, domain) in enumerate(zip(steps, domains, strict=True)):
        put(module, step)
        statistics.update(domain)
        if number == 1:
            windows.append(statistics.window())
    epoch = statistics.epoch()
    whole = summarise([torch.cat(parts) for parts in zip(*steps, strict=True)], torch.cat(domains))
    for name in ("0", "1"):
        torch.testing.assert_close(windows[0][name].scores, summarise(steps[0], domains[0])[name].scores)
        torch.testing.assert_close(epoch[name].scores, whole[name].scores)
        # Of two windows of two steps the first of each is sampled.
        firsts = [summarise(steps[number], domains[number])[name] for number in (0, 2)]
        assert epoch[name].sampled == 7 + 5
        torch.testing.assert_close(epoch[name].entropy, firsts[0].entropy + firsts[1].entropy)
        assert torch.equal(epoch[name].paths, firsts[0].paths | firsts[1].paths)


def test_entropy_and_paths_are_those_of_every_eighth_step(process_group: None) -> None:
    module, steps = linears(), [random_scores(3, seed=seed) for seed in range(17)]
    statistics = RoutingStatistics(module)
    for step in steps:
        put(module, step)
        statistics.update(torch.empty(0, dtype=torch.int64))
    found, sampled = statistics.epoch(), [torch.cat(parts) for parts in zip(*steps[::8], strict=True)]
    for name, scores in zip(("0", "1"), sampled, strict=True):
        torch.testing.assert_close(found[name].mean_entropy(), summarise([scores] * M)[name].mean_entropy())
        assert found[name].distinct_paths() == len(scores.argmax(-1).unique(dim=0))
        assert (found[name].sampled, found[name].scores.sum()) == (9, pytest.approx(3 * 17 * L))


def test_paths_too_many_to_tell_apart_are_reported_as_a_lower_bound(process_group: None) -> None:
    scores = random_scores(3000, num_layers=20, num_experts=16)[0]
    many = summary_of(scores)
    assert len(many.paths) == 1 << 16
    taken = len(scores.argmax(-1).unique(dim=0))
    # Of n balls in 2^16 buckets so many meet another in the mean: n^2 / 2^17, here 69.
    assert taken - 120 < many.distinct_paths() < taken
    assert many.as_dict().keys() == {*(f"layer{layer}" for layer in range(1, 21)), "paths_at_least"}
    few = summary_of(random_scores(3000, num_layers=4, num_experts=16)[0])
    assert len(few.paths) == 16**4
    assert "paths" in few.as_dict()


def test_the_same_paths_fall_into_the_same_bucket(process_group: None) -> None:
    scores = random_scores(1, num_layers=20, num_experts=16)[0]
    assert summary_of(scores.expand(50, -1, -1)).distinct_paths() == 1


def test_inactive_experts_leave_no_figures() -> None:
    module = linears()
    for layer in expert_layers(module).values():
        layer.experts_active = False
    statistics = RoutingStatistics(module, num_domains=DOMAINS)
    statistics.update(torch.tensor([0, 1]))
    assert statistics.window() == statistics.epoch() == {}


def test_updates_keep_no_graph(process_group: None) -> None:
    module = linears()
    statistics = RoutingStatistics(module)
    put(module, [scores.requires_grad_() for scores in random_scores(4)])
    statistics.update(torch.empty(0, dtype=torch.int64))
    assert not statistics.window()["0"].scores.requires_grad


def _of_rank(ranks: Ranks) -> dict[str, tuple[Any, ...]]:
    """Ten rows, cut so that rank r has those from 4 r to 4 r + 4 and the last rank none."""
    rows = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    return numbers(summarise([scores[rows] for scores in random_scores(10)], (torch.arange(10) % DOMAINS)[rows]))


def numbers(routing: dict[str, RoutingSummary]) -> dict[str, tuple[Any, ...]]:
    """What a process can send to another."""
    return {name: (s.scores.numpy(), s.mean_entropy().numpy(), s.paths.numpy()) for name, s in routing.items()}


def test_figures_are_those_of_all_ranks(process_group: None) -> None:
    whole = numbers(summarise(random_scores(10), torch.arange(10) % DOMAINS))
    for of_rank in run_ranks(4, _of_rank):
        assert of_rank.keys() == whole.keys()
        for name, wanted in whole.items():
            for found, array in zip(of_rank[name], wanted, strict=True):
                np.testing.assert_allclose(found, array, rtol=1e-5)
