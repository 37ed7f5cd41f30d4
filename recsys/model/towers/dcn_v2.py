"""DCN-V2: cross layers in front of a perceptron (arXiv 2008.13535)."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from recsys.config.towers import DCNv2TowerConfig
from recsys.model.towers.mlp import MLP, PerceptronOptions, perceptron
from recsys.model.towers.registry import Tokens, Tower, builds


class DCNv2(Tower):
    """DCN-V2, stacked (arXiv 2008.13535): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, then a perceptron."""

    def __init__(
        self, in_features: int, num_cross_layers: int, hidden: Sequence[int], **options: Unpack[PerceptronOptions]
    ) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(in_features, in_features) for _ in range(num_cross_layers))
        self.mlp = MLP(in_features, hidden, **options)
        self.out_features = self.mlp.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1])."""
        crossed = x
        for linear in self.cross:
            crossed = torch.addcmul(crossed, x, linear(crossed))
        out: Tensor = self.mlp(crossed)
        return out


@builds(DCNv2TowerConfig)
def build_dcn_v2(settings: DCNv2TowerConfig, tokens: Tokens) -> DCNv2:
    """The DCN-V2 that the settings describe."""
    return DCNv2(tokens.width, settings.num_cross_layers, settings.hidden, **perceptron(settings))
