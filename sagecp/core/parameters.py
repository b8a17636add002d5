"""Parameters of policies, strategies and balancers: declared beside their code, validated as a whole."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sagecp.core.errors import FieldViolation

_ANY = ".*"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number that operators may change while the core runs.

    Attributes:
        name: ``component.what_unit``, such as ``priority.boost_high_s``. One that
            ends with ``.*`` stands for any number of names, such as one per tenant;
            those have no value unless somebody gives one.
        default: Value when nobody says otherwise.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        description: What it does, in a sentence.
    """

    name: str
    default: float
    minimum: float
    maximum: float
    description: str


class ParameterTable:
    """Every parameter that exists, by name.

    Args:
        parameters: The declarations of all components; a name may occur once only.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters: dict[str, Parameter] = {}
        for parameter in parameters:
            if parameter.name in self._parameters:
                raise ValueError(f"parameter {parameter.name!r} is declared twice")
            self._parameters[parameter.name] = parameter

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._parameters[name] for name in sorted(self._parameters))

    def find(self, name: str) -> Parameter | None:
        """Return the declaration that a name belongs to; ``None``: there is none."""
        found = self._parameters.get(name)
        if found is None:
            found = next(
                (
                    parameter
                    for pattern, parameter in self._parameters.items()
                    if pattern.endswith(_ANY) and name.startswith(pattern[:-1]) and name != pattern[:-1]
                ),
                None,
            )
        return None if name.endswith(_ANY) else found

    def resolve(self, overrides: Mapping[str, float]) -> dict[str, float]:
        """Return every parameter's value: the override where there is one, else the default."""
        values = {
            name: parameter.default for name, parameter in self._parameters.items() if not name.endswith(_ANY)
        }
        values.update(overrides)
        return values

    def violations(self, overrides: Mapping[str, object]) -> list[FieldViolation]:
        """Return everything that is wrong with some overrides."""
        found = []
        for name, value in overrides.items():
            parameter = self.find(name)
            where = f"parameters[{name!r}]"
            if parameter is None:
                close = difflib.get_close_matches(name, self._parameters, n=3) or sorted(self._parameters)
                found.append(FieldViolation(where, f"is not a parameter; known are {', '.join(close)}"))
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                found.append(FieldViolation(where, f"is {value!r}; must be a number"))
            elif not (math.isfinite(value) and parameter.minimum <= value <= parameter.maximum):
                allowed = f"{parameter.minimum:g} to {parameter.maximum:g}"
                found.append(FieldViolation(where, f"is {value:g}; must be {allowed}"))
        return found
