"""Reading fields of a JSON body the way vLLM's API does, mistakes included in its words.

Values are converted leniently (``"3"`` is an integer, ``3.0`` too), every bad
field is reported at once, and fields that are not asked for are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

_MAX_LISTED = 10
_INTEGER = re.compile(r"\s*[+-]?\d+(\.0*)?\s*\Z")
_TRUE = {"1", "true", "t", "yes", "y", "on"}
_FALSE = {"0", "false", "f", "no", "n", "off"}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: The HTTP status.
        message: What is wrong.
        type: vLLM's name for this kind of error.
        param: The field at fault, or ``None``.
    """

    def __init__(
        self, message: str, *, status: int = 400, type_: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type_
        self.param = param

    def body(self) -> bytes:
        """Return the JSON that says so."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.status,
                }
            }
        )


class UnreadableBodyError(Exception):
    """A body is not even text; vLLM answers this one in another shape."""


def refuse(message: str, param: str | None = None, value: object = None) -> ApiError:
    """Make the error for a value that is understood and not allowed."""
    if param is not None:
        message += (
            f" (parameter={param})" if value is None else f" (parameter={param}, value={describe(value)})"
        )
    return ApiError(message, param=param)


def describe(value: object) -> str:
    """Return a value as error messages show it: scalars in full, containers by size."""
    if isinstance(value, Mapping):
        return f"<dict of {len(value)} items>"
    if isinstance(value, list):
        return f"<list of {len(value)} items>"
    return str(value)


class FieldReader:
    """Reads typed fields from an object and collects what is wrong with them.

    Args:
        data: The object.
        where: Its path, as errors name it.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "body") -> None:
        self.data = data
        self._where = where
        self._violations: list[str] = []
        self._first_location = where

    def fail(self, location: str, kind: str, message: str, value: object, bounds: object = None) -> None:
        """Record a bad value at a path below the object (empty: the object itself)."""
        path = f"{self._where}.{location}" if location else self._where
        if not self._violations:
            self._first_location = path
        entry = f"{{'type': {kind!r}, 'loc': {path!r}, 'msg': {message!r}, 'input': {describe(value)!r}"
        entry += "}" if bounds is None else f", 'ctx': {bounds!r}}}"
        self._violations.append(entry)

    def raise_failures(self) -> None:
        """Raise one error for everything recorded.

        Raises:
            ApiError: Something was.
        """
        if not self._violations:
            return
        count = len(self._violations)
        lines = [f"{count} validation error{'s' if count > 1 else ''}:"]
        lines += [f"  {violation}" for violation in self._violations[:_MAX_LISTED]]
        if count > _MAX_LISTED:
            lines.append(f"  ...and {count - _MAX_LISTED} more errors")
        raise ApiError("\n".join(lines), type_="Bad Request", param=self._first_location)

    def integer(
        self, name: str, default: int, *, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        """Read an integer that may be absent but not null."""
        if name not in self.data:
            return default
        value = self._integer(name, self.data[name])
        return default if value is None or not self._in_range(name, value, minimum, maximum) else value

    def optional_integer(
        self, name: str, *, minimum: int | None = None, maximum: int | None = None
    ) -> int | None:
        """Read an integer that may be absent or null."""
        raw = self.data.get(name)
        if raw is None:
            return None
        value = self._integer(name, raw)
        return None if value is None or not self._in_range(name, value, minimum, maximum) else value

    def optional_number(self, name: str) -> float | None:
        """Read a number that may be absent or null."""
        raw = self.data.get(name)
        if raw is None:
            return None
        if isinstance(raw, str):
            try:
                return float(raw)
            except ValueError:
                message = "Input should be a valid number, unable to parse string as a number"
                self.fail(name, "float_parsing", message, raw)
                return None
        if isinstance(raw, int | float):
            return float(raw)
        self.fail(name, "float_type", "Input should be a valid number", raw)
        return None

    def boolean(self, name: str, *, default: bool = False) -> bool:
        """Read a boolean; null counts as absent."""
        raw = self.data.get(name)
        if raw is None:
            return default
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, int | float) and raw in (0, 1):
            return bool(raw)
        if isinstance(raw, str) and raw.lower() in _TRUE | _FALSE:
            return raw.lower() in _TRUE
        if isinstance(raw, str | int | float):
            message = "Input should be a valid boolean, unable to interpret input"
            self.fail(name, "bool_parsing", message, raw)
        else:
            self.fail(name, "bool_type", "Input should be a valid boolean", raw)
        return default

    def optional_string(self, name: str) -> str | None:
        """Read a string that may be absent or null."""
        raw = self.data.get(name)
        if raw is None or isinstance(raw, str):
            return raw
        self.fail(name, "string_type", "Input should be a valid string", raw)
        return None

    def items(self, name: str, raw: object, convert: Callable[[str, object], Any]) -> list[Any]:
        """Read a list, converting every item with its path."""
        if not isinstance(raw, list):
            self.fail(name, "list_type", "Input should be a valid list", raw)
            return []
        return [convert(f"{name}.{index}", item) for index, item in enumerate(raw)]

    def strings(self, name: str) -> tuple[str, ...]:
        """Read a string or a list of strings; null counts as none."""
        raw = self.data.get(name)
        if raw is None:
            return ()
        if isinstance(raw, str):
            return (raw,)
        if not isinstance(raw, list):
            self.fail(name, "string_type", "Input should be a valid string", raw)
        return tuple(self.items(name, raw, self._string))

    def integers(self, name: str) -> tuple[int, ...]:
        """Read a list of integers; null counts as none."""
        raw = self.data.get(name)
        return () if raw is None else tuple(self.items(name, raw, self._integer))

    def _string(self, location: str, raw: object) -> str:
        if isinstance(raw, str):
            return raw
        self.fail(location, "string_type", "Input should be a valid string", raw)
        return ""

    def _integer(self, location: str, raw: object) -> int | None:
        if isinstance(raw, bool | int):
            return int(raw)
        if isinstance(raw, float):
            if raw.is_integer():
                return int(raw)
            message = "Input should be a valid integer, got a number with a fractional part"
            self.fail(location, "int_from_float", message, raw)
        elif isinstance(raw, str):
            if _INTEGER.match(raw):
                return int(raw.split(".")[0])
            message = "Input should be a valid integer, unable to parse string as an integer"
            self.fail(location, "int_parsing", message, raw)
        else:
            self.fail(location, "int_type", "Input should be a valid integer", raw)
        return None

    def _in_range(self, name: str, value: int, minimum: int | None, maximum: int | None) -> bool:
        if minimum is not None and value < minimum:
            message = f"Input should be greater than or equal to {minimum}"
            self.fail(name, "greater_than_equal", message, value, {"ge": minimum})
            return False
        if maximum is not None and value > maximum:
            message = f"Input should be less than or equal to {maximum}"
            self.fail(name, "less_than_equal", message, value, {"le": maximum})
            return False
        return True


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Raises:
        ApiError: It is none; says where parsing failed.
    """
    reader = FieldReader({})
    value: Any = None
    if not body:
        reader.fail("", "missing", "Field required", None)
    else:
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = _parse_leniently(body, reader)
    reader.raise_failures()
    if not isinstance(value, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        reader.fail("", "model_attributes_type", message, value)
        reader.raise_failures()
    result: dict[str, Any] = value
    return result


def _parse_leniently(body: bytes, reader: FieldReader) -> object:
    """Parse with the standard library, which knows where a mistake is (and takes NaN)."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        reader.fail(str(error.pos), "json_invalid", "JSON decode error", {}, {"error": error.msg})
    except (UnicodeDecodeError, RecursionError):
        raise UnreadableBodyError from None
    return None
