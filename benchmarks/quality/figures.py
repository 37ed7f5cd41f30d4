"""What the runs of a grid came to, in the tables that compare them."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from benchmarks.quality.grid import Case, GridConfig, RivalsConfig, Run, TableConfig
from benchmarks.quality.intervals import Difference, difference
from benchmarks.quality.stages import StageEnd, landed_ends, stage_ends, stage_rows
from benchmarks.report import Line, read, shown_path
from recsys.config import ConfigError, validate
from recsys.terminal import Rows

Spread = Mapping[str, float | None]


class _RivalModel(BaseModel):
    model: str
    name: str


class _RivalRun(BaseModel):
    model: str
    seed: int
    figures: dict[str, float | None]


class _Rivals(BaseModel):
    """What another program measured, by kind of line; further kinds and keys are its own matter."""

    model: list[_RivalModel] = []
    run: list[_RivalRun] = []


class _About(BaseModel):
    device: str


class _LandedCase(BaseModel):
    case: str
    description: str


class _LandedRun(BaseModel):
    case: str
    seed: int
    figures: dict[str, int | float | None]
    commit: str | None = None  # neither is told of rivals
    stages: dict[str, dict[str, Any]] = {}
    domains: dict[str, dict[str, float | None]] = Field({}, alias="domains after stages")

    @model_validator(mode="after")
    def _is_of_its_stages(self) -> Self:
        for name in self.domains:
            wauc = (self.stages.get(name, {}).get("over_domains") or {}).get("wauc")
            if not isinstance(wauc, int | float):
                raise ValueError(f'"domains after stages" has {name}, but "stages" has no WAUC over_domains of it')
        return self


class _Landed(BaseModel):
    """What a report of these tables says, by kind of line."""

    about: list[_About] = Field(min_length=1, max_length=1)
    case: list[_LandedCase] = []
    run: list[_LandedRun] = []


class Figures:
    """The figures of a grid's runs, as far as these are complete.

    Args:
        grid: what is compared.
        cases: its cases.
        landed: a report of the same grid (`.jsonl`), whose figures stand for runs that are not here, where config and
            overrides of their case are the same. What the config file said then is told by the run's commit alone.

    Raises:
        ConfigError: a file of rivals is there but not in the form that `RivalsConfig` gives, or `landed` is no report.

    Attributes:
        of: by case and seed, a run's figures by name; None where one is undefined, as an AUC of one class.
    """

    def __init__(self, grid: GridConfig, cases: Sequence[Case], landed: Path | None = None) -> None:
        self.grid, self.cases = grid, cases
        self.of: dict[str, dict[int, Mapping[str, float | None]]] = {case.name: {} for case in cases}
        self._summaries: dict[Run, dict[str, Any]] = {}
        self._ends: dict[Run, list[StageEnd]] = {}
        self._rivals: dict[str, str] = {}
        for case in cases:
            for run in case.runs:
                self.take(run)
            if case.rivals is not None and (rival := _rival(case.rivals)):
                self._rivals[case.name], self.of[case.name] = rival
        if landed is not None:
            self._take_landed(landed)

    def take(self, run: Run) -> bool:
        """Add a run's figures if it is complete under its settings; whether it is."""
        path = run.directory / "summary.json"
        if not path.exists() or not run.is_there:
            return False
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if summary["world_size"] != self.grid.nproc:
            return False
        self.of[run.case][run.seed] = _figures(summary)
        self._summaries[run] = summary
        self._ends[run] = stage_ends(summary, run.directory / "evaluations.jsonl")
        return True

    def _take_landed(self, path: Path) -> None:
        told = validate(_Landed, read(path), source=str(path))
        listed = [*((case.case,) for case in told.case), *((run.case, run.seed) for run in told.run)]
        if twice := [names for names, times in Counter(listed).items() if times > 1]:
            raise ConfigError(f"{path}: {', seed '.join(map(str, twice[0]))} is there twice; which counts is not told")
        described = {case.case: case.description for case in told.case}
        runs = {(run.case, run.seed): run for run in told.run}
        for case in self.cases:
            if case.rivals is not None or described.get(case.name) != self._description(case).removeprefix("- "):
                continue
            for run in case.runs:
                there = runs.get((run.case, run.seed))
                if there is None or run.seed in self.of[run.case]:
                    continue
                self.of[run.case][run.seed] = there.figures
                about = {"commit": there.commit, "device": told.about[0].device, "reference": None}
                self._summaries[run] = {**about, "stages": there.stages}
                self._ends[run] = landed_ends(there.stages, there.domains)

    def told(self, key: str) -> list[str]:
        """What the runs' summaries say under a key, each answer once."""
        return sorted({str(summary[key]) for summary in self._summaries.values()})

    def case_rows(self, *, brief: bool = False) -> list[dict[str, str]]:
        """A row for each case: its seeds, means and spreads, as many as a terminal has room for if `brief`.

        Cases that have no run yet are left out, and the trials of searches to tables of their own.
        """
        forms = {
            figure: form
            for figure, form in _SHOWN.items()
            if (figure in _BRIEF if brief else figure not in _OVER_DOMAINS or self._has(figure))
        }
        rows = []
        for case in self.cases:
            if self.of[case.name] and not self.grid.cases[case.section].search:
                there = len(self.of[case.name])
                seeds = str(there) if there == len(case.runs) or case.rivals else f"{there} of {len(case.runs)}"
                shown = {figure: form(self._spread(case.name, figure)) for figure, form in forms.items()}
                rows.append({"case": case.name, "seeds": seeds, **shown})
        return rows

    def parts(self, failed: Mapping[Run, int]) -> list[str | Rows]:
        """The page, without how it came about.

        Args:
            failed: exit codes of runs that failed.
        """
        devices = ", ".join(self.told("device")) or "no device of its own"
        parts: list[str | Rows] = [
            f"Mean ± standard deviation over seeds; ranks per run: {self.grid.nproc}, on {devices}. Best valid AUC is "
            "the highest after any stage. FLOPs are those of the dense arch's forward pass, dense parameters its own; "
            "parameters include the tables. Training seconds are the stages', without evaluation.",
        ]
        references: dict[str, dict[str, None]] = {}
        for run, summary in self._summaries.items():
            if told := summary["reference"]:
                text = f"Reference column {told['column']}: test AUC {digits(told['auc'])}, log loss "
                wauc = f", test WAUC {digits(told['over_domains']['wauc'])}" if "over_domains" in told else ""
                references.setdefault(f"{text}{digits(told['log_loss'])}{wauc}.", {})[run.case] = None
        one = len(references) == 1
        parts += sorted(text if one else f"{', '.join(cases)}: {text}" for text, cases in references.items())
        if missing := self._missing(failed):
            parts.append(f"Missing: {'; '.join(missing)}.")
        parts.append(self.case_rows())
        for table in self.grid.tables:
            explained = f"Difference from {table.baseline}; in brackets, its 95 % interval."
            if rows := self._difference_rows(table):
                parts += [f"## {table.question}", explained, rows, *([table.text] if table.text else [])]
        if rows := stage_rows(self._stages_of_cases()):
            parts += ["## What each stage adds", _STAGES, rows]
        for section in self._searches():
            if rows := self._trial_rows(section):
                parts += [f"## Search: {section}", f"{len(rows)} trials, the best on the valid split first.", rows]
        there = [case for case in self.cases if self.of[case.name]]
        return [*parts, "## Cases", "\n".join(map(self._description, there))]

    def lines(self, failed: Mapping[Run, int]) -> Iterator[Line]:
        """The same for a program: every case and, after it, its runs; then the tables and the searches."""
        for case in self.cases:
            yield from self._case_lines(case, failed)
        yield from map(self._table_line, self.grid.tables)
        for section in self._searches():
            yield {"kind": "search", "case": section, "trials": self._ranked(section)}

    def _stages_of_cases(self) -> dict[str, list[list[StageEnd]]]:
        ends = {case.name: [self._ends[run] for run in case.runs if self._ends.get(run)] for case in self.cases}
        return {name: of_runs for name, of_runs in ends.items() if of_runs}

    def _has(self, figure: str) -> bool:
        return any(figure in figures for runs in self.of.values() for figures in runs.values())

    def _spread(self, case: str, figure: str) -> Spread:
        return _spread([figures.get(figure) for figures in self.of[case].values()])

    def _difference(self, case: str, baseline: str, figure: str) -> Difference | None:
        def known(case: str) -> dict[int, float]:
            return {s: value for s, figures in self.of[case].items() if (value := figures.get(figure)) is not None}

        values, base = known(case), known(baseline)
        return difference(values, base) if values and base else None

    def _difference_rows(self, table: TableConfig) -> Rows:
        rows = []
        for case in table.cases if self.of[table.baseline] else ():
            if not self.of[case]:
                continue
            auc, loss, flops, parameters, wauc = (
                self._difference(case, table.baseline, figure) for figure in _COMPARED
            )
            rows.append(
                {
                    "case": case,
                    "compared": _how(auc),
                    "test AUC, 10⁻⁴": _in_1e4(auc),
                    "test AUC, %": _percent(auc, 3),
                    **({"test WAUC, 10⁻⁴": _in_1e4(wauc)} if self._has("test WAUC") else {}),
                    "test log loss, 10⁻⁴": _in_1e4(loss),
                    "test log loss, %": _percent(loss, 3),
                    "FLOPs, %": _percent(flops, 1),
                    "dense parameters, %": _percent(parameters, 1),
                }
            )
        return rows

    def _searches(self) -> list[str]:
        return [name for name, case in self.grid.cases.items() if case.search]

    def _trial(self, name: str) -> Mapping[str, float | None]:
        return next(iter(self.of[name].values()), {})

    def _ranked(self, section: str) -> list[str]:
        """Trials by their best valid AUC; the test split has no say in a search."""

        def auc(name: str) -> float:
            found = self._trial(name).get("best valid AUC")
            return -math.inf if found is None else found

        trials = (case.name for case in self.cases if case.section == section and self.of[case.name])
        return sorted(trials, key=auc, reverse=True)

    def _trial_rows(self, section: str) -> Rows:
        return [
            {
                "trial": name,
                "best valid AUC": digits(self._trial(name).get("best valid AUC")),
                **{figure: _SHOWN[figure](self._spread(name, figure)) for figure in ("epochs", "training seconds")},
            }
            for name in self._ranked(section)
        ]

    def _missing(self, failed: Mapping[Run, int]) -> list[str]:
        missing = []
        for case in self.cases:
            if case.rivals is not None and not self.of[case.name]:
                missing.append(f"{case.name}, from {shown_path(case.rivals.file)}")
            if case.runs and not self.of[case.name] and not any(run in failed for run in case.runs):
                missing.append(f"{case.name}, not run")
                continue
            for run in case.runs:
                if run.seed not in self.of[case.name]:
                    how = f" (FAILED with exit code {failed[run]})" if run in failed else ""
                    missing.append(f"{case.name}, seed {run.seed}{how}")
        return missing

    def _description(self, case: Case) -> str:
        if case.rivals is not None:
            model = self._rivals.get(case.name, case.rivals.model)
            return f"- {case.name}: {model}, from {shown_path(case.rivals.file)}"
        return f"- {case.name}: " + " ".join(f"`{part}`" for part in (shown_path(case.config), *case.overrides))

    def _case_lines(self, case: Case, failed: Mapping[Run, int]) -> Iterator[Line]:
        summaries = {run.seed: self._summaries[run] for run in case.runs if run in self._summaries}
        names = dict.fromkeys(name for figures in self.of[case.name].values() for name in figures)
        yield {
            "kind": "case",
            "case": case.name,
            "description": self._description(case).removeprefix("- "),
            "statistics": {name: self._spread(case.name, name) for name in names},
        }
        for seed, figures in self.of[case.name].items():
            line = {"kind": "run", "case": case.name, "seed": seed, "figures": figures}
            if seed in summaries:
                stages = _without_checkpoints(summaries[seed]["stages"])
                line |= {"commit": summaries[seed]["commit"], "stages": stages}
                if ends := next(self._ends[run] for run in case.runs if run.seed == seed):
                    line["domains after stages"] = {end.stage: end.domains for end in ends}
            yield line
        for run, code in failed.items():
            if run.case == case.name:
                yield {"kind": "failed run", "case": case.name, "seed": run.seed, "exit code": code}

    def _table_line(self, table: TableConfig) -> Line:
        differences: dict[str, Any] = {case: {} for case in table.cases}
        for case in table.cases:
            for figure in _COMPARED:
                found = self._difference(case, table.baseline, figure)
                differences[case][figure] = asdict(found) if found else None
        return {"kind": "table", "question": table.question, "baseline": table.baseline, "differences": differences}


def _rival(where: RivalsConfig) -> tuple[str, dict[int, Mapping[str, float | None]]] | None:
    """Its name, and its figures by seed; None where the file, or the model in it, is yet to come."""
    if not Path(where.file).exists():
        return None
    rivals = validate(_Rivals, read(Path(where.file)), source=where.file)
    names = {told.model: told.name for told in rivals.model}
    if where.model not in names:
        return None
    return names[where.model], {run.seed: run.figures for run in rivals.run if run.model == where.model}


def digits(value: float | None) -> str:
    """An AUC or a log loss, whose differences are in the fourth digit."""
    return "-" if value is None else f"{value:.5f}"


def _figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    test, reference, stages = summary["test"], summary["reference"], summary["stages"]
    valid = {name: stage["valid"]["auc"] for name, stage in stages.items() if stage["valid"]}
    cost = summary.get("cost", {})
    figures: dict[str, float | None] = {
        "test AUC": test["auc"],
        "test log loss": test["log_loss"],
        "test NE": test["ne"],
        "test calibration": test["calibration"],
        "best valid AUC": max((auc for auc in valid.values() if auc is not None), default=None),
        **{f"valid AUC after {name}": auc for name, auc in valid.items()},
        "FLOPs per example": _of_dense_arch(cost.get("flops")),
        "dense parameters": _of_dense_arch(cost.get("parameters")),
        "parameters": cost.get("parameters", {}).get("total"),
        "training seconds": sum(stage["seconds"] for stage in stages.values()),
        "examples": sum(stage["examples"] for stage in stages.values()),
        "epochs": sum(stage["epochs"] for stage in stages.values()),
        "examples/s": summary["examples_per_second"],
    }
    if over := summary.get("over_domains"):
        figures |= {"test WAUC": over["wauc"], "worst domain": over["worst_auc"]}
    if reference is not None:
        known = test["auc"] is not None
        figures[f"test AUC of {reference['column']}"] = reference["auc"]
        figures["gap to it"] = reference["auc"] - test["auc"] if known else None
    return figures


def _without_checkpoints(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages as a summary tells them, but for where their checkpoints were, which are gone."""
    return {name: {key: value for key, value in stage.items() if key != "checkpoint"} for name, stage in stages.items()}


def _of_dense_arch(parts: Mapping[str, int] | None) -> int | None:
    return parts["total"] - parts["embedding"] if parts else None


def _spread(values: Collection[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):  # a mean over some of the runs would pass for one over all
        return dict.fromkeys(("mean", "standard deviation", "min", "max"))
    deviation = stdev(known) if len(known) > 1 else None
    return {"mean": mean(known), "standard deviation": deviation, "min": min(known), "max": max(known)}


def _with_deviation(spread: Spread) -> str:
    deviation = spread["standard deviation"]
    return digits(spread["mean"]) + ("" if deviation is None else f" ± {deviation:.5f}")


def _to_digits(places: int) -> Callable[[Spread], str]:
    return lambda spread: "-" if spread["mean"] is None else f"{spread['mean']:,.{places}f}"


_SHOWN: Mapping[str, Callable[[Spread], str]] = {
    "test AUC": _with_deviation,
    "test log loss": _with_deviation,
    "test WAUC": _with_deviation,
    "worst domain": _with_deviation,
    "best valid AUC": _with_deviation,
    "FLOPs per example": _to_digits(0),
    "dense parameters": _to_digits(0),
    "parameters": _to_digits(0),
    "training seconds": _to_digits(1),
    "examples": _to_digits(0),
    "epochs": _to_digits(1),
}
_STAGES = (
    "Valid WAUC of the state that a stage ended with, what the stage changed, and how many domains' AUCs it raised and "
    "lowered. A stage that ends with the state it began with has changed nothing."
)
_BRIEF = ("test AUC", "test log loss", "best valid AUC", "training seconds")
_OVER_DOMAINS = ("test WAUC", "worst domain")
_COMPARED = ("test AUC", "test log loss", "FLOPs per example", "dense parameters", "test WAUC")


def _how(found: Difference | None) -> str:
    if found is None:
        return "-"
    return f"{found.pairs} pair{'s' * (found.pairs > 1)} of one seed" if found.pairs else "means (Welch)"


def _in_1e4(found: Difference | None) -> str:
    if found is None:
        return "-"
    interval = f"{found.interval[0] * 1e4:+.1f}, {found.interval[1] * 1e4:+.1f}" if found.interval else "-"
    return f"{found.mean * 1e4:+.1f} [{interval}]"


def _percent(found: Difference | None, places: int) -> str:
    return "-" if found is None else f"{100 * found.relative:+.{places}f}"
