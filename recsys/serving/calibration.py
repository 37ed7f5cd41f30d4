"""Calibrators that an export fitted: from the logits of the model to those that are served.

Each is a map that never falls, of float64, from a logit to a logit, so that a probability is always the sigmoid of the
logit beside it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Method = Literal["platt", "isotonic"]

_MOST = float(np.finfo(np.float32).max)
"""Beyond which there is no logit."""


@dataclass(frozen=True)
class Platt:
    """A line: slope x logit + intercept (Platt 1999).

    Attributes:
        slope: above 0.
        intercept: in logits.
    """

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not _are_finite((self.slope, self.intercept)) or self.slope <= 0:
            raise ValueError("slope and intercept must be numbers, the slope above 0")

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits (N,) of logits (N,), both float64."""
        return logits * self.slope + self.intercept


@dataclass(frozen=True)
class Isotonic:
    """Straight lines between K knots, level before the first and after the last.

    Attributes:
        logits: (K,) of the model, rising; 2 at least.
        calibrated: (K,) what becomes of them, never falling.
    """

    logits: tuple[float, ...]
    calibrated: tuple[float, ...]

    def __post_init__(self) -> None:
        knots = self.logits, self.calibrated
        if not all(isinstance(numbers, list | tuple) and _are_finite(numbers) for numbers in knots):
            raise ValueError("logits and calibrated must be lists of numbers")
        if not len(self.logits) == len(self.calibrated) >= 2:
            raise ValueError("logits and calibrated must be as many, 2 at least")
        if not (np.diff(self.logits) > 0).all() or not (np.diff(self.calibrated) >= 0).all():
            raise ValueError("logits must rise, and calibrated must not fall")

    @cached_property
    def _knots(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.logits, dtype=torch.float64), torch.tensor(self.calibrated, dtype=torch.float64)

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits (N,) of logits (N,), both float64."""
        at, calibrated = self._knots
        right = torch.searchsorted(at, logits).clamp_(1, len(at) - 1)
        left = right - 1
        way = ((logits - at[left]) / (at[right] - at[left])).clamp_(0, 1)
        return torch.lerp(calibrated[left], calibrated[right], way)


Calibrator = Platt | Isotonic

_KINDS: dict[Method, type[Platt] | type[Isotonic]] = {"platt": Platt, "isotonic": Isotonic}


@dataclass(frozen=True)
class Calibration:
    """The calibrators of an artefact.

    Attributes:
        method: of all of them.
        overall: fitted on all rows; of the domains that have none of their own.
        domains: by the domain's number; empty where rows of all domains are calibrated alike.
    """

    method: Method
    overall: Calibrator
    domains: Mapping[int, Calibrator] = field(default_factory=dict)

    def __call__(self, logits: Tensor, domains: NDArray[np.int64]) -> Tensor:
        """Calibrated logits (N,) float32 of logits (N,), computed in float64.

        Args:
            logits: of the model.
            domains: (N,) of each row; read only where a domain has a calibrator of its own.
        """
        wide = logits.double()
        if not self.domains:
            return self.overall(wide).float()
        if len(domains) != len(logits):
            raise ValueError(f"{len(logits)} logits, but the domains of {len(domains)} rows")
        calibrated = torch.empty_like(wide)
        for number, rows in rows_by_domain(domains):
            places = torch.from_numpy(rows)
            calibrated[places] = self.domains.get(number, self.overall)(wide[places])
        return calibrated.float()

    def to_json(self) -> str:
        """As `calibration.json` has it."""
        domains = {str(number): asdict(calibrator) for number, calibrator in self.domains.items()}
        told = {"method": self.method, "overall": asdict(self.overall), "domains": domains}
        return json.dumps(told, indent=2) + "\n"

    @classmethod
    def parse(cls, told: Any, num_domains: int) -> "Calibration":
        """What `to_json` wrote.

        Args:
            told: an object of JSON.
            num_domains: of the config.

        Raises:
            ValueError: it is something else.
        """
        if not (isinstance(told, dict) and told.keys() == {"method", "overall", "domains"}):
            raise ValueError("method, overall and domains are needed, and nothing else")
        method, domains = told["method"], told["domains"]
        if not (isinstance(method, str) and method in _KINDS):
            raise ValueError(f"method must be one of {', '.join(_KINDS)}")
        numbers = {str(number): number for number in range(num_domains)}
        if not (isinstance(domains, dict) and domains.keys() <= numbers.keys()):
            raise ValueError(f"domains must be by their numbers, of which the config has {num_domains}")
        return cls(
            method,
            _parse(method, told["overall"]),
            {numbers[name]: _parse(method, of_domain) for name, of_domain in domains.items()},
        )


def rows_by_domain(domains: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each domain that occurs among (N,), and the places of its rows, in order."""
    order = np.argsort(domains, kind="stable")
    numbers, starts = np.unique(domains[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, starts[1:]), strict=False)  # of no rows, a part that holds none


def _parse(method: Method, told: Any) -> Calibrator:
    kind = _KINDS[method]
    names = [one.name for one in fields(kind)]
    if not (isinstance(told, dict) and told.keys() == set(names)):
        raise ValueError(f"a calibrator of method {method} must have {' and '.join(names)}, and nothing else")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return kind(**values)


def _are_finite(numbers: Any) -> bool:
    return all(type(number) in (int, float) and abs(number) <= _MOST for number in numbers)
