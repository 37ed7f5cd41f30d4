"""AutoInt: self-attention over the tokens beside a perceptron (arXiv 1810.11921)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import AutoIntTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class InteractingLayer(nn.Module):
    """relu(multi-head attention of the tokens + W_res x), without biases; scores are plain inner products.

    As in FuxiCTR, W_res is the identity where widths agree; the paper always has a matrix.

    Args:
        in_features: width of the tokens.
        dim: width of the output.
        num_heads: must divide `dim`.
        dropout: of attention weights.
    """

    def __init__(self, in_features: int, dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value = (nn.Linear(in_features, dim, bias=False) for _ in range(3))
        self.residual = nn.Identity() if in_features == dim else nn.Linear(in_features, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, in_features) -> (B, F, dim)."""
        # (B, F, dim) -> (B, heads, F, dim / heads)
        query, key, value = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)
        return F.relu(attended.transpose(1, 2).flatten(2) + self.residual(x))


class AutoInt(Tower):
    """Interacting layers on tokens of one width, a perceptron (AutoInt+) and a linear part (arXiv 1810.11921).

    The paper's logit is w' of all tokens after the last layer, to which AutoInt+ adds a perceptron's. This tower gives
    the perceptron's last layer, those tokens and the sum of the first-order terms side by side, so that the ranker's
    linear head completes the sum. The linear part is FuxiCTR's, not the paper's.

    Args:
        token_dims: width of each token within the concatenation, the same for all.
        num_layers: number of interacting layers.
        dim: their width.
        num_heads: must divide `dim`.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        wide: whether tokens end in a first-order weight and padding.
        dropout: of attention weights and in the perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        num_layers: int,
        dim: int,
        num_heads: int,
        hidden: Sequence[int],
        *,
        wide: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.first_order = len(token_dims), FirstOrder(token_dims, wide)
        token_dim = self.first_order.dims[0]
        widths = [token_dim, *[dim] * (num_layers - 1)]
        self.layers = nn.ModuleList(InteractingLayer(width, dim, num_heads, dropout=dropout) for width in widths)
        self.mlp = MLP(token_dim * self.num_tokens, hidden, dropout=dropout) if hidden else None
        self.num_logits = self.first_order.out_features
        self.out_features = (self.mlp.out_features if self.mlp else 0) + dim * self.num_tokens + self.num_logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, [hidden[-1] +] F * dim [+ 1])."""
        embeddings, first_order = self.first_order(x)
        # Before attention, which is of whole rows: a linear multiplies what candidates share once.
        deep = [] if self.mlp is None else [self.mlp(embeddings)]
        attended = embeddings.unflatten(-1, (self.num_tokens, -1))
        for layer in self.layers:
            attended = layer(attended)
        return torch.cat([*deep, attended.flatten(1), first_order], 1)


@builds(AutoIntTowerConfig)
def build_autoint(settings: AutoIntTowerConfig, tokens: Tokens) -> AutoInt:
    """The AutoInt that the settings describe."""
    return AutoInt(
        tokens.dims,
        settings.num_layers,
        settings.attention_dim,
        settings.num_heads,
        settings.hidden,
        wide=settings.wide,
        dropout=settings.dropout,
    )
