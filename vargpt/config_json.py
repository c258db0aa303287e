"""Configurations as JSON: our own ``config.json``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vargpt.config import ImportedConfig, ProjectorConfig, VargptConfig
from vargpt.files import read_json
from vargpt.vision import OpenClipConfig, TimmConfig

FORMAT = "vargpt"
"""The "format" field of our config.json."""


def describe(config: VargptConfig) -> dict[str, Any]:
    """The content of a ``config.json``."""
    return {"format": FORMAT, "config": to_json(config)}


def read_config(directory: Path) -> VargptConfig:
    """The configuration that a directory of ours holds.

    Raises:
        ValueError: an unknown or missing field, named with its place.
    """
    content = read_json(directory / "config.json")
    try:
        return from_json(VargptConfig, content.get("config"))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None


# A nested dataclass is an object; where a slot has alternatives, "kind" tells which.
_KINDS = {"open_clip": OpenClipConfig, "timm": TimmConfig}


def to_json(config: Any) -> Any:
    """Plain JSON values of a configuration dataclass."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kinds = [kind for kind, cls in _KINDS.items() if isinstance(config, cls)]
        return {"kind": kinds[0], **values} if kinds else values
    return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(cls: type, values: Any, where: str = "config") -> Any:
    """The configuration dataclass that the JSON values describe.

    Raises:
        ValueError: an unknown or missing field, named with its place.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, not {values!r}")
    values = {name: value for name, value in values.items() if name != "kind" or cls not in _KINDS.values()}
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    arguments = {name: _field(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except TypeError as error:  # a required field is missing
        raise ValueError(f"{where}: {error}") from None


def changed(config: VargptConfig, changes: Mapping[str, Any]) -> VargptConfig:
    """The configuration with some fields changed, those of parts one by one: ``{"llm": {"depth": 6}}``. What names a
    "kind" takes the whole place of what was there.

    Raises:
        ValueError: an unknown field or a value that it cannot have, named with its place.
    """
    return from_json(VargptConfig, _merged(to_json(config), changes))


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, Mapping)) or "kind" in new:
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def _field(hint: Any, value: Any, where: str) -> Any:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    if value is None:
        if type(None) not in options:
            raise ValueError(f"{where} must not be null")
        return None
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if ImportedConfig in classes:  # our own projector is what has no kind
        imported = isinstance(value, dict) and "kind" in value
        return from_json(ImportedConfig if imported else ProjectorConfig, value, where)
    if len(classes) > 1:
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"{where}.kind must be one of {', '.join(_KINDS)}, not {kind!r}")
        return from_json(_KINDS[kind], value, where)
    if classes:
        return from_json(typing.cast(type, classes[0]), value, where)
    items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple]
    if items:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return tuple(_field(items[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    named = [word for option in options if typing.get_origin(option) is typing.Literal for word in option.__args__]
    if named and value not in named:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, named))}, not {value!r}")
    if any(typing.get_origin(option) is Mapping for option in options) and not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {value!r}")
    expected = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    allowed = [kind for option in options for kind in expected.get(option, ())]
    if allowed and type(value) not in allowed:
        names = " or ".join(option.__name__ for option in options if option in expected)
        raise ValueError(f"{where} must be {names}, not {value!r}")
    return value
