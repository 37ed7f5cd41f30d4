"""What a resumed run needs to know beside weights and optimizer states: all of it, in one object."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from recsys.data.order import Epoch, Position
from recsys.training.counts import Counts
from recsys.training.metrics import Metrics
from recsys.training.routing import RoutingSummary


@dataclass
class StageTotals:
    """What a stage has done, over all its phases and all ranks.

    Attributes:
        steps: optimizer steps.
        epochs: that were trained on, whole or in part.
        examples: rows that were trained on.
        seconds: of training, evaluation left out.
        waited: seconds of those in which this rank waited for data.
        losses: mean of each loss over the steps of the latest epoch, by name.
        routing: of each linear with experts in the latest epoch.
        best_epoch: whose state the stage ended with; 0 is the state that it began with, None where nothing was chosen.
        valid: figures of the valid split at its end.
        checkpoint: written at its end.
    """

    steps: int = 0
    epochs: int = 0
    examples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    routing: dict[str, RoutingSummary] = field(default_factory=dict)
    best_epoch: int | None = None
    valid: Metrics | None = None
    checkpoint: Path | None = None


@dataclass
class Best:
    """The best state of a phase so far; it lies in the checkpoint `best`.

    Attributes:
        epoch: after which of the phase's epochs it was; 0 is the state that the phase began with.
        metrics: its figures on the valid split.
    """

    epoch: int
    metrics: Metrics


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        stage: name of the stage under way, or of the last one.
        phase: number of the phase under way within the stage, from 0.
        phase_steps: optimizer steps of the phase, which its schedule and its end go by.
        phase_epochs: epochs of the phase that have ended.
        step: optimizer steps over all stages.
        epoch: number of the epoch under way over all stages, from 0; each has a reading order of its own.
        epoch_step: steps of that epoch that were taken.
        best: of the phase under way, where it is chosen by the valid split.
        valid: figures of the valid split for the weights as the last stage left them, where they are known.
        totals: by stage, of those that have begun.
        counts: by split: values that were cut, replaced or left out, in all train rows so far, or in one pass.
    """

    stage: str = ""
    phase: int = 0
    phase_steps: int = 0
    phase_epochs: int = 0
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    best: Best | None = None
    valid: Metrics | None = None
    totals: dict[str, StageTotals] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)

    @property
    def of_stage(self) -> StageTotals:
        """Totals of the stage under way."""
        return self.totals[self.stage]

    def position(self, epoch: Epoch) -> Position:
        """Which rows of the epoch under way have been trained on; `epoch` is its order."""
        return epoch.position(self.epoch_step)

    def begin_stage(self, name: str) -> None:
        """The next stage begins, with its first phase."""
        self.stage = name
        self.totals[name] = StageTotals()
        self.begin_phase(0)

    def begin_phase(self, number: int) -> None:
        """A phase of the stage begins."""
        self.phase, self.phase_steps, self.phase_epochs, self.best = number, 0, 0, None

    def step_done(self, examples: int) -> None:
        """The optimizers have taken a step on so many rows, over all ranks."""
        self.step += 1
        self.phase_steps += 1
        self.epoch_step += 1
        self.of_stage.steps += 1
        self.of_stage.examples += examples

    def epoch_done(self) -> None:
        """The epoch under way has ended, or the phase has within it."""
        self.phase_epochs += 1
        self.of_stage.epochs += 1
        self.epoch += 1
        self.epoch_step = 0

    def add_counts(self, split: str, counts: Counts) -> None:
        """More values of a split were cut, replaced or left out."""
        self.counts.setdefault(split, Counter()).update(counts)
