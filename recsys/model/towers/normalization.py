"""Normalisation between a linear and its activation: none, by layer, or by batch over all ranks."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recsys.config.towers import Normalization


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) by the mean and variance of a step's rows on all ranks.

    Parameters, buffers and defaults are those of `nn.BatchNorm1d` by name and meaning (which counts batches besides);
    each rank may have another number of rows, or none. Unlike `nn.SyncBatchNorm` it also runs on a CPU.

    - In training, y = (x - mean) / sqrt(variance + eps) * weight + bias, and the running statistics, the variance
      unbiased, move towards those of the step. A call is collective, forward and backward: one all-reduce each.
    - A step of one row in all has variance 0 and becomes `bias`. It tells no variance, so it leaves the running
      statistics as they are, as does one of no rows.
    - In evaluation, and where `weight` needs no gradient, as in a stage that freezes it, y is made by the running
      statistics, which stay as they are. Nothing is collective then.

    It computes in its parameters' precision, whatever autocast makes of the linear before it.

    Args:
        num_features: C, the width of x.
        eps: added to variances.
        momentum: by how much of the difference running statistics move at a step.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C); every vector counts as a row."""
        if not (self.training and self.weight.requires_grad):
            scale, shift = self.affine()
            return torch.addcmul(shift, x, scale)
        y, mean, variance, moves = _Normalized.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.num_features), self.weight, self.bias, self.eps
        )
        moved = self.momentum * moves
        self.running_mean.lerp_(mean, moved)
        self.running_var.lerp_(variance, moved)
        out: Tensor = y.reshape(x.shape)
        return out

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,) each, with which evaluation makes x * scale + shift of x."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def folded_into(self, linear: nn.Linear) -> nn.Linear:
        """The linear, a copy, that computes what a linear to C and this do in evaluation, one after the other."""
        folded = nn.Linear(
            linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
        )
        with torch.no_grad():  # in double precision, so that only the products' own rounding is left
            scale, shift = (part.double() for part in self.affine())
            folded.weight.copy_(linear.weight.double() * scale[:, None])
            folded.bias.copy_(shift if linear.bias is None else linear.bias.double() * scale + shift)
        return folded.train(linear.training)

    def extra_repr(self) -> str:
        """As of `nn.BatchNorm1d`."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class Folds(ABC):
    """A module with batch norms behind linears, which serving has it leave to them."""

    @abstractmethod
    def fold_norms(self) -> None:
        """Leave batch norms to the linears before them, where these are plain: the same in evaluation, in one pass."""


def folded(linear: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A linear and the norm behind it, the norm left to the linear where that is plain and this a batch norm."""
    if isinstance(norm, BatchNorm) and type(linear) is nn.Linear:
        return norm.folded_into(linear), nn.Identity()
    return linear, norm


def build_normalization(kind: Normalization, width: int) -> nn.Module:
    """The module from (..., width) to (..., width) that a config's `normalization` names."""
    match kind:
        case "batch":
            return BatchNorm(width)
        case "layer":
            return nn.LayerNorm(width)
    return nn.Identity()


class _Normalized(torch.autograd.Function):
    """Rows (N, C) normalised by the statistics of all ranks' rows.

    Gives besides what running statistics move to, mean and unbiased variance (C,), and whether they do, (1,) of 1 or 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        x = x.to(weight.dtype)
        of_rank = x.sum(0) / max(len(x), 1)
        centred = x - of_rank
        count, mean, squares = _over_ranks(len(x), of_rank, centred.square().sum(0))
        unbiased = squares / (count - 1).clamp(min=1)
        inverse = (squares / count.clamp(min=1) + eps).rsqrt()
        mean, unbiased, inverse, moves = (of.to(x.dtype) for of in (mean, unbiased, inverse, count > 1))
        centred += of_rank - mean
        ctx.save_for_backward(centred, inverse, weight, count)
        ctx.mark_non_differentiable(mean, unbiased, moves)
        return torch.addcmul(bias, centred, weight * inverse), mean, unbiased, moves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        centred, inverse, weight, count = ctx.saved_tensors
        sums = torch.stack([d_y.sum(0), (d_y * centred).sum(0)])
        # The parameters' gradients are those of this rank's rows, as everywhere: DDP takes the mean over ranks.
        d_bias, d_weight = sums[0].clone(), sums[1] * inverse
        if _ranks() > 1:
            dist.all_reduce(sums)
        straight, along = (sums / count.clamp(min=1).to(sums.dtype)).unbind()
        d_x = torch.addcmul(d_y - straight, centred, along * inverse.square(), value=-1).mul_(weight * inverse)
        return d_x, d_weight, d_bias, None


def _over_ranks(rows: int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of rows (1,), their mean and squared differences from it (C,), of all ranks from those of each.

    In float64, where the squares of means that are large beside the deviations do not swallow these.
    """
    mean = mean.double()
    moments = torch.cat([mean.new_full((1,), rows), rows * mean, squares + rows * mean.square()])
    if _ranks() > 1:
        dist.all_reduce(moments)
    count, sums, squares = moments.split([1, len(mean), len(mean)])
    mean = sums / count.clamp(min=1)
    return count, mean, (squares - count * mean.square()).clamp(min=0)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
