"""QNN: quadratic layers beside a perceptron (arXiv 2505.17999)."""

from collections.abc import Iterable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from recsys.config.towers import Activation, Normalization, QNNAlphaTowerConfig, QNNTowerConfig
from recsys.model.towers.mlp import MLP, PerceptronOptions, build_activation, perceptron
from recsys.model.towers.normalization import Folds, build_normalization, folded
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


class _Quadratic(Tower):
    """Layers from (B, W) to (B, W), one after another, beside a perceptron of which no widths are none at all."""

    def __init__(
        self, in_features: int, layers: Iterable[nn.Module], hidden: Sequence[int], **options: Unpack[PerceptronOptions]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.mlp = MLP(in_features, hidden, **options) if hidden else None
        self.out_features = in_features + (self.mlp.out_features if self.mlp else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, [hidden[-1] +] W)."""
        # Before the quadratic layers, whose products are of whole rows: a linear multiplies what candidates share once.
        deep = [] if self.mlp is None else [self.mlp(x)]
        quadratic = x
        for layer in self.layers:
            quadratic = layer(quadratic)
        return torch.cat([*deep, quadratic], 1)


class QNN(_Quadratic):
    """Quadratic layers x_{l+1} = x_l + norm((A_l x_l) * (B_l x_l)) beside a perceptron (QNN, arXiv 2505.17999).

    The paper compares neurons that its code (github.com/salmon1802/QNN, FuxiCTR's `QNN`) calls T1 to T30. This is T23,
    without the activation after it that the paper finds useless, and with a norm, without which products of products
    grow with depth. Of the others, T1, T2 and T6 have full bilinear forms; T9, x * (A x) + x, is DCN-V2's cross layer
    with x_l for x_0; T26 is `QNNAlpha`'s. The tower gives both parts side by side, and the ranker's head is the linear
    on each.

    Args:
        in_features: W.
        num_layers: number of quadratic layers.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        norm: whether products go through a LayerNorm.
        options: of the perceptron; its dropout also after each quadratic layer.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        hidden: Sequence[int],
        *,
        norm: bool = True,
        **options: Unpack[PerceptronOptions],
    ) -> None:
        layers = (
            QuadraticLayer(in_features, norm=norm, dropout=options.get("dropout", 0.0)) for _ in range(num_layers)
        )
        super().__init__(in_features, layers, hidden, **options)


class KhatriRaoLayer(nn.Module, Folds):
    """x + sum_r s(x) * act(norm(A_r x + a_r)), with dropout behind the activation and at the end.

    Args:
        in_features: W.
        num_rows: R, of which each A_r is (W, W).
        token_dim: D, that of each token; what `num_heads` divides.
        num_heads: H. s puts the numbers of all tokens' first D / H dimensions first, then those of the next, and so on;
            it leaves x as it is where H is 1.
        activation: act.
        normalization: of all R W numbers.
        dropout: probability.
    """

    def __init__(
        self,
        in_features: int,
        num_rows: int,
        token_dim: int,
        num_heads: int = 1,
        *,
        activation: Activation = "relu",
        normalization: Normalization = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(in_features, in_features * num_rows)
        self.norm: nn.Module = build_normalization(normalization, in_features * num_rows)
        self.activate = build_activation(activation, in_features * num_rows)
        self.dropout = nn.Dropout(dropout)
        self._rows = num_rows
        self._token_dim, self._heads = token_dim, num_heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        factors = self.dropout(self.activate(self.norm(self.linear(x))))
        # A head's rows lie together, as FuxiCTR has it, so that its weights are these.
        summed = factors.unflatten(1, (self._heads, self._rows, -1)).sum(2).flatten(1)
        slices = x
        if self._heads > 1:
            slices = x.unflatten(1, (-1, self._heads, self._token_dim // self._heads)).transpose(1, 2).flatten(1)
        out: Tensor = self.dropout(x + slices * summed)
        return out

    def fold_norms(self) -> None:
        """As `Folds`."""
        self.linear, self.norm = folded(self.linear, self.norm)


class QNNAlpha(_Quadratic):
    """The layers of QNN-alpha (arXiv 2505.17999; neuron T26 of its code) beside a perceptron.

    The published model has one layer of 4 rows, 4 heads and batch norm on MovieLens-1M, no perceptron (its code's
    `QNN_T26_MLP` sets one beside it as here), and a loss on two passes of dropout, which is no part of a tower.

    Args:
        in_features: W.
        num_layers: number of layers.
        hidden: widths of the perceptron's layers; none leaves the perceptron out.
        num_rows: as `KhatriRaoLayer`.
        num_heads: as `KhatriRaoLayer`.
        token_dim: as `KhatriRaoLayer`.
        options: of the perceptron and of the layers.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        hidden: Sequence[int],
        *,
        num_rows: int,
        token_dim: int,
        num_heads: int = 1,
        **options: Unpack[PerceptronOptions],
    ) -> None:
        layers = (KhatriRaoLayer(in_features, num_rows, token_dim, num_heads, **options) for _ in range(num_layers))
        super().__init__(in_features, layers, hidden, **options)


@builds(QNNTowerConfig)
def build_qnn(settings: QNNTowerConfig, tokens: Tokens) -> QNN:
    """The QNN that the settings describe."""
    return QNN(
        tokens.width,
        settings.num_layers,
        settings.hidden,
        norm=settings.norm == "layer",
        **perceptron(settings),
    )


@builds(QNNAlphaTowerConfig)
def build_qnn_alpha(settings: QNNAlphaTowerConfig, tokens: Tokens) -> QNNAlpha:
    """The QNN-alpha that the settings describe."""
    return QNNAlpha(
        tokens.width,
        settings.num_layers,
        settings.hidden,
        num_rows=settings.num_rows,
        num_heads=settings.num_heads,
        token_dim=tokens.dims[0],
        **perceptron(settings),
    )
