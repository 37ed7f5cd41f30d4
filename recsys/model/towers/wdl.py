"""Wide & Deep: a linear model beside a perceptron (arXiv 1606.07792)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys.config.towers import WDLTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class WDL(Tower):
    """Wide & Deep (arXiv 1606.07792): w_wide' x + w_deep' MLP(embeddings) + b.

    The tower gives the perceptron's output and the wide sum side by side; the ranker's head completes the sum, with a
    learned factor of the wide one that starts at 1. As in FuxiCTR, the wide part has a weight for each value of each
    feature; the paper's crossed features are columns of the log like any other. Here the dense features, too, have one.
    """

    def __init__(self, token_dims: Sequence[int], hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first_order = FirstOrder(token_dims, True)
        self.mlp = MLP(sum(self.first_order.dims), hidden, dropout=dropout)
        self.num_logits = 1
        self.out_features = self.mlp.out_features + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1] + 1)."""
        embeddings, first_order = self.first_order(x)
        return torch.cat([self.mlp(embeddings), first_order], 1)


@builds(WDLTowerConfig)
def build_wdl(settings: WDLTowerConfig, tokens: Tokens) -> WDL:
    """The Wide & Deep that the settings describe."""
    return WDL(tokens.dims, settings.hidden, dropout=settings.dropout)
