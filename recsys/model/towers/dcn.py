"""DCN: cross layers of one vector each beside a perceptron (arXiv 1708.05123)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config.towers import DCNTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds


class DCN(Tower):
    """DCN (arXiv 1708.05123), parallel: x_{l+1} = x_0 (w_l' x_l) + b_l + x_l beside a perceptron on x_0.

    The tower gives both outputs side by side, as the paper does; no widths leave the perceptron out.
    """

    def __init__(self, in_features: int, num_cross_layers: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(in_features, 1, bias=False) for _ in range(num_cross_layers))
        self.cross_biases = nn.ParameterList(torch.zeros(in_features) for _ in range(num_cross_layers))
        self.mlp = MLP(in_features, hidden, dropout=dropout) if hidden else None
        self.out_features = in_features + sum(hidden[-1:])

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W + hidden[-1])."""
        # The perceptron first: it takes the rows of a request with their context apart, and products do not.
        deep = [] if self.mlp is None else [self.mlp(x)]
        crossed = x
        for linear, bias in zip(self.cross, self.cross_biases, strict=True):
            crossed = torch.addcmul(crossed + bias, x, linear(crossed))
        return torch.cat([crossed, *deep], 1)


@builds(DCNTowerConfig)
def build_dcn(settings: DCNTowerConfig, tokens: Tokens) -> DCN:
    """The DCN that the settings describe."""
    return DCN(tokens.width, settings.num_cross_layers, settings.hidden, dropout=settings.dropout)
