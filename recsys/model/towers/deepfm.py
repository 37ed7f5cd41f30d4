"""DeepFM: a factorization machine and a perceptron on the same embeddings (arXiv 1703.04247)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys.config.towers import DeepFMTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.products import pooled_products
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class DeepFM(Tower):
    """DeepFM (arXiv 1703.04247): sum_i w_i + sum_{i<j} <v_i, v_j> + w' MLP(v_1 ... v_F) + b.

    The tower gives the perceptron's output and both sums side by side; the ranker's head completes the sum, with a
    learned factor of each that starts at 1. The published form, and FuxiCTR's, has a bias in both parts, which are one
    here.

    Args:
        token_dims: width of each token within the concatenation, all the same.
        hidden: widths of the perceptron.
        wide: whether tokens end in first-order weights; False leaves w_i out.
        dropout: in the perceptron.
    """

    def __init__(
        self, token_dims: Sequence[int], hidden: Sequence[int], *, wide: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.first_order = FirstOrder(token_dims, wide)
        self.mlp = MLP(sum(self.first_order.dims), hidden, dropout=dropout)
        self.num_logits = 1 + self.first_order.out_features
        self.out_features = self.mlp.out_features + self.num_logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1] + 2), without first-order terms + 1."""
        embeddings, first_order = self.first_order(x)
        # The perceptron first: it takes the rows of a request with their context apart, and products do not.
        deep = self.mlp(embeddings)
        pairs = pooled_products(embeddings.unflatten(1, (len(self.first_order.dims), -1))).sum(1, keepdim=True)
        return torch.cat([deep, pairs, first_order], 1)


@builds(DeepFMTowerConfig)
def build_deepfm(settings: DeepFMTowerConfig, tokens: Tokens) -> DeepFM:
    """The DeepFM that the settings describe."""
    return DeepFM(tokens.dims, settings.hidden, wide=settings.wide, dropout=settings.dropout)
