"""YAML as configs and schemas are written: one value for each key, every key a text, `1e-4` a number.

Whatever the text is, it ends as a value or as one error, in bounded time and memory: the bounds below hold over a file
and all that it includes. They leave room for more than a thousand features.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recsys.config.faults import ConfigError, one_line, shortened
from recsys.files import FileError, FileTooLargeError, read_regular

MAX_BYTES = 2 << 20
MAX_VALUES = 1 << 16
MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 50
MAX_INCLUDES = 100
_MAX_NUMBER_LENGTH = 400
"""Beyond the longest double that is written out; what Python makes of longer ones takes time that grows faster."""


@dataclass
class Allowance:
    """How much may still be read.

    Attributes:
        bytes: of files.
        values: keys, scalars, lists and mappings, each counted wherever an alias repeats it.
        characters: of keys and scalars, counted likewise.
        includes: entries of `include`.
    """

    bytes: int = MAX_BYTES
    values: int = MAX_VALUES
    characters: int = MAX_CHARACTERS
    includes: int = MAX_INCLUDES


def read_yaml(
    path: Path, kind: str, *, remedy: str, allowance: Allowance | None = None, follow: bool = True
) -> dict[str, Any]:
    """Read a mapping from YAML, refusing duplicate keys and taking `1e-4` for a number.

    Args:
        path: the file.
        kind: what the file is, for messages.
        remedy: what helps where it cannot be read.
        allowance: what is left of that of several files; None is one for this file alone.
        follow: whether the file may be a link.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, or is beyond a bound.
    """
    allowance = allowance or Allowance()
    try:
        raw = parse_yaml(_read_bytes(path, kind, remedy, allowance, follow).decode("utf-8"), allowance)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{kind} {path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{kind} {path} is not valid YAML: {one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{kind} {path} must be a mapping of sections, found {type(raw).__name__}")
    return raw


def is_path(text: str | Path) -> bool:
    """Whether a text can be a path: it holds neither NUL nor half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _read_bytes(path: Path, kind: str, remedy: str, allowance: Allowance, follow: bool) -> bytes:
    try:
        content = read_regular(path, allowance.bytes, follow=follow)
    except FileTooLargeError:
        raise ConfigError(
            f"{kind} {path} is too large: with all that is included there may be {MAX_BYTES} bytes; "
            "keep lists of files in an @list.txt and lists of values in a vocabulary"
        ) from None
    except FileError as error:
        shown = path if is_path(path) else repr(str(path))
        raise ConfigError(f"cannot read {kind} {shown}: {error.reason}; {remedy}") from None
    allowance.bytes -= len(content)
    return content


def parse_yaml(text: str, allowance: Allowance) -> Any:
    """The value that a text of YAML stands for.

    Raises:
        yaml.YAMLError: it stands for none, or is beyond a bound.
    """
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        values, characters, _ = loader.sizes[id(node)]
        allowance.values -= values
        allowance.characters -= characters
        if allowance.values < 0 or allowance.characters < 0:
            raise yaml.YAMLError(_TOO_MUCH)
        return loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner, which takes \UFFFFFFFF for a character
        raise yaml.YAMLError(f"it holds a character or a number that there is not: {error}") from None


_TOO_MUCH = (
    f"it holds too much: with all that is included, and every alias written out, there may be {MAX_VALUES} values of "
    f"{MAX_CHARACTERS} characters in all; shorten it"
)


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e-4` as a number (YAML 1.1 asks for `1.0e-4`).

    It makes what JSON can hold, and dates, and composes no more than the bounds of this module allow.

    Attributes:
        sizes: values, characters and depth of each node by its `id`, with every alias written out.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, tuple[int, int, int]] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As `SafeLoader`, within the bounds."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._depth += 1
        # Before what is within is composed, so that neither this recursion nor the time until it ends is the text's.
        if self._depth > MAX_DEPTH:
            raise _beyond(f"more than {MAX_DEPTH} lists and mappings within each other; flatten it", mark)
        if len(self.sizes) > MAX_VALUES:
            raise _beyond(_TOO_MUCH, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if is_alias and id(node) not in self.sizes:
            raise _beyond("a YAML alias stands inside what it refers to; write out what is meant", mark)
        if not is_alias:
            self.sizes[id(node)] = self._size(node)
        values, characters, depth = self.sizes[id(node)]
        if values > MAX_VALUES or characters > MAX_CHARACTERS:
            raise _beyond(_TOO_MUCH, mark)
        if self._depth + depth > MAX_DEPTH:
            raise _beyond(f"more than {MAX_DEPTH} lists and mappings within each other; flatten it", mark)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int, int]:
        """Of a node whose parts have one already."""
        if isinstance(node, yaml.ScalarNode):
            return 1, len(node.value), 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [self.sizes[id(part)] for part in parts]
        return (
            1 + sum(values for values, _, _ in sizes),
            sum(characters for _, characters, _ in sizes),
            1 + max((depth for _, _, depth in sizes), default=0),
        )

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As `SafeLoader`, naming the place of a scalar that is not of its tag: `2020-13-45`, `!!int foo`."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        try:
            if kind in ("int", "float") and len(node.value) > _MAX_NUMBER_LENGTH:
                raise ValueError("too long")
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
            problem = f"{shortened(node.value)!r} is no {kind}; correct it, or quote it if a text is meant"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader`."""
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys the mapping's own replace
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {shortened(repr(key))} is not a text; quote it or name it otherwise"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"duplicate key {shortened(key)!r}; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _beyond(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, mark)


# What JSON cannot hold would reach the schema as the text that Python prints of it.
for _kind in ("binary", "omap", "pairs", "set"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `StrictLoader` would read as a number, such as '1e5'."""


for _reader_or_writer in (StrictLoader, StrictDumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
