"""Reading a published ``config.json`` field by field, with one clear line for every mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from vargpt.choices import ABSENT

Value = TypeVar("Value")
Word = TypeVar("Word", bound=str)


class Fields:
    """One object of a published ``config.json``: its fields by type, with defaults for those absent or null.

    Every reading method raises a ValueError that names the field where it has another type or is missing.
    """

    def __init__(self, values: object, defaults: Mapping[str, Any], where: str = "") -> None:
        if not isinstance(values, dict):
            raise ValueError(f"config.json: {where.rstrip('.')} must be an object, not {values!r}")
        self._values, self._defaults, self._where = values, defaults, where

    def inner(self, name: str) -> Fields:
        """An object within this one; an empty one where there is none."""
        values = self._values.get(name)
        return Fields({} if values is None else values, {}, f"{self._where}{name}.")

    def or_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        return Fields(self._values, defaults, self._where)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        return self._checked(name, value, "a whole number above 0", type(value) is int and value > 0)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        fits = type(value) in (int, float) and 0 < value < float("inf")
        return float(self._checked(name, value, "a number above 0", fits))

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._value(name, default)
        return self._checked(name, value, "true or false", type(value) is bool)

    def word(self, name: str, *allowed: Word) -> Word:
        """One of the words that are supported; the first is the default."""
        value = self._value(name, allowed[0])
        kind = f"{' or '.join(map(repr, allowed))}, the only supported"
        return self._checked(name, value, kind, value in allowed)

    def index(self, name: str, default: int) -> int:
        value = self._value(name, default)
        return self._checked(name, value, "a whole number", type(value) is int)

    def token(self, name: str) -> int:
        """A token's number, or ``ABSENT``; of several that end a text, the first."""
        value = self._value(name, ABSENT)
        first: Any = value[0] if isinstance(value, list) and value else value
        return self._checked(name, first, "a token's number", type(first) is int)

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = self._defaults.get(name) if default is None else default
        if value is None:
            raise ValueError(f"config.json: {self._where}{name} is missing")
        return value

    def _checked(self, name: str, value: Value, kind: str, fits: bool) -> Value:
        if not fits:
            raise ValueError(f"config.json: {self._where}{name} must be {kind}, not {value!r}")
        return value
