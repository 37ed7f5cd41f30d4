"""The fault harness: a few of its trials, and that it notices what must not be."""

import json
from collections import Counter
from pathlib import Path

import pytest
from faults.harness import INT, KILL, MOMENTS, TARGETS, TERM, Kill, Outcome, Plan, Trial, Workshop, draw, trials
from faults.launches import LAUNCHERS
from faults.notes import Notes, lineage, rows_lost_and_twice
from faults.report import report


def kill(to: str, by: int, moment: str, at: float = 0.5, rank: float = 0.0) -> Kill:
    return Kill(to, by, moment, at, 0.0, rank)


PLANS = [
    Plan(0, "forked", 0, (1,), True, (kill("one rank", KILL, "after aside", 1), kill("one rank", KILL, "save"))),
    Plan(1, "forked", 0, (1,), False, (kill("one rank", KILL, "in delete", 2), kill("one rank", INT, "step"))),
    Plan(2, "forked", 0, (2,), True, (kill("one rank", KILL, "save", rank=0.9), kill("all ranks", KILL, "clock"))),
    Plan(3, "forked", 0, (3,), True, (kill("one rank", TERM, "step", rank=0.4), kill("all ranks", KILL, "save"))),
]


@pytest.mark.slow
def test_runs_that_are_killed_end_as_those_that_are_not_and_the_harness_would_notice(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, seed=1)
    outcomes = [Trial(workshop, plan)() for plan in PLANS]
    assert [outcome.faults() for outcome in outcomes] == [[]] * len(PLANS), outcomes
    kills = [one for outcome in outcomes for one in outcome.kills]
    assert len(kills) > 5 and sum(one["within_save"] for one in kills) > 1
    assert sum(one.get("resumed") is not None for one in kills) > 4
    # What if the uninterrupted run had been another, or a row more had been read?
    lines = [json.loads(line) for line in workshop.results.read_text().splitlines()]
    others = [{**line, "bits": "", "order": ""} if line["kind"] == "reference" else line for line in lines]
    workshop.results.write_text("".join(f"{json.dumps(line)}\n" for line in others))
    workshop.rows.add(0)
    outcome = Trial(workshop, Plan(4, "forked", 0, (1,), True, ()))()
    assert outcome.faults() == ["rows lost", "order", "bits"]
    assert outcome.rows_lost == 4


def write_notes(folder: Path, name: str, *notes: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps({'at': 1.0, **note})}\n" for note in notes))


def begin(attempt: str, rank: int, from_step: int, at: float) -> dict[str, object]:
    resumed = f"step-{from_step}" if from_step else None
    return {"attempt": attempt, "rank": rank, "world_size": 2, "from_step": from_step, "resumed": resumed, "at": at}


def step(number: int, *rows: int, epoch: int = 0) -> dict[str, object]:
    return {"step": number, "epoch": epoch, "rows": list(rows)}


def test_what_was_rolled_back_does_not_count_and_rows_lost_and_twice_do(tmp_path: Path) -> None:
    write_notes(tmp_path, "a.jsonl", begin("x", 0, 0, 1.0), step(1, 1, 2), step(2, 3))
    write_notes(tmp_path, "b.jsonl", begin("x", 1, 0, 1.1), step(1, 4), step(2, 5), step(3, 99))
    notes = Notes(tmp_path)
    assert [(attempt.from_step, len(attempt.steps)) for attempt in notes.attempts()] == [(0, 3)]
    write_notes(tmp_path, "c.jsonl", begin("y", 1, 1, 2.1), step(2, 3))
    write_notes(tmp_path, "d.jsonl", begin("y", 0, 1, 2.0), step(2, 5))
    (tmp_path / "e.jsonl").write_text('{"att')  # killed before it could say more
    attempts = notes.attempts()
    assert [(attempt.from_step, attempt.resumed) for attempt in attempts] == [(0, None), (1, "step-1")]
    steps = lineage(attempts)
    assert steps == {1: (0, {0: [1, 2], 1: [4]}), 2: (0, {0: [5], 1: [3]})}
    assert rows_lost_and_twice(steps, {1, 2, 3, 4, 5}, 1) == (0, 0)
    assert rows_lost_and_twice(steps, {1, 2, 3, 4, 5, 6}, 1) == (1, 0)
    assert rows_lost_and_twice(steps, {1, 2, 3, 4, 5}, 2) == (5, 0)
    assert rows_lost_and_twice({**steps, 3: (0, {0: [5]})}, {1, 2, 3, 4, 5}, 1) == (0, 1)


def test_trials_are_drawn_alike_and_of_every_kind() -> None:
    plans = [draw(1, number) for number in range(800)]
    assert plans == [draw(1, number) for number in range(800)] != [draw(2, number) for number in range(800)]
    kinds = Counter((plan.launcher, one.to, one.by) for plan in plans for one in plan.kills)
    assert set(kinds) == {(launcher, to, by) for launcher in LAUNCHERS for to, by, _ in TARGETS[launcher]}
    assert {one.moment for plan in plans for one in plan.kills} == {moment for moment, _ in MOMENTS}
    assert {plan.world_sizes[0] for plan in plans} == {1, 2, 3}
    assert {plan.asynchronous for plan in plans} == {True, False}
    assert any(len(set(plan.world_sizes)) > 1 for plan in plans) and any(plan.restarts for plan in plans)


def trial(number: int, **more: object) -> dict[str, object]:
    made = {"to": "one rank", "by": "SIGKILL", "moment": "save", "world_size": 2, "orphans": 0, "within_save": True}
    kills = [{**made, "resumed": "step-5", "seconds_to_recover": 2.0}, {**made, "resumed": None}, made]
    plan = {
        "launcher": "forked",
        "restarts": 0,
        "commit": "abc",
        "faults": [],
        **vars(Outcome()),
        "kills": kills,
        "world_size": 2,
    }
    return {"kind": "trial", "seed": 1, "number": number, **plan, **more}


def test_what_is_recorded_is_not_done_again_though_the_last_line_was_cut_off(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, seed=1)
    workshop.record(**trial(0))
    workshop.record(**{**trial(1), "seed": 2})
    with workshop.results.open("a") as file:
        file.write('{"kind": "tri')
    assert [line["number"] for line in workshop.lines("trial")] == [0]
    assert list(trials(workshop, kills=3)) == []
    workshop.record(**trial(1))
    assert [line["number"] for line in workshop.lines("trial")] == [0, 1]
    assert list(trials(Workshop(tmp_path, seed=1), kills=6)) == []


def test_the_page_counts_what_was_tried_and_what_went_wrong(tmp_path: Path) -> None:
    references = [
        {"kind": "reference", "launcher": "forked", "config_seed": seed, "summary": {"test": {"auc": auc}}}
        for seed, auc in ((17, 0.70), (18, 0.72))
    ]
    wrong = trial(1, bits_differ=True, rows_lost=7, faults=["rows lost", "bits"])
    report(tmp_path / "faults", [trial(0), wrong], references, 1, "make test-faults")
    page = (tmp_path / "faults.md").read_text()
    assert "6 kills in 2 trials, 6 of them within a save: 2 resumed, 7 rows lost, 0 twice, 1 of 2 runs with" in page
    assert "| SIGKILL of one rank | 6 | 6 | 2 | 2 | 2 | 0 | 0 | 2.0 | 2.0 |" in page
    assert "Trials with a fault: [(1, ['rows lost', 'bits'])]" in page
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 5
