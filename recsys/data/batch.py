"""The unit that travels from the reader through the pipeline to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """One rank's rows of one step; B may differ between ranks and be 0.

    Attributes:
        dense_features: (B, F_d) float32, in the config's order.
        sparse_features: one key a sparse feature, B bags each; a null or empty id list is an empty bag.
        labels: (B,) float32, 0 or 1.
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
