"""What is wrong with a config, told by the path at which the user wrote it."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from recsys.config.section import listed
from recsys.errors import UserError


class ConfigError(UserError):
    """The configuration is wrong; the message names the path, what was found and what is allowed."""


_Model = TypeVar("_Model", bound=BaseModel)

_MAX_FAULTS = 100
_MAX_FAULT_LENGTH = 2000


def one_line(text: str) -> str:
    """A text without its line breaks, cut where it is too long for a message."""
    return shortened(" ".join(text.split()), _MAX_FAULT_LENGTH)


def shortened(text: str, length: int = 80) -> str:
    """A text, cut in the middle if it has more characters than `length`."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} ... {text[-length // 4 :]} ({len(text)} characters)"


def validate(schema: type[_Model], raw: Mapping[str, Any], *, source: str) -> _Model:
    """Make a model of what was read from `source`.

    Raises:
        ConfigError: a value is not allowed; every fault is listed with its path, on a line of its own.
    """
    # Through JSON, because pydantic's strict mode takes a JSON array for a tuple but not a Python list.
    try:
        text = json.dumps(raw, default=str)
    except ValueError:
        raise ConfigError(f"{source}: a mapping or a list stands inside itself") from None
    written = json.loads(text)  # in which both halves of a surrogate pair are one character
    more = 0
    faults = list(islice(_halves_of_pairs(written, ""), _MAX_FAULTS))
    if not faults:
        text = json.dumps(_without_retired(written, schema, "", faults))
        try:
            valid = schema.model_validate_json(text)
        except ValidationError as error:
            faults += islice(_explain(error, schema), _MAX_FAULTS)
            more = max(error.error_count() - _MAX_FAULTS, 0)
    if faults:
        distinct = list(dict.fromkeys(shortened(fault, _MAX_FAULT_LENGTH) for fault in faults))
        distinct += [f"and {more} more; mend these first"] * bool(more)
        raise ConfigError("\n".join([f"{source}:", *(f"  {fault}" for fault in distinct)]))
    return valid


def _halves_of_pairs(raw: Any, path: str) -> Iterator[str]:
    """A fault for each text that is no Unicode, which neither files nor paths can hold."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            here = f"{path}.{key}" if path else key
            yield from (f"{fault} (a key)" for fault in _halves_of_pairs(key, here))
            yield from _halves_of_pairs(value, here)
    elif isinstance(raw, list):
        for place, item in enumerate(raw):
            yield from _halves_of_pairs(item, f"{path}.{place}")
    elif isinstance(raw, str) and not raw.isascii() and any("\ud800" <= character <= "\udfff" for character in raw):
        shown = json.dumps(shortened(raw))
        yield f"{json.dumps(path)[1:-1]}: {shown} holds half of a surrogate pair, which is no text; correct it"


def _without_retired(raw: Any, schema: type[BaseModel], path: str, faults: list[str]) -> Any:
    """What was read without the keys that are retired; those that are not at their default are faults."""
    if not isinstance(raw, dict):
        return raw
    kept = {}
    known: Mapping[str, Any] = getattr(schema, "retired", {})
    for key, value in raw.items():
        here = f"{path}.{key}" if path else key
        if key in known:
            if value != known[key]:
                faults.append(
                    f"{here}: is retired; only its old default, {json.dumps(known[key])}, is let by, found "
                    f"{json.dumps(value)}; remove it, or use the version that trained with it"
                )
        elif key in schema.model_fields and len(models := list(_models(schema.model_fields[key].annotation))) == 1:
            kept[key] = _without_retired(value, models[0], here, faults)
        else:
            kept[key] = value
    return kept


def _explain(error: ValidationError, schema: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        # Tags of discriminated unions ('mlp') and of `str | tuple` alternatives are not part of the user's path.
        path, model, annotation = _user_path(fault["loc"], schema)
        path = [shortened(part) for part in path]
        kind, found = fault["type"], fault["input"]
        if kind == "extra_forbidden":
            *section, key = path
            allowed = list(model.model_fields) if model else []
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            where = ".".join(section) or "the top level"
            yield f"{'.'.join(path)}: unknown key; {hint}{where} takes {listed(allowed)}"
        elif kind == "missing":
            yield f"{'.'.join(path)}: missing, and has no default"
        elif kind == "value_error":
            message = str(fault["ctx"]["error"])
            yield f"{'.'.join(path)}: {message}" if path else message
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            allowed = [tag for member in _models(annotation) if (tag := _tag(member))]
            given = f"found {found['type']!r}" if "type" in found else "and is missing"
            yield f"{'.'.join(path)}.type: must be one of {listed(allowed)}, {given}"
        else:
            shown = json.dumps(found, default=str)
            yield f"{'.'.join(path)}: {fault['msg']}, found {shown if len(shown) < 80 else type(found).__name__}"


def _user_path(
    location: tuple[int | str, ...], schema: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None, Any]:
    """Path as the user writes it, the model of its last section and the annotation of what it leads to.

    They are found by walking the schema along the way.
    """
    path: list[str] = []
    annotation: Any = schema
    model: type[BaseModel] | None = None
    for part in location:
        candidates = list(_models(annotation))
        if part in {_tag(candidate) for candidate in candidates}:
            annotation = next(m for m in candidates if _tag(m) == part)
            continue
        # In a mapping every part but '[key]' is a name of the user's, who may call a table `str` or `street`.
        tag = r"\[key\]" if getattr(annotation, "__origin__", None) is dict else r"str|tuple\[.*|function-.*|\[key\]"
        if isinstance(part, str) and re.fullmatch(tag, part):
            continue
        path.append(str(part))
        model = candidates[0] if len(candidates) == 1 else None
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
        elif model is None and isinstance(part, str):  # a place in a list leads to what its kind does
            arguments = get_args(annotation)
            annotation = arguments[-1] if arguments else None
    return path, model, annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models of a section's annotation: itself, or the members of a union; none for a mapping."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
    elif getattr(annotation, "__origin__", None) is not dict:
        for argument in get_args(annotation):
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    values = get_args(field.annotation) if field else ()
    return values[0] if len(values) == 1 else None
