"""What a search tries: the schema of a study, the settings that its space holds, and the runs of one trial."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, field_validator, model_validator

from benchmarks.quality.grid import Overrides, Run, Seeds
from recsys.config import Config, ConfigError, Name, Section, load_config, read_yaml, validate

Figure = tuple[Literal["auc", "log_loss"], Literal["maximize", "minimize"]]

OBJECTIVES: Mapping[str, Figure] = {"valid AUC": ("auc", "maximize"), "valid log loss": ("log_loss", "minimize")}

HIDDEN = "data.test=null"
"""Of every run of a search: what chooses settings must not see the test split."""


class IntegersConfig(Section):
    """Whole numbers from `low` to `high`, both included, `step` apart; `log` draws them on a logarithmic scale."""

    low: int
    high: int
    log: bool = False
    step: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        _check_range(self.low, self.high, log=self.log, step=self.step)
        return self


class ParameterConfig(Section):
    """One setting: `choices`, or numbers from `low` to `high`, both included, or whole ones (`int`)."""

    choices: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    int: IntegersConfig | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        given = self.model_fields_set
        if given not in ({"choices"}, {"int"}) and not {"low", "high"} <= given <= {"low", "high", "log", "step"}:
            raise ValueError("give choices, or low and high (with log or step), or int with those within, and no two")
        if self.low is not None and self.high is not None:
            _check_range(self.low, self.high, log=self.log, step=self.step)
        if self.choices is not None and len(set(map(json.dumps, self.choices))) < len(self.choices):
            raise ValueError("choices: one stands twice")
        return self

    def distribution(self) -> BaseDistribution:
        """The setting as optuna draws it; a choice by its JSON, as any value may be one."""
        if self.choices is not None:
            return CategoricalDistribution([json.dumps(choice) for choice in self.choices])
        if self.int is not None:
            return IntDistribution(self.int.low, self.int.high, log=self.int.log, step=self.int.step or 1)
        assert self.low is not None and self.high is not None
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def extremes(self) -> tuple[JsonValue, ...]:
        """The choices, or the ends of the range."""
        if self.choices is not None:
            return self.choices
        return (self.int.low, self.int.high) if self.int is not None else (self.low, self.high)


class PruningConfig(Section):
    """Which trials end early: those that are not among the best `percentile` % of complete ones at an evaluation.

    `startup_trials` must be complete before any is pruned, and the first `warmup_evaluations` of a trial prune none.
    """

    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0
    startup_trials: PositiveInt = 5
    warmup_evaluations: NonNegativeInt = 0


class StudyConfig(Section):
    """A whole study; paths are relative to the working directory. See docs/benchmarks.md for every key."""

    name: Name
    config: str
    nproc: PositiveInt = 1
    overrides: Overrides = ()
    space: Annotated[dict[str, ParameterConfig], Field(min_length=1)]
    seeds: Seeds
    objective: Literal["valid AUC", "valid log loss"] = "valid AUC"
    trials: PositiveInt
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    sampler_seed: NonNegativeInt = 0
    random_trials: PositiveInt = 10
    pruning: PruningConfig | None = PruningConfig()

    @field_validator("seeds")
    @classmethod
    def _once_each(cls, seeds: Seeds) -> Seeds:
        if len(set(seeds)) < len(seeds):
            raise ValueError("one stands twice; its run would only repeat the other")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for path in (*self.space, *(override.partition("=")[0] for override in self.overrides)):
            if path in ("seed", "output_dir"):
                raise ValueError(f"{path}: is the study's to set, by seeds and --runs")
        for one, other in itertools.permutations(self.space, 2):
            if other.startswith(f"{one}."):
                raise ValueError(
                    f"space.{other}: lies within {one}, which is tried as well; write whole values of {one} as choices"
                )
        return self

    @property
    def figure(self) -> str:
        """The objective's name among a run's figures."""
        return OBJECTIVES[self.objective][0]

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Whether more of the objective is better, or less."""
        return OBJECTIVES[self.objective][1]


def load_study(path: str | Path) -> tuple[StudyConfig, Config]:
    """Read a study, and the config that it starts from.

    Raises:
        ConfigError: the file cannot be read, is a grid, a value is not allowed (every fault is listed, one per line),
            the config has no valid split, or it does not take a value of the space.
    """
    raw = read_yaml(Path(path), "study", remedy="docs/benchmarks.md has one")
    if "cases" in raw and "space" not in raw:
        raise ConfigError(f"{path} is a grid, and no study; take python -m benchmarks.quality {path}")
    study = validate(StudyConfig, raw, source=str(path))
    base = load_config(study.config, study.overrides)
    if base.data.valid is None:
        raise ConfigError(f"{path}: data.valid of {study.config} is not set; a search is judged by it")
    for key, parameter in study.space.items():
        for value in parameter.extremes():
            try:
                load_config(study.config, (*study.overrides, *as_overrides({key: value})))
            except ConfigError as error:
                raise ConfigError(f"{path}: space.{key}, {json.dumps(value)}: {error}") from None
    return study, base


def as_overrides(values: Mapping[str, Any]) -> Overrides:
    """Values by config path as arguments of `recsys.train`."""
    return tuple(f"{path}={json.dumps(value)}" for path, value in values.items())


def values_of(study: StudyConfig, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What optuna drew, by config path in the space's order, as the config takes it."""
    return {
        path: drawn[path] if parameter.choices is None else json.loads(drawn[path])
        for path, parameter in study.space.items()
        if path in drawn
    }


def runs_of(study: StudyConfig, name: str, values: Mapping[str, Any], folder: Path) -> Iterator[Run]:
    """The runs of a trial, one for each seed, in `<folder>/<name>/seed-<n>`.

    Raises:
        ConfigError: the values do not go together.
    """
    for seed in study.seeds:
        directory = folder / name / f"seed-{seed}"
        own = (HIDDEN, f"seed={seed}", f"output_dir={json.dumps(str(directory))}")
        overrides = (*study.overrides, *as_overrides(values), *own)
        yield Run(name, seed, directory, study.config, overrides, load_config(study.config, overrides))


def grid_of(
    study: StudyConfig, name: str, values: Mapping[str, Any], seeds: Sequence[int], note: str
) -> dict[str, Any]:
    """A grid, as `load_grid` reads it, of the settings that the study starts from and these values."""
    return {
        "name": name,
        "config": study.config,
        "nproc": study.nproc,
        "seeds": list(seeds),
        "overrides": list(study.overrides),
        "cases": {"baseline": {}, "winner": {"overrides": list(as_overrides(values))}},
        "tables": [
            {
                "question": f"Is what the search {study.name} found better than what it started from?",
                "baseline": "baseline",
                "cases": ["winner"],
                "text": note,
            }
        ],
    }


def _check_range(low: float, high: float, *, log: bool, step: float | None) -> None:
    if low >= high:
        raise ValueError(f"high: must be above low, which is {low}, found {high}")
    if log and (low <= 0 or step is not None):
        raise ValueError("log: goes with a low above 0, and with no step")
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ValueError(f"step: from {low} to {high} is no whole number of steps of {step}; change one of them")
