"""Typed reading of a `config.json`: every refusal names its field, every default is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from braid_wire.errors import ConfigInvalid

_SHOWN = 80  # characters of a bad value that go into a message

# transformers writes non-finite numbers as {"__float__": "Infinity"}, since JSON has none.
_TAGGED_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf}


def shown(value: object) -> str:
    """A value as it may stand in a message: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


class Fields:
    """One JSON object of a config, read field by field.

    A field that is absent or null takes the family's published default, and `defaulted` remembers
    that it did. Without a default it is missing, and that is an error.

    Args:
        values: the JSON object that describes the text model.
        defaults: the family's published defaults, by field name.
        outer: the object that wraps `values`, if any. A field that both hold must be equal in both.
        path: what stands before a field's name in messages ("text_config.").

    Raises (from every reader):
        ConfigInvalid: the field is missing, has the wrong type or breaks its bound; metadata has
            `field` and, where there is one, `value`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        outer: Mapping[str, Any] | None = None,
        path: str = "",
    ) -> None:
        self._values = values
        self._defaults = defaults or {}
        self._outer = outer or {}
        self._path = path
        self.defaulted: dict[str, object] = {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Remember a fact for the reader of the plan; saying it twice counts once."""
        if text not in self.notes:
            self.notes.append(text)

    def declared(self, name: str) -> bool:
        """Whether the config itself gives this field a value other than null."""
        return self._values.get(name) is not None

    def known(self, name: str) -> bool:
        """Whether the config or the family's published defaults give this field a value."""
        return self.declared(name) or self._defaults.get(name) is not None

    def is_text(self, name: str, text: str) -> bool:
        """Whether the config gives this field exactly this string (for numbers that may be "auto")."""
        value: object = self._values.get(name)
        return value == text

    def invalid(self, name: str, value: object, rule: str) -> ConfigInvalid:
        """The error for a field that breaks `rule` (a clause such as "it must be positive")."""
        text = shown(value)
        return ConfigInvalid(f"{self._path}{name} is {text}; {rule}", field=self._path + name, value=text)

    def missing(self, name: str, rule: str = "this family has no default for it") -> ConfigInvalid:
        """The error for a field that must be there."""
        return ConfigInvalid(f"{self._path}{name} is missing; {rule}", field=self._path + name)

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, aliases: Sequence[str] = ()
    ) -> int:
        """An integer of at least `minimum`; `default` stands in where the family has none."""
        value = self._get(name, default, aliases)
        if value is None:
            raise self.missing(name)
        return self._as_integer(name, value, minimum)

    def optional_integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, aliases: Sequence[str] = ()
    ) -> int | None:
        """As `integer`, but an explicit null is a value of its own: None."""
        if name in self._values and self._values[name] is None:
            return None
        value = self._get(name, default, aliases)
        return None if value is None else self._as_integer(name, value, minimum)

    def number(self, name: str, default: float | None = None, *, aliases: Sequence[str] = ()) -> float:
        """A number, not NaN; infinity is allowed."""
        value = self._get(name, default, aliases)
        if value is None:
            raise self.missing(name)
        return self._as_number(name, value)

    def numbers(self, name: str, *, aliases: Sequence[str] = ()) -> tuple[float, ...] | None:
        """A list of numbers, or None where neither config nor family has one."""
        value = self._get(name, None, aliases)
        if value is None:
            return None
        return tuple(self._as_number(name, item) for item in self._as_list(name, value))

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self._get(name, default)
        if value is None:
            raise self.missing(name)
        if not isinstance(value, bool):
            raise self.invalid(name, value, "it must be true or false")
        return value

    def text(self, name: str, default: str | None = None, *, aliases: Sequence[str] = ()) -> str:
        """A string."""
        value = self._get(name, default, aliases)
        if value is None:
            raise self.missing(name)
        if not isinstance(value, str):
            raise self.invalid(name, value, "it must be a string")
        return value

    def texts(self, name: str, *, aliases: Sequence[str] = ()) -> tuple[str, ...] | None:
        """A list of strings, or None where neither config nor family has one."""
        value = self._get(name, None, aliases)
        if value is None:
            return None
        for item in self._as_list(name, value):
            if not isinstance(item, str):
                raise self.invalid(name, item, "its entries must be strings")
        return tuple(value)

    def integers(self, name: str, *, minimum: int = 0) -> tuple[int, ...] | None:
        """A list of integers, or None where neither config nor family has one."""
        value = self._get(name, None)
        if value is None:
            return None
        return tuple(self._as_integer(name, item, minimum) for item in self._as_list(name, value))

    def section(self, name: str) -> Fields | None:
        """A nested object with its own fields (no defaults), or None where it is absent."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.invalid(name, value, "it must be an object")
        return Fields(value, path=f"{self._path}{name}.")

    def _get(self, name: str, default: object, aliases: Sequence[str] = ()) -> Any:
        value = self._declared_value(name, aliases)
        if value is not None:
            return value
        value = self._defaults.get(name)
        if value is None:
            value = default
        if value is not None:
            self.defaulted[name] = value
        return value

    def _declared_value(self, name: str, aliases: Sequence[str]) -> Any:
        found: Any = None
        found_as = name
        for candidate in (name, *aliases):
            value = self._values.get(candidate)
            outer = self._outer.get(candidate)
            if value is not None and outer is not None and value != outer:
                raise self.invalid(candidate, value, f"the outer config says {shown(outer)}")
            if value is None:
                continue
            if found is not None and found != value:
                raise self.invalid(candidate, value, f"{found_as} says {shown(found)}")
            found, found_as = value, candidate
        return found

    def _as_integer(self, name: str, value: Any, minimum: int) -> int:
        # bool is an int in Python; a config that says true where a size belongs is wrong.
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.invalid(name, value, "it must be an integer")
        if value < minimum:
            raise self.invalid(name, value, f"it must be at least {minimum}")
        return value

    def _as_number(self, name: str, value: Any) -> float:
        if isinstance(value, Mapping) and set(value) == {"__float__"}:
            value = _TAGGED_FLOATS.get(value["__float__"])
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            raise self.invalid(name, value, "it must be a number")
        return float(value)

    def _as_list(self, name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.invalid(name, value, "it must be a list")
        return value
