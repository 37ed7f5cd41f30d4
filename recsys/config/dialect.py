"""YAML as configs and schemas are written: one value for each key, every key a text, `1e-4` a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from recsys.config.faults import ConfigError


def read_yaml(path: Path, kind: str, *, remedy: str) -> dict[str, Any]:
    """Read a mapping from YAML, refusing duplicate keys and taking `1e-4` for a number.

    Args:
        path: the file.
        kind: what the file is, for messages.
        remedy: what helps where it cannot be read.

    Raises:
        ConfigError: the file cannot be read, or is no YAML mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {kind} {path}: {error.strerror or error}; {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{kind} {path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{kind} {path} is not valid YAML: {one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{kind} {path} must be a mapping of sections, found {type(raw).__name__}")
    return raw


def one_line(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e-4` as a number (YAML 1.1 asks for `1.0e-4`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader`."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys the mapping's own replace
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not a text; quote it or name it otherwise"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `StrictLoader` would read as a number, such as '1e5'."""


for _reader_or_writer in (StrictLoader, StrictDumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
