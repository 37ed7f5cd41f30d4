"""What a checkpoint of a moment between two evaluations owes to its tables' rows, and paying it.

Weight decay and averages move every row at every step, and training applies that to a row when the row is looked up
(`recsys.sharding.rows`). A checkpoint that is written meanwhile holds rows as they are, by table the number of steps
that each row has had, and sums over the steps, so that a run goes on from it as if nothing had happened. Whoever reads
the model from it settles what it reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.tensors import TensorReader

PREFIX = "optimizer.decay."
LOGS = f"{PREFIX}logs"
MOVES = f"{PREFIX}averages"
LAST = f"{PREFIX}last."
MAX_NORM = f"{PREFIX}max_norm."
SWEEP = f"{PREFIX}sweep"
_BLOCK_ROWS = 1 << 16
"""Rows whose weights are read at a time to settle their averages."""


def decay_(rows: Tensor, logs: Tensor, last: Tensor, now: Tensor | float) -> None:
    """Multiply rows by the factors of the steps that they have not had, in place.

    Args:
        rows: (N, ...), whatever a row is made of.
        logs: (n + 1,) float64, by number of steps the sum of the logarithms of their factors.
        last: (N,) how many steps each row has had.
        now: the sum of those that it is to have.
    """
    factors = (now - logs.index_select(0, last)).exp_().to(rows.dtype)
    rows.mul_(factors.view(-1, *(1,) * (rows.dim() - 1)))


def average_(
    averages: Tensor, rows: Tensor, logs: Tensor | None, moves: Tensor, last: Tensor, now: Sequence[float]
) -> None:
    """Bring averages of rows up to a step, in place; a row was moved by its decay alone since its last step.

    Of steps with average <- d average + (1 - d) row, let D be the product of the first d and S what they make of an
    average of 0 and a row of 1 that has the factors of all of them alone. Then a row w of which P are the factors at
    its last step s, and whose average is that of step s - 1, has at step t

        D(t) / D(s - 1) average + (S(t) - D(t) / D(s - 1) S(s - 1)) / P w.

    Args:
        averages: (N, ...), of each row as of the step before its last, as of the beginning where it has had none.
        rows: (N, ...) as of the last steps that they have had.
        logs: (n + 1,) float64, as `decay_` takes them; None where there is no decay.
        moves: (2, n + 2) float64, 1 / D and S of the step before each: 1 and 0 twice, then those of the first n steps.
        last: (N,) how many steps each row has had.
        now: D and S of the step up to which averages are brought.
    """
    kept, before = (of_steps.index_select(0, last) for of_steps in moves)
    kept.mul_(now[0])
    taken = before.mul_(kept).neg_().add_(now[1])
    if logs is not None:
        taken.mul_(logs.index_select(0, last).neg_().exp_())
    shape = (-1, *(1,) * (rows.dim() - 1))
    averages.mul_(kept.to(rows.dtype).view(shape)).addcmul_(rows, taken.to(rows.dtype).view(shape))


def renormalise_(rows: Tensor, max_norm: Tensor | float, norms: Tensor | None = None) -> None:
    """Scale rows of a larger L2 norm down to `max_norm`, in place, as `nn.Embedding` does.

    Args:
        rows: (N, ...).
        max_norm: of all, or (N,).
        norms: (N,), None for those of the rows as they stand.
    """
    norms = rows.flatten(1).norm(dim=1) if norms is None else norms
    scales = (max_norm / (norms + 1e-7)).where(norms > max_norm, 1.0)
    rows.mul_(scales.view(-1, *(1,) * (rows.dim() - 1)))


class PendingRows:
    """What a checkpoint's rows have not had yet.

    Args:
        reader: of the checkpoint.

    Raises:
        UnreadableError: that is damaged.

    Attributes:
        reader: of the checkpoint.
        logs: (n + 1,) float64, as `decay_` takes them, of the n steps since all rows were settled; None where all are.
        moves: (2, n + 2) float64, as `average_` takes them; None where no averages are behind.
        sweep: sum of the learning rates since the last sweep of a coupled decay, and the number of these steps.
    """

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self.logs = self._whole(LOGS, 1)
        self.moves = self._whole(MOVES, 2)
        if self.moves is not None:
            steps = -1 if self.logs is None else len(self.logs) + 1
            if tuple(self.moves.shape) != (2, steps) or not (self.moves.isfinite().all() and self.moves[0].min() > 0):
                raise UnreadableError(f"{MOVES} has not what averages need of the steps in {LOGS}")
        sweep = self._whole(SWEEP, 1)
        if sweep is not None and not (len(sweep) == 2 and sweep.isfinite().all()):
            raise UnreadableError(f"{SWEEP} is no sum of learning rates and number of steps")
        self.sweep = (0.0, 0) if sweep is None else (float(sweep[0]), int(sweep[1]))

    def _whole(self, name: str, dims: int) -> Tensor | None:
        if name not in self.reader.names:
            return None
        shape, dtype = self.reader.shape(name), self.reader.dtype(name)
        if len(shape) != dims or 0 in shape or dtype != torch.float64:
            raise UnreadableError(f"{name} is of {dtype} and shape {tuple(shape)}, which it cannot be")
        return self.reader.read(name)

    def last(self, table: str, first: int, count: int) -> Tensor | None:
        """How many of the n steps rows of a table have had, (count,) int32; None where all have had all.

        Args:
            table: its name in the checkpoint.
            first: number of the first row.
            count: of rows.

        Raises:
            UnreadableError: that is damaged.
        """
        name = LAST + table
        if self.logs is None or name not in self.reader.names:
            return None
        shape, dtype = self.reader.shape(name), self.reader.dtype(name)
        if len(shape) != 1 or shape[0] < first + count or dtype != torch.int32:
            raise UnreadableError(f"{name} is of {dtype} and shape {tuple(shape)}, and has no rows of its table")
        last = self.reader.read(name, slice(first, first + count))
        if count and not 0 <= int(last.min()) <= int(last.max()) < len(self.logs):
            raise UnreadableError(f"{name} counts steps that are not in {LOGS}")
        return last

    def decay_(self, name: str, rows: Tensor, first: int) -> None:
        """Have rows of a table had all steps; see `settle_`."""
        table = _table_of(name)
        last = self.last(table, first, len(rows)) if table is not None else None
        if last is not None:
            assert self.logs is not None
            logs = self.logs.to(rows.device)
            decay_(rows, logs, last.to(rows.device), logs[-1])

    def settle_(self, name: str, rows: Tensor, first: int = 0, column: int = 0) -> None:
        """Make of rows of a tensor, as they were read, what the model has there, in place.

        Args:
            name: of the tensor in the checkpoint; of all but tables nothing is owed, nor of averages by sweeps.
            rows: (N, D), on any device, or any tensor that is no table's. Of a table with `max_norm`, whole rows.
            first: number of the first one.
            column: number of their first column.

        Raises:
            UnreadableError: the checkpoint is damaged.
        """
        if name not in self.reader.index.averaged:
            self.decay_(name, rows, first)
        elif self.moves is None:
            return
        else:
            self._average_(name, rows, first, column)
        max_norm = self._whole(MAX_NORM + (_table_of(name) or ""), 0)
        if max_norm is not None:
            renormalise_(rows, float(max_norm))

    def _average_(self, name: str, averages: Tensor, first: int, column: int) -> None:
        """Have averages of rows of a table had all steps, by the rows themselves."""
        table = _table_of(name)
        if table is None or LAST + table not in self.reader.names:
            return
        assert self.logs is not None and self.moves is not None
        reader, device = self.reader.unaveraged(), averages.device
        logs, moves = self.logs.to(device), self.moves.to(device)
        now = (1 / float(self.moves[0, -1]), float(self.moves[1, -1]))
        for at, block in enumerate(averages.split(_BLOCK_ROWS)):
            start = first + at * _BLOCK_ROWS
            last = self.last(table, start, len(block))
            if last is not None:
                rows = reader.read(name, slice(start, start + len(block)))[:, column : column + block.shape[1]]
                average_(block, rows.to(device), logs, moves, last.to(device), now)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorReader.read`, and settled."""
        found = self.reader.read(name, rows)
        self.settle_(name, found, 0 if rows is None else rows.indices(self.reader.shape(name)[0])[0])
        return found


def _table_of(name: str) -> str | None:
    """The name in the checkpoint of the table whose weight a tensor is, None if it is none."""
    parts = name.split(".")
    is_table = parts[0] == "model" and parts[-1] == "weight" and parts[-3:-2] == ["embedding_bags"]
    return parts[-2] if is_table else None
