"""Towers: from feature embeddings to the representation that the head turns into a logit.

Shapes: B rows, F tokens (one a feature, one more for the dense features), W the sum of the tokens' widths.

Every tower is built of linears from one factory, so that each can be dense or carry HiLoMoE experts. A tower takes the
concatenated tokens (B, W) and gives (B, `out_features`).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LinearFactory = Callable[[int, int], nn.Linear]
"""(in_features, out_features) -> a linear with bias, dense or HiLoMoE."""


class MLP(nn.Module):
    """Linear, ReLU, dropout for each hidden width; no widths give the identity."""

    def __init__(self, in_features: int, hidden: Sequence[int], linear: LinearFactory, *, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.linears = nn.ModuleList(linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        for linear in self.linears:
            x = self.dropout(F.relu(linear(x)))
        return x


class DCNv2(nn.Module):
    """DCN-V2, stacked (arXiv 2008.13535): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, then a perceptron."""

    def __init__(
        self,
        in_features: int,
        num_cross_layers: int,
        hidden: Sequence[int],
        linear: LinearFactory,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cross = nn.ModuleList(linear(in_features, in_features) for _ in range(num_cross_layers))
        self.mlp = MLP(in_features, hidden, linear, dropout=dropout)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        crossed = x
        for linear in self.cross:
            crossed = torch.addcmul(crossed, x, linear(crossed))
        out: Tensor = self.mlp(crossed)
        return out


class TransformerBlock(nn.Module):
    """Pre-norm multi-head self-attention over the tokens, then a position-wise perceptron, each with a residual."""

    def __init__(
        self, dim: int, num_heads: int, feedforward_dim: int, linear: LinearFactory, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.output = linear(dim, dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.up, self.down = linear(dim, feedforward_dim), linear(feedforward_dim, dim)
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
        out: Tensor = x + self.dropout(self.down(F.relu(self.up(self.feedforward_norm(x)))))
        return out


class Transformer(nn.Module):
    """Encoder blocks over feature tokens (no positions: which feature a token is shows in its projection's bias).

    Args:
        token_dims: width of each token within the concatenation; each is projected to `dim`.
        dim: D, the blocks' width.
        num_blocks: number of encoder blocks.
        num_heads: must divide D.
        feedforward_dim: width inside a block's perceptron.
        linear: factory for the blocks' linears; the token projections are plain.
        dropout: after attention and perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        dim: int,
        num_blocks: int,
        num_heads: int,
        feedforward_dim: int,
        linear: LinearFactory,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_dims = list(token_dims)
        self.tokens = nn.ModuleList(nn.Linear(width, dim) for width in token_dims)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, feedforward_dim, linear, dropout=dropout) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.out_features = dim * len(self.token_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, F * D)."""
        parts = x.split(self.token_dims, -1)
        x = torch.stack([project(part) for project, part in zip(self.tokens, parts, strict=True)], 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x).flatten(1)
        return out
