"""Learning rates over a phase: shares of the rates that a stage states, by its steps and by its evaluations."""

from dataclasses import dataclass
from math import cos, pi

from recsys.config import PlateauConfig, StageConfig


def schedule_factor(stage: StageConfig, step: int, num_steps: int, plateau_share: float = 1.0) -> float:
    """Factor of all learning rates at a step: a linear warm-up, then what the stage's schedule says.

    Of W steps of warm-up and N in all, step s < W has (s + 1) / W. Then, with the minimum m and the way
    t = (s - W) / (N - W), a linear schedule has m + (1 - m) (1 - t), cosine m + (1 - m) (1 + cos(pi t)) / 2.

    Args:
        stage: settings.
        step: of the phase, from 0.
        num_steps: that the phase lasts at most.
        plateau_share: what evaluations have left of the rates; a schedule `plateau` has it, in warm-up as well.
    """
    warm = (step + 1) / stage.warmup_steps if step < stage.warmup_steps else 1.0
    if stage.schedule == "plateau":
        return warm * max(plateau_share, stage.schedule_minimum)  # which may have been raised since
    if step < stage.warmup_steps or stage.schedule == "constant":
        return warm
    done = (step - stage.warmup_steps) / max(num_steps - stage.warmup_steps, 1)
    left = 1 - done if stage.schedule == "linear" else 0.5 * (1 + cos(pi * done))
    return stage.schedule_minimum + (1 - stage.schedule_minimum) * left


@dataclass
class Plateau:
    """How far evaluations have brought a phase's rates down, as torch's ReduceLROnPlateau does with threshold 0.

    Attributes:
        share: of the rates that is left.
        without_better: evaluations since the best one or the last cut, whichever was later.
    """

    share: float = 1.0
    without_better: int = 0

    def evaluated(self, stage: StageConfig, *, is_better: bool) -> bool:
        """Take an evaluation into account, and tell whether the rates were cut."""
        if stage.schedule != "plateau":
            return False
        settings = stage.plateau or PlateauConfig()
        self.without_better = 0 if is_better else self.without_better + 1
        if self.without_better < settings.patience:
            return False
        self.without_better = 0
        before, self.share = self.share, max(self.share * settings.factor, stage.schedule_minimum)
        return self.share < before
