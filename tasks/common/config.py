"""The base of every configuration: strict, immutable, documented beside its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from yaml.constructor import ConstructorError

from tasks.common.errors import InputError


class Config(BaseModel):
    """Base of all configurations. An unknown key is an error; the docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(),
                              allow_inf_nan=False)  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _no_flag_is_a_number(cls, values: Any) -> Any:
        """``yes`` and ``on`` are true in YAML, which pydantic takes for 1: hand it over as a word, which it refuses."""
        if not isinstance(values, dict):
            return values
        flags = {name: str(value).lower() for name, value in values.items() if isinstance(value, bool)
                 and name in cls.model_fields and _is_number(cls.model_fields[name].annotation)}  # fmt: skip
        return {**values, **flags} if flags else values

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON types: what is stored in a run, and what cache keys are made from."""
        return self.model_dump(mode="json")


def _is_number(annotation: Any) -> bool:
    return {*(get_args(annotation) or (annotation,))} - {NoneType} <= {int, float}


ConfigT = TypeVar("ConfigT", bound=Config)
_MOST_MERGED, _DEEPEST, _LARGEST = 10_000, 100, (1 << 63) - 1


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its silences and bombs: a key stands once, nesting and merges (``<<``) have an end,
    a number fits into 64 bits, and a value that is none of its kind is an error of YAML."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ConstructorError(None, None, f"nested more than {_DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_MERGED:
            raise ConstructorError(None, None, f"more than {_MOST_MERGED:,} keys are merged", node.start_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise ConstructorError(None, None, f"a value is none of its kind ({error})", node.start_mark) from None
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConstructorError(None, None, "a number has more than 64 bits", node.start_mark)
        return value


def _load(text: str) -> Any:
    """A YAML document's value.

    Raises:
        InputError: it is none; with the row, without the file.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.reader.ReaderError as error:
        row = text.count("\n", 0, error.position) + 1
        raise InputError(f"not YAML: {error.reason}", row=row) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"not YAML: {problem}", row=None if mark is None else mark.line + 1) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        value = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such configuration file", file=path) from None
    except IsADirectoryError:
        raise InputError("is a directory; name a YAML file", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason})", file=path) from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", file=path) from None
    except InputError as error:
        raise InputError(error.problem, file=path, row=error.row) from None
    if not isinstance(value, dict):
        raise InputError("must be a mapping of keys to values", file=path)
    return value


def read_with_settings(
    path: Path, settings: Sequence[str], fill: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Read a YAML mapping and apply ``a.b=value`` overrides.

    Args:
        path: the file.
        settings: the overrides, in their order.
        fill: puts what other files hold into the mapping: before the overrides, which reach into it, and after them,
            for they may name another file.

    Raises:
        InputError: as :func:`read_yaml` and :func:`apply_setting`.
    """
    values = read_yaml(path)
    fill(values)
    for setting in settings:
        apply_setting(values, setting)
    fill(values)
    return values


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Apply one ``a.b=value`` override in place; the value is read as YAML.

    Raises:
        InputError: the override is not ``key=value``, or a key on the way is not a mapping.
    """
    key, separator, raw = setting.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"--set needs key=value, got {setting!r}")
    try:
        value = _load(raw)
    except InputError:
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
        shown = "" if isinstance(given, dict | list) or first["type"] == "missing" else f" (got {_short(given)})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise InputError(f"{first['msg']}{shown}{more}", file=source, field=field or None) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
