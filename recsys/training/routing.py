"""Expert health: how the linears with experts route over many steps and all ranks.

Shapes: N inputs of a linear in a step (rows, or in a transformer their tokens), L layers of K experts, D domains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.model.experts import ExpertLayer, expert_layers

DEAD_LOAD = 0.01
"""An expert is dead if its load is below this share of a uniform one, 1/K.

By load, because that means the same under dense routing, where no score is ever 0, and under top-k, where an expert
that is never among the k has load 0."""

EXACT_PATHS = 1 << 16
"""Up to so many possible paths, K^L, each is told apart; beyond, they are hashed into so many buckets."""


_SUMS = ("scores", "entropy", "paths")

SAMPLE_EVERY = 8
"""Entropy and paths are taken from every so many-th step, from a window's first on: they cost ten times the load."""


@dataclass(frozen=True)
class RoutingSummary:
    """How one linear routed over some steps and all ranks, on the CPU.

    Attributes:
        scores: (D, L, K) float64, sum of each expert's scores over the inputs of each domain; D is 1 without domains.
        entropy: (L,) float64, sum over the sampled inputs of the scores' entropy in nats.
        sampled: scalar, number of sampled inputs.
        paths: (P,) bool, those that the sampled inputs took: the expert of the highest score in each layer.
        paths_exact: whether each path has a place in `paths` of its own; if not, there are at least as many as places.
    """

    scores: Tensor
    entropy: Tensor
    sampled: Tensor
    paths: Tensor
    paths_exact: bool

    def __add__(self, other: "RoutingSummary") -> "RoutingSummary":
        return RoutingSummary(
            self.scores + other.scores,
            self.entropy + other.entropy,
            self.sampled + other.sampled,
            self.paths | other.paths,
            self.paths_exact,
        )

    def load(self) -> Tensor:
        """Share of a layer's routed mass that each expert got, (L, K); NaN without any input."""
        return _shares(self.scores.sum(0))

    def mean_entropy(self) -> Tensor:
        """Mean over sampled inputs of the scores' entropy in nats, (L,): log K is uniform, 0 one expert an input."""
        return self.entropy / self.sampled

    def variation(self) -> Tensor:
        """Coefficient of variation of the load over a layer's experts, (L,): 0 is uniform, sqrt(K - 1) collapse."""
        load = self.load()
        return load.std(-1, correction=0) / load.mean(-1)

    def dead(self) -> list[list[int]]:
        """The dead experts of each layer, numbered from 1; see `DEAD_LOAD`."""
        mask = self.load() < DEAD_LOAD / self.scores.shape[-1]
        return [(layer.nonzero().flatten() + 1).tolist() for layer in mask]

    def distinct_paths(self) -> int:
        """Paths that at least one sampled input took; a lower bound unless `paths_exact`."""
        return int(self.paths.sum())

    def domain_load(self) -> Tensor:
        """The load as a multiple of a uniform one over each domain's inputs alone, (D, L, K); NaN without any."""
        return _shares(self.scores) * self.scores.shape[-1]

    def as_dict(self) -> dict[str, Any]:
        """What a report tells, JSON types alone."""
        figures = zip(self.mean_entropy().tolist(), self.variation().tolist(), self.dead(), strict=True)
        layers = {
            f"layer{number}": {"entropy": entropy, "cv": cv, "dead": dead}
            for number, (entropy, cv, dead) in enumerate(figures, start=1)
        }
        return {**layers, "paths" if self.paths_exact else "paths_at_least": self.distinct_paths()}


class RoutingStatistics:
    """Sums of how the linears of a dense arch route, on its device: a small product per linear and step, no sync.

    Those linears count whose experts are active when this is made.

    Args:
        dense_arch: on its device, never wrapped.
        num_domains: D; 0 if batches have no domains.
    """

    def __init__(self, dense_arch: nn.Module, *, num_domains: int = 0) -> None:
        layers = {name: layer for name, layer in expert_layers(dense_arch).items() if layer.experts_active}
        self._linears = {name: _Linear(layer, max(num_domains, 1)) for name, layer in layers.items()}
        devices = {linear.scores.device for linear in self._linears.values()}
        self._domains = torch.arange(num_domains, device=next(iter(devices), None))[:, None]
        self._steps = 0  # since the last window
        self._epoch: dict[str, RoutingSummary] = {}

    @torch.no_grad()
    def update(self, domain: Tensor) -> None:
        """Add what the linears did in the last step; `domain` is the batch's, (B,), or anything without domains."""
        sampled = self._steps % SAMPLE_EVERY == 0
        self._steps += 1
        members: dict[int, Tensor] = {}
        for linear in self._linears.values():
            assert linear.layer.routing is not None  # a step was taken
            scores = linear.layer.routing.scores.float()
            if not (inputs := len(scores)):
                continue
            if inputs not in members:
                members[inputs] = self._members(domain, inputs)
            linear.scores.addmm_(members[inputs], scores.flatten(1))
            if sampled:
                linear.sample(scores)

    def _members(self, domain: Tensor, inputs: int) -> Tensor:
        """Which inputs are of which domain, (D, N) of 0 and 1; all of the only one without domains."""
        if not len(self._domains):
            return torch.ones(1, inputs, device=self._domains.device)
        tokens = inputs // len(domain)
        return (self._domains == (domain if tokens == 1 else domain.repeat_interleave(tokens))).float()

    def window(self) -> dict[str, RoutingSummary]:
        """The steps since the last window, by linear; a collective call. Nothing while no expert is active."""
        if not self._linears:
            return {}
        self._steps = 0
        sums = [buffer for linear in self._linears.values() for buffer in (linear.scores, linear.entropy)]
        paths = [linear.paths for linear in self._linears.values()]
        all_sums = torch.cat([buffer.flatten() for buffer in sums]).double()
        all_paths = torch.cat(paths)
        dist.all_reduce(all_sums)
        dist.all_reduce(all_paths, dist.ReduceOp.MAX)
        for buffer in (*sums, *paths):
            buffer.zero_()
        reduced_sums = iter(all_sums.cpu().split([buffer.numel() for buffer in sums]))
        reduced_paths = all_paths.cpu().bool().split([buffer.numel() for buffer in paths])
        window = {
            name: linear.summary(next(reduced_sums), next(reduced_sums), taken)
            for (name, linear), taken in zip(self._linears.items(), reduced_paths, strict=True)
        }
        self._epoch = {name: self._epoch[name] + new if name in self._epoch else new for name, new in window.items()}
        return window

    def state(self) -> dict[str, Tensor]:
        """What this rank has summed up, for `load_state` of statistics of the same linears."""
        state = {"steps": torch.tensor(self._steps)}
        for name, linear in self._linears.items():
            state |= {f"{name}.{kind}": getattr(linear, kind) for kind in _SUMS}
            if name in self._epoch:
                state |= {f"{name}.epoch_{kind}": getattr(self._epoch[name], kind) for kind in (*_SUMS, "sampled")}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` told."""
        self._steps = int(state["steps"])
        for name, linear in self._linears.items():
            for kind in _SUMS:
                getattr(linear, kind).copy_(state[f"{name}.{kind}"])
            if f"{name}.epoch_sampled" in state:
                told = {kind: state[f"{name}.epoch_{kind}"].cpu() for kind in (*_SUMS, "sampled")}
                self._epoch[name] = RoutingSummary(**told, paths_exact=linear.paths_exact)

    def epoch(self) -> dict[str, RoutingSummary]:
        """All steps so far, by linear; a collective call."""
        self.window()
        return self._epoch


class _Linear:
    """One linear's sums on its device: scores (D, L K), entropy (L + 1,) with the number of inputs, paths (P,)."""

    def __init__(self, layer: ExpertLayer, num_domains: int) -> None:
        self.layer = layer
        device, num_layers, num_experts = layer.weight.device, layer.num_layers, layer.num_experts
        self.scores = torch.zeros(num_domains, num_layers * num_experts, device=device)
        self.entropy = torch.zeros(num_layers + 1, device=device)
        self.paths_exact = num_experts**num_layers <= EXACT_PATHS
        num_paths = num_experts**num_layers if self.paths_exact else EXACT_PATHS
        self.paths = torch.zeros(num_paths, dtype=torch.uint8, device=device)
        if self.paths_exact:
            factors = torch.tensor([num_experts**number for number in range(num_layers)])
        else:
            # Multilinear hashing: a random odd 64-bit factor a layer, of whose sum modulo 2^64 the high bits are kept.
            generator = torch.Generator().manual_seed(0)
            factors = torch.randint(-(1 << 62), 1 << 62, (num_layers,), generator=generator) * 2 + 1
        self._factors = factors.to(device)

    def sample(self, scores: Tensor) -> None:
        """Add the entropy and the paths of scores (N, L, K)."""
        # On a CPU three times as fast as torch.special.entr, and as exact: 0 log(tiny) is 0.
        entropy = -(scores * scores.clamp_min(torch.finfo(scores.dtype).tiny).log()).sum((0, 2))
        self.entropy[:-1] += entropy
        self.entropy[-1] += len(scores)
        paths = (scores.max(-1).indices * self._factors).sum(-1)
        if not self.paths_exact:
            paths = (paths >> 48) & (EXACT_PATHS - 1)
        self.paths.index_fill_(0, paths, 1)

    def summary(self, scores: Tensor, entropy: Tensor, paths: Tensor) -> RoutingSummary:
        """Of the sums over all ranks."""
        shape = (-1, self.layer.num_layers, self.layer.num_experts)
        return RoutingSummary(scores.view(shape), entropy[:-1], entropy[-1], paths, self.paths_exact)


def dead_experts(routing: Mapping[str, RoutingSummary]) -> Iterator[str]:
    """The dead experts of every linear and layer that has some, in words."""
    for name, summary in routing.items():
        for layer, dead in enumerate(summary.dead(), start=1):
            if dead:
                numbers = ", ".join(map(str, dead))
                yield f"{name} layer {layer}: {f'experts {numbers} are' if len(dead) > 1 else f'expert {numbers} is'}"


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)
