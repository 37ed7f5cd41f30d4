"""A transformer's encoder over feature tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import Activation, Normalization, TransformerTowerConfig
from recsys.model.towers.mlp import build_activation, perceptron
from recsys.model.towers.normalization import build_normalization
from recsys.model.towers.registry import Tokens, Tower, builds


class TransformerBlock(nn.Module):
    """Pre-norm multi-head self-attention over the tokens, then a position-wise perceptron, each with a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        normalization: Normalization = "layer",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = build_normalization(normalization, dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.feedforward_norm = build_normalization(normalization, dim)
        self.up, self.down = nn.Linear(dim, feedforward_dim), nn.Linear(feedforward_dim, dim)
        self.activation = build_activation(activation, feedforward_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)."""
        normed = self.attention_norm(x)
        # (B, F, D) -> (B, heads, F, D / heads)
        query, key, value = (
            part(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.down(self.activation(self.up(self.feedforward_norm(x)))))
        return out


class Transformer(Tower):
    """Encoder blocks over feature tokens (no positions: which feature a token is shows in its projection's bias).

    Args:
        token_dims: width of each token within the concatenation; each is projected to `dim`.
        dim: D, the blocks' width.
        num_blocks: number of encoder blocks.
        num_heads: must divide D.
        feedforward_dim: width inside a block's perceptron.
        activation: within the perceptrons.
        dropout: after attention and perceptron.
        normalization: before each, and at the end.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        dim: int,
        num_blocks: int,
        num_heads: int,
        feedforward_dim: int,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        normalization: Normalization = "layer",
    ) -> None:
        super().__init__()
        self.token_dims = list(token_dims)
        self.tokens = nn.ModuleList(nn.Linear(width, dim) for width in token_dims)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim, num_heads, feedforward_dim, activation=activation, dropout=dropout, normalization=normalization
            )
            for _ in range(num_blocks)
        )
        self.norm = build_normalization(normalization, dim)
        self.out_features = dim * len(self.token_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, F * D)."""
        parts = x.split(self.token_dims, -1)
        x = torch.stack([project(part) for project, part in zip(self.tokens, parts, strict=True)], 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x).flatten(1)
        return out


@builds(TransformerTowerConfig)
def build_transformer(settings: TransformerTowerConfig, tokens: Tokens) -> Transformer:
    """The encoder that the settings describe."""
    return Transformer(
        tokens.dims,
        settings.model_dim,
        settings.num_blocks,
        settings.num_heads,
        settings.feedforward_dim,
        **perceptron(settings),
    )
