"""FinalMLP: two gated perceptrons and their bilinear fusion (arXiv 2304.00902)."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import FinalMLPTowerConfig
from recsys.model.towers.mlp import MLP, PerceptronOptions, perceptron
from recsys.model.towers.registry import Tokens, Tower, builds


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


class FinalMLP(Tower):
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
        options: of both streams.
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
        **options: Unpack[PerceptronOptions],
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
        self.first = MLP(width, first_hidden, **options)
        self.second = MLP(width, second_hidden, **options)
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


@builds(FinalMLPTowerConfig)
def build_final_mlp(settings: FinalMLPTowerConfig, tokens: Tokens) -> FinalMLP:
    """The FinalMLP that the settings describe."""
    features = list(tokens.features)
    return FinalMLP(
        tokens.dims,
        settings.first_hidden,
        settings.second_hidden,
        settings.num_heads,
        first_context=[features.index(name) for name in settings.first_context],
        second_context=[features.index(name) for name in settings.second_context],
        gate_hidden=settings.gate_hidden,
        **perceptron(settings),
    )
