"""The terms of the loss by name.

An auxiliary loss is one entry of `AUXILIARY` and one weight `<name>_weight` of a stage; the ranker sums what is here,
and the monitor and the summary take whatever there is.
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
"""The loss that is always there, with weight 1."""

Losses = dict[str, Tensor]
"""Scalars by name: `CLICK`, then those of `AUXILIARY` that were computed."""


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
        self, logits: Tensor, auxiliary: Losses, batch: "Batch", weights: Mapping[str, float]
    ) -> tuple[Tensor, Losses]:
        """What is differentiated, a scalar, and its terms, detached.

        The click loss is the binary cross entropy of logits (B,), each row's multiplied by its weight, summed, and
        scaled so that the mean over ranks is that over the step's examples. The others follow in the mapping's order.
        """
        click = F.binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weight, reduction="sum")
        total = click = click * batch.loss_scale
        for name, value in auxiliary.items():
            total = total + weights.get(name, 0.0) * value
        return total, {name: value.detach() for name, value in ((CLICK, click), *auxiliary.items())}
