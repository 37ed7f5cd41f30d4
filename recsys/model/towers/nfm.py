"""NFM: a perceptron on pooled products of embeddings (arXiv 1708.05027)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys.config.towers import NFMTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.products import pooled_products
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class NFM(Tower):
    """NFM (arXiv 1708.05027): b + sum_i w_i + h' MLP(sum_{i<j} v_i * v_j).

    The tower gives the perceptron's output and the first-order sum side by side; the ranker's head completes the sum,
    with a learned factor of the latter that starts at 1. As in FuxiCTR, nothing is dropped of the pooled products
    themselves, where the paper has dropout, too. Without layers and with h = 1 it is a factorization machine.

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
        self.mlp = MLP(self.first_order.dims[0], hidden, dropout=dropout)
        self.num_logits = self.first_order.out_features
        self.out_features = self.mlp.out_features + self.num_logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1] + 1), without first-order terms (B, hidden[-1])."""
        embeddings, first_order = self.first_order(x)
        pooled = pooled_products(embeddings.unflatten(1, (len(self.first_order.dims), -1)))
        return torch.cat([self.mlp(pooled), first_order], 1)


@builds(NFMTowerConfig)
def build_nfm(settings: NFMTowerConfig, tokens: Tokens) -> NFM:
    """The NFM that the settings describe."""
    return NFM(tokens.dims, settings.hidden, wide=settings.wide, dropout=settings.dropout)
