"""From a YAML file and `path=value` pairs on the command line to a validated config."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recsys.config.dialect import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_INCLUDES,
    MAX_VALUES,
    Allowance,
    is_path,
    parse_yaml,
    read_yaml,
)
from recsys.config.faults import ConfigError, one_line, shortened, validate
from recsys.config.schema import Config

DEFAULT_CONFIG = "configs/default.yaml"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `dotted.path=value` overrides; values are YAML too.

    What `include` names, one file or a list, relative to the file that names it, is merged beneath that file's own
    keys, section by section; of a list, a later file lies above an earlier one. `${here}` in a glob of `data` or
    in the file of a feature's ids is the folder of the file that it stands in. A table, a feature or a stage that is
    null in the end is left out. `name`
    defaults to the file's stem and `output_dir` to `outputs/<name>`.

    Raises:
        ConfigError: a file cannot be read or includes itself, an override is no `path=value`, or a value is not
            allowed; every fault of the config is listed, on a line of its own.
    """
    path = Path(os.path.expanduser(path))
    reading = _Reading(Allowance(), {})
    return _resolve(path, reading.read(path, ()), overrides, reading.allowance)


def load_checkpoint_config(directory: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config that a checkpoint holds, whoever wrote it, and apply overrides as `load_config` does.

    Training writes it resolved, so it is one file, and no link; what it would include is not read.

    Raises:
        ConfigError: as `load_config`, or it includes something.
    """
    path = Path(os.path.expanduser(directory)) / "config.yaml"
    allowance = Allowance()
    raw = read_yaml(path, "config", remedy="restore the checkpoint", allowance=allowance, follow=False)
    if "include" in raw:
        raise ConfigError(f"{path}: a checkpoint's config includes nothing, as training writes it; remove include")
    return _resolve(path, raw, overrides, allowance)


def _resolve(path: Path, raw: dict[str, Any], overrides: Sequence[str], allowance: Allowance) -> Config:
    """The config that what was read from `path` makes under overrides."""
    for override in overrides:
        _apply(raw, override, allowance)
    features = raw.get("features")
    for section, key in ((raw, "tables"), (raw, "stages"), (features, "sparse"), (features, "dense")):
        _leave_out_nulls(section, key)
    raw.setdefault("name", path.stem)
    raw.setdefault("output_dir", f"outputs/{raw['name']}")
    _fill_in_home(raw)
    config = validate(Config, raw, source=str(path))
    values, characters = _measure(config.model_dump())
    if values > MAX_VALUES or characters > MAX_CHARACTERS:
        raise ConfigError(
            f"{path}: with all defaults it has {values} values of {characters} characters, and a checkpoint's config "
            f"with more than {MAX_VALUES} of {MAX_CHARACTERS} could not be read; take fewer features or tables"
        )
    return config


@dataclass
class _Reading:
    """Reading one config with all that it includes.

    Attributes:
        allowance: what may still be read.
        known: what has been read, by path: a file that several include is read once.
    """

    allowance: Allowance
    known: dict[Path, dict[str, Any]]

    def read(self, path: Path, includers: tuple[Path, ...]) -> dict[str, Any]:
        """A config and, beneath its own keys, what it includes; `includers` led here, the outermost first."""
        if path not in self.known:
            self.known[path] = self._read(path, (*includers, path))
        return self.known[path]

    def _read(self, path: Path, includers: tuple[Path, ...]) -> dict[str, Any]:
        remedy = f"{includers[-2]} includes it" if len(includers) > 1 else "give one with --config"
        raw = read_yaml(path, "config", remedy=remedy, allowance=self.allowance)
        _fill_in_folder(raw, os.path.normpath(path.parent))
        names = raw.pop("include", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            found = shortened(json.dumps(names, default=str))
            raise ConfigError(f"{path}: include must be a path or a list of paths, found {found}")
        ways = {os.path.realpath(includer) for includer in includers}
        merged: dict[str, Any] = {}
        for name in names:
            self.allowance.includes -= 1
            if self.allowance.includes < 0:
                raise ConfigError(
                    f"{path}: too much is included: the files of one config may include {MAX_INCLUDES} in all; "
                    f"{includers[0]} should name what it needs itself"
                )
            # The plain way to the file, for the paths that it gives by ${here} and for messages.
            included = Path(os.path.normpath(path.parent / os.path.expanduser(name)))
            if is_path(included) and os.path.realpath(included) in ways:
                chain = " includes ".join(map(str, (*includers, included)))
                raise ConfigError(f"configs include each other in a circle: {chain}; remove one include")
            merged = _merge(merged, self.read(included, includers))
        return _merge(merged, raw)


def _merge(below: dict[str, Any], above: dict[str, Any], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Both mappings in one: sections are merged in turn, of any other value the one above counts.

    A section of another `type` takes the place of the one below, whose keys need not be its own. Those of `optimizers`
    have the same keys for all types, and keep what the one above does not say.
    """
    kinds = [of.get("type") for of in (below, above)]  # mappings or nulls where a table or a feature has that name
    if all(isinstance(kind, str) for kind in kinds) and kinds[0] != kinds[1] and where[:1] != ("optimizers",):
        return above
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value, (*where, key)) if both else value
    return merged


def _leave_out_nulls(section: Any, key: str) -> None:
    """Drop the entries that are null from a mapping by name, as far as it is one."""
    if isinstance(section, dict) and isinstance(section.get(key), dict):
        section[key] = {name: entry for name, entry in section[key].items() if entry is not None}


def _fill_in_folder(raw: dict[str, Any], folder: str) -> None:
    """Put `folder` in the place of `${here}` in the globs of `data` and in the files of features' ids."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value.replace("${here}", folder) if isinstance(value, str) else value

    data, features = raw.get("data"), raw.get("features")
    if isinstance(data, dict):
        data.update({split: filled(data[split]) for split in ("train", "valid", "test") if split in data})
    sparse = features.get("sparse") if isinstance(features, dict) else None
    for feature in sparse.values() if isinstance(sparse, dict) else ():
        ids = feature.get("ids") if isinstance(feature, dict) else None
        if isinstance(ids, dict) and "file" in ids:
            ids["file"] = filled(ids["file"])


def _fill_in_home(raw: dict[str, Any]) -> None:
    """Put the home directory in the place of `~` in paths that are opened as they stand; patterns are found by it."""

    def within(section: Any, key: str) -> Any:
        return section.get(key) if isinstance(section, dict) else None

    sparse = within(raw.get("features"), "sparse")
    features = sparse.values() if isinstance(sparse, dict) else ()
    files = [(within(feature, "ids"), "file") for feature in features]
    named = (
        (raw, "output_dir"),
        (raw, "resume"),
        (raw.get("warm_start"), "checkpoint"),
        (within(raw.get("data"), "synthetic"), "directory"),
    )
    for section, key in (*named, *files):
        if isinstance(value := within(section, key), str):
            section[key] = os.path.expanduser(value)


def _measure(raw: Any) -> tuple[int, int]:
    """The values of a config and their characters, as `recsys.config.dialect` counts them."""
    if not isinstance(raw, dict | list | tuple):
        return 1, len(str(raw))
    parts = [part for pair in raw.items() for part in pair] if isinstance(raw, dict) else raw
    sizes = [_measure(part) for part in parts]
    return 1 + sum(values for values, _ in sizes), sum(characters for _, characters in sizes)


def _apply(raw: dict[str, Any], override: str, allowance: Allowance) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    shown = repr(shortened(override, 200))
    if not separator or not all(keys):
        raise ConfigError(f"override {shown} is not of the form path.to.key=value")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"override {shown}: no section lies {MAX_DEPTH} deep; shorten the path")
    try:
        value = parse_yaml(text, allowance)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {shown}: the value is not valid YAML: {one_line(str(error))}") from None
    section: Any = raw
    for depth, key in enumerate(keys[:-1]):
        found = {} if section.get(key) is None else section[key]
        if not isinstance(found, dict):
            path = ".".join(keys[: depth + 1])
            remedy = f"a list, which an override gives as a whole: {path}=[...]"
            told = remedy if isinstance(found, list) else "a value, not a section"
            raise ConfigError(f"override {shown}: {path} is {told}")
        # A copy: where the file has a YAML alias, the same mapping stands elsewhere too.
        below = dict(found)
        section[key] = below
        section = below
    section[keys[-1]] = value
