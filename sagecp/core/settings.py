"""What operators may change while the core runs: names and parameters, as versions to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sagecp.core.errors import FieldViolation, InvalidRequestError, SettingsVersionError
from sagecp.core.parameters import ParameterTable
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.shared_parameters import SHARED_PARAMETERS

MAX_COMMENT_LENGTH = 256
# Versions that can be gone back to.
HISTORY_LIMIT = 64

PARAMETERS = ParameterTable(
    (
        *SHARED_PARAMETERS,
        *(
            parameter
            for name in SCHEDULING_POLICIES.names
            for parameter in SCHEDULING_POLICIES.get(name).PARAMETERS
        ),
        *(
            parameter
            for name in ROUTING_STRATEGIES.names
            for parameter in ROUTING_STRATEGIES.get(name).PARAMETERS
        ),
        *(parameter for name in LOAD_BALANCERS.names for parameter in LOAD_BALANCERS.get(name).PARAMETERS),
    )
)
"""Every parameter of every component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingSettings:
    """One version of how requests are ordered and placed.

    Attributes:
        version: From 1; every change adds one.
        scheduling_policy: A name of `core.policies.registry`.
        routing_strategy: A name of `core.router.registry`.
        load_balancer: Likewise.
        parameters: Values that differ from the defaults, by name.
        values: Every parameter's value.
        update_s: When it came into force, on the core's clock.
        comment: Who changed what, and why.
    """

    version: int
    scheduling_policy: str
    routing_strategy: str
    load_balancer: str
    parameters: Mapping[str, float]
    update_s: float = 0.0
    comment: str = ""
    values: Mapping[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChange:
    """A wish to change the settings. Empty names and absent parameters stay as they are.

    Attributes:
        parameters: New values by name.
        reset_parameters: Put every parameter that is not named back to its default.
        expected_version: Only if this version is in force. 0: whichever is.
        revert_to_version: Go back to this version instead of changing anything else. 0: no.
    """

    scheduling_policy: str = ""
    routing_strategy: str = ""
    load_balancer: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    reset_parameters: bool = False
    comment: str = ""
    expected_version: int = 0
    revert_to_version: int = 0


class SettingsHistory:
    """The settings in force, and those before them.

    Args:
        scheduling_policy: The first version's.
        routing_strategy: The first version's.
        load_balancer: The first version's.
        parameters: The first version's.

    Raises:
        UnknownNameError: One of the names is not known.
        InvalidRequestError: Names every bad parameter.
    """

    def __init__(
        self,
        scheduling_policy: str,
        routing_strategy: str,
        load_balancer: str,
        parameters: Mapping[str, float],
    ) -> None:
        first = SchedulingSettings(
            version=1,
            scheduling_policy=scheduling_policy,
            routing_strategy=routing_strategy,
            load_balancer=load_balancer,
            parameters=dict(parameters),
            comment="configured at start",
        )
        self._versions: dict[int, SchedulingSettings] = {1: _checked(first)}
        self.current = self._versions[1]

    def versions(self) -> tuple[SchedulingSettings, ...]:
        """Return the versions that can be gone back to, oldest first; the last is in force."""
        return tuple(self._versions.values())

    def preview(self, change: SettingsChange, now: float) -> SchedulingSettings:
        """Return what the settings would be after a change, changing nothing.

        Raises:
            UnknownNameError: One of the names is not known.
            InvalidRequestError: Names every bad field.
            SettingsVersionError: Another version is in force, or the one to go back to is not kept.
        """
        current = self.current
        if change.expected_version and change.expected_version != current.version:
            raise SettingsVersionError(
                f"version {current.version} is in force, not {change.expected_version}; "
                "look at it and decide again",
                version=current.version,
            )
        if len(change.comment) > MAX_COMMENT_LENGTH:
            raise InvalidRequestError(
                [
                    FieldViolation(
                        "config.comment",
                        f"has {len(change.comment)} characters; at most {MAX_COMMENT_LENGTH} are allowed",
                    )
                ]
            )
        if change.revert_to_version:
            return self._reverted(change, now)
        parameters = {} if change.reset_parameters else dict(current.parameters)
        parameters.update(change.parameters)
        return _checked(
            SchedulingSettings(
                version=current.version + 1,
                scheduling_policy=change.scheduling_policy or current.scheduling_policy,
                routing_strategy=change.routing_strategy or current.routing_strategy,
                load_balancer=change.load_balancer or current.load_balancer,
                parameters=parameters,
                update_s=now,
                comment=change.comment,
            )
        )

    def apply(self, change: SettingsChange, now: float) -> SchedulingSettings:
        """Change the settings. Errors: as :meth:`preview`, and then nothing has changed."""
        self.current = self.preview(change, now)
        self._versions[self.current.version] = self.current
        if len(self._versions) > HISTORY_LIMIT:
            del self._versions[next(iter(self._versions))]
        return self.current

    def _reverted(self, change: SettingsChange, now: float) -> SchedulingSettings:
        wanted = self._versions.get(change.revert_to_version)
        if wanted is None:
            kept = sorted(self._versions)
            raise SettingsVersionError(
                f"version {change.revert_to_version} is not kept; those from {kept[0]} to {kept[-1]} are",
                version=self.current.version,
            )
        return replace(
            wanted,
            version=self.current.version + 1,
            update_s=now,
            comment=change.comment or f"back to version {wanted.version}",
        )


def _checked(settings: SchedulingSettings) -> SchedulingSettings:
    """Return the settings with every parameter's value, if all of it is usable."""
    SCHEDULING_POLICIES.get(settings.scheduling_policy)
    ROUTING_STRATEGIES.get(settings.routing_strategy)
    LOAD_BALANCERS.get(settings.load_balancer)
    violations = PARAMETERS.violations(settings.parameters)
    if violations:
        raise InvalidRequestError(violations)
    parameters = {name: float(value) for name, value in settings.parameters.items()}
    return replace(
        settings,
        parameters=MappingProxyType(parameters),
        values=MappingProxyType(PARAMETERS.resolve(parameters)),
    )
