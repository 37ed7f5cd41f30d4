"""DLRM: inner products of embeddings and dense features between two perceptrons (arXiv 1906.00091)."""

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from recsys.config.towers import DLRMTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.products import inner_products
from recsys.model.towers.registry import Tokens, Tower, builds


class DLRM(Tower):
    """DLRM, dot interaction (arXiv 1906.00091): Top(z, <e_i, e_j> for i < j), z = Bottom(dense) the last of the e_i.

    The bottom's last layer brings the dense features to D, the embeddings' width, and has an activation as well. It
    begins at the ranker's projection of the dense features, so its first linear is a product of two, and any where
    `dense_dim` is no less than their number. Without dense features the top sees the products alone, as FuxiCTR's does.

    Args:
        token_dims: width of each token within the concatenation, D but for the dense one.
        bottom_hidden: widths of the bottom before its last; None where there are no dense features.
        hidden: widths of the top.
        dropout: in both.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        bottom_hidden: Sequence[int] | None,
        hidden: Sequence[int],
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim, self.num_tokens = token_dims[0], len(token_dims)
        self.bottom = None if bottom_hidden is None else MLP(token_dims[-1], [*bottom_hidden, dim], dropout=dropout)
        self.split = [sum(token_dims[:-1]), token_dims[-1]]
        width = comb(self.num_tokens, 2) + (0 if self.bottom is None else dim)
        self.top = MLP(width, hidden, dropout=dropout)
        self.out_features = self.top.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        dense = x[:, :0]
        if self.bottom is not None:
            embeddings, dense = x.split(self.split, -1)
            dense = self.bottom(dense)
            x = torch.cat([embeddings, dense], 1)
        products = inner_products(x.unflatten(1, (self.num_tokens, -1)))
        out: Tensor = self.top(torch.cat([dense, products], 1))
        return out


@builds(DLRMTowerConfig)
def build_dlrm(settings: DLRMTowerConfig, tokens: Tokens) -> DLRM:
    """The DLRM that the settings describe."""
    bottom_hidden = settings.bottom_hidden if len(tokens.dims) > len(tokens.features) else None
    return DLRM(tokens.dims, bottom_hidden, settings.hidden, dropout=settings.dropout)
