"""Exponential averages of the weights that a phase trains: kept beside them, evaluated in their place."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from recsys.checkpoint.index import AVERAGE
from recsys.config import AverageConfig, ConfigError
from recsys.sharding.rows import new_like
from recsys.sharding.shard import ShardedRanker, forget_cached_rows, local_parts, with_parts
from recsys.training.checkpoint import State, load_averages, model_state, saved_names
from recsys.training.progress import Progress

_BLOCK_ROWS = 1 << 16
"""Of a table that are in memory a third time while weights and averages change places."""
_DENSE = "model.dense_arch."


class Averages:
    """The averages of a phase under way; without settings there are none, and every method does nothing.

    They begin as the weights when `start` steps of the phase are over. After the n-th step from there on, with
    d_n = `decay`, or with `warmup` min(decay, (1 + n) / (10 + n)),

        average <- d_n average + (1 - d_n) weight

    for the parameters of the dense arch that the phase trains, running statistics of batch norms among them, and for
    its data-parallel tables. Buffers of integers are as the weights have them, and what is frozen is itself. A sweep
    over all rows of the sharded tables stands for several steps: its d is the product of theirs, so that the average of
    a row is what each step would have made of it, had the row been all the while what it is at the sweep. Sweeps are at
    steps of the phase that `every` divides and at the ends of epochs, wherever else checkpoints and evaluations are.
    Averages of rows as they are `touched` are the rows' own (`recsys.sharding.rows.Rows`): those of every step.

    Args:
        settings: of the config.
        sharded: the ranker on its ranks, at the beginning of a phase, which says what is frozen.
        dense_arch: its replicated part, never wrapped.
        progress: how far the run has come; what tables were swept is kept there.
    """

    def __init__(
        self, settings: AverageConfig | None, sharded: ShardedRanker, dense_arch: nn.Module, progress: Progress
    ) -> None:
        self._settings, self._sharded, self._dense_arch, self._progress = settings, sharded, dense_arch, progress
        self._averages: dict[str, list[Tensor]] = {}
        self._each_step: tuple[list[Tensor], list[Tensor]] = ([], [])
        if settings and progress.phase_steps >= settings.start:
            self._begin()

    @property
    def differ(self) -> bool:
        """Whether there are any, which a step has moved the weights away from."""
        return bool(self._averages) and self._settings is not None and self._progress.phase_steps > self._settings.start

    def step_done(self) -> None:
        """The optimizers have taken a step, which the progress knows of."""
        if self._settings is None:
            return
        step = self._progress.phase_steps
        if step == self._settings.start:
            if self._tables != "none":
                self._sharded.rows.catch_up()  # which the averages begin as
            self._begin()
        elif step > self._settings.start:
            averages, weights = self._each_step
            decay = self._decay(step)
            _move(averages, weights, decay)
            if self._tables == "touched":
                self._sharded.rows.average_step(decay)
                self._progress.swept = step
            elif step % self._settings.every == 0:
                self._sweep()

    def epoch_done(self) -> None:
        """An epoch of the phase is over, or the phase is within it."""
        if self._averages and self._tables == "touched":
            self._sharded.rows.catch_up()
        elif self._averages:
            self._sweep()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights; after it, it has the weights back, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def become_weights(self) -> None:
        """The phase is over: the model has the averages for weights from here on, and there are none beside them."""
        for weight, average in self._pairs():
            weight.copy_(average)
        self._tables_changed()
        self._sharded.rows.end_averages()
        self._settings, self._averages, self._each_step = None, {}, ([], [])

    def state(self) -> State:
        """The averages by the names of their weights, with `average.` for `model.`, as views."""
        trained = self._trained() if self._averages else {}
        return {
            f"{AVERAGE}{name.removeprefix('model.')}": with_parts(value, self._averages[name])
            for name, value in trained.items()
        }

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Go on from a checkpoint whose weights the model has; where it has no averages, these are the weights.

        A collective call.

        Raises:
            CheckpointError: an average has another shape than its weight, or cannot be read.
        """
        if not self._averages:
            return
        rows, is_touched, averages = self._sharded.rows, self._tables == "touched", self.state()
        goes_on, saved = is_touched and rows.goes_on, saved_names(directory)
        if (is_touched and not goes_on) or not averages.keys() <= saved:
            rows.catch_up()
            self._progress.swept = self._progress.phase_steps
        for weight, average in self._pairs():
            average.copy_(weight)
        there = {name: average for name, average in averages.items() if name in saved}
        load_averages(directory, there, settled=not goes_on)

    @torch.no_grad()
    def _begin(self) -> None:
        """Averages of one moment: the weights."""
        trained = self._trained()
        rows = self._sharded.rows if self._tables == "touched" else None
        if rows is not None:
            rows.begin_averages()
        parts = {name: [part for part, _, _ in local_parts(value)] for name, value in trained.items()}
        self._averages = {
            name: [
                rows.average_of(part) if rows and isinstance(value, ShardedTensor) else new_like(part).copy_(part)
                for part in parts[name]
            ]
            for name, value in trained.items()
        }
        each_step = [name for name, value in trained.items() if not isinstance(value, ShardedTensor)]
        self._each_step = (
            [average for name in each_step for average in self._averages[name]],
            [part for name in each_step for part in parts[name]],
        )

    def _sweep(self) -> None:
        """Bring the averages of the sharded tables up to the step."""
        assert self._settings is not None
        step = self._progress.phase_steps
        first = max(self._progress.swept, self._settings.start) + 1
        self._progress.swept = step
        if self._tables != "sweep" or first > step:
            return
        decay = math.prod(self._decay(one) for one in range(first, step + 1))
        self._sharded.rows.catch_up()
        for name, value in self._trained().items():
            if isinstance(value, ShardedTensor):
                _move(self._averages[name], [part for part, _, _ in local_parts(value)], decay)

    @property
    def _tables(self) -> Literal["none", "sweep", "touched"]:
        """How sharded tables are averaged in this phase."""
        assert self._settings is not None
        return "none" if self._sharded.ranker.embeddings_frozen else self._settings.tables

    def _decay(self, step: int) -> float:
        assert self._settings is not None
        n = step - self._settings.start
        return min(self._settings.decay, (1 + n) / (10 + n)) if self._settings.warmup else self._settings.decay

    def _trained(self) -> State:
        """What is averaged of the model's weights, as views; rows that a table's cache has are written back first."""
        dense, frozen = set(_trained_names(self._dense_arch)), self._sharded.ranker.embeddings_frozen

        def is_averaged(name: str, value: Tensor | ShardedTensor) -> bool:
            if name.startswith(_DENSE):
                return name.removeprefix(_DENSE) in dense
            return self._tables != "none" if isinstance(value, ShardedTensor) else not frozen

        state = model_state(self._sharded, self._dense_arch)
        return {name: value for name, value in state.items() if is_averaged(name, value)}

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of a weight that this rank has, with its average."""
        for name, value in (self._trained() if self._averages else {}).items():
            for (weight, _, _), average in zip(local_parts(value), self._averages[name], strict=True):
                yield weight, average

    @torch.no_grad()
    def _exchange(self) -> None:
        for whole in self._pairs():
            for weight, average in zip(*(torch.atleast_1d(one).split(_BLOCK_ROWS) for one in whole), strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
        self._tables_changed()

    def _tables_changed(self) -> None:
        if self._averages and self._tables != "none":
            forget_cached_rows(self._sharded)


def check_start(settings: AverageConfig | None, lengths: Mapping[str, int]) -> None:
    """Refuse averages that no stage would have; `lengths` are the steps of the longest phase of each.

    Raises:
        ConfigError: `start` is no less than any of them.
    """
    if settings and settings.start >= (longest := max(lengths.values())):
        raise ConfigError(
            f"optimizers.average.start is {settings.start}, but no stage has more than {longest} steps; lower it, or "
            "set optimizers.average to null"
        )


def _move(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """As torch's averaged models are moved, in place and without waiting for the device."""
    if averages:
        get_ema_multi_avg_fn(decay)(averages, weights, 0)


def _trained_names(module: nn.Module) -> Iterable[str]:
    """Parameters that train, and the buffers of floats in the modules that these belong to."""
    for prefix, part in module.named_modules():
        trained = [name for name, parameter in part.named_parameters(recurse=False) if parameter.requires_grad]
        if trained:
            trained += [name for name, buffer in part.named_buffers(recurse=False) if buffer.is_floating_point()]
        yield from (f"{prefix}.{name}" if prefix else name for name in trained)
