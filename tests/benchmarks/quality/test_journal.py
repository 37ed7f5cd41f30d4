"""Trials that several processes share: none is lost, none is tried twice, and going on changes nothing."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import Trial, TrialState
from studies import RATE, write_study

from benchmarks.quality.journal import Journal, retries
from benchmarks.quality.study import load_study
from recsys.errors import UserError

SPACE = {"stages.backbone.learning_rate": RATE, "model.dense_dim": {"choices": [4, 8, 16]}}


def opened(folder: Path, **settings: Any) -> Journal:
    study, base = load_study(write_study(folder, **{"space": SPACE, "trials": 6, "random_trials": 3, **settings}))
    return Journal(study, base.to_yaml(), folder / "study")


def asked(journal: Journal) -> Trial:
    trial = journal.ask()
    assert trial is not None
    return trial


def tell(journal: Journal, trial: Trial) -> None:
    journal.tell(trial, TrialState.COMPLETE, trial.params["stages.backbone.learning_rate"])


def die(journal: Journal) -> None:
    """Give up what the system takes back when a process ends."""
    assert journal._of_trial is not None
    journal._of_trial.release()


def outcome(journal: Journal) -> list[tuple[dict[str, Any], float | None]]:
    """What was tried, without what was cut off."""
    trials = journal.trials()
    return [(trial.params, trial.value) for trial in trials if trial.number not in retries(trials)]


def test_a_study_that_was_cut_off_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    whole = opened(folder)
    while (trial := whole.ask()) is not None:
        tell(whole, trial)
    expected = outcome(whole)
    assert len({str(params) for params, _ in expected}) == 6  # no two trials draw alike
    (folder / "study").rename(folder / "whole")

    for _ in range(4):  # in pieces: each ends one trial, and is cut off in the next
        journal = opened(folder)
        tell(journal, asked(journal))
        asked(journal)
        die(journal)
    journal = opened(folder)
    while (trial := journal.ask()) is not None:
        tell(journal, trial)
    assert len(journal.trials()) == 6 + len(retries(journal.trials())) == 10
    assert outcome(journal) == expected


def test_what_another_process_works_on_is_left_to_it(folder: Path) -> None:
    one, other = opened(folder, trials=2), opened(folder, trials=2)
    first, second = asked(one), asked(other)
    assert first.params != second.params
    assert one.ask() is None  # both are under way
    assert [trial.state for trial in one.trials()] == [TrialState.RUNNING, TrialState.RUNNING]
    tell(one, first)
    assert [trial.state for trial in other.trials()] == [TrialState.COMPLETE, TrialState.RUNNING]
    die(other)
    again = asked(one)
    assert again.params == second.params
    assert (again.number, retries(one.trials())) == (2, {1: 2})
    assert one.trials()[1].state == TrialState.FAIL


def test_what_was_cut_off_while_it_was_taken_up_is_tried_once_more_and_no_twice(folder: Path) -> None:
    journal = opened(folder)
    trial = asked(journal)
    die(journal)
    journal._study.enqueue_trial(trial.params, user_attrs={"retry of": 0})  # where the next process was killed
    again = asked(opened(folder))
    assert (again.number, again.params) == (1, trial.params)
    assert [trial.state for trial in journal.trials()] == [TrialState.FAIL, TrialState.RUNNING]


def test_a_study_is_only_gone_on_with_under_its_own_settings(folder: Path) -> None:
    assert opened(folder).ask() is not None
    opened(folder, trials=9, timeout_minutes=1.0)  # may be longer
    with pytest.raises(UserError, match=r"begun with other settings \(seeds, space\); set them back"):
        opened(folder, seeds=[1], space={"model.dense_dim": {"choices": [4]}})
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text().replace("batch_size: 32", "batch_size: 16"))
    with pytest.raises(UserError, match=r"other settings \(the config that it starts from\)"):
        opened(folder)


def test_a_study_from_before_a_key_of_the_config_came_goes_on(folder: Path) -> None:
    journal = opened(folder)
    settings = journal._study.user_attrs["settings"]
    assert "  domain_experts: null\n" in settings["start"]
    before = settings["start"].replace("  domain_experts: null\n", "")
    journal._study.set_user_attr("settings", {**settings, "start": before})
    assert opened(folder).ask() is not None


def test_a_file_that_is_no_journal_is_named(folder: Path) -> None:
    (folder / "study").mkdir()
    (folder / "study" / "journal.jsonl").write_text("no journal\n[]\n")
    with pytest.raises(UserError, match=r"journal\.jsonl is no journal of a study"):
        opened(folder)


def test_a_line_that_was_cut_off_loses_nothing_but_itself(folder: Path) -> None:
    """By a process that was killed while another goes on, and by one that nobody outlived."""
    journal = opened(folder)
    path = folder / "study" / "journal.jsonl"
    for _ in range(2):
        with path.open("ab") as file:
            file.write(b'{"op_code":6,"worker_id":"somebody')
        tell(journal, asked(journal))
        journal = opened(folder)
    assert [trial.state for trial in journal.trials()] == [TrialState.COMPLETE] * 2
    assert b"somebody" not in path.read_bytes()


@pytest.mark.parametrize(
    ("objective", "values", "pruned"),
    [("valid AUC", (0.6, 0.7, 0.8), [0.69]), ("valid log loss", (0.6, 0.5, 0.4), [0.51])],
)
def test_trials_worse_than_the_median_are_pruned_after_the_warm_up(
    folder: Path, objective: str, values: tuple[float, ...], pruned: list[float]
) -> None:
    journal = opened(folder, objective=objective, pruning={"startup_trials": 3, "warmup_evaluations": 1})
    for value in values:
        trial = asked(journal)
        for number in (1, 2):
            trial.report(value, number)
            assert not trial.should_prune()
        journal.tell(trial, TrialState.COMPLETE, value)
    better = max(values) if objective == "valid AUC" else min(values)
    for value in (*pruned, better):
        trial = asked(journal)
        trial.report(value, 1)
        assert not trial.should_prune()
        trial.report(value, 2)
        assert trial.should_prune() == (value in pruned)
        journal.tell(trial, TrialState.PRUNED)
