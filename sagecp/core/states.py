"""The life cycles of requests and instances, described once."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar

from sagecp.core.errors import IllegalTransitionError
from sagecp.core.types import InstanceState, RequestState

StateT = TypeVar("StateT", bound=enum.Enum)

REQUEST_TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset(
        {RequestState.DISPATCHED, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED}
    ),
    # Back to QUEUED: the attempt was lost before it produced anything.
    RequestState.DISPATCHED: frozenset(
        {
            RequestState.RUNNING,
            RequestState.SUCCEEDED,
            RequestState.QUEUED,
            RequestState.FAILED,
            RequestState.CANCELLED,
            RequestState.EXPIRED,
        }
    ),
    RequestState.RUNNING: frozenset(
        {
            RequestState.SUCCEEDED,
            RequestState.QUEUED,
            RequestState.FAILED,
            RequestState.CANCELLED,
            RequestState.EXPIRED,
        }
    ),
    RequestState.SUCCEEDED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.CANCELLED: frozenset(),
    RequestState.EXPIRED: frozenset(),
}

INSTANCE_TRANSITIONS: Mapping[InstanceState, frozenset[InstanceState]] = {
    InstanceState.STARTING: frozenset(
        {InstanceState.READY, InstanceState.UNHEALTHY, InstanceState.DRAINING, InstanceState.LOST}
    ),
    InstanceState.READY: frozenset({InstanceState.UNHEALTHY, InstanceState.DRAINING, InstanceState.LOST}),
    # A drain that is undone leads to wherever the engine's condition would have led.
    InstanceState.DRAINING: frozenset(
        {
            InstanceState.DRAINED,
            InstanceState.STARTING,
            InstanceState.READY,
            InstanceState.UNHEALTHY,
            InstanceState.LOST,
        }
    ),
    InstanceState.DRAINED: frozenset(
        {InstanceState.STARTING, InstanceState.READY, InstanceState.UNHEALTHY, InstanceState.LOST}
    ),
    InstanceState.UNHEALTHY: frozenset(
        {InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING, InstanceState.LOST}
    ),
    InstanceState.LOST: frozenset(
        {InstanceState.STARTING, InstanceState.READY, InstanceState.UNHEALTHY, InstanceState.DRAINING}
    ),
}

_HISTORY_LIMIT = 32


class StateMachine(Generic[StateT]):
    """A current state, the table of allowed steps, and the last steps taken.

    Args:
        subject: Name for error messages, such as ``request 'r-1'``.
        initial: The first state.
        transitions: For each state, the states that may follow.
    """

    __slots__ = ("_transitions", "history", "state", "subject")

    def __init__(
        self, subject: str, initial: StateT, transitions: Mapping[StateT, frozenset[StateT]]
    ) -> None:
        self.subject = subject
        self.state = initial
        self.history: list[StateT] = [initial]
        self._transitions = transitions

    def to(self, target: StateT) -> None:
        """Take one step.

        Raises:
            IllegalTransitionError: The table has no such step; carries the history.
        """
        if target not in self._transitions[self.state]:
            raise IllegalTransitionError(self.subject, self.history, target)
        self.state = target
        self.history.append(target)
        if len(self.history) > _HISTORY_LIMIT:
            del self.history[1]
