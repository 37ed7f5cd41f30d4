"""What all trials came to, as a page."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write
from recsys.terminal import Rows

Line = Mapping[str, Any]

MOMENTS = {
    "clock": "at a moment of the time that is left",
    "step": "at a step of those that are left",
    "save": "while a `.partial` is there",
    "before aside": "before the old one is moved aside",
    "after aside": "between both renames",
    "before named": "before the new one gets its name",
    "after named": "after it has it",
    "in delete": "while one is deleted",
}
LAUNCHERS = {
    "forked": "ranks forked by the harness",
    "python": "python",
    "torchrun": "torchrun",
    "torchrun, restarts": "torchrun --max-restarts 3",
    "torchx": "torchx",
    "torchx, restarts": "torchx --max_retries 3",
}
INTRODUCTION = """\
A small config in three stages, two of them with early stopping, is killed at moments drawn by seed and launched again
by the same command until it ends with exit code 0. What it leaves is held against runs that were not interrupted.
`tests/faults/harness.py` says how; a kill counts only if the process was still there to get it.

- *within a save*: what was killed left a checkpoint that it was writing, renaming or deleting.
- *resumed*: the next attempt went on from a checkpoint, always the newest whole one; *anew*: there was none yet;
  *again*: it was killed again before it had begun; *over*: the run marked itself as
  finished, before the kill or in spite of it.
- *rows lost* and *twice* are held against each row exactly once in each epoch, over all attempts, without what was
  rolled back.
- *bits differ*: the last checkpoint is another by SHA-256 over all tensors (weights, optimizers' state, random
  numbers), or the rows came in another order, or the progress or a figure of `summary.json` is another, times left out.
  Where the number of ranks changed on the way, bits must differ, and the final AUC must be within 3 standard deviations
  of what seeds {seeds} give on 1, 2 and 3 ranks ({auc}).
- *orphans*: processes of the run that were there 10 s after the launcher had ended, or that torchrun had not ended when
  it had started others in their place.
- *seconds* to recover: from launching again (from the kill, where torchrun starts the ranks again) to the first new
  step. Forked ranks have their imports done; all others need seconds for those.
"""


def report(stem: Path, trials: Sequence[Line], references: Sequence[Line], seed: int, command: str) -> None:
    """Write the page and the JSON lines.

    Args:
        stem: path without its ending.
        trials: lines of `trials.jsonl`.
        references: of the runs that were not interrupted.
        seed: by which trials were drawn.
        command: that made them.
    """
    kills = [{**kill, "launcher": launcher(trial)} for trial in trials for kill in trial["kills"]]
    aucs = [line["summary"]["test"]["auc"] for line in references if line["launcher"] == "forked"]
    introduction = INTRODUCTION.format(
        seeds=", ".join(map(str, sorted({line["config_seed"] for line in references}))),
        auc=f"{statistics.mean(aucs):.4f} +- {statistics.stdev(aucs):.4f}",
    )
    faulty = [trial for trial in trials if trial["faults"]]
    commits = sorted({str(trial["commit"]) for trial in trials})
    total = (
        f"{len(kills)} kills in {len(trials)} trials, {sum(kill.get('within_save', False) for kill in kills)} of them "
        f"within a save: {sum(end(kill) == 'resumed' for kill in kills)} resumed, "
        f"{sum(trial['rows_lost'] for trial in trials)} rows lost, "
        f"{sum(trial['rows_twice'] for trial in trials)} twice, {sum(map(differs, trials))} of "
        f"{sum(not trial['mixed'] for trial in trials)} runs with other bits, "
        f"{sum(kill['orphans'] for kill in kills)} orphans; {len(faulty)} trials with a fault of any kind."
    )
    write(
        stem,
        "Runs that are killed",
        [
            total,
            introduction.rstrip(),
            "By what is killed:",
            table_of(kills, "kill", lambda kill: f"{kill['by']} of {kill['to']}", sorted),
            "By moment; the renames and the deletion are held open for half a second, so that the kill falls there:",
            table_of(
                kills, "moment", lambda kill: MOMENTS[kill["moment"]], lambda found: ordered(found, MOMENTS.values())
            ),
            "By launcher and number of ranks when killed:",
            table_of(
                kills, "launcher, ranks", lambda kill: f"{LAUNCHERS[kill['launcher']]}, {kill['world_size']}", sorted
            ),
            "Whole trials, by launcher and number of ranks at the end:",
            trials_table(trials),
            *([f"Trials with a fault: {[(trial['number'], trial['faults']) for trial in faulty]}."] if faulty else []),
        ],
        {"command": command, **environment(), "commit": ", ".join(commits), "seed": seed},  # that which was killed
        [without_figures(line) for line in (*references, *trials)],
    )


def without_figures(line: Line) -> Line:
    """A result without what only the harness compares."""
    return {key: value for key, value in line.items() if key not in ("progress", "summary")} | (
        {"auc": line["summary"]["test"]["auc"]} if "summary" in line else {}
    )


def launcher(trial: Line) -> str:
    """By which a trial was launched."""
    return trial["launcher"] + (", restarts" if trial["restarts"] else "")


def end(kill: Line) -> str:
    """What became of the run after a kill, as the page calls it."""
    if kill.get("finished"):
        return "over"
    if "resumed" not in kill:
        return "again"
    return "anew" if kill["resumed"] is None else "resumed"


def differs(trial: Line) -> bool:
    """Whether a trial ended otherwise than the run that was not interrupted."""
    return bool(trial["bits_differ"] or trial["order_differs"] or trial["figures_differ"])


def ordered(found: Iterable[str], order: Iterable[str]) -> list[str]:
    """What was found, in an order."""
    present = set(found)
    return [one for one in order if one in present]


def table_of(
    kills: Sequence[Line], title: str, key: Callable[[Line], str], order: Callable[[Iterable[str]], list[str]]
) -> Rows:
    """Kills by a key."""
    by: dict[str, list[Line]] = {}
    for kill in kills:
        by.setdefault(key(kill), []).append(kill)
    return [{title: name, **kills_row(by[name])} for name in order(by)] + [{title: "all", **kills_row(kills)}]


def kills_row(kills: Sequence[Line]) -> dict[str, str]:
    """What some kills came to."""
    seconds = [kill["seconds_to_recover"] for kill in kills if "seconds_to_recover" in kill]
    ends = Counter(end(kill) for kill in kills)
    return {
        "kills": str(len(kills)),
        "within a save": str(sum(kill.get("within_save", False) for kill in kills)),
        **{name: str(ends[name]) for name in ("resumed", "anew", "again", "over")},
        "orphans": str(sum(kill["orphans"] for kill in kills)),
        "seconds, median": f"{statistics.median(seconds):.1f}" if seconds else "-",
        "max": f"{max(seconds):.1f}" if seconds else "-",
    }


def trials_table(trials: Sequence[Line]) -> Rows:
    """Trials by launcher and number of ranks."""
    by: dict[str, list[Line]] = {}
    for trial in trials:
        ranks = "on another number of ranks" if trial["mixed"] else trial["world_size"]
        by.setdefault(f"{LAUNCHERS[launcher(trial)]}, {ranks}", []).append(trial)
    return [
        {
            "trials": name,
            "tried": str(len(of)),
            "kills": str(sum(len(trial["kills"]) for trial in of)),
            "ended well": str(sum(not trial["failures"] for trial in of)),
            "rows lost": str(sum(trial["rows_lost"] for trial in of)),
            "rows twice": str(sum(trial["rows_twice"] for trial in of)),
            "bits differ": "-" if of[0]["mixed"] else str(sum(map(differs, of))),
            "AUC off": str(sum(trial["auc_off"] for trial in of)),
            "left behind": str(sum(bool(trial["leftovers"]) for trial in of)),
        }
        for name, of in sorted(by.items())
    ]
