"""Running statistics of batch norms behind weights that no step has trained with: averages of those that it has."""

from collections.abc import Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from recsys.data.batch import Batch
from recsys.model.ranker import Ranker
from recsys.model.towers.normalization import BatchNorm

NORM_STEPS = 32
"""Of the train split, whose rows the statistics are of."""


def trained_norms(dense_arch: nn.Module) -> list[BatchNorm]:
    """Those whose statistics move in the phase under way."""
    return [part for part in dense_arch.modules() if isinstance(part, BatchNorm) and part.weight.requires_grad]


@torch.no_grad()
def count_statistics(ranker: Ranker, norms: Iterable[BatchNorm], batches: Iterable[Batch]) -> None:
    """Have running statistics be the means of those of some batches, over all ranks; a collective call.

    All else is as in evaluation, without dropout, since it is for evaluation that they are counted. So are those of
    averaged models after training (arXiv 1803.05407, section 3.2). Batches of fewer than two rows in all, as rows
    without a label leave them, tell no variance and are passed over; where all are so, statistics stay as they are.

    Args:
        ranker: sharded, and attached to no pipeline; its training mode is kept.
        norms: of its dense arch, each of which trains.
        batches: as many on all ranks, on the ranker's device; no more are taken than give `NORM_STEPS`.
    """
    was_training, momenta = ranker.training, [(norm, norm.momentum) for norm in norms]
    ranker.eval()
    for norm, _ in momenta:
        norm.train()
    for number, batch in enumerate(islice(filter(_tells_variance, batches), NORM_STEPS), start=1):
        for norm, _ in momenta:
            norm.momentum = 1 / number
        ranker(batch)
    for norm, momentum in momenta:
        norm.momentum = momentum
    ranker.train(was_training)


def _tells_variance(batch: Batch) -> bool:
    """The same on all ranks; a collective call."""
    rows = torch.tensor(len(batch.labels), device=batch.labels.device)
    dist.all_reduce(rows)
    return int(rows) > 1
