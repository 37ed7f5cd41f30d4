"""xDeepFM: a compressed interaction network beside a perceptron and a linear part (arXiv 1803.05170)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from recsys.config.towers import XDeepFMTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class CompressedInteractionNetwork(nn.Module):
    """CIN: x^k_h = sum over i, j of W^k_{h,ij} (x^0_i * x^{k-1}_j) + b^k_h, each map x^k_h summed over its numbers.

    As in FuxiCTR there is a bias, which the paper has not, and neither an activation nor maps that are split between
    the next layer and the output, which are options of the authors' code.

    Args:
        num_fields: F.
        hidden: number of feature maps of each layer, one layer at least.
    """

    def __init__(self, num_fields: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(num_fields * a, b) for a, b in pairwise([num_fields, *hidden]))
        self.out_features = sum(hidden)

    def forward(self, fields: Tensor) -> Tensor:
        """(B, F, D) -> (B, sum(hidden))."""
        base = maps = fields.transpose(1, 2)
        pooled = []
        for layer in self.layers:
            # (B, D, F, 1) * (B, D, 1, maps)
            maps = layer((base.unsqueeze(-1) * maps.unsqueeze(-2)).flatten(2))
            pooled.append(maps.sum(1))
        return torch.cat(pooled, 1)


class XDeepFM(Tower):
    """CIN, perceptron and linear part on tokens of one width (xDeepFM, arXiv 1803.05170).

    The paper's logit is w_linear' a + w_cin' p + w_dnn' x + b. This tower gives the perceptron's x, the CIN's p
    and the sum of the first-order terms side by side, so that the ranker's linear head completes the sum.

    Args:
        token_dims: width of each token within the concatenation, the same for all.
        cin_hidden: number of the CIN's feature maps, layer by layer.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        wide: whether tokens end in a first-order weight and padding.
        dropout: in the perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        cin_hidden: Sequence[int],
        hidden: Sequence[int],
        *,
        wide: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.first_order = len(token_dims), FirstOrder(token_dims, wide)
        self.cin = CompressedInteractionNetwork(self.num_tokens, cin_hidden)
        self.mlp = MLP(sum(self.first_order.dims), hidden, dropout=dropout) if hidden else None
        self.num_logits = self.first_order.out_features
        self.out_features = (self.mlp.out_features if self.mlp else 0) + self.cin.out_features + self.num_logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, [hidden[-1] +] sum(cin_hidden) [+ 1])."""
        embeddings, first_order = self.first_order(x)
        # Before the CIN, whose products are of whole rows: a linear multiplies what candidates share once.
        deep = [] if self.mlp is None else [self.mlp(embeddings)]
        fields = embeddings.unflatten(-1, (self.num_tokens, -1))
        return torch.cat([*deep, self.cin(fields), first_order], 1)


@builds(XDeepFMTowerConfig)
def build_xdeepfm(settings: XDeepFMTowerConfig, tokens: Tokens) -> XDeepFM:
    """The xDeepFM that the settings describe."""
    return XDeepFM(tokens.dims, settings.cin_hidden, settings.hidden, wide=settings.wide, dropout=settings.dropout)
