"""What each stage of a run with domains came to, over them and for each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from recsys.terminal import Rows


@dataclass(frozen=True)
class StageEnd:
    """The valid figures of the state that a stage ended with.

    Attributes:
        stage: its name.
        wauc: the mean of the domains' AUCs, weighted by their rows.
        domains: AUC of each domain that has one.
    """

    stage: str
    wauc: float
    domains: Mapping[str, float]


def stage_ends(summary: Mapping[str, Any], evaluations: Path) -> list[StageEnd]:
    """Of a run's stages, in turn; none for a run of one stage, or without domains.

    Args:
        summary: the run's.
        evaluations: its `evaluations.jsonl`, which has the AUCs of domains that a summary has for its end alone.
    """
    stages = {name: stage for name, stage in summary["stages"].items() if stage.get("over_domains")}
    if len(stages) < 2 or not evaluations.exists():
        return []
    lines = [json.loads(line) for line in evaluations.read_text(encoding="utf-8").splitlines()]
    # The state that a stage ends with may be one of an earlier line, also where it keeps the one that it began with.
    of_wauc = {line["over_domains"]["wauc"]: line["domains"] for line in lines if line.get("domains")}
    ends = [(name, stage["over_domains"]["wauc"]) for name, stage in stages.items()]
    return [_end(name, wauc, of_wauc[wauc]) for name, wauc in ends if wauc in of_wauc and wauc is not None]


def landed_ends(
    stages: Mapping[str, Mapping[str, Any]], domains: Mapping[str, Mapping[str, float | None]]
) -> list[StageEnd]:
    """Of a run's stages, as a report's line tells them under `stages` and `domains after stages`."""
    return [_end(name, stages[name]["over_domains"]["wauc"], aucs) for name, aucs in domains.items()]


def _end(stage: str, wauc: float, domains: Mapping[str, float | None]) -> StageEnd:
    return StageEnd(stage, wauc, {name: auc for name, auc in domains.items() if auc is not None})


def stage_rows(runs: Mapping[str, Sequence[Sequence[StageEnd]]]) -> Rows:
    """A row for each stage of each case: what it added, and to how many domains, all means over the case's runs.

    Args:
        runs: the stages of each run of a case, by case; cases with fewer than two stages have no rows.
    """
    rows = []
    for case, ends in runs.items():
        before: Sequence[StageEnd] | None = None
        by_name = [{end.stage: end for end in of_run} for of_run in ends]
        # A stage whose WAUC is undefined in one run, as with rows of one class alone, has no mean over all.
        for now in [[of[name] for of in by_name] for name in by_name[0] if all(name in of for of in by_name)]:
            row = {"case": case, "stage": now[0].stage, "valid WAUC": f"{mean(end.wauc for end in now):.5f}"}
            rows.append({**row, **_change(before, now)})
            before = now
    return rows


def _change(before: Iterable[StageEnd] | None, now: Sequence[StageEnd]) -> dict[str, str]:
    if before is None:
        return dict.fromkeys(("change, 10⁻⁴", "domains that gain", "that lose", "largest loss, 10⁻⁴"), "-")
    pairs = list(zip(before, now, strict=True))
    names = set.intersection(*(set(end.domains) for pair in pairs for end in pair))
    changes = {name: 1e4 * mean(new.domains[name] - old.domains[name] for old, new in pairs) for name in names}
    worst = min(changes, key=lambda name: (changes[name], name), default="")
    return {
        "change, 10⁻⁴": f"{1e4 * mean(new.wauc - old.wauc for old, new in pairs):+.1f}",
        "domains that gain": str(sum(change > 0 for change in changes.values())),
        "that lose": str(sum(change < 0 for change in changes.values())),
        "largest loss, 10⁻⁴": f"{changes[worst]:+.1f} ({worst})" if changes.get(worst, 0) < 0 else "none",
    }
