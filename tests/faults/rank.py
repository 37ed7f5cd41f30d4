"""A rank of a run that is killed: `recsys/train.py`, which also notes what it trains on and may hold a save open.

It is launched in place of `recsys/train.py`, with its arguments and two environment variables:

    FAULTS_NOTES=FOLDER      each process appends JSON lines to a file of its own in that folder: where it begins, and
                             the rows of each step, before a checkpoint can hold the step
    FAULTS_HOLD="POINT N"    wait at the N-th time that a commit or a deletion comes to that point (see `POINTS`), after
                             leaving the file `held` in the folder, so that a kill falls there
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTES, HOLD = "FAULTS_NOTES", "FAULTS_HOLD"
HELD = "held"
HOLD_SECONDS = 0.5

POINTS = ("before aside", "after aside", "before named", "after named", "in delete")
"""Where a checkpoint is renamed aside as `.replaced`, where one gets its name, and where `meta.json` is deleted."""


def main() -> None:
    """Train; nothing of torch is imported before `recsys.train` does so itself."""
    from recsys import train

    load_config = train.load_config

    def load_and_watch(*arguments: Any) -> Any:
        config = load_config(*arguments)
        watch(Path(os.environ[NOTES]))
        if hold := os.environ.get(HOLD):
            point, _, nth = hold.rpartition(" ")
            hold_at(point, int(nth), Path(os.environ[NOTES]))
        return config

    train.load_config = load_and_watch
    train.main()


def forked(environment: dict[str, str], arguments: list[str], output: str) -> None:
    """The same in a process that was forked with all imports done; what it prints goes to a file."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), number)
    sys.argv = ["train.py", *arguments]
    main()


def watch(folder: Path) -> None:
    """Note where this process begins, and the rows of each of its steps."""
    import torch
    import torch.distributed as dist

    from recsys.training import run, stage

    file = folder / f"{time.monotonic_ns()}-{os.getpid()}.jsonl"
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def note(**what: Any) -> None:
        os.write(descriptor, f"{json.dumps({'at': time.monotonic(), **what})}\n".encode())  # whole, or not at all

    taken: list[list[int]] = []
    following, step, begin = stage._Taken.__next__, stage.PhaseTrainer._step, run.Trainer.run

    def take(self: Any) -> Any:
        batch = following(self)
        taken.append(batch.dense_features[:, 1].view(torch.int32).tolist())  # `scale`, which no two rows share
        return batch

    def take_step(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        note(step=self._progress.step, epoch=self._progress.epoch, rows=taken.pop(0))

    def begin_run(self: Any) -> Any:
        attempt = [uuid.uuid4().hex]
        dist.broadcast_object_list(attempt)
        ranks, resumed = self.ranks, self.checkpoints.begun
        note(
            attempt=attempt[0],
            rank=ranks.rank,
            world_size=ranks.world_size,
            from_step=self.progress.step,
            resumed=resumed.name if resumed else None,
        )
        return begin(self)

    stage._Taken.__next__, stage.PhaseTrainer._step, run.Trainer.run = take, take_step, begin_run


def hold_at(point: str, nth: int, folder: Path) -> None:
    """Wait at a point of writing and deleting checkpoints."""
    passed = dict.fromkeys(POINTS, 0)

    def come_to(here: str) -> None:
        passed[here] += 1
        if here == point and passed[here] == nth:
            (folder / HELD).touch()
            time.sleep(HOLD_SECONDS)

    rename = Path.rename
    rmtree: Callable[..., None] = shutil.rmtree

    def watched_rename(self: Path, target: Any) -> Path:
        ends = {".replaced": "aside"}.get(Path(target).suffix, "named" if self.suffix == ".partial" else None)
        if ends:
            come_to(f"before {ends}")
        result = rename(self, target)
        if ends:
            come_to(f"after {ends}")
        return result

    def watched_rmtree(path: Any, *arguments: Any, **named: Any) -> None:
        if Path(path).name.startswith("step-") and Path(path).exists():
            come_to("in delete")
        rmtree(path, *arguments, **named)

    Path.rename, shutil.rmtree = watched_rename, watched_rmtree


if __name__ == "__main__":
    main()
