"""Runs that are killed and go on, held against runs that were not: `make test-faults`.

Trials are drawn by seed and number. Each trains a small config in three stages, is killed up to four times in a row,
and is launched again by the same command until it ends with exit code 0. Each is one JSON line in FOLDER/trials.jsonl,
and so is each uninterrupted run that they are held against; whoever is cut off goes on behind the last.

A trial is sound if the last checkpoint of the same number of ranks has the same bits (all tensors, by hash) and its
progress and the summary the same figures, what has to do with time left out; if, whatever the number of ranks, each row
was trained on exactly once in its epoch, the final AUC is where other seeds' are, each attempt went on from the newest
whole checkpoint, nothing was left running after a kill, and nothing beside the checkpoints that are to be kept.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from faults.launches import Launch, is_running, launch, warm_up
from faults.notes import Notes, lineage, rows_lost_and_twice
from faults.rank import HELD, HOLD, NOTES, POINTS
from tiny import tiny_config, write_tiny_log

from recsys.checkpoint.layout import META, PROGRESS
from recsys.checkpoint.tensors import TensorReader
from recsys.versions import git_commit

ROWS = {
    "valid": 200,
    "train": 960,
    "test": 251,
}  # train: whole steps on 1, 2 and 3 ranks, at whose last one saves fall together
SEEDS = (17, 18, 19)
ASIDE = ("seconds", "examples_per_second", "data_wait", "checkpoint", "checkpoint_wait", "waited", "commit")
"""What summary and progress tell of time, place and the checkout."""

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SPREAD = 3.0  # standard deviations of other seeds' AUC
ORPHAN_SECONDS = 10.0
HANG_SECONDS = 120.0
MOST_LAUNCHES = 12

_POLL_SECONDS = 0.004


@dataclass(frozen=True)
class Kill:
    """A signal at a moment.

    Attributes:
        to: `one rank`, `all ranks`, `torchrun` or `torchx`.
        by: the signal.
        moment: `clock` is a share `at` of the time that is left, start-up included; `step` is that share of the steps
            left; `save` is the first save seen from there on; else one of `POINTS`, held open.
        at: from 0 to 1; at a point, how often it is passed before.
        delay: seconds from the moment to the kill.
        rank: which of the ranks, as a share of them.
    """

    to: str
    by: signal.Signals
    moment: str
    at: float
    delay: float
    rank: float


@dataclass(frozen=True)
class Plan:
    """A trial.

    Attributes:
        number: by which it is drawn.
        launcher: one of `LAUNCHERS`.
        restarts: how often torchrun may start ranks again by itself.
        world_sizes: number of ranks of each launch; the last holds for all that follow.
        asynchronous: whether checkpoints are written in the background.
        kills: one after another.
    """

    number: int
    launcher: str
    restarts: int
    world_sizes: tuple[int, ...]
    asynchronous: bool
    kills: tuple[Kill, ...]


TARGETS = {
    "forked": [("one rank", KILL, 5), ("all ranks", KILL, 4), ("one rank", TERM, 2), ("all ranks", INT, 1)],
    "python": [("one rank", KILL, 5), ("one rank", TERM, 1), ("one rank", INT, 1)],
    "torchrun": [
        ("one rank", KILL, 3),
        ("all ranks", KILL, 1),
        ("torchrun", KILL, 4),
        ("one rank", TERM, 1),
        ("torchrun", TERM, 2),
        ("torchrun", INT, 1),
    ],
    "torchx": [
        ("one rank", KILL, 2),
        ("torchrun", KILL, 2),
        ("torchx", KILL, 4),
        ("torchx", TERM, 2),
        ("one rank", TERM, 1),
    ],
}
MOMENTS = [("clock", 4), ("step", 5), ("save", 6), *((point, 1) for point in POINTS)]


def draw(seed: int, number: int) -> Plan:
    """A trial by seed and number; every fourth has a real launcher."""
    chance = random.Random(f"{seed} {number}")
    launcher = "forked" if number % 4 else chance.choice(["python", "torchrun", "torchrun", "torchx", "torchx"])
    world_size = 1 if launcher == "python" else chance.choice([1, 2, 3] if launcher == "forked" else [2, 3])
    restarts = chance.choice([0, 0, 3]) if launcher in ("torchrun", "torchx") else 0
    kills = []
    for _ in range(chance.choice([1, 2, 2, 3, 4] if launcher == "forked" else [1, 1, 2])):
        targets = TARGETS[launcher]
        ((to, by, _),) = chance.choices(targets, [weight for *_, weight in targets])
        moments = [one for one in MOMENTS if not (restarts and one[0] in POINTS)]  # a new launch is told where to hold
        ((moment, _),) = chance.choices(moments, [weight for _, weight in moments])
        at, delay = chance.random(), chance.choice([0.0, chance.uniform(0, 0.02)])
        if moment in POINTS:
            at = chance.randrange(2 if "aside" in moment else 4)
        kills.append(Kill(to, by, moment, at, delay, chance.random()))
    sizes = [world_size]
    if launcher != "python" and not restarts and chance.random() < 0.3:
        sizes += [chance.choice([1, 2, 3] if launcher == "forked" else [2, 3]) for _ in kills]
    return Plan(number, launcher, restarts, tuple(sizes), chance.random() < 0.7, tuple(kills))


@dataclass
class Outcome:
    """What became of a trial; see `faults` for what must not be."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    launches: int = 0
    failures: list[str] = field(default_factory=list)
    world_size: int = 0
    mixed: bool = False
    rows_lost: int = 0
    rows_twice: int = 0
    order_differs: bool = False
    bits_differ: bool | None = None
    figures_differ: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    auc: float | None = None
    auc_off: bool = False
    seconds: float = 0.0

    def faults(self) -> list[str]:
        """What must not be, by name."""
        found = {
            "failures": self.failures,
            "rows lost": self.rows_lost,
            "rows twice": self.rows_twice,
            "order": self.order_differs,
            "bits": self.bits_differ,
            "figures": self.figures_differ,
            "leftovers": self.leftovers,
            "auc": self.auc_off,
            "orphans": sum(kill["orphans"] for kill in self.kills),
            "not the newest": [kill for kill in self.kills if kill.get("not_newest")],
        }
        return [name for name, value in found.items() if value]


class Workshop:
    """A folder with the data, the results so far, and what trials leave.

    Args:
        folder: made if it is not there.
        seed: by which trials are drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.resolve(), seed
        self.results = self.folder / "trials.jsonl"
        if not (self.folder / "data").exists():
            write_tiny_log(self.folder / "data.partial", ROWS)
            (self.folder / "data.partial").rename(self.folder / "data")
        shards = [pq.read_table(file, columns=["z"]) for file in (self.folder / "data/train").glob("*.parquet")]
        self.rows = {row for shard in shards for row in shard["z"].to_numpy().astype("f4").view("i4").tolist()}
        assert len(self.rows) == ROWS["train"]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Results so far; a line that was cut off is none."""
        found = []
        with suppress(FileNotFoundError):
            for line in self.results.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    found.append(json.loads(line))
        return [line for line in found if line["kind"] == kind and line.get("seed", self.seed) == self.seed]

    def record(self, **line: Any) -> None:
        """Add a result."""
        text = self.results.read_bytes() if self.results.exists() else b""
        if text and not text.endswith(b"\n"):  # cut off within a line
            self.results.write_bytes(text[: text.rfind(b"\n") + 1])
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def reference(self, launcher: str, world_size: int, seed: int = SEEDS[0]) -> dict[str, Any]:
        """An uninterrupted run, made if there is none yet."""
        of = {"launcher": launcher, "world_size": world_size, "config_seed": seed}
        for line in self.lines("reference"):
            if of.items() <= line.items():
                return line
        if launcher == "forked":
            warm_up()
        folder = self.folder / f"reference-{launcher}-{world_size}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(self, folder, asynchronous=True, config_seed=seed)
        began = time.monotonic()
        process = run.launch(launcher, world_size)
        try:
            status, ended = process.wait(HANG_SECONDS), time.monotonic()
        finally:
            process.clear()
        assert status == 0, f"an uninterrupted run ends with {status}:\n{run.log()}"
        (attempt,) = run.notes.attempts()
        assert attempt.first_step is not None and list(attempt.steps) == sorted(attempt.steps)
        epochs = 1 + max(epoch for epoch, _ in attempt.steps.values())
        assert rows_lost_and_twice(attempt.steps, self.rows, epochs) == (0, 0)
        found = {
            "kind": "reference",
            "seed": self.seed,
            **of,
            "start_up": attempt.first_step - began,
            "training": ended - attempt.first_step,
            "epochs": epochs,
            "order": order_of(attempt.steps),
            **run.end(),
        }
        self.record(**found)
        shutil.rmtree(folder)
        return found

    def auc_of_seeds(self) -> list[float]:
        """Final AUC of uninterrupted runs, of all seeds and numbers of ranks."""
        return [self.reference("forked", size, seed)["summary"]["test"]["auc"] for size in (1, 2, 3) for seed in SEEDS]


class Run:
    """A run of the small config in a folder of its own, launched as often as one likes."""

    def __init__(self, workshop: Workshop, folder: Path, *, asynchronous: bool, config_seed: int) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "notes").mkdir(parents=True)
        raw = tiny_config(workshop.folder / "data", self.out)
        raw["seed"] = config_seed
        raw["features"]["sparse"]["tags"]["max_length"] = 2  # so that something is counted
        raw["data"]["reader_threads"] = 1
        # Gradients of several tens of KiB: how three ranks add them up depends on where in a bucket they are.
        raw["model"]["tower"] |= {"hidden": [160, 64], "dropout": 0.1}
        raw["stages"]["backbone"] |= {"patience": 1, "epochs": 3}
        raw["stages"]["experts"] |= {"patience": 1, "monitor": "auc"}
        raw["stages"]["joint"] |= {"epochs": 1}
        del raw["stages"]["joint"]["steps"]
        raw["logging"] = {"every_steps": 4, "eval_every_steps": 9}
        raw["checkpoints"] = {"every_steps": 5, "asynchronous": asynchronous}
        (folder / "config.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        self.notes = Notes(folder / "notes")

    def launch(self, launcher: str, world_size: int, restarts: int = 0, hold: str = "") -> Launch:
        """Launch it; always by the same command."""
        environment = {NOTES: str(self.folder / "notes"), HOLD: hold}
        arguments = ["--config", str(self.folder / "config.yaml")]
        (self.folder / "notes" / HELD).unlink(missing_ok=True)
        return launch(launcher, world_size, restarts, arguments, self.folder, environment)

    def log(self) -> str:
        """The last of what it printed."""
        files = [self.folder / "log", *self.folder.glob("logs/**/[0-9]/std???.log")]
        return "\n".join("\n".join(file.read_text().splitlines()[-30:]) for file in files if file.exists())

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here."""
        with suppress(FileNotFoundError):
            return bool(json.loads((self.out / "run.json").read_text())["state"] == "finished")
        return False

    def newest_whole(self) -> str | None:
        """Name of the newest checkpoint that has its name, or that another was just about to take it from."""
        names = {path.parent.name.removesuffix(".replaced") for path in self.out.glob(f"checkpoints/step-*/{META}")}
        return max((name for name in names if "." not in name), key=lambda name: int(name[5:]), default=None)

    def is_within_save(self) -> bool:
        """Whether what was killed was writing, renaming or deleting a checkpoint."""
        found = list(self.out.glob("checkpoints/step-*"))
        return any("." in path.name or not (path / META).exists() for path in found)

    def end(self) -> dict[str, Any]:
        """What is left of it when it is over: summary, progress, hash of the last checkpoint, names of all."""
        summary = json.loads((self.out / "summary.json").read_text())
        checkpoint = Path(summary["checkpoint"])
        return {
            "summary": without_circumstances(summary),
            "progress": without_circumstances(json.loads((checkpoint / PROGRESS).read_text())),
            "steps": summary["steps"],
            "bits": hash_of(checkpoint),
            "checkpoints": sorted(path.name for path in self.out.glob("checkpoints/*")),
        }


def without_circumstances(value: Any) -> Any:
    """JSON without what is other in every run."""
    if isinstance(value, dict):
        return {key: without_circumstances(item) for key, item in value.items() if key not in ASIDE}
    return value


def hash_of(checkpoint: Path) -> str:
    """SHA-256 of all tensors of a checkpoint: names, types, shapes and bytes, by name."""
    reader, digest = TensorReader(checkpoint), hashlib.sha256()
    for name in sorted(reader.names):
        tensor = reader.read(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def order_of(steps: Mapping[int, tuple[int, Mapping[int, Sequence[int]]]]) -> str:
    """SHA-256 of the rows of each step on each rank, in their order."""
    told = [
        (step, epoch, sorted((rank, list(rows)) for rank, rows in of.items())) for step, (epoch, of) in steps.items()
    ]
    return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()


class Trial:
    """A run that is killed as planned and launched again until it ends."""

    def __init__(self, workshop: Workshop, plan: Plan) -> None:
        self._workshop, self._plan = workshop, plan
        folder = workshop.folder / f"trial-{plan.number}"
        shutil.rmtree(folder, ignore_errors=True)
        self.run = Run(workshop, folder, asynchronous=plan.asynchronous, config_seed=SEEDS[0])
        self.outcome = Outcome()
        self._process: Launch | None = None
        self._launched_at = 0.0
        self._expected: str | None = None
        self._unrecovered: tuple[float, dict[str, Any]] | None = None

    def __call__(self) -> Outcome:
        """Carry it out; what it leaves on the disk is deleted if nothing is wrong."""
        for size in self._plan.world_sizes:
            self._workshop.reference(self._plan.launcher, size)  # now, not while something runs
        self._workshop.reference("forked", self._plan.world_sizes[-1])
        began = time.monotonic()
        try:
            for kill in self._plan.kills:
                self._kill(kill)
            self._finish()
            if self.run.is_finished:
                self._check()
        finally:
            if self._process is not None:
                self._process.clear()
        self.outcome.seconds = time.monotonic() - began
        if not self.outcome.faults():
            shutil.rmtree(self.run.folder)
        return self.outcome

    def _launch(self, kill: Kill | None) -> Launch:
        sizes, launches = self._plan.world_sizes, self.outcome.launches
        hold = f"{kill.moment} {int(kill.at) + 1}" if kill and kill.moment in POINTS else ""
        self._expected, self._launched_at = self.run.newest_whole(), time.monotonic()
        self.outcome.world_size = sizes[min(launches, len(sizes) - 1)]
        self.outcome.launches += 1
        return self.run.launch(self._plan.launcher, self.outcome.world_size, self._plan.restarts, hold)

    def _kill(self, kill: Kill) -> None:
        """Kill what is running, or is launched for it; nothing happens if the run ends before the moment comes."""
        if self.run.is_finished:
            return
        self._process = process = self._process or self._launch(kill)
        if not self._await_moment(process, kill):
            self._take_end(process)
            return
        targets = process.pids("rank" if "rank" in kill.to else kill.to)
        if kill.to == "one rank" and targets:
            targets = [sorted(targets)[int(kill.rank * len(targets))]]
        self._recover()
        ranks, killed_at = process.ranks(), time.monotonic()
        if not [pid for pid in targets if send(pid, kill.by)]:
            return
        told = {**asdict(kill), "by": kill.by.name, "world_size": self.outcome.world_size, "orphans": 0}
        self.outcome.kills.append(told)
        self._unrecovered = killed_at, told
        if self._plan.restarts and "rank" in kill.to:
            self._await_restart(process, ranks, told, killed_at)
        else:
            self._await_end(process, kill, told, killed_at)

    def _await_restart(self, process: Launch, ranks: list[int], told: dict[str, Any], killed_at: float) -> None:
        """Wait until torchrun has started the ranks again, and they have begun."""
        until = killed_at + HANG_SECONDS
        while process.poll() is None and time.monotonic() < until:
            if any(attempt.began > killed_at for attempt in self.run.notes.attempts()):
                told["orphans"] = sum(map(is_running, ranks))
                self._launched_at = killed_at
                return
            time.sleep(0.05)
        if process.poll() is None:
            self.outcome.failures.append(f"no restart: {self.run.log()}")
        self._take_end(process, killed=True)

    def _await_end(self, process: Launch, kill: Kill, told: dict[str, Any], killed_at: float) -> None:
        status = process.wait(HANG_SECONDS)
        until = time.monotonic() + ORPHAN_SECONDS
        while (left := process.left()) and time.monotonic() < until:
            time.sleep(0.02)
        told |= {
            "status": status,
            "seconds_to_end": time.monotonic() - killed_at,
            "orphans": len(left),
            "within_save": self.run.is_within_save(),
            "finished": self.run.is_finished,
        }
        if status is None:
            self.outcome.failures.append(f"hangs after {kill.by.name}: {self.run.log()}")
        self._take_end(process, killed=True)

    def _take_end(self, process: Launch, *, killed: bool = False) -> None:
        """The run under way has ended, or must."""
        status = process.poll()
        if not killed and status != 0:
            self.outcome.failures.append(f"ended with {status} unkilled: {self.run.log()}")
        process.clear()
        self._recover()
        self._process = None

    def _recover(self) -> None:
        """Note how the last kill was recovered from, once an attempt has begun since."""
        if self._unrecovered is None:
            return
        killed_at, told = self._unrecovered
        later = [attempt for attempt in self.run.notes.attempts() if attempt.began > killed_at]
        if not later:
            return
        told["resumed"] = later[0].resumed
        if later[0].first_step is not None:
            told["seconds_to_recover"] = later[0].first_step - self._launched_at
        if "status" in told and told["resumed"] != self._expected:
            told["not_newest"] = f"{told['resumed']} instead of {self._expected}"
        self._unrecovered = None

    def _await_moment(self, process: Launch, kill: Kill) -> bool:
        """Wait for a kill's moment; false if the run ends before."""
        size, since = self.outcome.world_size, self._launched_at
        reference = self._workshop.reference(self._plan.launcher, size)
        attempts = self.run.notes.attempts()
        earlier = [attempt for attempt in attempts if attempt.began < since]
        done = len(lineage(earlier)) / reference["steps"] if earlier else 0.0
        left = max(0.1, 1.0 - done)
        steps_wanted = int(kill.at * left * reference["steps"])
        clock = since + reference["start_up"] + kill.at * left * reference["training"]
        if kill.moment == "clock":
            clock = since + kill.at * (reference["start_up"] + left * reference["training"])
        held = self.run.folder / "notes" / HELD
        until = time.monotonic() + HANG_SECONDS
        while process.poll() is None and time.monotonic() < until:
            if kill.moment == "clock" and time.monotonic() >= clock and process.ranks():
                return True
            if kill.moment in POINTS and held.exists():
                time.sleep(kill.delay)
                return True
            is_late = kill.moment in ("step", "save") and self._steps_since(since) > steps_wanted
            if is_late and (kill.moment == "step" or any(self.run.out.glob("checkpoints/*.partial"))):
                time.sleep(kill.delay)
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _steps_since(self, moment: float) -> int:
        return sum(len(attempt.steps) for attempt in self.run.notes.attempts() if attempt.began > moment)

    def _finish(self) -> None:
        """Launch the run until it has ended."""
        while not self.run.is_finished and self.outcome.launches < MOST_LAUNCHES and len(self.outcome.failures) < 3:
            self._process = process = self._process or self._launch(None)
            status = process.wait(HANG_SECONDS)
            if status is None:
                self.outcome.failures.append("hangs")
            self._take_end(process)
        if not self.run.is_finished:
            self.outcome.failures.append(f"did not end: {self.run.log()}")

    def _check(self) -> None:
        """Hold what it left against the run that was not interrupted."""
        outcome, run = self.outcome, self.run
        attempts = run.notes.attempts()
        steps = lineage(attempts)
        whole = self._workshop.reference("forked", attempts[-1].world_size)
        outcome.world_size = attempts[-1].world_size
        outcome.mixed = {len(by_rank) for _, by_rank in steps.values()} != {outcome.world_size}
        epochs = 1 + max(epoch for epoch, _ in steps.values())
        outcome.rows_lost, outcome.rows_twice = rows_lost_and_twice(steps, self._workshop.rows, epochs)
        end = run.end()
        outcome.auc = end["summary"]["test"]["auc"]
        kept = [name for name in end["checkpoints"] if name.removeprefix("step-").isdecimal()]
        outcome.leftovers = [name for name in end["checkpoints"] if name not in kept]
        if len(kept) != len(whole["checkpoints"]):
            outcome.leftovers += kept
        if outcome.mixed:
            seeds = self._workshop.auc_of_seeds()
            outcome.auc_off = abs(outcome.auc - statistics.mean(seeds)) > SPREAD * statistics.stdev(seeds)
        else:
            outcome.order_differs = order_of(steps) != whole["order"]
            outcome.bits_differ = end["bits"] != whole["bits"]
            outcome.figures_differ = [key for key in ("summary", "progress", "steps") if end[key] != whole[key]]
            if end["checkpoints"] != whole["checkpoints"]:
                outcome.leftovers = outcome.leftovers or end["checkpoints"]


def send(pid: int, number: signal.Signals) -> bool:
    """Signal a process; false if it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def trials(workshop: Workshop, kills: int) -> Iterator[tuple[Plan, Outcome]]:
    """Carry out the trials that are not recorded yet, until so many kills have been made in all."""
    done = {line["number"]: len(line["kills"]) for line in workshop.lines("trial")}
    number, made = 0, 0
    while made < kills:
        if number not in done:
            plan = draw(workshop.seed, number)
            outcome = Trial(workshop, plan)()
            workshop.record(
                kind="trial",
                seed=workshop.seed,
                number=number,
                commit=git_commit(),
                launcher=plan.launcher,
                restarts=plan.restarts,
                asynchronous=plan.asynchronous,
                faults=outcome.faults(),
                **asdict(outcome),
            )
            done[number] = len(outcome.kills)
            yield plan, outcome
        made += done[number]
        number += 1
