"""Strict configuration: pydantic models that refuse unknown keys, and say which key was probably meant.

Knows: how to turn a file or a mapping into a model, and a pydantic failure into one sentence a user can act on.
Does not know: any particular setting.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmc.errors import ConfigError


class Strict(BaseModel):
    """Base of every configuration, manifest and request body: unknown keys are refused, values are never coerced
    from another type, and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], values: Mapping[str, Any] | str | bytes, *, where: str) -> Model:
    """Build `model` from a mapping, or from JSON text.

    JSON text is validated by JSON's own types (a list for a tuple); a mapping must hold Python's.

    Args:
        where: What the values come from ("pretrain.toml", "request body"); it begins the message.

    Raises:
        ConfigError: Naming the first wrong field, what was met, and the nearest known name for an unknown key.
    """
    try:
        if isinstance(values, str | bytes):
            return model.model_validate_json(values)
        return model.model_validate(values)
    except ValidationError as error:
        message, param = explain(error, model)
        raise ConfigError(f"{where}: {message}", param=param) from None


def load(model: type[Model], path: Path) -> Model:
    """Read `model` from a `.toml` or `.json` file.

    Raises:
        ConfigError: The file is missing, is not TOML or JSON, or does not fit the model.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    if path.suffix == ".json":
        return parse(model, text, where=str(path))
    if path.suffix == ".toml":
        # TOML goes through JSON so that both kinds of file meet the same validation (lists for tuples).
        return parse(model, json.dumps(_read_toml(text, path), default=str), where=str(path))
    raise ConfigError(f"{path}: a configuration is a .toml or a .json file")


def _read_toml(text: str, path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[str, str | None]:
    """Turn one of pydantic's complaints into (sentence, dotted path of the field).

    An unknown field goes first: when it is a misspelt one, that is why another is missing.
    """
    found = error.errors(include_url=False)
    first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    location = tuple(first["loc"])
    field = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        guesses = difflib.get_close_matches(str(location[-1]), _fields_at(model, location[:-1]), n=1)
        hint = f" (did you mean '{guesses[0]}'?)" if guesses else ""
        return f"unknown field '{field}'{hint}", field
    if first["type"] == "missing":
        return f"the field '{field}' is required", field
    if first["type"] == "json_invalid":
        return f"not valid JSON: {first['ctx']['error']}", None
    met = repr(first["input"])
    met = met if len(met) <= 80 else met[:77] + "..."
    message = first["msg"].removeprefix("Value error, ")
    return (f"'{field}': {message} (met {met})", field) if field else (message, None)


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Names (and aliases) of the fields of the model found by following `path` from `model`."""
    current: Any = model
    for part in path:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return []
        current = _model_in(current.model_fields[str(part)].annotation)
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        return []
    return [name for key, info in current.model_fields.items() for name in (key, info.alias) if name]


def _model_in(annotation: Any) -> Any:
    """The model inside an annotation such as `Rope | None`, or the annotation itself."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
