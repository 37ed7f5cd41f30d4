"""The multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

from torch import Tensor, nn

from recsys.config.towers import Activation, MLPTowerConfig, Normalization, PerceptronSettings
from recsys.model.towers.normalization import Folds, build_normalization, folded
from recsys.model.towers.registry import Tokens, Tower, builds


class PerceptronOptions(TypedDict, total=False):
    """What the layers of a perceptron are; see `recsys.config.towers.PerceptronSettings`."""

    activation: Activation
    dropout: float
    normalization: Normalization


def perceptron(settings: PerceptronSettings) -> PerceptronOptions:
    """What a tower's settings say of its perceptrons, as arguments of `MLP`."""
    return {
        "activation": settings.activation,
        "dropout": settings.dropout,
        "normalization": settings.normalization,
    }


class MLP(Tower, Folds):
    """Linear, normalisation, activation, dropout for each hidden width; no widths give the identity."""

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(build_normalization(normalization, width) for width in hidden)
        self.activations = nn.ModuleList(build_activation(activation, width) for width in hidden)
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        for linear, norm, activate in zip(self.linears, self.norms, self.activations, strict=True):
            x = self.dropout(activate(norm(linear(x))))
        return x

    def fold_norms(self) -> None:
        """As `Folds`."""
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            self.linears[layer], self.norms[layer] = folded(linear, norm)


class PReLU(nn.PReLU):
    """That of torch with a slope for each of the last dimension's numbers, whatever is before them.

    Torch has slopes go with the second dimension, which in (B, F, D) is that of tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return super().forward(x.flatten(0, -2)).view_as(x)


def build_activation(kind: Activation, width: int) -> nn.Module:
    """The module from (..., width) to (..., width) that a config's `activation` names."""
    match kind:
        case "relu":
            return nn.ReLU()
        case "gelu":
            return nn.GELU()
        case "silu":
            return nn.SiLU()
        case "leaky_relu":
            return nn.LeakyReLU()
        case "prelu":
            return PReLU(width)
    return nn.Identity()


@builds(MLPTowerConfig)
def build_mlp(settings: MLPTowerConfig, tokens: Tokens) -> MLP:
    """The perceptron that the settings describe."""
    return MLP(tokens.width, settings.hidden, **perceptron(settings))
