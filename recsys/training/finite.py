"""Whether what a run computes is finite: watched on the device at every step, and looked at before every save."""

from collections.abc import Callable, Mapping
from operator import is_
from pathlib import Path
from typing import NamedTuple, NoReturn

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.origins import Origin, Reread, in_words, origins, read_again, write_batch
from recsys.data.parquet import ParquetShards
from recsys.errors import UserError
from recsys.model.losses import Losses
from recsys.runtime import Ranks

_NEVER = torch.iinfo(torch.int64).max
_BLOCK_ROWS = 1 << 16
_HELD_STEPS = 64
_GRADIENTS = "the norm of the dense gradients"


class NotFiniteError(UserError):
    """A run has computed NaN or an infinite value, so that its model would be of no use."""


class NotFinite(NamedTuple):
    """The first that was not finite.

    Attributes:
        step: the optimizer step, from 1 over all stages.
        rank: whose it was; of gradients, which ranks have in common, the first.
        what: in words.
        is_shared: whether it is of gradients, to which the batches of all ranks contribute.
    """

    step: int
    rank: int
    what: str
    is_shared: bool


class Moment(NamedTuple):
    """When a run is looked at; what messages say of it.

    Attributes:
        step: the last that was taken, over all stages.
        stage: under way, whose learning rates may be at fault.
        last_good: tells the newest checkpoint that was saved before, if any; asked only where the run ends.
    """

    step: int
    stage: str
    last_good: Callable[[], Path | None]

    def way_out(self) -> str:
        """What there is to go back to, and what to change."""
        last_good = self.last_good()
        saved = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint had been saved before"
        return f"{saved}; lower the learning rates of stages.{self.stage}"


class FirstNotFinite:
    """Keeps the first step at which a dense feature, a loss or the norm of the dense gradients was not finite.

    Of one step, features come before losses and those before gradients, as one leads to the other. Observing writes a
    few figures into a buffer on the device, which is looked at when it is full; it waits neither for the device nor for
    other ranks, and takes no memory that grows.

    Args:
        dense_arch: whose parameters' gradients are watched, of those that have one after the first step.
        ranks: this process among all.
    """

    def __init__(self, dense_arch: nn.Module, ranks: Ranks) -> None:
        self._dense_arch, self._ranks = dense_arch, ranks
        self._parameters: list[nn.Parameter] = []
        self._gradients: list[Tensor | None] = []
        self._buckets: list[Tensor] = []
        self._names: list[str] = []
        self._begun = self._held = 0  # number of the first step that is in the buffer, and how many are
        self._offsets = torch.arange(_HELD_STEPS, device=ranks.device)[:, None]
        self._zero = torch.zeros((), device=ranks.device)

    @torch.no_grad()
    def observe(self, step: int, losses: Losses, dense_features: Tensor, gradient_norm: Tensor | None = None) -> None:
        """What a step came to, while its gradients are still there.

        Args:
            step: from 1 over all stages; higher than that of the call before.
            losses: scalars by name, the same names at every step.
            dense_features: (B, F_d), B or F_d may be 0.
            gradient_norm: of the dense gradients, (); None takes it of those that are there.
        """
        if not self._names:
            self._begin(losses)
        if self._held == _HELD_STEPS or step != self._begun + self._held:
            self._look()
            self._begun = step
        # Unlike a sum, extremes are not finite only if a feature is not.
        extremes = torch.aminmax(dense_features) if dense_features.numel() else (self._zero, self._zero)
        norm = self._gradient_norm() if gradient_norm is None else gradient_norm
        torch.stack([*extremes, *losses.values(), norm], out=self._rows[self._held])
        self._held += 1

    def read(self) -> NotFinite | None:
        """The first over all ranks, the same on each, or None; a collective call, as is what it says."""
        if not self._names:
            return None
        self._look()
        places, (ranks, first) = len(self._names), (self._ranks, self._first)
        key = (first * places + torch.arange(places, device=first.device)) * ranks.world_size + ranks.rank
        least = torch.where(first == _NEVER, first, key).min()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        found = int(least)
        if found == _NEVER:
            return None
        (step, place), rank = divmod(found // ranks.world_size, places), found % ranks.world_size
        return NotFinite(step, rank, self._names[place], self._names[place] == _GRADIENTS)

    def _begin(self, losses: Losses) -> None:
        self._parameters = [parameter for parameter in self._dense_arch.parameters() if parameter.grad is not None]
        self._names = ["a dense feature", "a dense feature", *(f"the loss {name}" for name in losses), _GRADIENTS]
        self._first = torch.full((len(self._names),), _NEVER, device=self._ranks.device)
        self._values = torch.zeros(_HELD_STEPS, len(self._names), device=self._ranks.device)
        self._rows = self._values.unbind()

    def _look(self) -> None:
        """Look at what is in the buffer, and empty it."""
        if self._held:
            finite = self._values[: self._held].isfinite()
            steps = torch.where(finite, _NEVER, self._offsets[: self._held] + self._begun)
            self._first = torch.minimum(self._first, steps.amin(0))
            self._held = 0

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters]
        if not (len(gradients) == len(self._gradients) and all(map(is_, gradients, self._gradients))):
            # At the first step, and at the second, as DistributedDataParallel then makes other buckets.
            self._gradients, self._buckets = gradients, _buckets([it for it in gradients if it is not None])
        if not self._buckets:
            return self._zero
        norms = torch._foreach_norm(self._buckets)
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def end_not_finite(
    found: NotFinite,
    shards: ParquetShards,
    epoch: Epoch,
    epoch_step: int,
    ranks: Ranks,
    output_dir: Path,
    moment: Moment,
) -> NoReturn:
    """Read the batch of a step that was not finite again, leave its rows to be looked at, and end the run.

    A collective call. The batch of the rank, or for gradients that of each, becomes
    `not-finite-rank<r>-step<n>.parquet` in the output directory; see `recsys.data.origins.write_batch`.

    Args:
        found: what was not finite.
        shards: that the run trains on.
        epoch: the order of the epoch that the step is of, under the layout of this run.
        epoch_step: the step within the epoch under that layout, from 0.
        ranks: this process among all.
        output_dir: of the run.
        moment: at which it was noticed.

    Raises:
        NotFiniteError: always, on every rank, with the same message.
    """
    concerned = range(ranks.world_size) if found.is_shared else [found.rank]
    of_ranks = {rank: origins(epoch, rank, epoch_step) for rank in concerned}
    kept, failed = "", False
    if ranks.rank in of_ranks:
        path = output_dir / f"not-finite-rank{ranks.rank}-step{found.step}.parquet"
        try:
            kept = f"its rows are in {path}{_largest(shards, _dump(path, shards, of_ranks[ranks.rank]))}"
        except (OSError, UserError, pa.ArrowException) as error:
            kept, failed = f"its rows could not be kept in {path}: {' '.join(str(error).split())}", True
    kept = _told_by(kept, ranks, found.rank, failed=failed)
    batch = "the batches of all ranks are" if found.is_shared and ranks.world_size > 1 else "its batch is"
    read = in_words(shards, [origin for each in of_ranks.values() for origin in each])
    raise NotFiniteError(
        f"step {found.step}, rank {found.rank}: {found.what} is not finite; {batch} of {read}; {kept}; "
        f"{moment.way_out()}, or mend rows whose values are out of all proportion, as features.dense.<name>.clip does"
    )


def check_weights(weights: Mapping[str, Tensor | ShardedTensor], ranks: Ranks, moment: Moment) -> None:
    """Refuse to go on with weights that are not all finite; a collective call, which waits for the device once.

    Each rank looks at what it holds of them. No memory is taken that grows with a table.

    Args:
        weights: by name, the same names in the same order on every rank.
        ranks: this process among all.
        moment: at which they are looked at.

    Raises:
        NotFiniteError: a weight is NaN or infinite; raised on every rank, with the same message.
    """
    names = list(weights)
    finite = torch.ones(len(names) + 1, dtype=torch.bool, device=ranks.device)  # and one that always is
    for place, value in enumerate(weights.values()):
        for block in _blocks(value):
            low, high = torch.aminmax(block.detach())
            finite[place] &= (low.isfinite() & high.isfinite()).to(ranks.device)
    places = torch.arange(len(finite), device=ranks.device) * ranks.world_size + ranks.rank
    least = places.masked_fill(finite, _NEVER).min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if (found := int(least)) != _NEVER:
        place, rank = divmod(found, ranks.world_size)
        raise NotFiniteError(
            f"step {moment.step}, rank {rank}: the weights {names[place]} are not all finite, so they are not saved; "
            f"{moment.way_out()}"
        )


@torch.no_grad()
def check_predictions(ranker: nn.Module, loader: Loader, ranks: Ranks, moment: Moment) -> None:
    """Refuse a model that predicts nothing finite, where no valid split is there to tell; a collective call.

    Weights that are all finite can still be so large that their products are not. Only the last step's need it: those
    of steps before it showed in the loss of the next.

    Args:
        ranker: sharded, not attached to a pipeline. Its training mode is kept.
        loader: of which the next batch is taken.
        ranks: this process among all.
        moment: at which it is asked.

    Raises:
        NotFiniteError: a logit is NaN or infinite; raised on every rank, with the same message.
    """
    batch = next(batch for _ in range(2) for batch in loader)  # the epoch under way may just have ended
    was_training = ranker.training
    ranker.eval()
    _, output = ranker(batch.to(ranks.device, non_blocking=True))
    ranker.train(was_training)
    finite = output.logits.isfinite().all().long()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not int(finite):
        raise NotFiniteError(
            f"step {moment.step}: the model predicts NaN or infinite logits, so it is not saved; {moment.way_out()}"
        )


def _buckets(gradients: list[Tensor]) -> list[Tensor]:
    """The same numbers in fewer tensors: the memory of gradients that fill it together, as a bucket's do."""
    found = []
    by_memory: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_memory.setdefault(gradient.untyped_storage().data_ptr(), []).append(gradient)
    for sharing in by_memory.values():
        one = sharing[0]
        if one.untyped_storage().nbytes() == sum(each.numel() for each in sharing) * one.element_size():
            found.append(one.new_empty(0).set_(one.untyped_storage()))
        else:
            found += sharing
    return found


def _blocks(value: Tensor | ShardedTensor) -> list[Tensor]:
    """What this rank holds of a tensor of floats, in pieces of which none needs to be copied to be looked at."""
    parts = [part.tensor for part in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    parts = [part for part in parts if part.numel() and part.is_floating_point()]
    # Of what is not contiguous, a copy is made.
    return [block for part in parts for block in ([part] if part.is_contiguous() else part.split(_BLOCK_ROWS))]


def _dump(path: Path, shards: ParquetShards, found: list[Origin]) -> Reread:
    reread = read_again(shards, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_batch(path, shards, reread)
    return reread


def _largest(shards: ParquetShards, reread: Reread) -> str:
    """The dense value of a batch that is furthest from 0: it tells rows that are at fault from rates that are."""
    values = reread.batch.dense_features.abs()
    if not values.numel():
        return ""
    place = int(values.argmax())
    name = list(shards.columns.dense)[place % values.shape[1]]
    return f" (largest dense value: {reread.batch.dense_features.flatten()[place]:.3g}, of {name})"


def _told_by(text: str, ranks: Ranks, rank: int, *, failed: bool) -> str:
    """The text of the first rank that failed, or else of the one given; a collective call."""
    teller = torch.tensor(ranks.rank if failed else ranks.world_size)
    dist.all_reduce(teller, dist.ReduceOp.MIN)
    source = int(teller) if int(teller) < ranks.world_size else rank
    written = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor(len(written))
    dist.broadcast(size, source)
    told = written if ranks.rank == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(told, source)
    return bytes(told.tolist()).decode()
