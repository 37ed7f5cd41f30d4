"""Binary classification metrics over all ranks: the same figures for any world size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite, isnan, log
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys.errors import UserError

_LOGIT_RANGE = 16.0
"""Bins of the AUC beyond its exact limit are even in logit space over +-this, so rare clicks are resolved as well."""


_MOST_BINS = 1 << 22
"""Of all groups together."""

MOST_NE = 1.5
"""Of a model that is of use: beyond it, always predicting the label rate would be far better."""


class DivergedError(UserError):
    """The model predicts NaN or an infinite logit, so that nothing measured of it means anything."""


@dataclass(frozen=True)
class OverDomains:
    """What the figures of domains come to; None where no domain has rows of both classes.

    Attributes:
        domains: with rows.
        wauc: mean of their AUCs, weighted by their rows (MoE-MLoRA, arXiv 2506.07563).
        wauc_error: bound on |wauc - exact wauc|; 0 when it is exact.
        mean_auc: unweighted mean.
        worst_auc: the least.
        worst: whose.
        one_class: names of those that have no AUC, as all their rows are of one class; the above leave them out.
    """

    domains: int
    wauc: float | None
    wauc_error: float
    mean_auc: float | None
    worst_auc: float | None
    worst: str | None
    one_class: tuple[str, ...]

    @classmethod
    def of(cls, domains: Mapping[str, "Metrics"]) -> "OverDomains":
        """Of each domain's figures by its name."""
        there = {name: metrics for name, metrics in domains.items() if metrics.examples}
        aucs = {name: metrics.auc for name, metrics in there.items() if metrics.auc is not None}
        one_class = tuple(name for name in there if name not in aucs)
        if not aucs:
            return cls(len(there), None, 0.0, None, None, None, one_class)
        rows = {name: there[name].examples for name in aucs}
        total = sum(rows.values())
        worst = min(aucs, key=lambda name: aucs[name])
        return cls(
            domains=len(there),
            wauc=sum(rows[name] * auc for name, auc in aucs.items()) / total,
            wauc_error=sum(rows[name] * there[name].auc_error for name in aucs) / total,
            mean_auc=sum(aucs.values()) / len(aucs),
            worst_auc=aucs[worst],
            worst=worst,
            one_class=one_class,
        )


@dataclass(frozen=True)
class Metrics:
    """Figures of a set of examples; None where they are undefined (no examples, or one class only).

    Attributes:
        examples: number of examples.
        positives: number with label 1.
        auc: area under the ROC curve, ties counting half.
        auc_error: bound on |auc - exact auc|; 0 when it is exact.
        log_loss: mean binary cross entropy in nats.
        ne: normalised entropy, log loss over that of always predicting the label rate (He et al., ADKDD 2014).
        calibration: sum of predictions over number of positives.
        over_domains: of their domains, where they have some.
    """

    examples: int
    positives: int
    auc: float | None
    auc_error: float
    log_loss: float | None
    ne: float | None
    calibration: float | None
    over_domains: OverDomains | None = None

    @property
    def wauc(self) -> float | None:
        """That of `over_domains`."""
        return self.over_domains.wauc if self.over_domains else None

    @property
    def mean_auc(self) -> float | None:
        """That of `over_domains`."""
        return self.over_domains.mean_auc if self.over_domains else None

    def as_dict(self) -> dict[str, float | int | None]:
        """All figures by name, for JSON, but for those over domains."""
        found = asdict(self)
        del found["over_domains"]
        return found

    @property
    def told_over_domains(self) -> dict[str, dict[str, Any]]:
        """Those over domains as JSON has them, under their key; empty without any."""
        return {"over_domains": asdict(self.over_domains)} if self.over_domains else {}


class BinaryMetrics:
    """Accumulates logits and labels on their device without synchronising; `compute` is the one collective.

    AUC is exact up to `exact_examples` over all ranks. Beyond that it is that of the logits rounded to `num_bins` bins;
    the memory is then 16 bytes a bin, and the error is at most half the share of pairs of a positive and a negative
    that fall into one bin, which is computed and reported.

    Args:
        exact_examples: limit of the exact AUC; each rank keeps at most this many scores and labels (8 bytes each).
        num_bins: bins beyond it.
        exact: False has the AUC always be that of the bins: these are summed over ranks, and no score leaves the rank,
            nor its device, where examples are kept until figures are asked for.
    """

    def __init__(self, *, exact_examples: int = 1 << 22, num_bins: int = 1 << 16, exact: bool = True) -> None:
        self._exact_examples = exact_examples
        self._num_bins = num_bins
        self._exact = exact
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._examples = 0
        self._sums: Tensor | None = None  # positives, sum of probabilities, sum of losses; float64
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bins: Tensor | None = None  # (2, num_bins) negatives and positives; int64

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add examples: logits (B,) and labels (B,) of 0 and 1, on one device."""
        wide, truth = logits.detach().double(), labels.double()
        loss = F.binary_cross_entropy_with_logits(wide, truth, reduction="sum")
        sums = torch.stack([truth.sum(), wide.sigmoid().sum(), loss])
        self._sums = sums if self._sums is None else self._sums + sums
        self._examples += len(labels)
        self._kept.append((logits.detach().float(), labels.float()))
        if self._examples > self._exact_examples:
            self._bin_kept()

    def state(self) -> dict[str, Tensor]:
        """What this rank has accumulated, for `load_state`."""
        limits = [self._exact_examples, self._num_bins, int(self._exact)]
        state = {"examples": torch.tensor(self._examples), "limits": torch.tensor(limits)}
        if self._sums is not None:
            state["sums"] = self._sums
        if self._bins is not None:
            state["bins"] = self._bins
        if self._kept:
            state["kept"] = torch.cat([torch.stack(pair) for pair in self._kept], 1)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` told, with tensors on the examples' device, and within the limits of before.

        What was binned by others is in no order any more, and counted by their bins.
        """
        if "limits" in state:  # which checkpoints of before do not have
            self._exact_examples, self._num_bins, exact = state["limits"].tolist()
            self._exact = bool(exact)
        self._examples = int(state["examples"])
        self._sums, self._bins = state.get("sums"), state.get("bins")
        self._kept = [(kept[0], kept[1])] if (kept := state.get("kept")) is not None else []

    def compute(self) -> Metrics:
        """The figures over all ranks, the same on each; a collective call.

        Raises:
            DivergedError: a logit is NaN or infinite.
        """
        sums = torch.zeros(3, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        totals = torch.cat([sums, torch.tensor([self._examples], dtype=torch.float64)])
        dist.all_reduce(totals)
        positives, predicted, loss, examples = totals.tolist()
        if not isfinite(loss):
            raise _diverged()
        auc, error = (None, 0.0) if not examples else self._auc(int(examples))
        return _figures(positives, predicted, loss, int(examples), auc, error)

    def _auc(self, examples: int) -> tuple[float | None, float]:
        return self._exact_auc() if self._exact and examples <= self._exact_examples else self._binned_auc()

    def _exact_auc(self) -> tuple[float | None, float]:
        """Every score goes to rank 0, which tells the result."""
        kept = torch.cat([torch.stack(pair) for pair in self._kept], 1).cpu() if self._kept else torch.empty(2, 0)
        gathered = _on_first_rank(kept)
        result = torch.zeros(1, dtype=torch.float64)
        if gathered is not None:
            result[0] = _exact_auc(*gathered)
        dist.broadcast(result, 0)
        auc = result.item()
        return (None if np.isnan(auc) else auc), 0.0

    def _binned_auc(self) -> tuple[float | None, float]:
        self._bin_kept()
        assert self._bins is not None
        bins = self._bins.clone()
        dist.all_reduce(bins)  # integers, whose sum is the same on any device, in any order
        negatives, positives = bins.cpu().numpy()
        return _auc(negatives, positives)

    def _bin_kept(self) -> None:
        if self._bins is None:
            device = self._kept[0][0].device if self._kept else None
            self._bins = torch.zeros(2 * self._num_bins, dtype=torch.int64, device=device).view(2, -1)
        if self._kept:
            logits, labels = (torch.cat(of) for of in zip(*self._kept, strict=True))
            index = _bin(logits, self._num_bins) + labels.long() * self._num_bins
            self._bins.view(-1).scatter_add_(0, index, torch.ones_like(index))
        self._kept = []


class GroupedMetrics:
    """The figures of each group of examples, such as the rows of a domain: `BinaryMetrics` of many at once.

    Accumulates on the examples' device without synchronising; `compute` is the one collective. AUC is exact up to
    `exact_examples` over all groups and ranks, beyond it binned with a bound on each group's error.

    Args:
        num_groups: G.
        exact_examples: limit of the exact AUC; each rank keeps at most this many examples (12 bytes each, and the
            groups).
        num_bins: bins beyond it, shared out among the groups; each has 1,024 at least, but all together have 2^22 at
            most (64 MiB), so that of many groups each has few.
    """

    def __init__(self, num_groups: int, *, exact_examples: int = 1 << 22, num_bins: int = 1 << 16) -> None:
        self._num_groups, self._exact_examples = num_groups, exact_examples
        self._num_bins = max(min(max(1024, num_bins // num_groups), _MOST_BINS // num_groups), 2)
        self._examples = 0
        self._sums: Tensor | None = None  # (G, 4) positives, sum of probabilities, sum of losses, examples; float64
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._bins: Tensor | None = None  # (G, 2, num_bins) negatives and positives; int64

    def update(self, logits: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Add examples: logits (B,), labels (B,) of 0 and 1 and groups (B,) of 0 .. G - 1, on one device."""
        wide, truth = logits.detach().double(), labels.double()
        losses = F.binary_cross_entropy_with_logits(wide, truth, reduction="none")
        figures = torch.stack([truth, wide.sigmoid(), losses, torch.ones_like(wide)], 1)
        if self._sums is None:
            self._sums = figures.new_zeros(self._num_groups, 4)
        self._sums.index_add_(0, groups, figures)
        self._examples += len(labels)
        self._kept.append((logits.detach().float(), labels.float(), groups))
        if self._examples > self._exact_examples:
            self._bin_kept()

    def compute(self) -> list[Metrics]:
        """The figures of each group over all ranks, the same on each; a collective call.

        Raises:
            DivergedError: a logit is NaN or infinite.
        """
        sums = torch.zeros(self._num_groups, 4, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        dist.all_reduce(sums)
        if not bool(sums.isfinite().all()):
            raise _diverged()
        exact = sums[:, 3].sum().item() <= self._exact_examples
        figures = []
        for (positives, predicted, loss, examples), (auc, error) in zip(
            sums.tolist(), self._exact_aucs() if exact else self._binned_aucs(), strict=True
        ):
            figures.append(_figures(positives, predicted, loss, int(examples), auc, error))
        return figures

    def _exact_aucs(self) -> list[tuple[float | None, float]]:
        kept = [torch.stack([logits, labels, groups.float()]) for logits, labels, groups in self._kept]
        gathered = _on_first_rank(torch.cat(kept, 1).cpu() if kept else torch.empty(3, 0))
        aucs = torch.full((self._num_groups,), torch.nan, dtype=torch.float64)
        if gathered is not None:
            scores, labels, groups = gathered
            aucs = torch.from_numpy(aucs_by_group(groups.astype(np.int64), self._num_groups, scores, labels == 1))
        dist.broadcast(aucs, 0)
        return [(None if isnan(auc) else auc, 0.0) for auc in aucs.tolist()]

    def _binned_aucs(self) -> list[tuple[float | None, float]]:
        self._bin_kept()
        assert self._bins is not None
        bins = self._bins.cpu()
        dist.all_reduce(bins)
        return [_auc(negatives, positives) for negatives, positives in bins.numpy()]

    def _bin_kept(self) -> None:
        if self._bins is None:
            device = self._kept[0][0].device if self._kept else None
            self._bins = torch.zeros(self._num_groups, 2, self._num_bins, dtype=torch.int64, device=device)
        for logits, labels, groups in self._kept:
            index = (groups * 2 + labels.long()) * self._num_bins + _bin(logits, self._num_bins)
            self._bins.view(-1).scatter_add_(0, index, torch.ones_like(index))
        self._kept = []


def weighted_metrics(logits: NDArray[np.float64], labels: NDArray[np.bool_], weights: NDArray[np.float64]) -> Metrics:
    """The figures of rows that are all here, each counted by its weight; those of `BinaryMetrics`, if all are 1.

    Args:
        logits: (N,).
        labels: (N,).
        weights: (N,), not negative; `examples` and `positives` count rows all the same.

    Raises:
        DivergedError: a logit is NaN or infinite.
    """
    wide, truth, weight = torch.from_numpy(logits), torch.from_numpy(labels).double(), torch.from_numpy(weights)
    loss = F.binary_cross_entropy_with_logits(wide, truth, weight=weight, reduction="sum").item()
    if not isfinite(loss):
        raise _diverged()
    _, tie = np.unique(logits, return_inverse=True)
    positives, negatives = np.bincount(tie, weights * labels), np.bincount(tie, weights * ~labels)
    pairs = positives.sum() * negatives.sum()
    auc = float(positives @ (negatives.cumsum() - negatives / 2) / pairs) if pairs else None
    predicted = (weight @ wide.sigmoid()).item()
    figures = _figures(positives.sum().item(), predicted, loss, weights.sum().item(), auc, 0.0)
    return replace(figures, examples=len(labels), positives=int(labels.sum()))


def _diverged() -> DivergedError:
    return DivergedError(
        "the model predicts NaN or infinite logits: training has diverged; lower the stage's learning rates"
    )


def far_off(metrics: Metrics) -> str | None:
    """In words, that predictions are far worse than always the label rate; None where they are not."""
    if metrics.ne is None or metrics.ne <= MOST_NE:
        return None
    return (
        f"ne is {metrics.ne:.4g}, where always predicting the label rate has 1: the model is of no use; lower the "
        "stage's learning rates, or give it patience, which goes back to its best state"
    )


def _figures(
    positives: float, predicted: float, loss: float, examples: float, auc: float | None, error: float
) -> Metrics:
    """Figures from the sums over all ranks of labels, probabilities, losses and examples."""
    if not examples:
        return Metrics(0, 0, None, 0.0, None, None, None)
    rate = positives / examples
    entropy = -(rate * log(rate) + (1 - rate) * log(1 - rate)) if 0 < rate < 1 else None
    return Metrics(
        examples=int(examples),
        positives=int(positives),
        auc=auc,
        auc_error=error,
        log_loss=loss / examples,
        ne=loss / examples / entropy if entropy else None,
        calibration=predicted / positives if positives else None,
    )


def _on_first_rank(kept: Tensor) -> tuple[NDArray[np.float32], ...] | None:
    """Rows (R, N) of all ranks side by side on the first, None on the others; a collective call, N may differ."""
    gathered = on_first_rank(kept)
    return None if gathered is None else tuple(torch.cat(gathered, 1).numpy())


def on_first_rank(kept: Tensor) -> list[Tensor] | None:
    """Tensors (..., N) of all ranks by rank on the first, None on the others; a collective call, N may differ."""
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = kept.shape[-1]
    dist.all_reduce(sizes)
    padded = kept.new_zeros(*kept.shape[:-1], int(sizes.max()))
    padded[..., : kept.shape[-1]] = kept
    gathered = [torch.empty_like(padded) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(padded, gathered)
    return gathered and [part[..., :size] for part, size in zip(gathered, sizes, strict=True)]


def _bin(logits: Tensor, num_bins: int) -> Tensor:
    """The bin of each logit; NaN, which has no place, fails when the figures are computed."""
    place = (logits.nan_to_num(0.0) / (2 * _LOGIT_RANGE) + 0.5).clamp(0, 1) * (num_bins - 1)
    return place.round().long()


def aucs_by_group(
    groups: NDArray[np.int64], num_groups: int, scores: NDArray[np.float32], positive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """AUC (G,) of the rows of each group, ties counting half; NaN where they are of one class, or none.

    Args:
        groups: (N,) of 0 .. G - 1.
        num_groups: G.
        scores: (N,).
        positive: (N,).
    """
    if not len(groups):
        return np.full(num_groups, np.nan)
    order = np.lexsort((scores, groups))
    groups, scores, positive = groups[order], scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])])
    positives = np.add.reduceat(positive, starts, dtype=np.int64)
    negatives = np.add.reduceat(~positive, starts, dtype=np.int64)
    of = groups[starts]
    all_negatives = np.bincount(groups, ~positive, num_groups).astype(np.int64)
    pairs = np.bincount(groups, positive, num_groups) * all_negatives
    # Of the negatives below a block of ties, those of its own group.
    below = np.cumsum(negatives) - negatives - (np.cumsum(all_negatives) - all_negatives)[of]
    won = np.bincount(of, positives * (below + negatives / 2), num_groups)
    aucs = np.full(num_groups, np.nan)
    np.divide(won, pairs, out=aucs, where=pairs > 0)
    return aucs


def _exact_auc(scores: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    """AUC of (N,) scores; NaN with one class only."""
    order = np.argsort(scores, kind="stable")
    scores, positive = scores[order], labels[order] == 1
    starts = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1])))
    negatives = np.add.reduceat(~positive, starts, dtype=np.int64)
    positives = np.add.reduceat(positive, starts, dtype=np.int64)
    auc, _ = _auc(negatives, positives)
    return float("nan") if auc is None else auc


def _auc(negatives: NDArray[np.int64], positives: NDArray[np.int64]) -> tuple[float | None, float]:
    """AUC of groups of tied scores in rising order, and half the share of tied pairs; None with one class only."""
    pairs = int(negatives.sum()) * int(positives.sum())
    if pairs == 0:
        return None, 0.0
    below = np.cumsum(negatives) - negatives
    tied = float(np.dot(positives.astype(np.float64), negatives.astype(np.float64)))
    won = float(np.dot(positives.astype(np.float64), below.astype(np.float64)))
    return (won + 0.5 * tied) / pairs, 0.5 * tied / pairs
