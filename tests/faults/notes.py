"""What ranks noted of a run (see `rank.py`): its attempts, and which rows are in the model after all of them."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

Rows = dict[int, list[int]]
"""Rows of a step by rank."""


@dataclass
class Attempt:
    """Ranks that met, and what they trained on.

    Attributes:
        began: when, in seconds of the monotonic clock.
        world_size: number of ranks.
        from_step: steps that were done before.
        resumed: name of the checkpoint from which it went on; None if it began anew.
        steps: epoch and rows of each step, over all stages.
        first_step: when its first step was done; None if none was.
    """

    began: float
    world_size: int
    from_step: int
    resumed: str | None
    steps: dict[int, tuple[int, Rows]] = field(default_factory=dict)
    first_step: float | None = None


class Notes:
    """The notes in a folder, read as they are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self._of: dict[Path, tuple[Attempt, int]] = {}
        self._attempts: dict[str, Attempt] = {}

    def attempts(self) -> list[Attempt]:
        """All that have begun so far, the first of them first."""
        for file in self._folder.glob("*.jsonl"):
            offset = self._offsets.get(file, 0)
            with file.open("rb") as stream:
                stream.seek(offset)
                written = stream.read()
            whole = written[: written.rfind(b"\n") + 1]
            self._offsets[file] = offset + len(whole)
            for line in whole.splitlines():
                self._take(file, json.loads(line))
        return sorted(self._attempts.values(), key=lambda attempt: attempt.began)

    def _take(self, file: Path, note: dict) -> None:  # type: ignore[type-arg]
        if "attempt" in note:
            new = Attempt(note["at"], note["world_size"], note["from_step"], note["resumed"])
            attempt = self._attempts.setdefault(note["attempt"], new)
            self._of[file] = attempt, note["rank"]
            return
        attempt, rank = self._of[file]
        attempt.steps.setdefault(note["step"], (note["epoch"], {}))[1][rank] = note["rows"]
        attempt.first_step = min(note["at"], attempt.first_step or note["at"])


def lineage(attempts: list[Attempt]) -> dict[int, tuple[int, Rows]]:
    """The steps that led to the model as it is after the attempts: what was rolled back is left out."""
    kept: dict[int, tuple[int, Rows]] = {}
    for attempt in attempts:
        kept = {step: of for step, of in kept.items() if step <= attempt.from_step}
        kept |= attempt.steps
    return kept


def rows_lost_and_twice(steps: dict[int, tuple[int, Rows]], rows: set[int], epochs: int) -> tuple[int, int]:
    """How many rows of that many epochs were not trained on, and how often one was more than once in its epoch."""
    trained: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(epochs)}
    for epoch, by_rank in steps.values():
        for of_rank in by_rank.values():
            trained.setdefault(epoch, Counter()).update(of_rank)
    lost = sum(len(rows - counts.keys()) for counts in trained.values())
    return lost, sum(counts.total() - len(counts) for counts in trained.values())
