"""The training of one phase of a stage: an epoch, a step, and a line of the log every so many steps."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.storage import DataError
from recsys.model.losses import Losses
from recsys.model.ranker import RankerOutput
from recsys.runtime import Ranks
from recsys.sharding.shard import ShardedRanker
from recsys.training.counts import Counts, in_words, num_skipped, reduce_counts
from recsys.training.finite import FirstNotFinite, NotFinite
from recsys.training.metrics import BinaryMetrics
from recsys.training.monitor import Monitor
from recsys.training.optimizers import PhaseOptimizers, begin_phase
from recsys.training.progress import Progress
from recsys.training.routing import DEAD_LOAD, RoutingStatistics, RoutingSummary, dead_experts


class LossSums:
    """Sums of the losses over some steps, on the device until their means are asked for."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._steps = 0

    def add(self, losses: Losses) -> None:
        """Another step's."""
        values = torch.stack(list(losses.values()))
        self._names, self._sums = tuple(losses), values if self._sums is None else self._sums + values
        self._steps += 1

    def merge(self, other: Self) -> None:
        """The steps of other sums as well, which are of the same losses."""
        if other._sums is not None:
            self._names, self._sums = other._names, other._sums if self._sums is None else self._sums + other._sums
            self._steps += other._steps

    def means(self) -> dict[str, float]:
        """Mean of each loss over steps and ranks; a collective call, after one step at least on every rank."""
        assert self._sums is not None
        means = self._sums / self._steps
        dist.all_reduce(means)
        return dict(zip(self._names, (means / dist.get_world_size()).tolist(), strict=True))


@dataclass
class Window:
    """What has happened since the last line of the log; on the device until it is written."""

    metrics: BinaryMetrics
    losses: LossSums = field(default_factory=LossSums)
    examples: int = 0
    waited: float = 0.0
    counts: Counts = field(default_factory=Counter)
    began: float = field(default_factory=time.perf_counter)

    def add(self, output: RankerOutput, examples: int) -> None:
        """A step's output, and its rows over all ranks."""
        self.metrics.update(output.logits, output.labels)
        self.losses.add(output.losses)
        self.examples += examples


class PhaseTrainer:
    """The training of one phase of a stage, epoch by epoch.

    Args:
        config: the run.
        ranks: this process among all.
        sharded: the ranker on its ranks.
        dense_arch: its replicated part, never wrapped.
        progress: how far the run has come; moved on at every step.
        monitor: shows and records every step.
        counted: kinds and features of values that may be cut, replaced or left out.
        num_steps: optimizer steps the phase lasts at most.
        evaluate: called in mid-epoch every `logging.eval_every_steps`.
        end_not_finite: called where a step of the epoch under way was not finite; ends the run.

    Attributes:
        optimizers: of the phase.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        sharded: ShardedRanker,
        dense_arch: nn.Module,
        progress: Progress,
        monitor: Monitor,
        *,
        counted: tuple[tuple[str, str], ...],
        num_steps: int,
        evaluate: Callable[[], object],
        end_not_finite: Callable[[NotFinite], NoReturn],
    ) -> None:
        self._config, self._ranks, self._sharded, self._dense_arch = config, ranks, sharded, dense_arch
        self._progress, self._monitor, self._counted, self._evaluate = progress, monitor, counted, evaluate
        self._num_steps, self._end_not_finite = num_steps, end_not_finite
        self._not_finite = FirstNotFinite(dense_arch, ranks)
        self.optimizers: PhaseOptimizers = begin_phase(
            sharded, dense_arch, config, progress.stage, progress.phase, num_steps=num_steps
        )
        self._pipeline: TrainPipelineSparseDist[Any, Any] = TrainPipelineSparseDist(
            sharded.ranker, self.optimizers.all, ranks.device
        )

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken."""
        return self._progress.phase_steps >= self._num_steps

    def train_epoch(self, epoch: Epoch, loader: Loader) -> None:
        """Take the steps of one epoch, or those left of the phase.

        Args:
            epoch: its order.
            loader: at whose next batches it begins.
        """
        progress, domain = self._progress, self._config.data.domain
        began, paused, examples_before = time.perf_counter(), 0.0, progress.of_stage.examples
        routing = RoutingStatistics(self._dense_arch, num_domains=domain.num_domains if domain else 0)
        losses = LossSums()
        self._sharded.ranker.train()
        waited_before, counts_before = loader.wait_seconds, loader.counts.copy()
        steps_left = self._num_steps - progress.phase_steps
        batches, window = islice(iter(loader), steps_left), self._window(loader)
        for epoch_step in range(min(epoch.num_steps, steps_left)):
            rates = self.optimizers.set_learning_rates(progress.phase_steps)
            output = self._step(batches, epoch.global_batch_rows(epoch_step), window)
            routing.update(output.domain)
            if self._is_due(self._config.logging.every_steps):
                self._check_finite()
                self._log(window, loader, rates)
                self._monitor.routing(progress.step, routing.window())
                losses.merge(window.losses)
                window = self._window(loader)
            if self._is_due(self._config.logging.eval_every_steps):
                self._check_finite()
                stopped = time.perf_counter()
                self._pipeline.detach()
                self._evaluate()
                self._attach()
                paused += time.perf_counter() - stopped
                window.began += time.perf_counter() - stopped
        self._check_finite()
        counts = reduce_counts(loader.counts - counts_before, self._counted, self._ranks.device)
        totals = progress.of_stage
        totals.examples -= num_skipped(counts)
        if totals.examples == examples_before:
            raise DataError(
                "data.train: no row that was read has a label, so there is nothing to learn from; correct data.label, "
                "or join the labels again when the shards are written"
            )
        totals.waited += loader.wait_seconds - waited_before
        totals.seconds += time.perf_counter() - began - paused
        progress.add_counts("train", counts)
        progress.epoch_done()
        if counts:
            self._monitor.say(f"warning: {progress.stage} epoch {totals.epochs}: {in_words(counts)}")
        losses.merge(window.losses)
        totals.losses, totals.routing = losses.means(), routing.epoch()
        self._report_routing(totals.routing, totals.examples - examples_before)

    def detach(self) -> None:
        """Take the ranker out of the pipeline, so that it can be called directly; the next epoch puts it back."""
        self._pipeline.detach()

    def _step(self, batches: Iterator[Batch], examples: int, window: Window) -> RankerOutput:
        """One optimizer step, forward and backward, on the next batch."""
        output: RankerOutput = self._pipeline.progress(batches)
        window.add(output, examples)
        self._progress.step_done(examples)
        self._not_finite.observe(self._progress.step, output.losses, output.dense_features)
        self._monitor.advance(self._progress.phase_steps)
        return output

    def _check_finite(self) -> None:
        if found := self._not_finite.read():
            self._end_not_finite(found)

    def _attach(self) -> None:
        """Put the ranker back into the pipeline, the batches in flight included."""
        self._pipeline.attach()
        if self._pipeline.contexts:
            # TorchRec runs the input distribution of the next batch again, and would never wait for its sizes.
            self._pipeline.wait_sparse_data_dist(self._pipeline.contexts[0])

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self._progress.phase_steps % every_steps == 0

    def _window(self, loader: Loader) -> Window:
        limits = self._config.metrics.model_dump()
        return Window(BinaryMetrics(**limits), waited=loader.wait_seconds, counts=loader.counts.copy())

    def _log(self, window: Window, loader: Loader, rates: dict[str, float]) -> None:
        counts = reduce_counts(loader.counts - window.counts, self._counted, self._ranks.device)
        gradients = [p.grad for p in self._dense_arch.parameters() if p.grad is not None]
        scalars = step_scalars(window, loader.wait_seconds, rates, counts, self._counted, gradients)
        progress = self._progress
        self._monitor.train_window(
            progress.stage, progress.step, progress.phase_steps, self._num_steps, window.metrics.compute(), scalars
        )

    def _report_routing(self, routing: dict[str, RoutingSummary], examples: int) -> None:
        """Warn of experts that were dead for an epoch, or what the phase took of it; show who used which."""
        progress, domain = self._progress, self._config.data.domain
        for dead in dead_experts(routing):
            self._monitor.say(
                f"warning: {progress.stage} epoch {progress.of_stage.epochs}: {dead} dead (below {DEAD_LOAD:.0%} of a "
                f"uniform load over {examples:,} examples); raise balance_weight where experts train, or "
                "model.hilomoe.top_k if it is set"
            )
        if domain is not None:
            self._monitor.routing_by_domain(progress.step, routing, domain.labels)


def step_scalars(
    window: Window,
    wait_seconds: float,
    rates: dict[str, float],
    counts: Counts,
    counted: tuple[tuple[str, str], ...],
    gradients: list[Tensor],
) -> dict[str, float]:
    """What is logged of the steps of a window beside its metrics, by TensorBoard tag; a collective call.

    Args:
        window: of one step at least.
        wait_seconds: that the loader was waited for, so far.
        rates: learning rates of the last step, by optimizer.
        counts: of the window's rows, over all ranks.
        counted: what may be counted.
        gradients: of the dense arch at the last step.
    """
    losses, seconds = window.losses.means(), time.perf_counter() - window.began
    return {
        **{f"train/{name}": mean for name, mean in losses.items()},
        **{f"learning_rate/{name}": rate for name, rate in rates.items()},
        **{f"data/{kind}/{feature}": counts[kind, feature] for kind, feature in counted},
        "throughput/examples_per_second": (window.examples - num_skipped(counts)) / seconds,
        "throughput/data_wait": (wait_seconds - window.waited) / seconds,
        "gradient_norm/dense": torch.nn.utils.get_total_norm(gradients).item(),
    }
