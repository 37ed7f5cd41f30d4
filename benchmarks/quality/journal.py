"""The trials of a study in a file that any number of processes work on at once, and that outlives each of them.

optuna keeps the trials in its journal. What it lacks there is telling whether the process that works on a trial lives,
as its heartbeats need a database: here that process holds a lock on a file of the trial's, which the system gives up
when the process ends, however it ends. All locks are `flock`'s. A line that a process was killed in, or the disk had no
room for, is removed before the next is written: optuna would write on behind it, and then read neither.
"""

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from optuna.pruners import BasePruner, NopPruner, PercentilePruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from benchmarks.quality.study import StudyConfig
from recsys.config import Config, ConfigError, validate
from recsys.errors import UserError

RETRY = "retry of"
"""Attribute of a trial: the number of the one that was cut off, whose values it has."""

_FREE = {"trials", "timeout_minutes"}
"""Keys of a study that may change while it goes on."""


class Journal:
    """A study as it lies in a folder; made there if it is not.

    Args:
        study: its settings.
        start: the resolved config that it starts from.
        folder: holds `journal.jsonl` and the locks.

    Raises:
        UserError: the study there was begun with other settings, or the file is no journal.
    """

    def __init__(self, study: StudyConfig, start: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._folder = study, folder
        self._lock = _Lock(folder / "study.lock")
        self._of_trial: _Lock | None = None
        self._distributions = {path: parameter.distribution() for path, parameter in study.space.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / "journal.jsonl"
        with self.locked():
            try:
                storage = JournalStorage(JournalFileBackend(str(path), _LockToAppend(path)))
                self._study = optuna.create_study(
                    storage=storage,
                    study_name=study.name,
                    direction=study.direction,
                    pruner=_pruner(study),
                    load_if_exists=True,
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} is no journal of a study ({error}); move {folder} away") from None
            self._hold_to(json.loads(json.dumps({**study.model_dump(mode="json", exclude=_FREE), "start": start})))

    def _hold_to(self, settings: Mapping[str, Any]) -> None:
        known = self._study.user_attrs.get("settings")
        if known is None:
            self._study.set_user_attr("settings", settings)
            return
        if _is_same_config(known.get("start"), settings["start"]):
            known = {**known, "start": settings["start"]}
        if differing := sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key)):
            # Trials under other settings do not compare.
            what = ", ".join("the config that it starts from" if key == "start" else key for key in differing)
            raise UserError(
                f"{self._folder}: this study was begun with other settings ({what}); set them back, give the study "
                "another name, or move the folder away"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from asking and reporting meanwhile."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def trials(self) -> list[FrozenTrial]:
        """All trials so far, by number."""
        return self._study.get_trials(deepcopy=False)

    def ask(self) -> Trial | None:
        """Begin the next trial, which is this process's until `tell`; None once there are as many as wanted.

        One that a process was cut off in is tried again first. What is drawn depends on the sampler's seed, on how many
        trials there were, and on what the trials that ended came to: a study in one process goes on as if it had not
        been interrupted.
        """
        with self.locked():
            self._take_up()
            trials = self.trials()
            retried = retries(trials)
            begun = sum(trial.state != TrialState.WAITING and trial.number not in retried for trial in trials)
            if begun >= self._config.trials:
                return None
            self._study.sampler = _sampler(self._config, begun)
            number = len(trials)
            waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
            self._of_trial = self._lock_of(min(waiting, default=number))
            self._of_trial.acquire()
            return self._study.ask(self._distributions)

    def tell(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        """End a trial, with its value if it is complete."""
        self._study.tell(trial, value, state)
        assert self._of_trial is not None
        self._of_trial.release()
        self._of_trial = None

    def _take_up(self) -> None:
        """Fail the trials whose processes have ended without a word, and have their values tried again."""
        retried = retries(self.trials())
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and (lock := self._lock_of(trial.number)).acquire(wait=False):
                # In this order, so that being cut off in between loses nothing: it is still running, and retried once.
                if trial.number not in retried:
                    self._study.enqueue_trial(trial.params, user_attrs={RETRY: trial.number})
                self._study.tell(trial.number, state=TrialState.FAIL)
                lock.release()

    def _lock_of(self, number: int) -> "_Lock":
        return _Lock(self._folder / f"trial-{number}.lock")


def retries(trials: list[FrozenTrial]) -> dict[int, int]:
    """The trials that were cut off, each with the number of the one that tries its values again."""
    return {trial.user_attrs[RETRY]: trial.number for trial in trials if RETRY in trial.user_attrs}


def _sampler(study: StudyConfig, begun: int) -> TPESampler:
    # A sampler seeded alike in each process would have all of them, and each that goes on, draw the same values.
    seed = int(np.random.SeedSequence([study.sampler_seed, begun]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Trials under way in other processes count as bad ones, so that their values are not tried twice.
        return TPESampler(seed=seed, n_startup_trials=study.random_trials, constant_liar=True)


def _pruner(study: StudyConfig) -> BasePruner:
    if (pruning := study.pruning) is None:
        return NopPruner()
    # Evaluations are numbered from 1, and optuna prunes from `n_warmup_steps` on.
    return PercentilePruner(pruning.percentile, pruning.startup_trials, pruning.warmup_evaluations + 1)


def _is_same_config(known: object, now: str) -> bool:
    """Whether a resolved config is what another was, but for keys that came since, if they are at their defaults."""
    try:
        return validate(Config, yaml.safe_load(str(known)), source="") == validate(
            Config, yaml.safe_load(now), source=""
        )
    except (ConfigError, yaml.YAMLError):
        return False


class _Lock(JournalFileOpenLock):
    """A lock that ends with the process which holds it; optuna's own outlive one that is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def acquire(self, wait: bool = True) -> bool:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        os.close(self._file)


class _LockToAppend(_Lock):
    """What optuna holds while it appends to a journal, which then ends in a whole line."""

    def __init__(self, journal: Path) -> None:
        super().__init__(journal.with_suffix(".lock"))
        self._journal = journal

    def acquire(self, wait: bool = True) -> bool:
        if not super().acquire(wait):
            return False
        with self._journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True
