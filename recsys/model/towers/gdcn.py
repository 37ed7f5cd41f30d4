"""GDCN: gated cross layers in front of a perceptron or beside it (arXiv 2311.04635)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config.towers import GDCNTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds


class GatedCross(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) * sigmoid(V_l x_l) + x_l."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.cross = nn.Linear(in_features, in_features)
        self.gate = nn.Linear(in_features, in_features, bias=False)

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        """x_0 and x_l, (B, W) both -> x_{l+1} (B, W)."""
        gate = torch.sigmoid(self.gate(x))
        return torch.addcmul(x, base * self.cross(x), gate)


class GDCN(Tower):
    """Gated cross layers and a perceptron (arXiv 2311.04635).

    Stacked (GDCN-S) the perceptron reads the last cross layer. In parallel (GDCN-P) it reads the embeddings, and both
    outputs stand side by side, on which the paper's last linear is the ranker's head. FuxiCTR has them as `GDCN` and
    `GDCNP`, with the same formula; its biases start in [0, 1], these as those of any linear.

    Args:
        in_features: W.
        num_cross_layers: number of gated cross layers.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        parallel: whether the perceptron stands beside the cross layers.
        dropout: in the perceptron.
    """

    def __init__(
        self,
        in_features: int,
        num_cross_layers: int,
        hidden: Sequence[int],
        *,
        parallel: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.layers = nn.ModuleList(GatedCross(in_features) for _ in range(num_cross_layers))
        self.mlp = MLP(in_features, hidden, dropout=dropout) if hidden else None
        outputs = [in_features] if parallel or self.mlp is None else []
        self.out_features = sum(outputs) + (self.mlp.out_features if self.mlp else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1]), in parallel (B, [hidden[-1] +] W)."""
        # Before the cross layers, whose products are of whole rows: a linear multiplies what candidates share once.
        deep = [self.mlp(x)] if self.mlp is not None and self.parallel else []
        crossed = x
        for layer in self.layers:
            crossed = layer(x, crossed)
        if self.mlp is not None and not self.parallel:
            crossed = self.mlp(crossed)
        return torch.cat([*deep, crossed], 1) if deep else crossed


@builds(GDCNTowerConfig)
def build_gdcn(settings: GDCNTowerConfig, tokens: Tokens) -> GDCN:
    """The GDCN that the settings describe."""
    return GDCN(
        tokens.width,
        settings.num_cross_layers,
        settings.hidden,
        parallel=settings.structure == "parallel",
        dropout=settings.dropout,
    )
