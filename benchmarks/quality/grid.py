"""What `quality.py` compares: the schema of `benchmarks/grids/*.yaml`, and the runs that such a file asks for."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from recsys.config import Config, ConfigError, Name, Section, load_config, read_yaml, validate

_MAX_NAME = 200
"""Bytes of a trial's name that its folder has; file systems know no name of more than 255."""

Overrides = tuple[str, ...]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class RivalsConfig(Section):
    """Another program's figures: those of `model` in a file of JSON lines, of which two kinds are read.

    {"kind": "model", "model": "<model>", "name": "<its full name>"}
    {"kind": "run", "model": "<model>", "seed": <seed>, "figures": {"test AUC": ..., ...}}
    """

    file: str
    model: str


class CaseConfig(Section):
    """One thing to train and measure; null settings are the grid's, whose `overrides` come first.

    `search` maps config paths to the values to try: every combination is a trial with the case's first seed, ranked by
    the valid split and part of no table but its own. A case of `rivals` is trained elsewhere.
    """

    config: str | None = None
    overrides: Overrides = ()
    seeds: Seeds | None = None
    search: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    rivals: RivalsConfig | None = None

    @model_validator(mode="after")
    def _rivals_stand_alone(self) -> Self:
        if self.rivals is not None and self.model_fields_set != {"rivals"}:
            raise ValueError("rivals are trained elsewhere, so nothing else can be set for them")
        return self


class TableConfig(Section):
    """One question: `cases`, each against `baseline`; `text` is put below the figures."""

    question: str
    baseline: str
    cases: Annotated[tuple[str, ...], Field(min_length=1)]
    text: str | None = None


class LogConfig(Section):
    """What every case is trained on in turn; `config` is the grid's where null, `cases` has overrides of some more."""

    config: str | None = None
    overrides: Overrides = ()
    cases: dict[Name, Overrides] = Field(default_factory=dict)


class LogsConfig(Section):
    """The part of a grid of several logs that says which cases and tables there are of each."""

    logs: Annotated[dict[Name, LogConfig], Field(min_length=1)]
    cases: Annotated[dict[Name, CaseConfig], Field(min_length=1)]
    tables: tuple[TableConfig, ...] = ()

    @model_validator(mode="after")
    def _logs_stand_apart(self) -> Self:
        for name, case in self.cases.items():
            if case.config is not None or case.rivals is not None:
                raise ValueError(f"cases.{name}: config and rivals are of one log, and logs names several")
        for name, log in self.logs.items():
            if unknown := log.cases.keys() - self.cases.keys():
                raise ValueError(f"logs.{name}.cases: no case {min(unknown)!r}; there are {', '.join(self.cases)}")
        made = Counter(f"{name}_{of}" for of in self.logs for name in self.cases)
        if twice := [name for name, times in made.items() if times > 1]:
            raise ValueError(
                f"two cases on logs are called {twice[0]!r}, as <case>_<log>; call a case or a log otherwise"
            )
        return self

    def expanded(self) -> dict[str, Any]:
        """Cases and tables of all logs: `<case>_<log>` is a case on a log, whose overrides come first."""
        cases = {
            f"{name}_{of}": case.model_copy(
                update={
                    "config": log.config,
                    "overrides": (*log.overrides, *case.overrides, *log.cases.get(name, ())),
                }
            )
            for of, log in self.logs.items()
            for name, case in self.cases.items()
        }
        tables = [
            {
                "question": f"{table.question}, on {of}",
                "baseline": f"{table.baseline}_{of}",
                "cases": [f"{name}_{of}" for name in table.cases],
                "text": table.text,
            }
            for of in self.logs
            for table in self.tables
        ]
        return {"cases": {name: case.model_dump(exclude_unset=True) for name, case in cases.items()}, "tables": tables}


class GridConfig(Section):
    """A whole grid; paths are relative to the working directory. See docs/benchmarks.md for every key."""

    name: Name
    config: str
    nproc: PositiveInt = 1
    seeds: Seeds
    overrides: Overrides = ()
    cases: Annotated[dict[Name, CaseConfig], Field(min_length=1)]
    tables: tuple[TableConfig, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sections: dict[str, GridConfig | CaseConfig] = {f"cases.{name}.": case for name, case in self.cases.items()}
        for where, section in {"": self, **sections}.items():
            seeds = section.seeds or ()
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{where}seeds: one stands twice; its run would only repeat the other")
            for override in section.overrides:
                if override.partition("=")[0] in ("seed", "output_dir"):
                    raise ValueError(f"{where}overrides: {override} is the grid's to set, by seeds and --runs")
        for index, table in enumerate(self.tables):
            for name in (table.baseline, *table.cases):
                if name not in self.cases:
                    raise ValueError(f"tables.{index}: no case {name!r}; there are {', '.join(self.cases)}")
                if self.cases[name].search:
                    raise ValueError(
                        f"tables.{index}: case {name!r} is a search, whose trials have a table of their own"
                    )
        return self


@dataclass(frozen=True)
class Run:
    """One training of a case, in `directory`; `config` is what `path` and `overrides` make."""

    case: str
    seed: int
    directory: Path
    path: str
    overrides: Overrides
    config: Config = field(compare=False)

    @property
    def log(self) -> Path:
        """What the run says, beside its directory."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def config_there(self) -> Path:
        """What its directory's run was begun with."""
        return self.directory / "config.yaml"

    @property
    def is_there(self) -> bool:
        """Whether its directory's run, complete or not, was begun with these settings.

        Keys that the config has had since then count as if they had been at their defaults.
        """
        try:
            begun_with = load_config(self.config_there)
        except ConfigError:  # or what is there is none of this version's
            return False
        return begun_with.model_copy(update={"resume": self.config.resume}) == self.config

    @property
    def makes_way(self) -> bool:
        """Whether its directory's run was begun with other settings, and so must be kept aside, complete or not."""
        return self.config.resume == "auto" and self.config_there.exists() and not self.is_there


@dataclass(frozen=True)
class Case:
    """A row of the report: settings that are trained once per seed, or the file with what others trained.

    Attributes:
        name: the case's, and for a trial of a search its values.
        section: the case's own name, which a search's trials share.
        config: path of the YAML file; empty for rivals.
        overrides: the grid's, the case's and the trial's.
        runs: one per seed; none for rivals.
        rivals: where their figures are.
    """

    name: str
    section: str
    config: str
    overrides: Overrides
    runs: tuple[Run, ...]
    rivals: RivalsConfig | None = None


def load_grid(path: str | Path) -> GridConfig:
    """Read a grid.

    Raises:
        ConfigError: the file cannot be read or is a study, or values are not allowed; each is listed, one a line.
    """
    raw = read_yaml(Path(path), "grid", remedy="benchmarks/grids has some")
    if "space" in raw and "cases" not in raw:
        raise ConfigError(f"{path} is a study, and no grid; take python -m benchmarks.quality search {path}")
    if "logs" in raw:
        of_logs = {key: raw.pop(key) for key in LogsConfig.model_fields if key in raw}
        raw |= validate(LogsConfig, of_logs, source=str(path)).expanded()
    return validate(GridConfig, raw, source=str(path))


def cases_of(grid: GridConfig, runs: Path) -> list[Case]:
    """All cases in the grid's order, a search as one case per trial, their configs loaded.

    Args:
        grid: what to compare.
        runs: the directory of the grid's runs; each gets `<case>/seed-<n>` there.

    Raises:
        ConfigError: a case's config is wrong or has no test split.
    """
    return [case for name in grid.cases for case in _expand(grid, name, runs)]


def _expand(grid: GridConfig, section: str, runs: Path) -> Iterator[Case]:
    case = grid.cases[section]
    if case.rivals is not None:
        yield Case(section, section, "", (), (), case.rivals)
        return
    path, seeds = case.config or grid.config, case.seeds or grid.seeds
    if not case.search:
        overrides = (*grid.overrides, *case.overrides)
        yield Case(section, section, path, overrides, _runs(section, path, overrides, seeds, runs))
        return
    for values in itertools.product(*case.search.values()):
        trial = {key: json.dumps(value) for key, value in zip(case.search, values, strict=True)}
        overrides = (*grid.overrides, *case.overrides, *(f"{key}={value}" for key, value in trial.items()))
        name = f"{section}[{', '.join(f'{short_path(key, case.search)}={value}' for key, value in trial.items())}]"
        yield Case(name, section, path, overrides, _runs(name, path, overrides, seeds[:1], runs))


def _runs(case: str, path: str, overrides: Overrides, seeds: Sequence[int], runs: Path) -> tuple[Run, ...]:
    made = []
    for seed in seeds:
        directory = runs / _folder(case) / f"seed-{seed}"
        full = (*overrides, f"seed={seed}", f"output_dir={json.dumps(str(directory))}")
        try:
            config = load_config(path, full)
        except ConfigError as error:
            raise ConfigError(f"cases.{case}: {error}") from None
        if config.data.test is None:
            raise ConfigError(f"cases.{case}: data.test is not set; quality is what a model shows on held-out data")
        made.append(Run(case, seed, directory, path, full, config))
    return tuple(made)


def _folder(case: str) -> str:
    """A case's folder: its name, with a digest where a trial tries paths or so much that no file can be called so."""
    if "/" not in case and len(case.encode()) <= _MAX_NAME:
        return case
    start = case.replace("/", "_").encode()[:_MAX_NAME].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(case.encode()).hexdigest()[:12]}"


def short_path(path: str, others: Iterable[str]) -> str:
    """The last part of a config path where that tells it from the others."""
    last = path.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else path
