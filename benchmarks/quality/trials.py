"""What the trials of a study came to: the best first, for a person and for a program."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from benchmarks.quality.figures import digits
from benchmarks.quality.grid import short_path
from benchmarks.quality.journal import retries
from benchmarks.quality.study import StudyConfig, values_of
from benchmarks.report import Line
from recsys.terminal import Rows

FAULT, SEEDS, COMMIT, DEVICE = "fault", "seeds", "commit", "device"
"""Attributes of a trial: why it failed; by seed, its `value` and its `epochs`; of which code and where it was run."""

_RANKS = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.RUNNING: 2, TrialState.WAITING: 2}


class Trials:
    """A study's trials.

    Args:
        study: its settings.
        trials: all that were begun, in any state.

    Attributes:
        ranked: complete ones by their values, the best first; then pruned ones by their last; then all others.
        tried: how many have ended, those that were cut off left out.
    """

    def __init__(self, study: StudyConfig, trials: list[FrozenTrial]) -> None:
        self._study, self._retries = study, retries(trials)
        sign = -1 if study.direction == "maximize" else 1

        def rank(trial: FrozenTrial) -> tuple[int, float, int]:
            return _RANKS.get(trial.state, 3), math.inf if trial.value is None else sign * trial.value, trial.number

        self.ranked = sorted(trials, key=rank)
        self.tried = sum(trial.state.is_finished() and trial.number not in self._retries for trial in trials)

    @property
    def winner(self) -> FrozenTrial | None:
        """The best complete trial; None where there is none."""
        return self.ranked[0] if self.ranked and self.ranked[0].state == TrialState.COMPLETE else None

    def told(self, attribute: str) -> list[str]:
        """What trials say under an attribute, each answer once."""
        return sorted({str(trial.user_attrs[attribute]) for trial in self.ranked if attribute in trial.user_attrs})

    def rows(self, *, brief: bool = False) -> Rows:
        """A row for each trial; `brief` leaves out what a terminal has no room for, and all but the ten best."""
        return [self._row(trial, brief=brief) for trial in (self.ranked[:10] if brief else self.ranked)]

    def lines(self) -> Iterator[Line]:
        """The same for a program."""
        for trial in self.ranked:
            yield {
                "kind": "trial",
                "trial": trial.number,
                "state": self.state(trial),
                "value": trial.value,
                "parameters": values_of(self._study, trial.params),
                "seeds": trial.user_attrs.get(SEEDS, {}),
                "evaluations": list(trial.intermediate_values.values()),
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "pruned at": trial.last_step if trial.state == TrialState.PRUNED else None,
                "fault": trial.user_attrs.get(FAULT),
                "retried as": self._retries.get(trial.number),
                "commit": trial.user_attrs.get(COMMIT),
            }

    def page(self) -> Sequence[str | Rows]:
        """The page, without how it came about."""
        study, devices = self._study, ", ".join(self.told(DEVICE)) or "no device yet"
        counts = [f"{self.tried} of {study.trials} trials have ended"]
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            found = [trial for trial in self.ranked if trial.state == state and trial.number not in self._retries]
            counts.append(f"{len(found)} {_STATES[state]}")
        seeds = ", ".join(map(str, study.seeds))
        of_seeds = f"the mean over seeds {seeds}" if len(study.seeds) > 1 else f"with seed {seeds}"
        parts: list[str | Rows] = [
            f"{'; '.join(counts)}. Objective: {study.objective} of the model that a run ends with, "
            f"{of_seeds}; the test split is not read. Ranks per run: {study.nproc}, on {devices}. Of a pruned trial "
            "the value is its last evaluation's, on the first seed. Seconds are those of the whole trial.",
            self.rows(),
        ]
        if faults := [f"- trial {t.number}: {t.user_attrs[FAULT]}" for t in self.ranked if FAULT in t.user_attrs]:
            parts += ["## Failed", "\n".join(faults)]
        return parts

    def state(self, trial: FrozenTrial) -> str:
        """What became of a trial, in a word."""
        return "cut off" if trial.number in self._retries else _STATES[trial.state]

    def _row(self, trial: FrozenTrial, *, brief: bool) -> dict[str, str]:
        study, seeds = self._study, trial.user_attrs.get(SEEDS, {})
        row = {"trial": str(trial.number), study.objective: digits(trial.value)}
        values = values_of(study, trial.params)
        row |= {short_path(path, study.space): shown(values[path]) if path in values else "" for path in study.space}
        if not brief:
            row |= {f"seed {seed}": digits(seeds.get(str(seed), {}).get("value")) for seed in study.seeds}
        epochs = [told["epochs"] for told in seeds.values()]
        pruned = f", at evaluation {trial.last_step}" if trial.state == TrialState.PRUNED else ""
        return row | {
            "epochs": ", ".join(map(str, epochs)),
            "seconds": f"{trial.duration.total_seconds():.1f}" if trial.duration else "",
            "state": f"{self.state(trial)}{pruned}",
        }


def shown(value: Any) -> str:
    """A setting's value for a person: numbers with four digits, what is no text as JSON."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
    TrialState.WAITING: "waiting",
}
