"""MaskNet, parallel: blocks that mask the embeddings by what they are, into a perceptron (arXiv 2102.07619)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import MaskNetTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds


class MaskBlock(nn.Module):
    """relu(LayerNorm(W (mask * normed))), where the mask is W_2 relu(W_1 x + b_1) + b_2 of the raw embeddings x.

    Args:
        in_features: W.
        out_features: width of the block.
        reduction_ratio: W_1 has this many times W outputs.
        dropout: after the activation.
    """

    def __init__(self, in_features: int, out_features: int, reduction_ratio: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.aggregation = nn.Linear(in_features, in_features * reduction_ratio)
        self.projection = nn.Linear(in_features * reduction_ratio, in_features)
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.LayerNorm(out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """Raw and normed embeddings, (B, W) both -> (B, out_features)."""
        mask = self.projection(F.relu(self.aggregation(x)))
        out: Tensor = self.dropout(F.relu(self.norm(self.linear(mask * normed))))
        return out


class MaskNet(Tower):
    """Mask blocks side by side on embeddings that are normed token by token, then a perceptron (arXiv 2102.07619).

    This is the paper's parallel model, and FuxiCTR's `ParallelMaskNet`.

    Args:
        token_dims: width of each token within the concatenation.
        num_blocks: number of mask blocks.
        block_dim: width of each.
        reduction_ratio: width of the masks' hidden layers over that of the embeddings.
        hidden: widths of the perceptron's layers; none gives the blocks to the head.
        dropout: in blocks and perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        num_blocks: int,
        block_dim: int,
        reduction_ratio: int,
        hidden: Sequence[int],
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_dims = list(token_dims)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in token_dims)
        self.blocks = nn.ModuleList(
            MaskBlock(sum(token_dims), block_dim, reduction_ratio, dropout=dropout) for _ in range(num_blocks)
        )
        self.mlp = MLP(num_blocks * block_dim, hidden, dropout=dropout)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        tokens = x.split(self.token_dims, -1)
        normed = torch.cat([norm(token) for norm, token in zip(self.norms, tokens, strict=True)], 1)
        out: Tensor = self.mlp(torch.cat([block(x, normed) for block in self.blocks], 1))
        return out


@builds(MaskNetTowerConfig)
def build_masknet(settings: MaskNetTowerConfig, tokens: Tokens) -> MaskNet:
    """The MaskNet that the settings describe."""
    return MaskNet(
        tokens.dims,
        settings.num_blocks,
        settings.block_dim,
        settings.reduction_ratio,
        settings.hidden,
        dropout=settings.dropout,
    )
