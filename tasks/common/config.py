"""The base of every configuration: strict, immutable, documented beside its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.common.errors import InputError


class Config(BaseModel):
    """Base of all configurations. An unknown key is an error; the docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON types: what is stored in a run, and what cache keys are made from."""
        return self.model_dump(mode="json")


ConfigT = TypeVar("ConfigT", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such configuration file", file=path) from None
    except IsADirectoryError:
        raise InputError("is a directory; name a YAML file", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason})", file=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"not YAML: {problem}", file=path, row=None if mark is None else mark.line + 1) from None
    if not isinstance(value, dict):
        raise InputError("must be a mapping of keys to values", file=path)
    return value


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Apply one ``a.b=value`` override in place; the value is read as YAML.

    Raises:
        InputError: the override is not ``key=value``, or a key on the way is not a mapping.
    """
    key, separator, raw = setting.partition("=")
    if not separator or not key:
        raise InputError(f"--set needs key=value, got {setting!r}")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise InputError(f"--set {key}: the value {raw!r} is not YAML") from None
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {key}: {parent!r} is not a mapping")
    place[last] = value


def parse(model: type[ConfigT], values: dict[str, Any], source: str | Path) -> ConfigT:
    """Validate ``values`` as ``model``.

    Raises:
        InputError: naming ``source`` and the first offending field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        given = first.get("input")
        shown = "" if isinstance(given, dict | list) or first["type"] == "missing" else f" (got {given!r})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise InputError(f"{first['msg']}{shown}{more}", file=source, field=field or None) from None
