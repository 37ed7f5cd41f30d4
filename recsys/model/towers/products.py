"""Products of tokens with one another, in one matrix product or one sum for all pairs.

Shapes: B rows, F tokens of one width D.
"""

import torch
from torch import Tensor


def inner_products(x: Tensor) -> Tensor:
    """(B, F, D) -> (B, F (F - 1) / 2): that of each pair i < j, in the order of i, then j."""
    num_tokens = x.shape[1]
    # Made anew, as a buffer would be broadcast over all ranks at every step.
    one, other = torch.triu_indices(num_tokens, num_tokens, 1, device=x.device)
    return torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, one * num_tokens + other)


def pooled_products(x: Tensor) -> Tensor:
    """(B, F, D) -> (B, D): the sum of the elementwise products of all pairs, as half of (sum)^2 - sum of squares."""
    total: Tensor = (x.sum(1).square() - x.square().sum(1)) / 2
    return total
