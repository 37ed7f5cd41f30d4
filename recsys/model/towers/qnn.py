"""QNN: quadratic layers beside a perceptron (arXiv 2505.17999)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config.towers import QNNTowerConfig
from recsys.model.towers.mlp import MLP
from recsys.model.towers.registry import Tokens, Tower, builds


class QuadraticLayer(nn.Module):
    """x + norm((A x + a) * (B x + b))."""

    def __init__(self, in_features: int, *, norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(in_features, in_features), nn.Linear(in_features, in_features)
        self.norm = nn.LayerNorm(in_features) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        out: Tensor = self.dropout(x + self.norm(self.left(x) * self.right(x)))
        return out


class QNN(Tower):
    """Quadratic layers x_{l+1} = x_l + norm((A_l x_l) * (B_l x_l)) beside a perceptron (QNN, arXiv 2505.17999).

    The paper compares neurons that its code (github.com/salmon1802/QNN, FuxiCTR's `QNN`) calls T1 to T30. This is T23,
    without the activation after it that the paper finds useless, and with a norm, without which products of products
    grow with depth. Of the others, T1, T2 and T6 have full bilinear forms; T9, x * (A x) + x, is DCN-V2's cross layer
    with x_l for x_0; T26 is the one behind QNN-alpha: x + the sum over r of x * relu(A_r x), over heads (a Khatri-Rao
    product), trained with a loss on two passes of dropout. `QNN_T26_MLP` of that code sets a perceptron beside it as
    here: the tower gives both side by side, and the ranker's head is the linear on each.

    Args:
        in_features: W.
        num_layers: number of quadratic layers.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        norm: whether products go through a LayerNorm.
        dropout: after each quadratic layer and in the perceptron.
    """

    def __init__(
        self, in_features: int, num_layers: int, hidden: Sequence[int], *, norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QuadraticLayer(in_features, norm=norm, dropout=dropout) for _ in range(num_layers))
        self.mlp = MLP(in_features, hidden, dropout=dropout) if hidden else None
        self.out_features = in_features + (self.mlp.out_features if self.mlp else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, [hidden[-1] +] W)."""
        # Before the quadratic layers, whose products are of whole rows: a linear multiplies what candidates share once.
        deep = [] if self.mlp is None else [self.mlp(x)]
        quadratic = x
        for layer in self.layers:
            quadratic = layer(quadratic)
        return torch.cat([*deep, quadratic], 1)


@builds(QNNTowerConfig)
def build_qnn(settings: QNNTowerConfig, tokens: Tokens) -> QNN:
    """The QNN that the settings describe."""
    return QNN(
        tokens.width,
        settings.num_layers,
        settings.hidden,
        norm=settings.norm == "layer",
        dropout=settings.dropout,
    )
