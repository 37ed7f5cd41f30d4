"""First-order ("wide") terms out of the tokens that also hold the embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config.towers import FIRST_ORDER_WIDTH


class FirstOrder(nn.Module):
    """Tokens taken apart into their embeddings and the sum of their first-order weights.

    The last four numbers of a token are its weight and three that nothing reads. So the weights of a linear model lie
    in the sharded tables and are trained, frozen, saved and served with them; those of the dense features are a row of
    their projection.

    Args:
        dims: width of each token within the concatenation.
        wide: False for tokens that are embeddings as a whole.

    Attributes:
        dims: width of each embedding.
        out_features: of the sum, 1, or 0 where tokens hold no weights.
    """

    def __init__(self, dims: Sequence[int], wide: bool) -> None:
        super().__init__()
        self.dims = [dim - FIRST_ORDER_WIDTH if wide else dim for dim in dims]
        self.out_features = int(wide)
        self._parts = [part for dim in self.dims for part in (dim, 1, FIRST_ORDER_WIDTH - 1)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, W) -> embeddings side by side (B, sum of `dims`), and the sum of the weights (B, `out_features`)."""
        if not self.out_features:
            return x, x[:, :0]
        # One split, whose gradient is one concatenation.
        parts = x.split(self._parts, -1)
        return torch.cat(parts[::3], 1), torch.cat(parts[1::3], 1).sum(1, keepdim=True)
