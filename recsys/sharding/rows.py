"""What happens to rows of sharded tables between the steps that look them up.

The update that is fused into the backward moves the rows of a step alone. What by definition moves every row at every
step is done to a row when it is looked up, or to all of them when they are settled: before an evaluation, and at a
phase's end. Every rank does so to the rows that it holds, of which it knows how many steps each has had; nothing is
sent, and nothing waits for the device.

- Decoupled weight decay: step t of rate r makes w (1 - r decay) of every row w, and moves that by the gradient at w.
  Before a lookup its rows are brought up to step t - 1; after it, before the backward, they have the factor of step t.
- Coupled weight decay, an L2 term of the gradient: a sweep over all rows every so many steps, by the sum of the rates
  since the last. SGD's is between the lookup of the last of these steps and its backward, as there the gradient is that
  of the weights before. Adagrad's follows the backward: sums of squares that lack a first gradient would make the term
  as large as any. They have its squares added, without its product with the gradient.
- `max_norm`: rows are scaled down to it before a lookup.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import exp, gcd, inf, log1p
from typing import NamedTuple

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from recsys.checkpoint.pending import LAST, LOGS, MAX_NORM, SWEEP, PendingRows, decay_, renormalise_
from recsys.config import SparseOptimizerConfig

_BLOCK_ROWS = 1 << 16
"""Rows that are settled or swept at a time, so that what is worked out beside them stays small."""


class Piece(NamedTuple):
    """A table, or what this rank has of it, in one of fbgemm's modules.

    Attributes:
        table: its name in a checkpoint.
        row: of the table, at which it begins.
        column: likewise.
        max_norm: of the table's rows, None without.
    """

    table: str
    row: int
    column: int
    max_norm: float | None


class Rows:
    """The rows of all sharded tables on this rank.

    Args:
        modules: each with what it holds, in its order.
        config: their optimizer's.
        max_norms: of all tables that have one, also on other ranks, by name in a checkpoint.
        device: of the tables.

    Attributes:
        keeps_decay: whether rows of sharded tables may lack the decay of some steps.
    """

    def __init__(
        self,
        modules: Sequence[tuple[SplitTableBatchedEmbeddingBagsCodegen, Sequence[Piece]]],
        config: SparseOptimizerConfig,
        max_norms: Mapping[str, float],
        device: torch.device,
    ) -> None:
        mode = config.weight_decay_mode if config.weight_decay else "fused"
        self._decay = config.weight_decay if mode == "decoupled" else 0.0
        self._l2 = config.weight_decay if mode == "coupled" else 0.0
        self._every, self._eps, self._max_norms = config.sweep_steps, config.eps, max_norms
        self.keeps_decay = bool(self._decay)
        self._is_lazy = self.keeps_decay or bool(max_norms)
        self._steps, self._log, self._log_before = 0, 0.0, 0.0
        self._logs = torch.zeros(1 << 10, dtype=torch.float64, device=device)
        self._rates, self._since = 0.0, 0
        self._due: float | None = None  # sum of the rates of a sweep at the step under way
        self._sweeps_within = config.type == "sgd"
        is_needed = self._is_lazy or self._l2
        self._held = [_Held(module, pieces, device) for module, pieces in modules] if is_needed else []
        for held in self._held:
            held.module.register_forward_pre_hook(partial(self._before, held), with_kwargs=True)
            held.module.register_forward_hook(partial(self._after, held))

    def begin_step(self, rate: float) -> None:
        """Say that the next lookup is a step of training at this learning rate, on every rank."""
        if self._is_lazy:
            self._steps += 1
            self._log_before, self._log = self._log, self._log + log1p(-rate * self._decay)
            if self._steps == len(self._logs):
                self._logs = torch.cat([self._logs, torch.zeros_like(self._logs)])
            self._logs[self._steps] = self._log
        self._due = None
        if self._l2:
            if self._since >= self._every:
                self._sweep()
            self._rates, self._since = self._rates + rate, self._since + 1
            if self._since >= self._every and self._sweeps_within:
                self._due, self._rates, self._since = self._rates, 0.0, 0

    @torch.no_grad()
    def _sweep(self) -> None:
        if self._since:
            for held in self._held:
                held.sweep(self._l2, self._rates, self._since, self._eps)
        self._rates, self._since = 0.0, 0

    @torch.no_grad()
    def renormalise(self) -> None:
        """Scale all rows down to `max_norm`, where a run begins with them and no step has."""
        for held in self._held:
            held.settle(self._logs, self._log, decays=False)

    @torch.no_grad()
    def settle(self) -> None:
        """Have all rows had all steps, so that a lookup without training finds the model as it is by definition."""
        self.catch_up()
        self._sweep()
        self._due = None

    @torch.no_grad()
    def catch_up(self) -> None:
        """As `settle`, but for the coupled decay, whose next sweep comes when it would."""
        for held in self._held if self._steps else []:
            held.settle(self._logs, self._log, decays=self.keeps_decay)
            held.last.zero_()
        self._steps, self._log, self._log_before = 0, 0.0, 0.0

    def state(self, weights: Mapping[str, Tensor | ShardedTensor]) -> dict[str, Tensor | ShardedTensor]:
        """What is pending, by name in a checkpoint, for `load`; nothing where all rows are settled.

        Args:
            weights: of all tables, by name in a checkpoint.
        """
        state: dict[str, Tensor | ShardedTensor] = {}
        if self._since:
            state[SWEEP] = torch.tensor([self._rates, self._since], dtype=torch.float64)
        if not self._steps:
            return state
        state[LOGS] = self._logs[: self._steps + 1]
        for table, max_norm in self._max_norms.items():
            state[MAX_NORM + table] = torch.tensor(max_norm, dtype=torch.float64)
        if self.keeps_decay:
            parts = {(piece.table, piece.row): last for held in self._held for piece, last in held.firsts()}
            for table, weight in weights.items():
                if isinstance(weight, ShardedTensor):
                    state[LAST + table] = _by_row(table, weight, parts)
        return state

    @torch.no_grad()
    def load(self, pending: PendingRows) -> None:
        """Go on from what was pending, on any number of ranks and under any plan.

        Raises:
            UnreadableError: the checkpoint is damaged.
        """
        self._steps, self._log, self._due = 0, 0.0, None
        for held in self._held:
            held.last.zero_()
        self._rates, self._since = pending.sweep if self._l2 else (0.0, 0)
        if pending.logs is None or not self._is_lazy:
            return
        self._steps, self._log = len(pending.logs) - 1, float(pending.logs[-1])
        spare = torch.zeros(1 + len(pending.logs), dtype=torch.float64)
        self._logs = torch.cat([pending.logs, spare]).to(self._logs.device)
        for held in self._held if self.keeps_decay else []:
            held.load(pending, self._steps)

    def _before(self, held: "_Held", _: object, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
        if self._is_lazy and torch.is_grad_enabled():
            indices, offsets = (*args, *(kwargs[name] for name in ("indices", "offsets")[len(args) :]))[:2]
            with torch.no_grad():
                held.bring_up(indices, offsets, self._logs, self._log_before, decays=self.keeps_decay)

    def _after(self, held: "_Held", *_: object) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                if self.keeps_decay:
                    held.decay_touched(exp(self._log - self._log_before), self._steps)
                if self._due is not None:
                    held.sweep(self._l2, self._due, self._every, self._eps)


class _Touched(NamedTuple):
    """Rows that are looked up, one for each of N lookups, so that those that are looked up twice are there twice.

    They are gathered, changed alike and put back to where they were, which needs no number of different rows, for
    which a GPU would be waited for.

    Attributes:
        rows: (N,) places in what is kept of rows.
        units: (N W,) places in the weights, cut into units of equal width; of a narrower table's, the last repeats.
        values: (N, W, unit) the rows.
    """

    rows: Tensor
    units: Tensor
    values: Tensor


class _Held:
    """What one of fbgemm's modules holds: tables one after another, of rows that may differ in width.

    Args:
        module: of fbgemm's.
        pieces: what it holds, in its order.
        device: of the tables.

    Attributes:
        module: of fbgemm's.
        pieces: what it holds, in its order.
        last: (R,) int32, of each row of all pieces the steps that it has had since rows were settled.
    """

    def __init__(
        self, module: SplitTableBatchedEmbeddingBagsCodegen, pieces: Sequence[Piece], device: torch.device
    ) -> None:
        self.module, self.pieces = module, pieces
        shapes = [weight.shape for weight in module.split_embedding_weights()]
        starts: list[int] = module.weights_physical_offsets
        self._unit = gcd(*(dim for _, dim in shapes), *starts)
        self._rows = [0, *accumulate(rows for rows, _ in shapes)]
        self.last = torch.zeros(self._rows[-1], dtype=torch.int32, device=device)
        self._touched: _Touched | None = None
        self._has_max_norm = any(piece.max_norm for piece in pieces)

        def by_feature(values: Sequence[float]) -> Tensor:
            return torch.tensor([values[table] for table in module.feature_table_map], device=device)

        self._row_of = by_feature(self._rows[:-1])
        self._unit_of = by_feature([start // self._unit for start in starts[: len(shapes)]])
        self._width_of = by_feature([dim // self._unit for _, dim in shapes])
        self._max_norm_of = by_feature([piece.max_norm or inf for piece in pieces])
        self._units = torch.arange(max(dim for _, dim in shapes) // self._unit, device=device)

    def bring_up(self, indices: Tensor, offsets: Tensor, logs: Tensor, now: float, *, decays: bool) -> None:
        """Have the rows of a step's lookups had the steps before it, and keep them at hand for `decay_touched`.

        Args:
            indices: (N,) of each feature after another.
            offsets: (F B + 1,) at which index each feature's each bag begins.
            logs: as `recsys.checkpoint.pending.decay_` takes them.
            now: sum of the steps before this one.
            decays: whether rows have more to be had than `max_norm`.
        """
        features = len(self._row_of)
        counts = offsets[:: (len(offsets) - 1) // features].diff()
        of = torch.repeat_interleave(counts, output_size=len(indices))
        rows, width = self._row_of[of] + indices, self._width_of[of, None]
        units = ((self._unit_of[of] + indices * width[:, 0])[:, None] + self._units.minimum(width - 1)).flatten()
        values = self._weights.index_select(0, units).view(len(rows), len(self._units), self._unit)
        if decays:
            decay_(values, logs, self.last[rows], now)
        if self._has_max_norm:
            squares = values.square().sum(2).where(self._units < width, 0.0)
            renormalise_(values, self._max_norm_of[of], squares.sum(1).sqrt())
        self._touched = _Touched(rows, units, values)
        self._put_back()

    def decay_touched(self, factor: float, steps: int) -> None:
        """Multiply the rows that were brought up by the factor of their step, so that they have had so many steps."""
        assert self._touched is not None
        self._touched.values.mul_(factor)
        self._put_back()
        self.last.index_fill_(0, self._touched.rows, steps)
        self._touched = None

    def settle(self, logs: Tensor, now: float, *, decays: bool) -> None:
        """Have all rows had all steps."""
        for piece, weight, start in zip(self.pieces, self.module.split_embedding_weights(), self._rows, strict=False):
            for first in range(0, len(weight), _BLOCK_ROWS):
                block = weight[first : first + _BLOCK_ROWS]
                if decays:
                    decay_(block, logs, self.last[start + first : start + first + len(block)], now)
                if piece.max_norm is not None:
                    renormalise_(block, piece.max_norm)

    def sweep(self, l2: float, rates: float, steps: int, eps: float) -> None:
        """The L2 term of so many steps on all rows, by the sum of their rates."""
        weights = [weight.data for weight in self.module.split_embedding_weights()]
        if self.module.optimizer == EmbOptimType.EXACT_SGD:
            for weight in weights:
                weight.mul_(1 - rates * l2)
            return
        for weight, (state, *_) in zip(weights, self.module.split_optimizer_states(), strict=True):
            # For each weight, or for each row; a rank may have none of a small table's.
            sums = state.data.view(len(weight), -1 if len(weight) else 1)
            for block, squares in zip(weight.split(_BLOCK_ROWS), sums.split(_BLOCK_ROWS), strict=True):
                square = (block * l2).square_()
                squares.add_(square if squares.shape == square.shape else square.mean(1, keepdim=True), alpha=steps)
                factors = 1 - rates * l2 / (squares.sqrt() + eps)
                # Several steps at once would go far beyond 0 where each by itself turns back.
                block.mul_(factors.clamp_(min=0.0) if steps > 1 else factors)

    def firsts(self) -> Iterator[tuple[Piece, Tensor]]:
        """`last` of each piece that begins a table's rows: those of other columns have the same."""
        for piece, start, stop in zip(self.pieces, self._rows, self._rows[1:], strict=False):
            if piece.column == 0:
                yield piece, self.last[start:stop]

    def load(self, pending: PendingRows, steps: int) -> None:
        """Take `last` from a checkpoint that was so many steps on."""
        for piece, start, stop in zip(self.pieces, self._rows, self._rows[1:], strict=False):
            last = pending.last(piece.table, piece.row, stop - start)
            self.last[start:stop] = steps if last is None else last.to(self.last.device)

    @property
    def _weights(self) -> Tensor:
        """All weights in units, (U, unit), as data: a change is not one that fbgemm's backward must not meet."""
        placed = (self.module.weights_host, self.module.weights_dev, self.module.weights_uvm)
        weights: Tensor = next(weights for weights in placed if weights.numel())
        return weights.data.view(-1, self._unit)

    def _put_back(self) -> None:
        assert self._touched is not None
        self._weights.index_copy_(0, self._touched.units, self._touched.values.flatten(0, 1))


def _by_row(table: str, weight: ShardedTensor, parts: Mapping[tuple[str, int], Tensor]) -> ShardedTensor:
    """What is kept for each row of a table, (R,), on the ranks that have its first columns."""
    shards = [
        ShardMetadata(shard.shard_offsets[:1], shard.shard_sizes[:1], shard.placement)
        for shard in weight.metadata().shards_metadata
        if shard.shard_offsets[1] == 0
    ]
    rank = dist.get_rank(weight._process_group)
    mine = [shard for shard in shards if shard.placement is not None and shard.placement.rank() == rank]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(parts[table, shard.shard_offsets[0]], shard) for shard in mine],
        ShardedTensorMetadata(shards, weight.size()[:1], TensorProperties(dtype=torch.int32)),
        process_group=weight._process_group,
    )
