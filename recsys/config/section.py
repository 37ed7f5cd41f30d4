"""What every section of a config is made of."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
"""Tables, features and stages are named by a path on the command line and in state dicts, where a dot separates."""


class Section(BaseModel):
    """A frozen section that refuses unknown keys, values of another type, NaN and infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    retired: ClassVar[Mapping[str, Any]] = {}
    """Keys that there were once, with their defaults, which old checkpoints write; `validate` lets those by."""


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted."""
    return ", ".join(sorted(names)) or "nothing"
