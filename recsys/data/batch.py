"""What travels from the reader through the pipeline to the model, and how decoded rows become it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recsys.data.rows import Rows, SparseLayout
from recsys.data.shuffling import take


@dataclass
class Batch(Pipelineable):
    """One rank's rows of one step; B may differ between ranks and be 0.

    Attributes:
        dense_features: (B, F_d) float32, in the config's order.
        sparse_features: one key a sparse feature, B bags each; a null or empty id list is an empty bag.
        labels: (B,) float32, 0 or 1; (0,) where the config names no label.
        reference: (B,) float64 probabilities of the reference column; (0,) where there is none.
        domain: (B,) int64, the domain of each row; (0,) where the config names no domain column.
        loss_scale: what the sum of this rank's losses is multiplied by so that the mean over ranks, which is what DDP
            and TorchRec take of gradients, is the mean over the step's examples: world size / examples on all ranks.
        weight: (B,) float32, what each row's loss is multiplied by; None where the config names no weight column.
        counts: by kind and feature, how often values of these rows were cut, replaced or left out.
    """

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    reference: Tensor
    domain: Tensor
    loss_scale: float
    weight: Tensor | None = None
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """A copy on `device` (the batch itself where it already is there)."""
        return Batch(
            dense_features=self.dense_features.to(device, non_blocking=non_blocking),
            sparse_features=self.sparse_features.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            reference=self.reference,  # only the host's metrics read it
            domain=self.domain.to(device, non_blocking=non_blocking),
            loss_scale=self.loss_scale,
            weight=None if self.weight is None else self.weight.to(device, non_blocking=non_blocking),
            counts=self.counts,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until work queued on `stream` is done."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)
        self.domain.record_stream(stream)
        if self.weight is not None:
            self.weight.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which copies to a GPU are asynchronous."""
        return Batch(
            dense_features=self.dense_features.pin_memory(),
            sparse_features=self.sparse_features.pin_memory(),
            labels=self.labels.pin_memory(),
            reference=self.reference,
            domain=self.domain.pin_memory(),
            loss_scale=self.loss_scale,
            weight=None if self.weight is None else self.weight.pin_memory(),
            counts=self.counts,
        )


class Part(NamedTuple):
    """Rows `start` up to `stop` of some decoded rows."""

    rows: Rows
    start: int
    stop: int

    def labelled(self) -> "Part":
        """Without the rows whose label is NaN."""
        kept = np.flatnonzero(~np.isnan(self.rows.labels[self.start : self.stop]))
        return Part(take(self.rows, kept + self.start), 0, len(kept))


def build_batch(
    parts: Sequence[Part], layout: SparseLayout, num_dense: int, *, loss_scale: float, pin_memory: bool
) -> Batch:
    """One batch of the given parts, one after another; of none, a batch of no rows.

    Every value is copied once, from where it was decoded to where the model, or the copy to the device, reads it.

    Rows whose label is NaN are left out. What happened to the rows is summed, theirs included.

    Args:
        parts: rows of the same layout.
        layout: of all parts.
        num_dense: number of dense features.
        loss_scale: as in `Batch`.
        pin_memory: build it in page-locked memory.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for rows, start, stop in parts:
        counts.update({key: int(happened[start:stop].sum()) for key, happened in rows.counts.items()})
    parts = [part.labelled() if any(kind == "skipped" for kind, _ in part.rows.counts) else part for part in parts]
    ends = list(accumulate(part.stop - part.start for part in parts))
    size = ends[-1] if ends else 0
    placed = [
        _Placed(rows, slice(start, stop), slice(end - stop + start, end))
        for (rows, start, stop), end in zip(parts, ends, strict=True)
    ]

    def column(name: str, dtype: torch.dtype, pinned: bool, width: tuple[int, ...] = ()) -> Tensor:
        """The rows' values, none where none of the parts has any."""
        there = any(getattr(part.rows, name).shape[-1] for part in parts)
        target = torch.empty((size if there else 0, *width), dtype=dtype, pin_memory=pinned)
        values = target.numpy().T
        for rows, taken, place in placed if there else ():
            values[..., place] = getattr(rows, name)[..., taken]
        return target

    weight = column("weight", torch.float32, pin_memory)
    return Batch(
        dense_features=column("dense", torch.float32, pin_memory, (num_dense,)),
        sparse_features=_sparse(placed, layout, size, pin_memory),
        labels=column("labels", torch.float32, pin_memory),
        reference=column("reference", torch.float64, False),
        domain=column("domain", torch.int64, pin_memory),
        loss_scale=loss_scale,
        weight=weight if len(weight) else None,
        counts=+counts,
    )


class _Placed(NamedTuple):
    """A part of a batch: its rows, which of them are taken, and where these stand in the batch."""

    rows: Rows
    taken: slice
    place: slice


def _sparse(parts: Sequence[_Placed], layout: SparseLayout, size: int, pin_memory: bool) -> KeyedJaggedTensor:
    if not layout.lists and not any(rows.has_empty for rows, _, _ in parts):
        lengths = torch.ones((len(layout.keys), size), dtype=torch.int32, pin_memory=pin_memory)
        held = [size] * len(layout.keys)
    else:
        lengths = torch.empty((len(layout.keys), size), dtype=torch.int32, pin_memory=pin_memory)
        held = _fill_lengths(parts, layout, lengths.numpy())
    values = torch.empty(sum(held), dtype=torch.int64, pin_memory=pin_memory)
    weights = torch.ones(sum(held), pin_memory=pin_memory) if layout.weighted else None
    _fill_values(parts, layout, lengths.numpy(), values.numpy(), None if weights is None else weights.numpy())
    # Told how many ids each key has, TorchRec need not wait for the device to count them.
    return KeyedJaggedTensor(list(layout.keys), values, weights, lengths.view(-1), stride=size, length_per_key=held)


def _fill_lengths(parts: Sequence[_Placed], layout: SparseLayout, target: NDArray[np.int32]) -> list[int]:
    """Write how many ids each feature has in each row, (F, B); how many each has in all rows."""
    held: list[int] = []
    for lists, features in layout.runs:
        of_run = target[len(held) : len(held) + features.stop - features.start]
        for rows, taken, place in parts:
            if lists:
                for of_feature, jagged in zip(of_run[:, place], rows.lists[features], strict=True):
                    np.subtract(
                        jagged.offsets[1:][taken], jagged.offsets[:-1][taken], out=of_feature, casting="same_kind"
                    )
            else:
                of_run[:, place] = rows.single[features, taken] >= 0 if rows.has_empty else 1
        held += of_run.sum(1).tolist()
    return held


def _fill_values(
    parts: Sequence[_Placed],
    layout: SparseLayout,
    lengths: NDArray[np.int32],
    values: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
) -> None:
    """Write the ids of all rows of the first feature, then of the next, and the weights of those that are not 1."""
    begin = key = 0
    for lists, features in layout.runs:
        of_run = lengths[key : key + features.stop - features.start]
        key += len(of_run)
        if lists:
            for feature in range(features.start, features.stop):
                for rows, taken, _ in parts:
                    jagged = rows.lists[feature]
                    ids = slice(int(jagged.offsets[taken.start]), int(jagged.offsets[taken.stop]))
                    end = begin + ids.stop - ids.start
                    values[begin:end] = jagged.values[ids]
                    if weights is not None and jagged.weights is not None:
                        weights[begin:end] = jagged.weights[ids]
                    begin = end
        elif any(rows.has_empty for rows, _, _ in parts):
            block = np.concatenate([rows.single[features, taken] for rows, taken, _ in parts], axis=1)
            found = block[of_run != 0]
            values[begin : begin + len(found)] = found
            begin += len(found)
        else:
            block = values[begin : begin + of_run.size].reshape(of_run.shape)
            for rows, taken, place in parts:
                block[:, place] = rows.single[features, taken]
            begin += of_run.size
