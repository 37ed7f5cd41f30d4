"""Towers: from feature embeddings to the representation that the head turns into a logit.

Shapes: B rows, F tokens (one a feature, one more for the dense features), W the sum of the tokens' widths.

Towers are built dense; `recsys.model.hilomoe.attach_experts` puts experts on the linears that one names. A tower takes
the concatenated tokens (B, W) and gives (B, `out_features`).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, ReLU, dropout for each hidden width; no widths give the identity."""

    def __init__(self, in_features: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        for linear in self.linears:
            x = self.dropout(F.relu(linear(x)))
        return x


class DCNv2(nn.Module):
    """DCN-V2, stacked (arXiv 2008.13535): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, then a perceptron."""

    def __init__(self, in_features: int, num_cross_layers: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(in_features, in_features) for _ in range(num_cross_layers))
        self.mlp = MLP(in_features, hidden, dropout=dropout)
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

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, feedforward_dim), nn.Linear(feedforward_dim, dim)
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
        dropout: after attention and perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        dim: int,
        num_blocks: int,
        num_heads: int,
        feedforward_dim: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_dims = list(token_dims)
        self.tokens = nn.ModuleList(nn.Linear(width, dim) for width in token_dims)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, feedforward_dim, dropout=dropout) for _ in range(num_blocks)
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


class FeatureGate(nn.Module):
    """FinalMLP's feature selection (arXiv 2304.00902, section 3.2): x * 2 sigmoid(MLP(context)).

    Args:
        in_features: W, width of what is gated.
        context_features: width of the context; 0 gates by one learned vector for all rows.
        hidden: width of the gate's hidden layer.
    """

    def __init__(self, in_features: int, context_features: int, hidden: int) -> None:
        super().__init__()
        # Zero-initialised, the learned context would leave the first linear without a gradient.
        self.context = None if context_features else nn.Parameter(torch.randn(1, _LEARNED_CONTEXT))
        self.hidden = nn.Linear(context_features or _LEARNED_CONTEXT, hidden)
        self.output = nn.Linear(hidden, in_features)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Gate x (B, W) by the context (B, `context_features`), which is not read where that width is 0."""
        gate = self.output(F.relu(self.hidden(context if self.context is None else self.context)))
        return x * (2 * torch.sigmoid(gate))


_LEARNED_CONTEXT = 16
"""Width of a context that is learned; a gate's hidden layer sees nothing but its image, so the width hardly matters."""


class FinalMLP(nn.Module):
    """Two perceptrons on differently gated features, and their bilinear interaction (FinalMLP, arXiv 2304.00902).

    The paper's fusion is b + w_1' o_1 + w_2' o_2 + sum_h o_1h' W_h o_2h over heads h. This tower gives o_1, o_2 and the
    interaction of each head side by side, so that the ranker's linear head completes the sum.

    Args:
        token_dims: width of each token within the concatenation.
        first_hidden: widths of the first stream, one at least.
        second_hidden: widths of the second.
        num_heads: H, must divide both streams' output widths.
        first_context: tokens by number that gate the first stream's features; none gates by a learned vector.
        second_context: the same of the second.
        gate_hidden: width of the gates' hidden layers; None leaves the gates out.
        dropout: in both streams.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        first_hidden: Sequence[int],
        second_hidden: Sequence[int],
        num_heads: int,
        *,
        first_context: Sequence[int] = (),
        second_context: Sequence[int] = (),
        gate_hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_dims, self.num_heads = list(token_dims), num_heads
        self.contexts = [list(first_context), list(second_context)]
        width = sum(token_dims)
        self.gates = (
            nn.ModuleList(
                FeatureGate(width, sum(token_dims[token] for token in context), gate_hidden)
                for context in self.contexts
            )
            if gate_hidden
            else None
        )
        self.first = MLP(width, first_hidden, dropout=dropout)
        self.second = MLP(width, second_hidden, dropout=dropout)
        heads = [stream.out_features // num_heads for stream in (self.first, self.second)]
        self.interaction = nn.Parameter(torch.empty(num_heads, *heads))
        for weight in self.interaction.detach():
            nn.init.xavier_uniform_(weight)
        self.out_features = self.first.out_features + self.second.out_features + num_heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, first_hidden[-1] + second_hidden[-1] + H)."""
        first = second = x
        if self.gates is not None:
            tokens = x.split(self.token_dims, -1)
            first, second = (
                gate(x, torch.cat([x[:, :0], *(tokens[token] for token in context)], 1))
                for gate, context in zip(self.gates, self.contexts, strict=True)
            )
        first, second = self.first(first), self.second(second)
        # (B, H, d_1) and (B, H, d_2), head by head
        one, two = (stream.unflatten(-1, (self.num_heads, -1)) for stream in (first, second))
        fused = (torch.einsum("bhi,hij->bhj", one, self.interaction) * two).sum(-1)
        return torch.cat([first, second, fused], 1)
