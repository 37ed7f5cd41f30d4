"""The terms of the loss by name.

An auxiliary loss of experts is one entry of `AUXILIARY` and one weight `<name>_weight` of a stage; the ranker sums what
is here, and the monitor and the summary take whatever there is.

Shapes: B rows of this rank's batch, P paths.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.model.experts import ExpertLayer, ExpertRouting

if TYPE_CHECKING:
    from recsys.data.batch import Batch  # which needs TorchRec

CLICK = "bce"
"""The loss that is always there: the binary cross entropy of the model's logits. With one tower, its weight is 1."""

PATHS = "bce_paths"
"""With paths, what has weight 1 in the place of `CLICK`: the mean of the paths' own binary cross entropies. It is never
less than `CLICK`, which is computed without a graph then, to be compared with other models and the valid split."""

AGREEMENT = "agreement"
"""With paths, the squared difference of two paths' probabilities: its mean over pairs of paths, and over rows."""

Losses = dict[str, Tensor]
"""Scalars by name: `CLICK`, with paths `PATHS` and `AGREEMENT`, then those of `AUXILIARY` that were computed."""


class Auxiliary(NamedTuple):
    """A loss that experts have.

    Attributes:
        of: its value for each layer of experts, (L,), from a layer and how it routed its last rows.
        watched: whether it is computed where its weight is 0 as well, since it costs little and tells of health.
    """

    of: Callable[[ExpertLayer, ExpertRouting], Tensor]
    watched: bool


AUXILIARY: Mapping[str, Auxiliary] = {
    "balance": Auxiliary(lambda layer, routing: routing.balance_loss(), watched=True),
    "z": Auxiliary(lambda layer, routing: routing.z_loss(), watched=True),
    "diversity": Auxiliary(lambda layer, routing: layer.diversity_loss(), watched=False),
}


def auxiliary_losses(layers: Sequence[ExpertLayer], weights: Mapping[str, float], like: Tensor) -> Losses:
    """Each auxiliary loss that is watched or has a weight: its mean over all layers of experts, 0 without any.

    Args:
        layers: those whose experts are active, after a call that they recorded.
        weights: by name; of those that are missing it is 0.
        like: whose device and type a loss has where there is no layer.
    """
    recorded = [(layer, layer.routing) for layer in layers if layer.routing is not None]
    wanted = {name: loss.of for name, loss in AUXILIARY.items() if loss.watched or weights.get(name, 0.0) > 0}
    if not recorded:
        return {name: like.new_zeros(()) for name in wanted}
    return {name: torch.stack([of(*each) for each in recorded]).mean() for name, of in wanted.items()}


class TotalLoss(nn.Module):
    """Sums the losses; a module of its own, so that a pipeline's symbolic tracing does not look inside."""

    def forward(
        self,
        logits: Tensor,
        auxiliary: Losses,
        batch: "Batch",
        weights: Mapping[str, float],
        paths: Tensor | None = None,
    ) -> tuple[Tensor, Losses]:
        """What is differentiated, a scalar, and its terms, detached.

        Each row's click loss is multiplied by its weight, and so is what its paths differ by. Both are summed, and
        scaled so that the mean over ranks is that over the step's examples. The others follow in the mapping's order.

        Args:
            logits: of the model, (B,).
            auxiliary: scalars by name.
            batch: labels and weights of the rows.
            weights: factors by name.
            paths: logits of each path, (P, B); None with one tower.
        """
        if paths is None:
            total = click = _cross_entropy(logits, batch)
            losses = {CLICK: click, **auxiliary}
        else:
            total = of_paths = _cross_entropy(paths, batch) / len(paths)
            with torch.no_grad():
                click = _cross_entropy(logits, batch)
            agreement = _disagreement(paths if weights.get(AGREEMENT) else paths.detach(), batch)
            auxiliary = {AGREEMENT: agreement, **auxiliary}
            losses = {CLICK: click, PATHS: of_paths, **auxiliary}
        for name, value in auxiliary.items():
            total = total + weights.get(name, 0.0) * value
        return total, {name: value.detach() for name, value in losses.items()}


def _cross_entropy(logits: Tensor, batch: "Batch") -> Tensor:
    """Of logits (..., B), summed over all."""
    labels = batch.labels.expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, labels, weight=batch.weight, reduction="sum") * batch.loss_scale


def _disagreement(paths: Tensor, batch: "Batch") -> Tensor:
    """Squared difference of the probabilities of logits (P, B): its mean over pairs, summed over rows."""
    probabilities = paths.sigmoid()
    # sum_{i<j} (p_i - p_j)^2 = P sum_i (p_i - mean)^2, of P (P - 1) / 2 pairs.
    of_rows = (probabilities - probabilities.mean(0)).square().sum(0) * (2 / (len(paths) - 1))
    if batch.weight is not None:
        of_rows = of_rows * batch.weight
    return of_rows.sum() * batch.loss_scale
