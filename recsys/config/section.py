"""What every section of a config is made of."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path or name can; remove it")
    return text


Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, AfterValidator(_without_nul)]
"""A path, the name of a column, an expression: what is handed to systems to which NUL ends a text."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]

Count = Annotated[int, Field(gt=0, lt=2**63)]
Rows = Annotated[int, Field(gt=0, lt=2**31)]
"""Of what one process holds at a time, which TorchRec counts in 32 bits."""
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Of a layer: two such layers are 16 GiB already."""
Layers = Annotated[int, Field(gt=0, le=2**8)]
Threads = Annotated[int, Field(gt=0, le=2**10)]
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
