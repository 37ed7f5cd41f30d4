"""The registry of towers: which builder makes the tower that a settings class of the config describes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from recsys.config import TowerSettings

_Settings = TypeVar("_Settings", bound=TowerSettings)
_BUILDERS: dict[type[TowerSettings], Callable[[Any, "Tokens"], "Tower"]] = {}


@dataclass(frozen=True)
class Tokens:
    """What a tower is given of each row: pooled embeddings, one of each sparse feature, and the projected dense ones.

    Attributes:
        features: names of the sparse features, in order.
        dims: width of each token within the concatenation; one more than features where there are dense ones.
    """

    features: Sequence[str]
    dims: Sequence[int]

    @property
    def width(self) -> int:
        """W, that of the concatenation."""
        return sum(self.dims)


class Tower(nn.Module, ABC):
    """From tokens side by side (B, W) to the representation (B, `out_features`) that the head turns into a logit.

    Attributes:
        out_features: width of the representation.
        num_logits: how many of its last numbers are summands of the logit; their factors in the head start at 1.
    """

    out_features: int
    num_logits: int = 0

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, out_features)."""


def builds(
    settings: type[_Settings],
) -> Callable[[Callable[[_Settings, Tokens], Tower]], Callable[[_Settings, Tokens], Tower]]:
    """Register the function below as what builds the towers that `settings` describes."""

    def register(build: Callable[[_Settings, Tokens], Tower]) -> Callable[[_Settings, Tokens], Tower]:
        _BUILDERS[settings] = build
        return build

    return register


def build_tower(settings: TowerSettings, tokens: Tokens) -> Tower:
    """The tower that the settings describe, dense and with fresh weights."""
    return _BUILDERS[type(settings)](settings, tokens)
