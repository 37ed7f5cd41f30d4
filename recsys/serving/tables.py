"""Embedding tables as an artefact keeps them, and pooling by them."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recsys.data.rows import Jagged

Precision = Literal["float32", "float16", "int8"]

_TAIL = 8
"""Bytes behind the numbers of a row of int8: its scale and its least value, float32 each."""

_LEVELS = 255


def stored(rows: Tensor, precision: Precision) -> Tensor:
    """Rows (R, D) of float32 as they are kept.

    Of int8, each row has the range of its own values: its D numbers of one byte, then its scale and its least value as
    float32, (R, D + 8) uint8. An element is off by half a scale at most, which is 1/510 of the row's range.

    Raises:
        OverflowError: a row is not finite, or beyond what the precision holds.
    """
    least, most = rows.aminmax(dim=1, keepdim=True)
    scale = (most - least) / _LEVELS
    kept = {"float32": rows, "float16": rows.half(), "int8": scale}[precision]
    if not bool(kept.isfinite().all()):
        raise OverflowError(f"a row that {precision} cannot hold, from {float(least.min())} to {float(most.max())}")
    if precision != "int8":
        return kept
    levels = ((rows - least) / scale.where(scale > 0, 1.0)).round_().clamp_(0, _LEVELS)
    return torch.cat([levels.to(torch.uint8), torch.cat([scale, least], 1).view(torch.uint8)], 1)


def stored_shape(rows: int, dim: int, precision: Precision) -> tuple[int, int]:
    """Of what `stored` gives."""
    return rows, dim + _TAIL if precision == "int8" else dim


def stored_dtype(precision: Precision) -> torch.dtype:
    """Of what `stored` gives."""
    return {"float32": torch.float32, "float16": torch.float16, "int8": torch.uint8}[precision]


class Table:
    """An embedding table that is read where it lies.

    Args:
        weight: as `stored` gives it.
        precision: in which it is kept.
    """

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        self._weight, self._precision = weight, precision
        self.num_embeddings = len(weight)
        self.dim = weight.shape[1] - (_TAIL if precision == "int8" else 0)

    def rows(self, ids: Tensor) -> Tensor:
        """Embeddings (N, D) float32 of ids (N,)."""
        kept = self._weight.index_select(0, ids)
        if self._precision != "int8":
            return kept.float()
        scale, least = kept[:, self.dim :].contiguous().view(torch.float32).split(1, 1)
        rows: Tensor = kept[:, : self.dim].float() * scale + least
        return rows

    def of_single(self, ids: Tensor, *, has_empty: bool = True) -> Tensor:
        """Embeddings (N, D) of at most one id for each row, -1 for none, of which False tells that there are none."""
        present = ids >= 0 if has_empty else None
        if present is None or bool(present.all()):
            return self.rows(ids)
        return self.rows(ids.clamp(min=0)) * present[:, None]

    def of_lists(self, lists: Jagged, *, mean: bool) -> Tensor:
        """Sums (N, D) over each row's ids, each multiplied by its weight if there are any, or their means."""
        lengths = torch.from_numpy(np.diff(lists.offsets))
        # Arrow's memory may not be written to, which torch warns of.
        rows = self.rows(torch.from_numpy(np.require(lists.values, requirements="W")))
        if lists.weights is not None:
            rows = rows * torch.from_numpy(np.require(lists.weights, requirements="W"))[:, None]
        of_row = torch.repeat_interleave(lengths)
        sums = rows.new_zeros(len(lengths), self.dim).index_add_(0, of_row, rows)
        # As in training, times the reciprocal.
        return sums * lengths.clamp(min=1).float().reciprocal()[:, None] if mean else sums


def blocks(rows: int, size: int = 1 << 16) -> Iterator[slice]:
    """All of so many rows, a bounded number at a time."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
