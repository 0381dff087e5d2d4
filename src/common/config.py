"""YAML into pydantic models. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from src.common.names import nearest_hint


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the key."""


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


def load_config(
    path: Path, model: type[ModelT], overrides: Mapping[str, Any] | None = None
) -> ModelT:
    """Read `path` (a missing or empty file is an empty mapping) and lay `overrides` over it.

    `overrides` maps dotted keys ("worker.port") to values; a None is left out, so that flags that
    were not given do not hide the file. Raises ConfigError with the file, the key and the reason.
    """
    raw = _read(path)
    for section in model.model_fields:
        # A section whose keys are all commented out reads as None.
        if raw.get(section, raw) is None:
            del raw[section]
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(raw, dotted, value)
    return parse_config(raw, model, where=str(path))


def parse_config(raw: Mapping[str, Any], model: type[ModelT], where: str) -> ModelT:
    """Validate an already read mapping. Raises ConfigError."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(error, model))) from error


def read_yaml(path: Path) -> Any:
    """Raises ConfigError that names the file and the place in it."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    raw = read_yaml(path)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(raw).__name__}")
    return raw


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            return  # not a section: the model will say so
    raw[leaf] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            yield f"unknown key {key!r}{nearest_hint(str(item['loc'][-1]), known)}"
        else:
            yield f"{key}: {item['msg']}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        nested = _nested_model(field.annotation)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in `X`, `X | None`, `list[X]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    nested = (_nested_model(arg) for arg in getattr(annotation, "__args__", ()))
    return next((found for found in nested if found is not None), None)
