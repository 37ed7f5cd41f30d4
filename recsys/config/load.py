"""From a YAML file and `path=value` pairs on the command line to a validated config."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recsys.config.dialect import StrictLoader, one_line, read_yaml
from recsys.config.faults import ConfigError, validate
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
    raw = _read_including(path, ())
    for override in overrides:
        _apply(raw, override)
    features = raw.get("features")
    for section, key in ((raw, "tables"), (raw, "stages"), (features, "sparse"), (features, "dense")):
        _leave_out_nulls(section, key)
    raw.setdefault("name", path.stem)
    raw.setdefault("output_dir", f"outputs/{raw['name']}")
    _fill_in_home(raw)
    return validate(Config, raw, source=str(path))


def _read_including(path: Path, includers: tuple[Path, ...]) -> dict[str, Any]:
    """Read a config and, beneath its own keys, what it includes; `includers` led here, the outermost first."""
    includers = (*includers, path)
    remedy = f"{includers[-2]} includes it" if len(includers) > 1 else "give one with --config"
    raw = read_yaml(path, "config", remedy=remedy)
    _fill_in_folder(raw, os.path.normpath(path.parent))
    names = raw.pop("include", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include must be a path or a list of paths, found {json.dumps(names, default=str)}")
    merged: dict[str, Any] = {}
    for name in names:
        # The plain way to the file, for the paths that it gives by ${here} and for messages.
        included = Path(os.path.normpath(path.parent / os.path.expanduser(name)))
        if included.resolve() in {includer.resolve() for includer in includers}:
            chain = " includes ".join(map(str, (*includers, included)))
            raise ConfigError(f"configs include each other in a circle: {chain}; remove one include")
        merged = _merge(merged, _read_including(included, includers))
    return _merge(merged, raw)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one: sections are merged in turn, of any other value the one above counts."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
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
    for section, key in ((raw, "output_dir"), (within(raw.get("data"), "synthetic"), "directory"), *files):
        if isinstance(value := within(section, key), str):
            section[key] = os.path.expanduser(value)


def _apply(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form path.to.key=value")
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {one_line(str(error))}") from None
    section: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    section[keys[-1]] = value
