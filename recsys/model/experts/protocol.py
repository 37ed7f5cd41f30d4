"""What stages, losses, routing statistics and cost know of a linear with experts; each kind of expert offers it."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class ExpertRouting(Protocol):
    """How one call of a layer routed its rows, with its graph."""

    @property
    def scores(self) -> Tensor:
        """Weights of the experts, (N, L, K): not negative, those of a row and layer sum to 1."""

    def balance_loss(self) -> Tensor:
        """How far from uniform the load of each layer's experts is, (L,): 1 is uniform, K one expert for all."""

    def z_loss(self) -> Tensor:
        """Mean over rows of logsumexp(logits)^2 for each layer, (L,)."""


class ExpertLayer(Protocol):
    """A subclass of `nn.Linear` that perturbs its weight by L layers of K experts.

    Attributes:
        num_layers: L.
        num_experts: K, of each layer.
        experts_active: False computes the plain linear only.
        record_routing: True keeps how the last call was routed in `routing`.
    """

    in_features: int
    out_features: int
    num_layers: int
    num_experts: int
    experts_active: bool
    record_routing: bool

    @property
    def weight(self) -> Tensor:
        """Of the base, (D_out, D_in)."""

    @property
    def routing(self) -> ExpertRouting | None:
        """Of the last call that was recorded."""

    @property
    def merges(self) -> bool:
        """Whether a linear computes the same in evaluation, which `merge` gives."""

    def merge(self) -> nn.Linear:
        """That linear, a copy; ValueError where there is none."""

    def forget_routing(self) -> None:
        """Drop what was recorded."""

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """All parameters but the base's, by the name under which a stage trains them."""

    def up_projections(self) -> list[nn.Parameter]:
        """Those of the experts' parameters that lead to the output, as LoRA's B; a stage may give them a rate."""

    @property
    def expert_multiply_adds(self) -> int:
        """What the active experts take of a row, routing left out: what is not base, nor this, counts as routing."""

    @property
    def num_expert_parameters(self) -> int:
        """Of all experts; the layer's other parameters, but the base's, are those of routing."""

    def diversity_loss(self) -> Tensor:
        """How alike the experts of each layer are, (L,): 0 if as different as can be, 1 if all are the same."""
