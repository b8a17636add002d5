"""Times, JSON values and enums."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.struct_pb2 import Struct, Value

from sagecp.core.errors import FieldViolation

_JSON_INTEGER_LIMIT = 2.0**53


def value_to_json(value: Value) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value as Python's; whole numbers as ``int``, because a Struct knows only doubles."""
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= _JSON_INTEGER_LIMIT else number
    if kind == "string_value":
        return value.string_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "struct_value":
        return struct_to_json(value.struct_value)
    if kind == "list_value":
        return [value_to_json(item) for item in value.list_value.values]
    return None


def struct_to_json(struct: Struct) -> dict[str, Any]:
    """Return a Struct as a dict."""
    return {key: value_to_json(value) for key, value in struct.fields.items()}


def check_enum(
    field: str,
    number: int,
    enum: EnumDescriptor,
    violations: list[FieldViolation],
    *,
    required: bool = False,
) -> bool:
    """Return whether an enum field is set to a value that exists.

    Notes a violation when the value does not exist, or is not set and must be.
    """
    if number == 0:
        if required:
            violations.append(FieldViolation(field, f"is not set; choose one of {_choices(enum)}"))
        return False
    if number not in enum.values_by_number:
        violations.append(
            FieldViolation(field, f"has the unknown value {number}; choose one of {_choices(enum)}")
        )
        return False
    return True


def _choices(enum: EnumDescriptor) -> str:
    return ", ".join(f"{value.name} ({value.number})" for value in enum.values if value.number)


def prefixed(prefix: str, violations: list[FieldViolation]) -> list[FieldViolation]:
    """Return violations with their field paths below ``prefix``."""
    return [FieldViolation(f"{prefix}.{v.field}", v.description) for v in violations]
