"""Putting decoded rows into another order, lists by fbgemm's kernel, which copies them whole."""

from typing import Any, NamedTuple

import fbgemm_gpu  # noqa: F401  registers the kernel
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.rows import Jagged, Rows, offsets_of


class Shuffle(NamedTuple):
    """Rows in the order of their numbers (M,): a permutation of all rows, or some of them."""

    rows: NDArray[np.int64]

    def place(self, values: NDArray[Any], target: NDArray[Any]) -> None:
        """Write one value for each row, in this order, into an array of a type that holds them."""
        # All numbers are in range; "clip" spares the copy that the check of it would make of `out`.
        np.take(values.astype(target.dtype, copy=False), self.rows, out=target, mode="clip")

    def lists(self, jagged: Jagged) -> Jagged:
        """The rows' lists in this order."""
        # numpy would need an index for each value.
        lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(self.rows.astype(np.int32)),
            torch.from_numpy(np.diff(jagged.offsets).astype(np.int32)),
            _tensor(jagged.values),
            None if jagged.weights is None else _tensor(jagged.weights),
            None,
        )
        return Jagged(values.numpy(), offsets_of(lengths.numpy()), None if weights is None else weights.numpy())


def take(rows: Rows, numbers: NDArray[np.int64]) -> Rows:
    """The rows of the given numbers, in that order."""
    # `clip` skips a check that numpy makes of every index in a pass of its own.
    return Rows(
        rows.labels.take(numbers, mode="clip") if len(rows.labels) else rows.labels,
        rows.reference.take(numbers, mode="clip") if len(rows.reference) else rows.reference,
        rows.domain.take(numbers, mode="clip") if len(rows.domain) else rows.domain,
        rows.dense.take(numbers, axis=1, mode="clip"),
        rows.single.take(numbers, axis=1, mode="clip"),
        tuple(Shuffle(numbers).lists(jagged) for jagged in rows.lists),
        rows.weight.take(numbers, mode="clip") if len(rows.weight) else rows.weight,
        {key: happened.take(numbers, mode="clip") for key, happened in rows.counts.items()},
        rows.has_empty,
    )


def _tensor(values: NDArray[Any]) -> Tensor:
    """To read from alone: torch knows no memory that is read-only, as Arrow's is."""
    return torch.from_numpy(values) if values.flags.writeable else torch.from_dlpack(pa.array(values))
