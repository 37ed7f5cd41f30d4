"""What a resumed run needs to know beside weights and optimizer states: all of it, in one object."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, ValidationError

from recsys.checkpoint.layout import CheckpointError
from recsys.data.order import Epoch, Position
from recsys.training.counts import Counts, by_kind
from recsys.training.metrics import Metrics
from recsys.training.schedules import Plateau


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
        routing: what a report tells of each linear with experts in the latest epoch.
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
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_epoch: int | None = None
    valid: Metrics | None = None
    checkpoint: Path | None = None


@dataclass
class Best:
    """The best state of a phase so far; it lies in the checkpoint of its step.

    Attributes:
        epoch: after which of the phase's epochs it was; 0 is the state that the phase began with.
        step: over all stages.
        metrics: its figures on the valid split.
    """

    epoch: int
    step: int
    metrics: Metrics


def _from_kinds(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(of, dict) for of in value.values()):
        return {(kind, feature): number for kind, of in value.items() for feature, number in of.items()}
    return value


_StoredCounts = Annotated[Counts, BeforeValidator(_from_kinds), PlainSerializer(by_kind)]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        stage: name of the stage under way, or of the last one.
        phase: number of the phase under way within the stage, from 0.
        phase_steps: optimizer steps of the phase, which its schedule and its end go by.
        phase_epochs: epochs of the phase that have ended.
        phase_over: whether the phase has ended, and its model is evaluated.
        step: optimizer steps over all stages.
        epoch: number of the epoch under way over all stages, from 0; each has a reading order of its own.
        epoch_step: steps of that epoch that were taken under its layout.
        epoch_examples: rows of that epoch that were trained on, those left out for want of a label among them.
        epoch_counts: values of that epoch that were cut, replaced or left out until a checkpoint, over all ranks.
        window_counts: those since the last line of the log.
        left: what of the epoch under way was read when the run was resumed within it, None where it was not.
        best: of the phase under way, where it is chosen by the valid split.
        plateau: what evaluations of the phase under way have made of its learning rates.
        swept: steps of the phase that the averages of sharded tables know of.
        valid: figures of the valid split for the weights as the last stage left them, where they are known.
        totals: by stage, of those that have begun.
        counts: by split: values that were cut, replaced or left out, in all train rows so far, or in one pass.
    """

    stage: str = ""
    phase: int = 0
    phase_steps: int = 0
    phase_epochs: int = 0
    phase_over: bool = False
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    epoch_examples: int = 0
    epoch_counts: _StoredCounts = field(default_factory=Counter)
    window_counts: _StoredCounts = field(default_factory=Counter)
    left: Position | None = None
    best: Best | None = None
    plateau: Plateau = field(default_factory=Plateau)
    swept: int = 0
    valid: Metrics | None = None
    totals: dict[str, StageTotals] = field(default_factory=dict)
    counts: dict[str, _StoredCounts] = field(default_factory=dict)

    @property
    def of_stage(self) -> StageTotals:
        """Totals of the stage under way."""
        return self.totals[self.stage]

    @property
    def is_within_epoch(self) -> bool:
        """Whether steps of the epoch under way were taken, and it is not done with."""
        return self.epoch_step > 0 or (self.left is not None and bool(self.left.taken))

    def position(self, epoch: Epoch) -> Position:
        """Which rows of the epoch under way have been trained on; `epoch` is its order."""
        return epoch.position(self.epoch_step)

    def epoch_of(self, order: Epoch) -> Epoch:
        """What there is to read of an epoch: all of it, or what a run that was resumed within it has left.

        Raises:
            PositionError: the order is not that of the run that was resumed.
        """
        return order.resumed(self.left) if self.left is not None and self.left.epoch == order.epoch else order

    def begin_stage(self, name: str) -> None:
        """The next stage begins, with its first phase."""
        self.stage = name
        self.totals[name] = StageTotals()
        self.begin_phase(0)

    def begin_phase(self, number: int) -> None:
        """A phase of the stage begins."""
        self.phase, self.phase_steps, self.phase_epochs, self.best = number, 0, 0, None
        self.plateau, self.swept = Plateau(), 0
        self.phase_over = False
        self.left = (
            None  # nothing is read of an epoch that begins, and it may be of other rows than the phase before had
        )

    def step_done(self, examples: int) -> None:
        """The optimizers have taken a step on so many rows, over all ranks."""
        self.step += 1
        self.phase_steps += 1
        self.epoch_step += 1
        self.epoch_examples += examples
        self.of_stage.steps += 1
        self.of_stage.examples += examples

    def epoch_done(self) -> None:
        """The epoch under way has ended, or the phase has within it."""
        self.phase_epochs += 1
        self.of_stage.epochs += 1
        self.epoch += 1
        self.epoch_step = self.epoch_examples = 0
        self.epoch_counts, self.window_counts, self.left = Counter(), Counter(), None

    def add_counts(self, split: str, counts: Counts) -> None:
        """More values of a split were cut, replaced or left out."""
        self.counts.setdefault(split, Counter()).update(counts)

    def to_json(self, epoch: Epoch) -> bytes:
        """As JSON that `from_json` reads; `epoch` is the order of the one under way."""
        return _STORED.dump_json(_Stored(self, self.position(epoch)), indent=2)

    @classmethod
    def from_json(cls, text: bytes, source: str) -> "Progress":
        """Read what `to_json` wrote, to go on from there on any number of ranks.

        Args:
            text: the JSON.
            source: what an error names.

        Raises:
            CheckpointError: the text is something else.
        """
        try:
            stored = _STORED.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise CheckpointError(f"{source} is no record of a run's progress: {place}: {first['msg']}") from None
        stored.progress.left, stored.progress.epoch_step = stored.position, 0
        return stored.progress

    def begin_again(self, order: Epoch) -> None:
        """Stand in the epoch under way where `epoch_of` has it go on; `order` is what that gave."""
        self.epoch_step = order.first_step


@dataclass
class _Stored:
    progress: Progress
    position: Position


_STORED = TypeAdapter(_Stored)
