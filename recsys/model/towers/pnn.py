"""PNN: a perceptron on embeddings and their inner products (arXiv 1611.00144)."""

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from recsys.config.towers import PNNTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.products import inner_products
from recsys.model.towers.registry import Tokens, Tower, builds


class PNN(Tower):
    """Inner PNN (arXiv 1611.00144): MLP(v_1 ... v_F, <v_i, v_j> for i < j).

    As in FuxiCTR, each product of two tokens has a weight of its own in the first linear. The paper also has those of a
    token with itself, and weights of the form theta_i theta_j.

    Args:
        token_dims: width of each token within the concatenation, all the same.
        hidden: widths of the perceptron.
        dropout: in the perceptron.
    """

    def __init__(self, token_dims: Sequence[int], hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_tokens = len(token_dims)
        self.mlp = MLP(sum(token_dims) + comb(self.num_tokens, 2), hidden, dropout=dropout)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        products = inner_products(x.unflatten(1, (self.num_tokens, -1)))
        out: Tensor = self.mlp(torch.cat([x, products], 1))
        return out


@builds(PNNTowerConfig)
def build_pnn(settings: PNNTowerConfig, tokens: Tokens) -> PNN:
    """The PNN that the settings describe."""
    return PNN(tokens.dims, settings.hidden, dropout=settings.dropout)
