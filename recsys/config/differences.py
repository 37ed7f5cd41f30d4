"""What differs between two configs, or whatever else can be told as JSON, key by key."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from recsys.config.faults import shortened


class Difference(NamedTuple):
    """A key that has another value than it had, as `path: old -> new`; None is a key that is not there."""

    path: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {shortened(repr(self.then))} -> {shortened(repr(self.now))}"


def differences(then: Any, now: Any, path: str = "") -> Iterator[Difference]:
    """Every key that differs, by its dotted path, in the order of `then`; lists are compared as a whole."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in [*then, *(key for key in now if key not in then)]:
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif then != now:
        yield Difference(path, then, now)
