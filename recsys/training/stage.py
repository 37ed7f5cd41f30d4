"""The training of one phase of a stage: an epoch, a step, and a line of the log every so many steps."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
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
from recsys.training.averages import Averages
from recsys.training.counts import Counts, in_words, num_skipped, reduce_counts
from recsys.training.finite import FirstNotFinite, NotFinite
from recsys.training.metrics import BinaryMetrics
from recsys.training.monitor import Monitor
from recsys.training.optimizers import PhaseOptimizers, begin_phase
from recsys.training.progress import Progress
from recsys.training.routing import DEAD_LOAD, RoutingStatistics, RoutingSummary, dead_experts


class LossSums:
    """Sums of the losses over some steps, on the device until their means are asked for.

    Attributes:
        steps: how many.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self.steps = 0

    def add(self, losses: Losses) -> None:
        """Another step's."""
        values = torch.stack(list(losses.values()))
        self._names, self._sums = tuple(losses), values if self._sums is None else self._sums + values
        self.steps += 1

    def merge(self, other: Self) -> None:
        """The steps of other sums as well, which are of the same losses."""
        if other._sums is not None:
            self._names, self._sums = other._names, other._sums if self._sums is None else self._sums + other._sums
            self.steps += other.steps

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, for `load_state`."""
        sums = [] if self._sums is None else self._sums.unbind()
        named = {f"{place}.{name}": value for place, (name, value) in enumerate(zip(self._names, sums, strict=True))}
        return {"steps": torch.tensor(self.steps), **named}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` told."""
        self.steps = int(state["steps"])
        named = sorted((int(key.split(".")[0]), key) for key in state if key != "steps")
        self._names = tuple(key.partition(".")[2] for _, key in named)
        self._sums = torch.stack([state[key] for _, key in named]) if named else None

    def means(self) -> dict[str, float]:
        """Mean of each loss over steps and ranks; a collective call, after one step at least on every rank."""
        assert self._sums is not None
        means = self._sums / self.steps
        dist.all_reduce(means)
        return dict(zip(self._names, (means / dist.get_world_size()).tolist(), strict=True))


@dataclass
class Window:
    """What has happened since the last line of the log; on the device until it is written."""

    metrics: BinaryMetrics
    waited: float
    losses: LossSums = field(default_factory=LossSums)
    examples: int = 0
    counts: Counts = field(default_factory=Counter)
    began: float = field(default_factory=time.perf_counter)


class EpochFigures:
    """What the steps of an epoch under way have shown on this rank: since the last line of the log, and in all.

    Attributes:
        window: since the last line of the log.
        losses: of the windows before it.
        routing: of all steps.
        counts: of all steps.
    """

    def __init__(self, window: Window, routing: RoutingStatistics) -> None:
        self.window, self.routing = window, routing
        self.losses, self.counts = LossSums(), Counter[tuple[str, str]]()

    def add(self, output: RankerOutput, examples: int, counts: Counts) -> None:
        """A step's output, its rows over all ranks, and what was cut, replaced or left out of this rank's."""
        self.window.metrics.update(output.logits, output.labels)
        self.window.losses.add(output.losses)
        self.window.examples += examples
        self.window.counts.update(counts)
        self.counts.update(counts)
        self.routing.update(output.routed_domain)

    def next_window(self, window: Window) -> None:
        """A line of the log is written: another window begins."""
        self.losses.merge(self.window.losses)
        self.window = window

    def state(self) -> dict[str, Tensor]:
        """All but the counts, which are few and kept as sums over ranks, for `load_state`."""
        return {f"{name}.{key}": value for name, of in self._parts().items() for key, value in of.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` told, with tensors on the device."""
        for name, of in self._parts().items():
            prefix = f"{name}."
            of.load_state({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})

    def _parts(self) -> dict[str, Any]:
        return {
            "window.metrics": self.window.metrics,
            "window.losses": self.window.losses,
            "losses": self.losses,
            "routing": self.routing,
        }


class _Taken(Iterator[Batch]):
    """Batches, with the counts of those that the pipeline has taken ahead of their step."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._ahead: deque[Counts] = deque()

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._ahead.append(Counter(batch.counts))
        return batch

    def step_done(self) -> Counts:
        """A step was taken on the first of them: its counts."""
        return self._ahead.popleft()


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
        after_step: called when all of a step is done, its line of the log and its evaluation included.

    Attributes:
        optimizers: of the phase.
        averages: of what they train.
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
        after_step: Callable[[], object],
        end_not_finite: Callable[[NotFinite], NoReturn],
    ) -> None:
        self._config, self._ranks, self._sharded, self._dense_arch = config, ranks, sharded, dense_arch
        self._progress, self._monitor, self._counted = progress, monitor, counted
        self._evaluate, self._after_step, self._end_not_finite = evaluate, after_step, end_not_finite
        self._not_finite = FirstNotFinite(dense_arch, ranks)
        self._num_steps = num_steps
        self._figures: EpochFigures | None = None
        self._since, self._waited = time.perf_counter(), 0.0
        self.optimizers: PhaseOptimizers = begin_phase(
            sharded, dense_arch, config, progress.stage, progress.phase, num_steps=num_steps
        )
        self.averages = Averages(config.optimizers.average, sharded, dense_arch, progress)
        self._pipeline: TrainPipelineSparseDist[Any, Any] = TrainPipelineSparseDist(
            sharded.ranker, self.optimizers.all, ranks.device
        )

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, and the epoch of the last one is done with."""
        return self._progress.phase_steps >= self._num_steps and not self._progress.is_within_epoch

    def open_state(self) -> dict[str, Tensor]:
        """What this rank has of the epoch under way, for `load_open_state`; a collective call.

        What is counted goes into the progress, as sums over ranks.
        """
        if self._figures is None:
            return {}
        figures, device = self._figures, self._ranks.device
        self._progress.epoch_counts = reduce_counts(figures.counts, self._counted, device)
        self._progress.window_counts = reduce_counts(figures.window.counts, self._counted, device)
        return figures.state()

    def load_open_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on within the epoch under way; without a state its figures are those of the steps that follow."""
        self._figures = self._new_figures()
        if self._ranks.is_first:
            self._figures.counts.update(self._progress.epoch_counts)
            self._figures.window.counts.update(self._progress.window_counts)
        if state:
            self._figures.load_state({name: value.to(self._ranks.device) for name, value in state.items()})

    def train_epoch(self, epoch: Epoch, loader: Loader) -> None:
        """Take the steps of one epoch, or those left of it or of the phase.

        Args:
            epoch: its order.
            loader: at whose next batches it begins.
        """
        progress = self._progress
        self._since, self._waited = time.perf_counter(), loader.wait_seconds
        self._sharded.ranker.train()
        figures = self._figures = self._figures or self._new_figures()
        figures.window.waited = loader.wait_seconds
        steps_left = self._num_steps - progress.phase_steps
        batches = _Taken(islice(iter(loader), steps_left))
        for _ in range(min(epoch.num_steps - progress.epoch_step, steps_left)):
            rates = self.optimizers.set_learning_rates(progress.phase_steps, progress.plateau.share)
            self._step(batches, epoch.global_batch_rows(progress.epoch_step), figures)
            if self._is_due(self._config.logging.every_steps):
                self.check_finite()
                self._log(figures, loader, rates)
                figures.next_window(self._window(loader))
            if self._is_due(self._config.logging.eval_every_steps):
                self.check_finite()
                with self._pausing(loader):
                    self._pipeline.detach()
                    self._evaluate()
                    self._attach()
            with self._pausing(loader):
                self._after_step()
        self.check_finite()
        self._end_epoch(figures, loader)

    def check_finite(self) -> None:
        """End the run if a step was not finite; a collective call."""
        if found := self._not_finite.read():
            self._end_not_finite(found)

    def detach(self) -> None:
        """Take the ranker out of the pipeline, so that it can be called directly; the next epoch puts it back."""
        self._pipeline.detach()

    def _new_figures(self) -> EpochFigures:
        domain = self._config.data.domain
        routing = RoutingStatistics(self._dense_arch, num_domains=len(domain.labels) if domain else 0)
        return EpochFigures(Window(self._window_metrics(), 0.0), routing)

    def _step(self, batches: _Taken, examples: int, figures: EpochFigures) -> None:
        """One optimizer step, forward and backward, on the next batch."""
        output: RankerOutput = self._pipeline.progress(batches)
        figures.add(output, examples, batches.step_done())
        self._progress.step_done(examples)
        self.averages.step_done()
        # Not after, as what clipping leaves of an infinite norm can be finite.
        norm = self.optimizers.norm_before_clipping
        self._not_finite.observe(self._progress.step, output.losses, output.dense_features, norm)
        self._monitor.advance(self._progress.phase_steps)

    def _attach(self) -> None:
        """Put the ranker back into the pipeline, the batches in flight included."""
        self._pipeline.attach()
        if self._pipeline.contexts:
            # TorchRec runs the input distribution of the next batch again, and would never wait for its sizes.
            self._pipeline.wait_sparse_data_dist(self._pipeline.contexts[0])

    @contextmanager
    def _pausing(self, loader: Loader) -> Iterator[None]:
        """Time that is not training's."""
        self._count_time(loader)
        stopped = time.perf_counter()
        yield
        self._since = time.perf_counter()
        if self._figures is not None:
            self._figures.window.began += self._since - stopped

    def _count_time(self, loader: Loader) -> None:
        now, totals = time.perf_counter(), self._progress.of_stage
        totals.seconds += now - self._since
        totals.waited += loader.wait_seconds - self._waited
        self._since, self._waited = now, loader.wait_seconds

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self._progress.phase_steps % every_steps == 0

    def _window(self, loader: Loader) -> Window:
        return Window(self._window_metrics(), loader.wait_seconds)

    def _window_metrics(self) -> BinaryMetrics:
        metrics = self._config.metrics
        return BinaryMetrics(**metrics.limits, exact=metrics.train_auc == "exact")

    def _log(self, figures: EpochFigures, loader: Loader, rates: dict[str, float]) -> None:
        window, progress = figures.window, self._progress
        counts = reduce_counts(window.counts, self._counted, self._ranks.device)
        norm = self.optimizers.norm_before_clipping
        if norm is None:
            norm = get_total_norm([p.grad for p in self._dense_arch.parameters() if p.grad is not None])
        scalars = step_scalars(window, loader.wait_seconds, rates, counts, self._counted, norm)
        self._monitor.train_window(
            progress.stage, progress.step, progress.phase_steps, self._num_steps, window.metrics.compute(), scalars
        )
        self._monitor.routing(progress.step, figures.routing.window())

    def _end_epoch(self, figures: EpochFigures, loader: Loader) -> None:
        """An epoch is over, or the phase is within it: what it came to."""
        self.averages.epoch_done()
        progress, totals = self._progress, self._progress.of_stage
        counts = reduce_counts(figures.counts, self._counted, self._ranks.device)
        trained = progress.epoch_examples - num_skipped(counts)
        if not trained:
            raise DataError(
                "data.train: no row that was read has a label, so there is nothing to learn from; correct data.label, "
                "or join the labels again when the shards are written"
            )
        totals.examples -= num_skipped(counts)
        self._count_time(loader)
        progress.add_counts("train", counts)
        progress.epoch_done()
        self._figures = None
        if counts:
            self._monitor.say(f"warning: {progress.stage} epoch {totals.epochs}: {in_words(counts)}")
        figures.losses.merge(figures.window.losses)
        if figures.losses.steps:  # none where a run was resumed behind the last, on another number of ranks
            routing = figures.routing.epoch()
            totals.losses = figures.losses.means()
            totals.routing = {linear: summary.as_dict() for linear, summary in routing.items()}
            self._report_routing(routing, trained)

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
    gradient_norm: Tensor,
) -> dict[str, float]:
    """What is logged of the steps of a window beside its metrics, by TensorBoard tag; a collective call.

    Args:
        window: of one step at least.
        wait_seconds: that the loader was waited for, so far.
        rates: learning rates of the last step, by optimizer.
        counts: of the window's rows, over all ranks.
        counted: what may be counted.
        gradient_norm: of the dense arch at the last step, before it is clipped, ().
    """
    losses, seconds = window.losses.means(), time.perf_counter() - window.began
    return {
        **{f"train/{name}": mean for name, mean in losses.items()},
        **{f"learning_rate/{name}": rate for name, rate in rates.items()},
        **{f"data/{kind}/{feature}": counts[kind, feature] for kind, feature in counted},
        "throughput/examples_per_second": (window.examples - num_skipped(counts)) / seconds,
        "throughput/data_wait": (wait_seconds - window.waited) / seconds,
        "gradient_norm/dense": gradient_norm.item(),
    }
