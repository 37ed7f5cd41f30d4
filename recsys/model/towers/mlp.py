"""The multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import MLPTowerConfig
from recsys.model.towers.registry import Tokens, Tower, builds


class MLP(Tower):
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


@builds(MLPTowerConfig)
def build_mlp(settings: MLPTowerConfig, tokens: Tokens) -> MLP:
    """The perceptron that the settings describe."""
    return MLP(tokens.width, settings.hidden, dropout=settings.dropout)
