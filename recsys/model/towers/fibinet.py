"""FiBiNET: bilinear products of pairs of tokens, plain and reweighted, into a perceptron (arXiv 1905.09433)."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config.towers import Bilinear, FiBiNETTowerConfig
from recsys.model.towers.mlp import MLP, PerceptronOptions, perceptron
from recsys.model.towers.registry import Tokens, Tower, builds
from recsys.model.towers.wide import FirstOrder


class SqueezeExcitation(nn.Module):
    """SENET: tokens times relu(W_2 relu(W_1 z)), with z the mean of each token's numbers.

    With sigmoid in the place of the outer relu no token is left out, as half of them are at the start otherwise.

    Args:
        num_fields: F.
        reduction_ratio: W_1 maps F numbers to F / reduction_ratio, rounded down and at least one.
        sigmoid: whether the outer activation is a sigmoid.
    """

    def __init__(self, num_fields: int, reduction_ratio: int, *, sigmoid: bool = False) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        reduced = max(1, num_fields // reduction_ratio)
        self.squeeze = nn.Linear(num_fields, reduced, bias=False)
        self.excite = nn.Linear(reduced, num_fields, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """(B, F, D) -> (B, F, D)."""
        excited = self.excite(F.relu(self.squeeze(fields.mean(-1))))
        weights = torch.sigmoid(excited) if self.sigmoid else F.relu(excited)
        return fields * weights.unsqueeze(-1)


class BilinearInteraction(nn.Module):
    """(W x_i) * x_j of all pairs of tokens i < j, F (F - 1) / 2 of them.

    Args:
        num_fields: F, two at least.
        dim: D.
        kind: W is one matrix for `all` pairs, one for `each` i, or one for each pair (`interaction`).
    """

    def __init__(self, num_fields: int, dim: int, kind: Bilinear) -> None:
        super().__init__()
        # The last token is the left one of no pair. The matrices of one left token are a linear of more outputs.
        widths = {
            "all": [dim],
            "each": [dim] * (num_fields - 1),
            "interaction": [dim * rights for rights in range(num_fields - 1, 0, -1)],
        }
        self.dim, self.shared = dim, kind == "all"
        self.linears = nn.ModuleList(nn.Linear(dim, width, bias=False) for width in widths[kind])
        self.out_features = num_fields * (num_fields - 1) // 2 * dim

    def forward(self, fields: Tensor) -> Tensor:
        """(B, F, D) -> (B, F (F - 1) / 2 * D)."""
        lefts = fields[:, :-1]
        if self.shared:
            mapped = self.linears[0](lefts).unbind(1)
        else:
            mapped = [linear(left) for linear, left in zip(self.linears, lefts.unbind(1), strict=True)]
        # (B, 1 or tokens to the right of i, D) * (B, tokens to the right of i, D)
        pairs = [left.unflatten(1, (-1, self.dim)) * fields[:, i:] for i, left in enumerate(mapped, 1)]
        return torch.cat(pairs, 1).flatten(1)


class FiBiNET(Tower):
    """Bilinear products of tokens and of SENET's tokens into a perceptron, and a linear part (arXiv 1905.09433).

    The paper's logit is w_0 + sum of w_i x_i + the perceptron's. This tower gives the perceptron's last layer and the
    sum of the first-order terms side by side, so that the ranker's linear head completes the sum. As in FuxiCTR, plain
    and reweighted tokens have matrices of their own; unlike there, `each` has none for the last token, which no pair
    would use.

    Args:
        token_dims: width of each token within the concatenation, the same for all; two tokens at least.
        bilinear: which pairs share a matrix.
        reduction_ratio: of SENET's hidden layer.
        hidden: widths of the perceptron's layers; none gives all products to the head.
        sigmoid: whether SENET's outer activation is a sigmoid.
        wide: whether tokens end in a first-order weight and padding.
        options: of the perceptron.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        bilinear: Bilinear,
        reduction_ratio: int,
        hidden: Sequence[int],
        *,
        sigmoid: bool = False,
        wide: bool = False,
        **options: Unpack[PerceptronOptions],
    ) -> None:
        super().__init__()
        self.num_tokens, self.first_order = len(token_dims), FirstOrder(token_dims, wide)
        dim = self.first_order.dims[0]
        self.senet = SqueezeExcitation(self.num_tokens, reduction_ratio, sigmoid=sigmoid)
        self.plain = BilinearInteraction(self.num_tokens, dim, bilinear)
        self.reweighted = BilinearInteraction(self.num_tokens, dim, bilinear)
        self.mlp = MLP(2 * self.plain.out_features, hidden, **options)
        self.num_logits = self.first_order.out_features
        self.out_features = self.mlp.out_features + self.num_logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, hidden[-1] [+ 1])."""
        embeddings, first_order = self.first_order(x)
        fields = embeddings.unflatten(-1, (self.num_tokens, -1))
        products = torch.cat([self.plain(fields), self.reweighted(self.senet(fields))], 1)
        return torch.cat([self.mlp(products), first_order], 1)


@builds(FiBiNETTowerConfig)
def build_fibinet(settings: FiBiNETTowerConfig, tokens: Tokens) -> FiBiNET:
    """The FiBiNET that the settings describe."""
    return FiBiNET(
        tokens.dims,
        settings.bilinear,
        settings.reduction_ratio,
        settings.hidden,
        sigmoid=settings.excitation == "sigmoid",
        wide=settings.wide,
        **perceptron(settings),
    )
