"""Find settings: trials of a study, each a run of training for every seed, judged by the valid split.

    python -m benchmarks.quality search STUDY.yaml [--freeze GRID.yaml [--seeds N ...]]

The same command goes on with a study, and started several times at once it works on one together; docs/benchmarks.md
has the keys of a study.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import yaml
from optuna.trial import Trial, TrialState

from benchmarks.quality.figures import digits
from benchmarks.quality.grid import Run, cases_of, load_grid
from benchmarks.quality.journal import Journal, retries
from benchmarks.quality.study import StudyConfig, grid_of, load_study, runs_of, values_of
from benchmarks.quality.training import end, start
from benchmarks.quality.trials import COMMIT, DEVICE, FAULT, SEEDS, Trials, shown
from benchmarks.report import RESULTS, environment, show, shown_path, write
from recsys.cli import run_entry
from recsys.config import Config, ConfigError
from recsys.errors import UserError
from recsys.versions import git_commit

_POLL_SECONDS = 0.2
_FROZEN = "# What the search "


class _Failed(Exception):
    """A trial that came to nothing, and why."""


def main(arguments: Sequence[str]) -> NoReturn:
    """Search as the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality search", description="Find settings by the valid split.")
    parser.add_argument("study", metavar="STUDY.yaml", help="space, seeds, objective; docs/benchmarks.md has the keys")
    parser.add_argument("--freeze", type=Path, metavar="GRID.yaml", help="write a grid of the winner and the start")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of that grid (default: the study's)")
    parser.add_argument("--report-only", action="store_true", help="try nothing, report what is there")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--runs", type=Path, default="outputs/quality", help="where the runs go (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    given = parser.parse_args(arguments)
    if given.seeds and given.freeze is None:
        parser.error("--seeds is of the grid that --freeze writes")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill, too, ends the run under way
    run_entry(lambda: _search(given))


def _search(given: argparse.Namespace) -> int:
    study, base = load_study(given.study)
    if given.freeze is not None:
        _check_freeze(given, base)
    folder = given.runs / f"search_{study.name}"
    journal = Journal(study, base.to_yaml(), folder)
    until = math.inf if study.timeout_minutes is None else time.monotonic() + 60 * study.timeout_minutes
    while not given.report_only and time.monotonic() < until and (trial := journal.ask()) is not None:
        drawn = ", ".join(f"{path}={shown(value)}" for path, value in values_of(study, trial.params).items())
        print(f"trial {trial.number}: {drawn}", flush=True)
        began = time.monotonic()
        outcome = _end_trial(study, journal, trial, folder)
        trials = _report(given, study, journal)
        seconds = time.monotonic() - began
        print(f"trial {trial.number}: {outcome}, {seconds:.0f} s; {trials.tried}/{study.trials} done", flush=True)
    trials = _report(given, study, journal)
    show(study.name, trials.rows(brief=True))
    if trials.winner is None:
        print(f"{study.name}: no trial is complete, so there is no winner", flush=True)
        return 1
    if given.freeze is not None:
        _freeze(given, study, trials)
    return 0


def _end_trial(study: StudyConfig, journal: Journal, trial: Trial, folder: Path) -> str:
    """Train a trial and have the journal keep what it came to; gives that in words."""
    trial.set_user_attr(COMMIT, git_commit())
    directory = folder / f"trial-{trial.number}"
    shutil.rmtree(directory, ignore_errors=True)  # of a study whose journal is gone
    try:
        runs = list(runs_of(study, directory.name, values_of(study, trial.params), folder))
        values = _train(study, trial, runs)
    except (_Failed, ConfigError) as failure:
        fault = " ".join(str(failure).split())
        trial.set_user_attr(FAULT, fault)
        journal.tell(trial, TrialState.FAIL)
        return f"FAILED: {fault}"
    cut_off = [folder / f"trial-{number}" for number in retries(journal.trials())]
    for checkpoints in (path for each in (directory, *cut_off) for path in each.glob("seed-*/checkpoints")):
        shutil.rmtree(checkpoints)
    if values is None:
        journal.tell(trial, TrialState.PRUNED)
        return "pruned"
    journal.tell(trial, TrialState.COMPLETE, mean(values))
    return f"{study.objective} {digits(mean(values))}"


def _train(study: StudyConfig, trial: Trial, runs: Sequence[Run]) -> list[float] | None:
    """The objective of each run, one after the other; None if the first of them was pruned.

    Raises:
        _Failed: a run fails, or has no such figure.
    """
    values, told = [], {}
    for run in runs:
        is_whole = _until_its_end(study, run, trial if run is runs[0] else None)
        evaluations = _evaluations(run)
        value = None
        if is_whole:
            summary: dict[str, Any] = json.loads((run.directory / "summary.json").read_text(encoding="utf-8"))
            trial.set_user_attr(DEVICE, summary["device"])
            value = summary["valid"][study.figure]
        told[str(run.seed)] = {"value": value, "epochs": evaluations[-1]["epochs"]}
        trial.set_user_attr(SEEDS, told)
        if not is_whole:
            return None
        if value is None:
            raise _Failed(f"{study.objective} is undefined on this valid split")
        values.append(value)
    return values


def _until_its_end(study: StudyConfig, run: Run, trial: Trial | None) -> bool:
    """Train a run, reporting its evaluations to a trial if there is one; False if that was pruned.

    Raises:
        _Failed: the run fails.
    """
    process = start(run, study.nproc, max(1, len(os.sched_getaffinity(0)) // study.nproc), dies_with_us=True)
    try:
        reported = 0
        while True:
            has_ended = process.poll() is not None  # asked first, so that nothing is written after the last look
            for number, evaluation in enumerate(_evaluations(run)[reported:] if trial else (), start=reported + 1):
                assert trial is not None
                reported = number
                if (value := evaluation[study.figure]) is not None:
                    trial.report(value, number)
                    # Also where the run has ended by now: what is pruned must not depend on who is faster.
                    if trial.should_prune():
                        return False
            if has_ended:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        end([process])
    if process.returncode:
        said = run.log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"]
        raise _Failed(f"seed {run.seed}, exit code {process.returncode}, {run.log} ends in: {said[-1]}")
    return True


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """What a run has told of the valid split so far."""
    path = run.directory / "evaluations.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["split"] == "valid"]


def _report(given: argparse.Namespace, study: StudyConfig, journal: Journal) -> Trials:
    """Write the report of what is there."""
    with journal.locked():  # another process may be about to do the same
        trials = Trials(study, journal.trials())
        about = {
            "name": study.name,
            "command": shlex.join(["python", "-m", "benchmarks.quality", "search", shown_path(given.study)]),
            "note": given.note,
            "objective": study.objective,
            "seeds": study.seeds,
            "ranks": study.nproc,
            "device": ", ".join(trials.told(DEVICE)),
            **environment(),
            # The trials tell which code trained them: some may be from before it changed.
            "commit": ", ".join(trials.told(COMMIT)),
        }
        parts = [*trials.page(), *([given.note] if given.note else [])]
        stem = given.output / f"quality_search_{study.name}"
        write(stem, f"Search: {study.name}", parts, about, trials.lines(), quiet=True)
    return trials


def _check_freeze(given: argparse.Namespace, base: Config) -> None:
    path: Path = given.freeze
    if base.data.test is None:
        raise ConfigError(f"--freeze {path}: data.test is not set, and a grid compares on held-out data; set it")
    if not re.fullmatch(r"[A-Za-z0-9_]+", path.stem):
        raise UserError(f"--freeze {path}: its name is to be the grid's, so take letters, digits and _ alone")
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_FROZEN):
        raise UserError(f"--freeze {path}: is there, and no grid of a search; name another file")


def _freeze(given: argparse.Namespace, study: StudyConfig, trials: Trials) -> None:
    winner, path = trials.winner, given.freeze
    assert winner is not None
    text = f"The winner is trial {winner.number} of {trials.tried}, by {study.objective}: {digits(winner.value)}."
    values = values_of(study, winner.params)
    content = grid_of(study, path.stem, values, given.seeds or study.seeds, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = f"{_FROZEN}{study.name} found, frozen; written by benchmarks.quality search --freeze.\n"
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8")
    cases_of(load_grid(path), given.runs / path.stem)  # that it can be run
    print(f"Frozen: {path}: python -m benchmarks.quality {path}", flush=True)
