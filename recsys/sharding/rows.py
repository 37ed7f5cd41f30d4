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
- Averages of rows, which every step moves: before a lookup those of its rows are brought up to step t - 1, in one go,
  as until then the rows were moved by their decay alone. Before a sweep of a coupled decay those of all rows are.
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
from torch.nn.functional import pad

from recsys.checkpoint.pending import (
    LAST,
    LOGS,
    MAX_NORM,
    MOVES,
    SWEEP,
    PendingRows,
    average_,
    decay_,
    renormalise_,
)
from recsys.config import ConfigError, SparseOptimizerConfig
from recsys.model.names import table_name

_BLOCK_ROWS = 1 << 16
"""Rows that are settled or swept at a time, so that what is worked out beside them stays small."""
_MAX_STEPS = 1 << 16
"""Steps after which all rows have them, so that their sums take a megabyte or two."""
_MIN_LOG = -16.0
"""Likewise a sum of logarithms, below which the sums of averages would lose digits that single precision has."""
_MIN_KEPT = 1e-200
"""Likewise what is left of an average, which is divided by."""


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


class _Sums:
    """What steps make of every row, as sums over those since rows were settled.

    Args:
        device: of the tables.

    Attributes:
        logs: (capacity,) float64, as `recsys.checkpoint.pending.decay_` takes them.
        moves: (2, capacity) float64, as `recsys.checkpoint.pending.average_` takes them.
        steps: number of these, the one under way included.
        log: of `logs`, that of the step under way.
        log_before: of `logs`, that of the step before it.
        moved: of `moves`, that up to which averages can be brought.
    """

    def __init__(self, device: torch.device) -> None:
        self.logs = torch.zeros(1 << 10, dtype=torch.float64, device=device)
        self.moves = torch.zeros(2, 1 << 10, dtype=torch.float64, device=device)
        self.moves[0] = 1.0
        self.forget()

    def forget(self) -> None:
        """Rows are settled."""
        self.steps, self.log, self.log_before = 0, 0.0, 0.0
        self.moved = (1.0, 0.0)

    @property
    def are_long(self) -> bool:
        """Whether rows are to be settled before the next step."""
        return self.steps == _MAX_STEPS or self.log < _MIN_LOG or self.moved[0] < _MIN_KEPT

    def begin_step(self, log_factor: float) -> None:
        """The next step begins."""
        self.steps += 1
        self.log_before, self.log = self.log, self.log + log_factor
        if self.steps + 1 == len(self.logs):
            self._grow()
        self.logs[self.steps].fill_(self.log)  # which, unlike an assignment, does not wait for a GPU

    def average(self, decay: float) -> None:
        """The step under way is over, and has averaged so."""
        kept, taken = self.moved
        kept, taken = self.moved = (decay * kept, decay * taken + (1 - decay) * exp(self.log))
        self.moves[0, self.steps + 1].fill_(1 / kept)
        self.moves[1, self.steps + 1].fill_(taken)

    def load(self, logs: Tensor, moves: Tensor | None) -> None:
        """Go on after the steps of a checkpoint, whose sums are as `state` gave them."""
        self.steps, self.log = len(logs) - 1, float(logs[-1])
        self.logs = logs.to(self.logs.device)
        if moves is not None:
            self.moved = (1 / float(moves[0, -1]), float(moves[1, -1]))
            self.moves = moves.to(self.logs.device)
        self._grow()

    def _grow(self) -> None:
        capacity = 2 * len(self.logs) + 2
        self.logs, self.moves = (pad(sums, (0, capacity - sums.shape[-1])) for sums in (self.logs, self.moves))


class Rows:
    """The rows of all sharded tables on this rank.

    Args:
        modules: each with what it holds, in its order.
        config: their optimizer's.
        max_norms: of all tables that have one, also on other ranks, by name in a checkpoint.
        device: of the tables.
        averaged: whether there may be averages of rows, between `begin_averages` and `end_averages`.

    Attributes:
        keeps_last: whether it is known of each row of sharded tables which steps it has had.
        goes_on: whether averages are behind as in the checkpoint that was loaded, so that they go on as it has them.
    """

    def __init__(
        self,
        modules: Sequence[tuple[SplitTableBatchedEmbeddingBagsCodegen, Sequence[Piece]]],
        config: SparseOptimizerConfig,
        max_norms: Mapping[str, float],
        device: torch.device,
        *,
        averaged: bool = False,
    ) -> None:
        mode = config.weight_decay_mode if config.weight_decay else "fused"
        self._decay = config.weight_decay if mode == "decoupled" else 0.0
        self._l2 = config.weight_decay if mode == "coupled" else 0.0
        self._every, self._eps, self._max_norms = config.sweep_steps, config.eps, max_norms
        self.keeps_last, self.goes_on = bool(self._decay) or averaged, False
        self._averages = False
        self._sums = _Sums(device)
        self._rates, self._since = 0.0, 0
        self._due: float | None = None  # sum of the rates of a sweep at the step under way
        self._sweeps_within = config.type == "sgd"
        is_needed = self.keeps_last or max_norms or self._l2
        self._held = [_Held(module, pieces, device) for module, pieces in modules] if is_needed else []
        for held in self._held:
            held.module.register_forward_pre_hook(partial(self._before, held), with_kwargs=True)
            held.module.register_forward_hook(partial(self._after, held))

    def begin_step(self, rate: float) -> None:
        """Say that the next lookup is a step of training at this learning rate, on every rank."""
        self._due = None
        if self._l2 and self._since >= self._every:
            self._sweep()
        if self._is_lazy:
            if self._sums.are_long:
                self._catch_up()
            self._sums.begin_step(log1p(-rate * self._decay))
        if self._l2:
            self._rates, self._since = self._rates + rate, self._since + 1
            if self._since >= self._every and self._sweeps_within:
                self._due, self._rates, self._since = self._rates, 0.0, 0

    def average_step(self, decay: float) -> None:
        """Say that the step is over, and has every row's average be decay times itself and 1 - decay times the row."""
        if self._sums.steps:
            self._sums.average(decay)

    @torch.no_grad()
    def begin_averages(self) -> None:
        """Have averages of all rows, which are the rows as they stand; what is pending of rows is so of averages."""
        self._averages = True
        for held in self._held:
            held.begin_averages()

    def end_averages(self) -> None:
        """Have none."""
        self._averages = False
        for held in self._held:
            held.averages = None

    def average_of(self, part: Tensor) -> Tensor:
        """The average of a table, or of what this rank has of it, as a view: (rows, columns) as the weights."""
        return next(held.average_of(part) for held in self._held if held.holds(part))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Scale all rows down to `max_norm`, where a run begins with them and no step has."""
        for held in self._held:
            held.settle(self._sums, looks_up=True)

    @torch.no_grad()
    def settle(self) -> None:
        """Have all rows had all steps, so that a lookup without training finds the model as it is by definition."""
        self.catch_up()
        self._sweep()
        self._due = None

    def catch_up(self) -> None:
        """As `settle`, but for the coupled decay, whose next sweep comes when it would."""
        self._catch_up(looks_up=True)

    @torch.no_grad()
    def _catch_up(self, *, looks_up: bool = False) -> None:
        for held in self._held if self._sums.steps else []:
            held.settle(self._sums, looks_up=looks_up)
            held.last.zero_()
        self._sums.forget()

    @torch.no_grad()
    def _sweep(self) -> None:
        """Between two steps, of which the averages know the rows as they are before and after it."""
        if self._since:
            if self._averages:
                self._catch_up()
            for held in self._held:
                held.sweep(self._l2, self._rates, self._since, self._eps)
        self._rates, self._since = 0.0, 0

    def state(self, weights: Mapping[str, Tensor | ShardedTensor]) -> dict[str, Tensor | ShardedTensor]:
        """What is pending, by name in a checkpoint, for `load`; nothing where all rows are settled.

        Args:
            weights: of all tables, by name in a checkpoint.
        """
        state: dict[str, Tensor | ShardedTensor] = {}
        if self._since:
            state[SWEEP] = torch.tensor([self._rates, self._since], dtype=torch.float64)
        if not (steps := self._sums.steps):
            return state
        state[LOGS] = self._sums.logs[: steps + 1]
        if self._averages:
            state[MOVES] = self._sums.moves[:, : steps + 2].contiguous()
        for table, max_norm in self._max_norms.items():
            state[MAX_NORM + table] = torch.tensor(max_norm, dtype=torch.float64)
        if self.keeps_last:
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
        self._sums.forget()
        self._due = None
        for held in self._held:
            held.last.zero_()
        self._rates, self._since = pending.sweep if self._l2 else (0.0, 0)
        self.goes_on = self.keeps_last and pending.moves is not None
        if pending.logs is None or not (self.keeps_last or self._max_norms):
            return
        logs = pending.logs if self.keeps_last else torch.zeros_like(pending.logs)
        self._sums.load(logs, pending.moves)
        for held in self._held if self.keeps_last else []:
            held.load(pending, self._sums.steps)

    @property
    def _is_lazy(self) -> bool:
        """Whether steps leave something pending, or an earlier run's have."""
        return bool(self._decay or self._max_norms or self._averages or self._sums.steps)

    def _before(self, held: "_Held", _: object, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
        if self._sums.steps and torch.is_grad_enabled():
            indices, offsets = (*args, *(kwargs[name] for name in ("indices", "offsets")[len(args) :]))[:2]
            with torch.no_grad():
                held.bring_up(indices, offsets, self._sums)

    def _after(self, held: "_Held", *_: object) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                if self._sums.steps and self.keeps_last:
                    held.step_touched(self._sums)
                if self._due is not None:
                    if self._averages:
                        held.settle(self._sums, looks_up=False)
                        held.last.fill_(self._sums.steps)
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
        averages: of the weights, in units like these; None where there are none.

    Raises:
        ConfigError: some of the tables are on a GPU and others on its host, each kind of which has weights of its own.
    """

    def __init__(
        self, module: SplitTableBatchedEmbeddingBagsCodegen, pieces: Sequence[Piece], device: torch.device
    ) -> None:
        self.module, self.pieces = module, pieces
        places = dict(zip(module.weights_physical_placements, pieces, strict=False))
        if len(places) > 1:
            one, other, *_ = (table_name(piece.table) for piece in places.values())
            raise ConfigError(
                f"tables.{one}.compute_kernel: fbgemm has {one} and {other} in one module, one on the GPU and one on "
                "the host, where max_norm, decoupled and coupled decay and averages of touched rows do not find them; "
                "give all tables the same compute_kernel"
            )
        shapes = [weight.shape for weight in module.split_embedding_weights()]
        starts: list[int] = module.weights_physical_offsets
        self._unit = gcd(*(dim for _, dim in shapes), *starts)
        self._rows = [0, *accumulate(rows for rows, _ in shapes)]
        self.last = torch.zeros(self._rows[-1], dtype=torch.int32, device=device)
        self.averages: Tensor | None = None
        self._touched: _Touched | None = None
        self._has_max_norm = any(piece.max_norm for piece in pieces)

        def by_feature(values: Sequence[float]) -> Tensor:
            return torch.tensor([values[table] for table in module.feature_table_map], device=device)

        self._row_of = by_feature(self._rows[:-1])
        self._unit_of = by_feature([start // self._unit for start in starts[: len(shapes)]])
        self._width_of = by_feature([dim // self._unit for _, dim in shapes])
        self._max_norm_of = by_feature([piece.max_norm or inf for piece in pieces])
        self._units = torch.arange(max(dim for _, dim in shapes) // self._unit, device=device)
        self._is_one_width = len(self._units) == 1 and self._rows[:-1] == [start // self._unit for start in starts]

    def begin_averages(self) -> None:
        """Have averages, which are the weights."""
        self.averages = new_like(self._weights).copy_(self._weights)

    def holds(self, part: Tensor) -> bool:
        """Whether this is a view of the weights."""
        return part.untyped_storage().data_ptr() == self._weights.untyped_storage().data_ptr()

    def average_of(self, part: Tensor) -> Tensor:
        """The averages of what a view of the weights has, (rows, columns)."""
        assert self.averages is not None
        start = part.storage_offset() - self._weights.storage_offset()
        return self.averages.view(-1)[start : start + part.numel()].view(part.shape)

    def bring_up(self, indices: Tensor, offsets: Tensor, sums: _Sums) -> None:
        """Have the rows of a step's lookups had the steps before it, and keep them at hand for `step_touched`.

        Args:
            indices: (N,) of each feature after another.
            offsets: (F B + 1,) at which index each feature's each bag begins.
            sums: of the steps, this one among them.
        """
        features = len(self._row_of)
        counts = offsets[:: (len(offsets) - 1) // features].diff()
        of = torch.repeat_interleave(counts, output_size=len(indices))
        rows = self._row_of.index_select(0, of) + indices
        units, width = rows, None
        if not self._is_one_width:
            width = self._width_of.index_select(0, of)[:, None]
            starts = self._unit_of.index_select(0, of) + indices * width[:, 0]
            units = (starts[:, None] + self._units.minimum(width - 1)).flatten()
        last = self.last.index_select(0, rows)
        values = self._weights.index_select(0, units).view(len(rows), len(self._units), self._unit)
        if self.averages is not None:
            averages = self.averages.index_select(0, units).view_as(values)
            average_(averages, values, sums.logs if sums.log else None, sums.moves, last, sums.moved)
            self.averages.index_copy_(0, units, averages.flatten(0, 1))
        if sums.log:
            decay_(values, sums.logs, last, sums.log_before)
        if self._has_max_norm:
            squares = values.square().sum(2)
            if width is not None:
                squares = squares.where(self._units < width, 0.0)
            renormalise_(values, self._max_norm_of[of], squares.sum(1).sqrt())
        self._touched = _Touched(rows, units, values)
        if sums.log or self._has_max_norm:
            self._put_back()

    def step_touched(self, sums: _Sums) -> None:
        """Multiply the rows that were brought up by the factor of their step, so that they have had this one too."""
        assert self._touched is not None
        if sums.log:
            self._touched.values.mul_(exp(sums.log - sums.log_before))
            self._put_back()
        self.last.index_fill_(0, self._touched.rows, sums.steps)
        self._touched = None

    def settle(self, sums: _Sums, *, looks_up: bool) -> None:
        """Have all rows had all steps, and by choice be scaled down as by a lookup."""
        for piece, weight, start in zip(self.pieces, self.module.split_embedding_weights(), self._rows, strict=False):
            whole = [weight.data] if self.averages is None else [weight.data, self.average_of(weight)]
            for first in range(0, len(weight), _BLOCK_ROWS):
                block, *averages = (rows[first : first + _BLOCK_ROWS] for rows in whole)
                last = self.last[start + first : start + first + len(block)]
                for average in averages:
                    average_(average, block, sums.logs, sums.moves, last, sums.moved)
                if sums.log:
                    decay_(block, sums.logs, last, sums.log)
                if looks_up and piece.max_norm is not None:
                    for rows in (block, *averages):
                        renormalise_(rows, piece.max_norm)

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
        weights: Tensor = next((weights for weights in placed if weights.numel()), self.module.weights_dev)
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


def new_like(part: Tensor) -> Tensor:
    """Memory like that of a piece of a table: on the host where a GPU's table lies there."""
    if part.is_cuda and torch.ops.fbgemm.is_uvm_tensor(part):
        of_host: Tensor = torch.ops.fbgemm.new_unified_tensor(part, part.shape, False)
        return of_host
    return torch.empty_like(part, memory_format=torch.contiguous_format)
