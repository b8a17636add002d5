"""Reads fields of a configuration that nobody vouches for, and gathers what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sagecp.core.errors import FieldViolation, InvalidRequestError

ROOT = "model_config"
"""Where the paths of fields begin in messages."""

_SHOWN_LENGTH = 40
# Beyond it Python refuses to print an integer.
_MAX_SHOWN_NUMBER = 10**18


class ModelConfigError(InvalidRequestError):
    """A model's configuration that cannot be planned with; names every bad field at once."""


class ConfigFields:
    """One object of a configuration.

    Attributes:
        config: The object.
        path: Its path, for messages.
        violations: What was found wrong so far, shared with the objects around it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        path: str = ROOT,
        violations: list[FieldViolation] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.path = path
        self.violations: list[FieldViolation] = [] if violations is None else violations
        self._defaults = defaults or {}

    def reject(self, name: str, description: str) -> None:
        """Note what is wrong with a field."""
        self.violations.append(FieldViolation(printable(f"{self.path}.{name}"), printable(description)))

    def present(self, *names: str) -> str | None:
        """Return the first of the names that the object has a value for; ``null`` is none."""
        return next((name for name in names if self.value(name) is not None), None)

    def value(self, name: str) -> object:
        """Return what the object, or else its class, has for the name."""
        value = self.config.get(name)
        return self._defaults.get(name) if value is None else value

    def integer(self, *names: str, most: int, least: int = 1) -> int | None:
        """Return the first of the fields that is there, a whole number within bounds.

        ``None``: there is none, or it is bad, which is noted.
        """
        name = self.present(*names)
        return None if name is None else self._checked(name, self.value(name), least, most)

    def required(self, *names: str, most: int, what: str) -> int:
        """Return the first of the fields, which must be there; 1: it is missing or bad, which is noted."""
        if self.present(*names) is None:
            self.reject(names[0], f"is missing; it is {what}. Is this the config.json of a language model?")
            return 1
        return self.integer(*names, most=most) or 1

    def first_integer(self, *names: str, most: int, least: int = 1) -> int | None:
        """Return a field that may be a list of equal numbers; its first counts."""
        name = self.present(*names)
        if name is None:
            return None
        value = self.value(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not value:
                return None
            value = value[0]
        return self._checked(name, value, least, most)

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.reject(name, f"is {shown(value)}; must be true or false")
            return default
        return value

    def text(self, name: str) -> str:
        """Return a text; ``""``: there is none."""
        value = self.value(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.reject(name, f"is {shown(value)}; must be a text")
            return ""
        return value

    def texts(self, name: str, at_most: int) -> tuple[str, ...] | None:
        """Return a list of texts; ``None``: there is none, or it is bad, which is noted."""
        listed = self._list(name)
        if listed is None:
            return None
        found = tuple(each for each in listed if isinstance(each, str))
        return found if self._are_all_good(name, listed, found, at_most, "texts") else None

    def whole_numbers(self, name: str, at_most: int) -> tuple[int, ...] | None:
        """Return a list of whole numbers, likewise."""
        listed = self._list(name)
        if listed is None:
            return None
        found = tuple(each for each in listed if isinstance(each, int) and not isinstance(each, bool))
        return found if self._are_all_good(name, listed, found, at_most, "whole numbers") else None

    def child(self, name: str) -> ConfigFields | None:
        """Return an object within this one; ``None``: there is none, or it is no object, which is noted."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.reject(name, f"is {shown(value)}; must be an object")
            return None
        return ConfigFields(value, f"{self.path}.{name}", self.violations)

    def raise_if_bad(self) -> None:
        """Raise what was noted.

        Raises:
            ModelConfigError: Something was.
        """
        if self.violations:
            raise ModelConfigError(self.violations)

    def _list(self, name: str) -> Sequence[object] | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.reject(name, f"is {shown(value)}; must be a list")
            return None
        return value

    def _are_all_good(
        self, name: str, listed: Sequence[object], found: Sequence[object], at_most: int, what: str
    ) -> bool:
        is_good = len(found) == len(listed) <= at_most
        if not is_good:
            self.reject(name, f"is {shown(listed)}; must be a list of at most {at_most:,} {what}")
        return is_good

    def _checked(self, name: str, value: object, least: int, most: int) -> int | None:
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            # Some readers of JSON know only floating-point numbers.
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.reject(name, f"is {shown(value)}; must be a whole number of {least:,} to {most:,}")
            return None
        return value


def printable(text: str) -> str:
    """Return a text without the halves of characters that JSON can hold, but no encoding."""
    return text.encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) <= _MAX_SHOWN_NUMBER else "a number far too large"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return repr(value[:_SHOWN_LENGTH]) + ("..." if len(value) > _SHOWN_LENGTH else "")
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return f"a list of {len(value):,}"
    return "null" if value is None else f"a {type(value).__name__}"
