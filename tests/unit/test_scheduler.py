"""The scheduler, events in and effects out.

A scenario is a list of steps. A step is an event, or a number of seconds after
which the clock is looked at, with the effects it must have, in order, one line
each (`tests.support.core_world.line`). An exception instead of lines: the event is
refused with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import (
    ErrorReason,
    Failure,
    FleetFullError,
    InstanceNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestIdConflictError,
    RequestNotFoundError,
    SageError,
    SettingsVersionError,
    StaleIncarnationError,
    UnknownNameError,
)
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.scheduler import Scheduler
from sagecp.core.service_books import LaneKey
from sagecp.core.types import (
    EngineCondition,
    FailoverMode,
    InstanceState,
    PromptDigest,
    RequestPriority,
    RequestState,
)
from tests.support.core_world import (
    LOST_CONNECTION,
    REJECTED,
    STEP_TIME,
    Traffic,
    World,
    arrive,
    beat,
    configure,
    dispatched,
    dispatched_to,
    fail,
    full_text,
    healthy,
    make_instance,
    probe,
)

Step = tuple[ev.Event | float, list[str] | type[SageError]]
NEW = "->"  # An instance that joins: `a ->STARTING`.


@dataclass
class Scenario:
    """A name, steps, and a configuration that differs from the defaults."""

    name: str
    steps: list[Step]
    config: dict[str, Any] = field(default_factory=dict)


def joined(instance_id: str) -> list[str]:
    return [f"{instance_id} {NEW}STARTING", f"{instance_id} STARTING>READY"]


def progressed(request_id: str, epoch: int = 1) -> ev.AttemptProgressed:
    return ev.AttemptProgressed(request_id, epoch)


def succeeded(request_id: str, epoch: int = 1) -> ev.AttemptSucceeded:
    return ev.AttemptSucceeded(request_id, epoch)


def drain(instance_id: str, undo: bool = False) -> ev.DrainRequested:
    return ev.DrainRequested(instance_id, undo, force=True)


UNHEALTHY = EngineCondition.UNHEALTHY
STARTING = EngineCondition.STARTING
UNKNOWN = EngineCondition.UNKNOWN
SHUTTING_DOWN = Failure(ErrorReason.SHUTTING_DOWN, "bye")
FULL = {"default_concurrency_limit": 1}

SCENARIOS = [
    # -- arrival and dispatch -----------------------------------------------------
    Scenario(
        "an idle fleet gets a request at once, and hears of it once more at its end",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (progressed("r1"), []),
            (progressed("r1"), []),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
        ],
    ),
    Scenario(
        "success needs no first token",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
        ],
    ),
    Scenario(
        "requests wait in the control plane while every instance is full",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (arrive("r3"), ["accept r3"]),
            (progressed("r1"), []),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch r2#1 a"]),
            (succeeded("r2"), ["end r2 SUCCEEDED", "dispatch r3#1 a"]),
        ],
        FULL,
    ),
    Scenario(
        "a request waits for an instance that is not ready yet",
        [
            (ev.InstanceRegistered(make_instance("a")), [f"a {NEW}STARTING"]),
            (arrive("r1"), ["accept r1"]),
            (probe("a"), ["a STARTING>READY", "dispatch r1#1 a"]),
        ],
    ),
    Scenario(
        "a request without a model takes the only one",
        [
            (healthy("a", "m", model_aliases=("alias",)), joined("a")),
            (arrive("r1", ""), ["accept r1", "dispatch r1#1 a"]),
            (healthy("b", "n"), joined("b")),
            (arrive("r2", ""), ["reject r2 MODEL_NOT_FOUND"]),
            (arrive("r3", "alias"), ["accept r3", "dispatch r3#1 a"]),
        ],
    ),
    Scenario(
        "what cannot be accepted is refused and not known afterwards",
        [
            (arrive("r1"), ["reject r1 MODEL_NOT_FOUND"]),
            (ev.RequestCancelled("r1"), RequestNotFoundError),
            (healthy("a"), joined("a")),
            (arrive("r1", "nope"), ["reject r1 MODEL_NOT_FOUND"]),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r1"), RequestIdConflictError),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
        ],
    ),
    Scenario(
        "the queue is bounded by count",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (arrive("r3"), ["reject r3 QUEUE_FULL"]),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch r2#1 a"]),
            (arrive("r3"), ["accept r3"]),
        ],
        FULL | {"max_queued_request_count": 1},
    ),
    Scenario(
        "the queue is bounded by bytes",
        [
            (healthy("a"), joined("a")),
            (arrive("r1", prompt="x" * 90), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2", prompt="x" * 90), ["accept r2"]),
            (arrive("r3", prompt="x" * 11), ["reject r3 QUEUE_FULL"]),
            (arrive("r4", prompt="x" * 10), ["accept r4"]),
            (ev.RequestCancelled("r2"), ["end r2 CANCELLED"]),
            (arrive("r3", prompt="x" * 90), ["accept r3"]),
        ],
        # Of which requests of the NORMAL class may fill four fifths.
        FULL | {"max_queued_bytes": 125},
    ),
    Scenario(
        "a lost attempt always gets its place back",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (
                fail("r1", failure=LOST_CONNECTION, engine_down=True),
                ["a READY>UNHEALTHY", "requeue r1"],
            ),
            (arrive("r3"), ["reject r3 QUEUE_FULL"]),
            (probe("a"), ["a UNHEALTHY>READY", "dispatch r1#2 a"]),
        ],
        FULL | {"max_queued_request_count": 1},
    ),
    Scenario(
        "models share nothing but the instances that serve both",
        [
            (healthy("a", "m", model_aliases=("n",)), joined("a")),
            (healthy("b", "n"), joined("b")),
            (arrive("r1", "m"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2", "m"), ["accept r2"]),
            (arrive("r3", "n"), ["accept r3", "dispatch r3#1 b"]),
            (arrive("r4", "n"), ["accept r4"]),
            (succeeded("r3"), ["end r3 SUCCEEDED", "dispatch r4#1 b"]),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch r2#1 a"]),
        ],
        FULL,
    ),
    Scenario(
        "the order holds over all models of an instance, one request at a time",
        [
            (ev.InstanceRegistered(make_instance("a", "m", model_aliases=("n",))), [f"a {NEW}STARTING"]),
            (arrive("m1", "m"), ["accept m1"]),
            (0.5, []),
            (arrive("n1", "n"), ["accept n1"]),
            (0.5, []),
            (arrive("m2", "m"), ["accept m2"]),
            (0.5, []),
            (arrive("n2", "n"), ["accept n2"]),
            (arrive("n3", "n", priority=RequestPriority.HIGH), ["accept n3"]),
            (
                probe("a"),
                [
                    "a STARTING>READY",
                    "dispatch n3#1 a",
                    "dispatch m1#1 a",
                    "dispatch n1#1 a",
                    "dispatch m2#1 a",
                ],
            ),
        ],
        {"scheduling_policy": "priority"},
    ),
    Scenario(
        "a request that is too big for the room there is waits, and nobody overtakes it",
        [
            (healthy("a", capacity=100), joined("a")),
            (arrive("r1", prompt="x" * 200, max_tokens=10), ["accept r1", "dispatch r1#1 a"]),
            (arrive("big", prompt="x" * 200, max_tokens=10), ["accept big"]),
            (arrive("small", max_tokens=1), ["accept small"]),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch big#1 a", "dispatch small#1 a"]),
        ],
        {"scheduling_policy": "priority"},
    ),
    Scenario(
        "a request bigger than any instance goes to one that holds nothing",
        [
            (healthy("a", capacity=10), joined("a")),
            (arrive("huge", prompt="x" * 4000), ["accept huge", "dispatch huge#1 a"]),
        ],
    ),
    # -- cancel, abort ------------------------------------------------------------
    Scenario(
        "a cancelled request leaves the queue, or the engine",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (arrive("r3"), ["accept r3"]),
            (ev.RequestCancelled("r2"), ["end r2 CANCELLED"]),
            (ev.RequestCancelled("r2"), RequestNotFoundError),
            (progressed("r1"), []),
            (ev.RequestCancelled("r1"), ["abort r1#1 a", "end r1 CANCELLED", "dispatch r3#1 a"]),
            (succeeded("r1"), []),
            (fail("r1"), []),
        ],
        FULL,
    ),
    Scenario(
        "the control plane gives requests up wherever they are",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (ev.RequestAborted("r2", SHUTTING_DOWN), ["end r2 FAILED"]),
            (ev.RequestAborted("r1", SHUTTING_DOWN), ["abort r1#1 a", "end r1 FAILED"]),
            (ev.RequestAborted("r1", SHUTTING_DOWN), []),
        ],
        FULL,
    ),
    Scenario(
        "giving up stops the engine, whatever the reason is called",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (ev.RequestAborted("r1", LOST_CONNECTION), ["abort r1#1 a", "end r1 FAILED"]),
        ],
    ),
    # -- failure and another try -----------------------------------------------------
    Scenario(
        "a lost attempt is tried elsewhere",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (fail("r1"), ["requeue r1", "dispatch r1#2 b"]),
            (succeeded("r1", 1), []),
            (progressed("r1", 1), []),
            (fail("r1", 1), []),
            (succeeded("r1", 2), ["end r1 SUCCEEDED"]),
        ],
    ),
    Scenario(
        "where there is nothing else, the same instance is tried again, up to the limit",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (fail("r1", 1), ["requeue r1", "dispatch r1#2 a"]),
            (fail("r1", 2), ["requeue r1", "dispatch r1#3 a"]),
            (fail("r1", 3), ["end r1 FAILED"]),
        ],
    ),
    Scenario(
        "output that was delivered is never produced twice",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (progressed("r1"), []),
            (fail("r1", output_token_count=3, cannot_continue="it uses tools"), ["end r1 FAILED"]),
        ],
    ),
    Scenario(
        "what the engine refuses is not tried again",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (fail("r1", failure=REJECTED, retryable=False), ["end r1 FAILED"]),
        ],
    ),
    Scenario(
        "a caller may ask for one attempt only",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1", failover_mode=FailoverMode.FAIL), ["accept r1", "dispatch r1#1 a"]),
            (fail("r1"), ["end r1 FAILED"]),
        ],
    ),
    Scenario(
        "a request waits for a busy instance rather than go back, and others may pass it",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2", "dispatch r2#1 b"]),
            (fail("r1"), ["requeue r1"]),
            (arrive("r3"), ["accept r3", "dispatch r3#1 a"]),
            (arrive("r4"), ["accept r4"]),
            (succeeded("r3"), ["end r3 SUCCEEDED", "dispatch r4#1 a"]),
            (succeeded("r2"), ["end r2 SUCCEEDED", "dispatch r1#2 b"]),
        ],
        FULL,
    ),
    Scenario(
        "a request goes back when the better instance is gone",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), joined("b")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2", "dispatch r2#1 b"]),
            (fail("r1"), ["requeue r1"]),
            (probe("b", UNHEALTHY), ["b READY>UNHEALTHY", "dispatch r1#2 a"]),
        ],
        FULL,
    ),
    Scenario(
        "an engine that does not answer at all gets nothing until a probe succeeds",
        [
            (healthy("a", incarnation=1), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2", "dispatch r2#1 a"]),
            (
                fail("r1", failure=LOST_CONNECTION, engine_down=True),
                ["a READY>UNHEALTHY", "requeue r1"],
            ),
            (fail("r2", failure=LOST_CONNECTION, engine_down=True), ["requeue r2"]),
            (beat("a", 1), []),
            (probe("a"), ["a UNHEALTHY>READY", "dispatch r1#2 a", "dispatch r2#2 a"]),
        ],
    ),
    Scenario(
        "an unreachable instance whose agent was lost and came back is UNHEALTHY, not LOST",
        [
            (healthy("a", incarnation=1), joined("a")),
            (6.0, ["a READY>LOST"]),
            (probe("a", UNHEALTHY), []),
            (beat("a", 1), ["a LOST>UNHEALTHY"]),
            (probe("a"), ["a UNHEALTHY>READY"]),
        ],
    ),
    # -- time ---------------------------------------------------------------------
    Scenario(
        "a deadline ends a request while it waits and while it runs",
        [
            (healthy("a"), joined("a")),
            (arrive("r1", slo_deadline_ms=2000.0), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2", slo_deadline_ms=1000.0), ["accept r2"]),
            (0.9, []),
            (0.1, ["end r2 EXPIRED"]),
            (1.0, ["abort r1#1 a", "end r1 EXPIRED"]),
        ],
        FULL,
    ),
    Scenario(
        "a request without a deadline may run for ever, and wait only so long",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (9.9, []),
            (0.1, ["end r2 EXPIRED"]),
            (1000.0, []),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
        ],
        FULL | {"queue_timeout_s": 10.0},
    ),
    Scenario(
        "a lost attempt may wait as long as a new request",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (9.0, []),
            (
                fail("r1", failure=LOST_CONNECTION, engine_down=True),
                ["a READY>UNHEALTHY", "requeue r1"],
            ),
            (9.9, []),
            (0.1, ["end r1 EXPIRED"]),
        ],
        {"queue_timeout_s": 10.0},
    ),
    Scenario(
        "a deadline counts from arrival through every attempt",
        [
            (healthy("a"), joined("a")),
            (arrive("r1", slo_deadline_ms=10000.0), ["accept r1", "dispatch r1#1 a"]),
            (9.0, []),
            (fail("r1"), ["requeue r1", "dispatch r1#2 a"]),
            (1.0, ["abort r1#2 a", "end r1 EXPIRED"]),
        ],
    ),
    Scenario(
        "an id that is used again has its own deadline",
        [
            (healthy("a"), joined("a")),
            (arrive("r1", slo_deadline_ms=1000.0), ["accept r1", "dispatch r1#1 a"]),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
            (arrive("r1", slo_deadline_ms=5000.0), ["accept r1", "dispatch r1#1 a"]),
            (1.0, []),
            (4.0, ["abort r1#1 a", "end r1 EXPIRED"]),
        ],
    ),
    # -- instances ----------------------------------------------------------------
    Scenario(
        "an instance follows the health of its engine",
        [
            (ev.InstanceRegistered(make_instance("a"), 1, STARTING), [f"a {NEW}STARTING"]),
            (beat("a", 1, STARTING), []),
            (beat("a", 1), ["a STARTING>READY"]),
            (beat("a", 1, UNKNOWN), []),
            (beat("a", 1, STARTING), []),
            (beat("a", 1, UNHEALTHY), ["a READY>UNHEALTHY"]),
            (beat("a", 1, UNKNOWN), []),
            (beat("a", 1, STARTING), ["a UNHEALTHY>STARTING"]),
            (beat("a", 1), ["a STARTING>READY"]),
        ],
    ),
    Scenario(
        "a lease that ends makes an instance LOST, and a beat brings it back",
        [
            (healthy("a", incarnation=1), joined("a")),
            (5.9, []),
            (0.1, ["a READY>LOST"]),
            (arrive("r1"), ["accept r1"]),
            (beat("a", 1, UNKNOWN), ["a LOST>STARTING"]),
            (beat("a", 1), ["a STARTING>READY", "dispatch r1#1 a"]),
            (5.9, []),
        ],
    ),
    Scenario(
        "a probe alone does not bring back what an agent lost",
        [
            (healthy("a", incarnation=1), joined("a")),
            (6.0, ["a READY>LOST"]),
            (probe("a"), []),
            (beat("a", 1), ["a LOST>READY"]),
        ],
    ),
    Scenario(
        "an instance without an agent has no lease",
        [(healthy("a"), joined("a")), (1e6, []), (arrive("r1"), ["accept r1", "dispatch r1#1 a"])],
    ),
    Scenario(
        "work on a LOST instance goes on and ends as usual",
        [
            (healthy("a", incarnation=1), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (6.0, ["a READY>LOST"]),
            (progressed("r1"), []),
            (succeeded("r1"), ["end r1 SUCCEEDED"]),
        ],
    ),
    Scenario(
        "a LOST instance is forgotten after a while, counted from the last time it was lost",
        [
            (healthy("a", incarnation=1), joined("a")),
            (6.0, ["a READY>LOST"]),
            (50.0, []),
            (beat("a", 1), ["a LOST>READY"]),
            (6.0, ["a READY>LOST"]),
            (99.0, []),
            (1.0, ["remove a"]),
            (beat("a", 1), InstanceNotFoundError),
            (arrive("r1"), ["reject r1 MODEL_NOT_FOUND"]),
        ],
        {"lost_retention_s": 100.0},
    ),
    Scenario(
        "the newest incarnation owns the name",
        [
            (healthy("a", incarnation=2), joined("a")),
            (healthy("a", incarnation=1), StaleIncarnationError),
            (healthy("a"), StaleIncarnationError),
            (beat("a", 1), StaleIncarnationError),
            (beat("a", 3), InstanceNotFoundError),
            (ev.InstanceDeregistered("a", 1), StaleIncarnationError),
            (healthy("a", incarnation=3), joined("a")),
            (beat("a", 2), StaleIncarnationError),
            (beat("a", 3), []),
            (ev.InstanceDeregistered("a", 3), ["remove a"]),
            (ev.InstanceDeregistered("a", 3), InstanceNotFoundError),
        ],
    ),
    Scenario(
        "a registration again keeps what runs, and its places",
        [
            (healthy("a", incarnation=1), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (healthy("a", incarnation=2), joined("a")),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch r2#1 a"]),
        ],
        FULL,
    ),
    Scenario(
        "requests run on when their instance leaves, and count when it comes back",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2"]),
            (ev.InstanceDeregistered("a"), ["remove a"]),
            (healthy("a"), joined("a")),
            (progressed("r1"), []),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch r2#1 a"]),
        ],
        FULL,
    ),
    Scenario(
        "an attempt that is lost with its instance is tried elsewhere",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (ev.InstanceDeregistered("a"), ["remove a"]),
            (fail("r1", failure=LOST_CONNECTION, engine_down=True), ["requeue r1"]),
            (healthy("b"), [*joined("b"), "dispatch r1#2 b"]),
        ],
    ),
    Scenario(
        "the fleet is bounded, and names are needed",
        [
            (healthy("a"), joined("a")),
            (healthy("b"), FleetFullError),
            (healthy(""), InvalidRequestError),
            (healthy("a"), joined("a")),
        ],
        {"max_instance_count": 1},
    ),
    Scenario(
        "news of instances that are not there",
        [
            (beat("a", 1), InstanceNotFoundError),
            (probe("a"), []),
            (drain("a"), InstanceNotFoundError),
            (ev.InstanceDeregistered("a"), InstanceNotFoundError),
        ],
    ),
    Scenario(
        "a full cache holds new work back until it empties",
        [
            (healthy("a", incarnation=1), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (beat("a", 1, key_value_cache_usage=0.99), []),
            (arrive("r2"), ["accept r2"]),
            (beat("a", 1, key_value_cache_usage=0.5), ["dispatch r2#1 a"]),
        ],
    ),
    Scenario(
        "requests waiting inside the engine lower the limit, and quiet raises it",
        [
            (healthy("a", incarnation=1, limit=8), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("r2"), ["accept r2", "dispatch r2#1 a"]),
            (beat("a", 1, running_request_count=2, waiting_request_count=1), []),
            (arrive("r3"), ["accept r3"]),
            (beat("a", 1, running_request_count=2, waiting_request_count=0), ["dispatch r3#1 a"]),
        ],
    ),
    # -- drain --------------------------------------------------------------------
    Scenario(
        "a drain finishes what runs and takes no more",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (drain("a"), ["a READY>DRAINING"]),
            (drain("a"), []),
            (arrive("r2"), ["accept r2"]),
            (probe("a"), []),
            (probe("a", UNHEALTHY), []),
            (succeeded("r1"), ["end r1 SUCCEEDED", "a DRAINING>DRAINED"]),
            (probe("a"), []),
            (drain("a", undo=True), ["a DRAINED>READY", "dispatch r2#1 a"]),
            (drain("a", undo=True), []),
        ],
    ),
    Scenario(
        "an idle instance is drained at once",
        [(healthy("a"), joined("a")), (drain("a"), ["a READY>DRAINING", "a DRAINING>DRAINED"])],
    ),
    Scenario(
        "a drain is complete when the last attempt is lost",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (drain("a"), ["a READY>DRAINING"]),
            (fail("r1"), ["requeue r1", "a DRAINING>DRAINED"]),
            (healthy("b"), [*joined("b"), "dispatch r1#2 b"]),
        ],
    ),
    Scenario(
        "a drain is complete when the last request is cancelled",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (drain("a"), ["a READY>DRAINING"]),
            (ev.RequestCancelled("r1"), ["abort r1#1 a", "end r1 CANCELLED", "a DRAINING>DRAINED"]),
        ],
    ),
    Scenario(
        "a drain outlasts a lost lease and a new registration",
        [
            (healthy("a", incarnation=1), joined("a")),
            (drain("a"), ["a READY>DRAINING", "a DRAINING>DRAINED"]),
            (6.0, ["a DRAINED>LOST"]),
            (beat("a", 1), ["a LOST>DRAINING", "a DRAINING>DRAINED"]),
            (
                healthy("a", incarnation=2),
                [f"a {NEW}STARTING", "a STARTING>DRAINING", "a DRAINING>DRAINED"],
            ),
            (arrive("r1"), ["accept r1"]),
            (drain("a", undo=True), ["a DRAINED>READY", "dispatch r1#1 a"]),
        ],
    ),
    Scenario(
        "a LOST instance is drained when it is back, unless that was undone",
        [
            (healthy("a", incarnation=1), joined("a")),
            (6.0, ["a READY>LOST"]),
            (drain("a"), []),
            (beat("a", 1), ["a LOST>DRAINING", "a DRAINING>DRAINED"]),
            (6.0, ["a DRAINED>LOST"]),
            (drain("a", undo=True), []),
            (beat("a", 1), ["a LOST>READY"]),
        ],
    ),
    Scenario(
        "deregistration ends a drain",
        [
            (healthy("a"), joined("a")),
            (drain("a"), ["a READY>DRAINING", "a DRAINING>DRAINED"]),
            (ev.InstanceDeregistered("a"), ["remove a"]),
            (healthy("a"), joined("a")),
        ],
    ),
    Scenario(
        "a drain that is undone leads to where the engine's health would have led",
        [
            (healthy("a"), joined("a")),
            (drain("a"), ["a READY>DRAINING", "a DRAINING>DRAINED"]),
            (probe("a", UNHEALTHY), []),
            (drain("a", undo=True), ["a DRAINED>UNHEALTHY"]),
            (ev.InstanceRegistered(make_instance("b")), [f"b {NEW}STARTING"]),
            (drain("b"), ["b STARTING>DRAINING", "b DRAINING>DRAINED"]),
            (drain("b", undo=True), ["b DRAINED>STARTING"]),
            (drain("b", undo=True), []),
        ],
    ),
    # -- configuration --------------------------------------------------------------
    Scenario(
        "a new policy reorders what waits and loses nothing",
        [
            (healthy("a"), joined("a")),
            (arrive("r1"), ["accept r1", "dispatch r1#1 a"]),
            (arrive("low", priority=RequestPriority.LOW), ["accept low"]),
            (1.0, []),
            (arrive("normal"), ["accept normal"]),
            (1.0, []),
            (arrive("high", priority=RequestPriority.HIGH), ["accept high"]),
            (configure("fifo", "round_robin", "least_connections"), ["settings 2"]),
            (succeeded("r1"), ["end r1 SUCCEEDED", "dispatch low#1 a"]),
            (configure("adaptive", "random", "predicted_latency"), ["settings 3"]),
            (succeeded("low"), ["end low SUCCEEDED", "dispatch high#1 a"]),
            (succeeded("high"), ["end high SUCCEEDED", "dispatch normal#1 a"]),
        ],
        FULL,
    ),
    Scenario(
        "bad settings leave everything as it is",
        [
            (configure("fifo", "no-such", "least_connections"), UnknownNameError),
            (configure("fifo", "random", "no-such"), UnknownNameError),
            (configure("no-such", "random", "least_connections"), UnknownNameError),
            (configure(parameters={"no-such": 1.0}), InvalidRequestError),
            (configure("fifo", parameters={"dispatch.patience": -1.0}), InvalidRequestError),
            (configure(expected_version=2), SettingsVersionError),
            (configure(revert_to_version=2), SettingsVersionError),
            (configure(comment="x" * 257), InvalidRequestError),
        ],
    ),
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario) -> None:
    world = World(**scenario.config)
    for number, (step, expected) in enumerate(scenario.steps):
        if isinstance(expected, type):
            assert not isinstance(step, float)
            with pytest.raises(expected):
                world.feed(step)
        else:
            lines = world.wait(step) if isinstance(step, float) else world.feed(step)
            assert lines == expected, f"step {number}: {step}"
    assert (world.scheduler.settings.current.version > 1) == ("new policy" in scenario.name)


# -- what effects carry ----------------------------------------------------------------


def test_the_receipt_of_a_dispatch() -> None:
    world = World(scheduling_policy="fifo", load_balancer="least_connections")
    world.feed(healthy("a", limit=1), arrive("first"))
    world.now = 5.0
    world.feed(arrive("asked"))
    world.now = 7.5
    [dispatch] = [
        effect for effect in world.effects(healthy("b", limit=1)) if isinstance(effect, fx.DispatchAttempt)
    ]
    decision = dispatch.decision
    assert dispatch.record.decisions == [decision]
    assert (decision.request_id, decision.epoch, decision.instance_id) == ("asked", 1, "b")
    assert (decision.decision_time_s, decision.queue_wait_s) == (7.5, 2.5)
    assert decision.scheduling_policy == "fifo"
    assert (decision.routing_strategy, decision.load_balancer) == ("load_balanced", "least_connections")
    assert decision.config_version == 1
    assert decision.reason == "fifo: oldest request waiting for m; least_connections: 0 of 1 in flight"
    assert [(c.instance_id, c.score) for c in decision.candidates] == [("b", 0.0)]
    assert decision.candidate_count == 1


def test_decisions_say_which_configuration_made_them() -> None:
    world = World()
    world.feed(healthy("a"), configure("fifo", "round_robin", "least_connections"))
    world.feed(arrive("r1"))
    [decision] = world.record("r1").decisions
    assert (decision.scheduling_policy, decision.routing_strategy) == ("fifo", "round_robin")
    assert decision.config_version == world.scheduler.settings.current.version == 2


def test_every_attempt_leaves_a_receipt() -> None:
    world = World()
    world.feed(healthy("a"), healthy("b"), arrive("r1"), fail("r1"))
    record = world.record("r1")
    assert [(d.epoch, d.instance_id) for d in record.decisions] == [(1, "a"), (2, "b")]
    assert record.excluded_instance_ids == {"a"}


@pytest.mark.parametrize(
    ("steps", "state", "reason", "message"),
    [
        (
            [ev.RequestCancelled("r1")],
            RequestState.CANCELLED,
            ErrorReason.REQUEST_CANCELLED,
            "the request was cancelled",
        ),
        (
            [ev.RequestCancelled("r1", "the client left")],
            RequestState.CANCELLED,
            ErrorReason.REQUEST_CANCELLED,
            "the request was cancelled: the client left",
        ),
        (
            [fail("r1", failure=REJECTED, retryable=False)],
            RequestState.FAILED,
            ErrorReason.ENGINE_REJECTED,
            "the engine refused it",
        ),
        (
            [ev.RequestAborted("r1", SHUTTING_DOWN)],
            RequestState.FAILED,
            ErrorReason.SHUTTING_DOWN,
            "bye",
        ),
        (
            [3.0],
            RequestState.EXPIRED,
            ErrorReason.DEADLINE_EXCEEDED,
            "the deadline of 2500 ms passed while it ran on a",
        ),
        (
            [fail("r1", failure=LOST_CONNECTION, engine_down=True), 3.0],
            RequestState.EXPIRED,
            ErrorReason.DEADLINE_EXCEEDED,
            "the deadline of 2500 ms passed while it waited",
        ),
    ],
)
def test_an_end_says_why(
    steps: list[ev.Event | float], state: RequestState, reason: ErrorReason, message: str
) -> None:
    world = World()
    world.feed(healthy("a"), arrive("r1", slo_deadline_ms=2500.0))
    for step in steps:
        if isinstance(step, float):
            world.now += step
        effects = world.effects(ev.ClockAdvanced() if isinstance(step, float) else step)
    [end] = [effect for effect in effects if isinstance(effect, fx.RequestEnded)]
    assert (end.state, end.record.state) == (state, state)
    assert end.failure == Failure(reason, message)


def test_waiting_too_long_says_for_what() -> None:
    world = World(queue_timeout_s=20.0)
    world.feed(ev.InstanceRegistered(make_instance("a")), arrive("r1"))
    world.now = 20.0
    [end] = world.effects(ev.ClockAdvanced())
    assert isinstance(end, fx.RequestEnded)
    assert end.failure == Failure(
        ErrorReason.DEADLINE_EXCEEDED, "it waited 20 s and no instance that serves 'm' had room"
    )


def test_times_of_a_request() -> None:
    world = World()
    world.now = 1.0
    world.feed(ev.InstanceRegistered(make_instance("a")), arrive("r1"))
    record = world.record("r1")
    world.now = 3.0
    world.feed(probe("a"))
    world.now = 4.0
    world.feed(progressed("r1"))
    world.now = 9.0
    world.feed(progressed("r1"))
    assert (record.arrival_s, record.dispatch_s, record.first_token_s) == (1.0, 3.0, 4.0)
    assert record.state is RequestState.RUNNING
    assert record.machine.history == [RequestState.QUEUED, RequestState.DISPATCHED, RequestState.RUNNING]


def test_an_instance_learns_from_what_it_completes() -> None:
    world = World()
    world.feed(healthy("a"), arrive("r1"), arrive("r2"), arrive("r3"))
    world.now = 0.5
    world.feed(progressed("r1"))
    world.now = 1.5
    world.feed(ev.AttemptSucceeded("r1", 1, output_token_count=11), fail("r2", retryable=False))
    world.feed(fail("r3", failure=REJECTED, retryable=False, counts_against_engine=False))
    instance = world.instance("a")
    assert (instance.completed_request_count, instance.failed_attempt_count) == (1, 1)
    assert instance.ttft_estimate_s == 0.5
    assert instance.tpot_estimate_s == pytest.approx(0.1)


def test_retry_times_follow_the_rate_of_completions() -> None:
    def retry_after_s(interval_s: float) -> float:
        world = World(default_concurrency_limit=1, max_queued_request_count=1)
        world.feed(healthy("a"), arrive("r0"), arrive("r1"))
        for number in range(60):
            world.now += interval_s
            world.feed(succeeded(f"r{number}"), arrive(f"r{number + 2}"))
        [refused] = world.effects(arrive("one-too-many"))
        assert isinstance(refused, fx.RequestRejected)
        assert isinstance(refused.error, QueueFullError)
        assert refused.error.retry_after_s is not None
        return refused.error.retry_after_s

    assert retry_after_s(0.5) == pytest.approx(0.5, rel=0.05)
    assert retry_after_s(5.0) == pytest.approx(5.0, rel=0.05)
    assert retry_after_s(0.001) == 0.1
    assert retry_after_s(1000.0) == 60.0


def test_a_refusal_names_the_models_that_exist() -> None:
    world = World()
    world.feed(healthy("a", "m", model_aliases=("adapter",)))
    [refused] = world.effects(arrive("r1", "nope"))
    assert isinstance(refused, fx.RequestRejected)
    assert isinstance(refused.error, ModelNotFoundError)
    assert refused.error.available == ("adapter", "m")


# -- gates -----------------------------------------------------------------------------

LONG = 10_000  # Prompt tokens: a prefill of about 0.6 s, longer than the window.
WINDOW_S = 0.25


def gated_world(policy: str) -> World:
    """A world with parameters of its own, whatever the defaults are."""
    parameters = {"dispatch.prefill_window_s": WINDOW_S, "dispatch.patience": 0.05}
    return World(scheduling_policy=policy, default_concurrency_limit=16, parameters=parameters)


def known(instance_id: str = "a", **fields: Any) -> ev.InstanceRegistered:
    """An instance whose speed is known."""
    return healthy(instance_id, step_time=STEP_TIME, **fields)


def long_prompt(token_count: int = LONG, *block_hashes: int) -> PromptDigest:
    return PromptDigest(token_count, block_hashes, 256)


def prefill_s(token_count: int = LONG) -> float:
    return STEP_TIME.prefill_s(token_count, token_count, batch_tokens=2048)


def test_prefill_work_waits_here_and_not_in_the_engine() -> None:
    world = gated_world("fifo")
    assert dispatched(world.feed(known(), arrive("r1", prompt_digest=long_prompt()))) == ["r1"]
    assert world.feed(arrive("r2", prompt_digest=long_prompt())) == ["accept r2"]
    opens_s = prefill_s() - WINDOW_S
    assert world.scheduler.next_timer_s() == pytest.approx(opens_s)
    assert world.wait(opens_s - 0.01) == []
    assert world.wait(0.011) == ["dispatch r2#1 a"]


@pytest.mark.parametrize("window_s", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("start_s", [0.0, 1e7, 1.7e9])
def test_a_gate_opens_by_its_timer_however_coarse_the_clock(start_s: float, window_s: float) -> None:
    world = World(scheduling_policy="fifo", parameters={"dispatch.prefill_window_s": window_s})
    world.now = start_s
    world.feed(known(), arrive("r1", prompt_digest=long_prompt()), arrive("r2", prompt_digest=long_prompt()))
    for _ in range(3):
        timer_s = world.scheduler.next_timer_s()
        assert timer_s is not None
        assert timer_s > world.now
        if world.wait(timer_s - world.now):
            break
    assert not world.record("r2").queued
    assert world.now == pytest.approx(start_s + prefill_s() - window_s, rel=0.0, abs=1e-5)


def test_a_first_token_that_comes_early_opens_the_gate() -> None:
    world = gated_world("fifo")
    world.feed(known(), arrive("r1", prompt_digest=long_prompt()), arrive("r2", prompt_digest=long_prompt()))
    world.now = 0.1
    assert world.feed(progressed("r1")) == ["dispatch r2#1 a"]


def test_an_engine_that_is_late_is_not_fed_at_its_old_pace() -> None:
    world = gated_world("fifo")
    world.feed(
        known(), arrive("r1", prompt_digest=long_prompt()), arrive("r2", prompt_digest=long_prompt(100))
    )
    world.wait(prefill_s() - WINDOW_S + 0.001)
    assert not world.record("r2").queued
    world.feed(arrive("r3"))
    assert world.wait(10.0) == []
    assert world.record("r3").queued
    assert world.feed(progressed("r1"), progressed("r2"))[-1] == "dispatch r3#1 a"


def test_an_engine_of_unknown_speed_has_no_gate() -> None:
    world = gated_world("fifo")
    world.feed(healthy("a"))
    for number in range(5):
        assert dispatched(world.feed(arrive(f"r{number}", prompt_digest=long_prompt()))) == [f"r{number}"]


def test_a_wide_window_lets_engines_queue() -> None:
    world = gated_world("fifo")
    world.feed(known(), arrive("r1", prompt_digest=long_prompt()), arrive("r2", prompt_digest=long_prompt()))
    lines = world.feed(configure(parameters={"dispatch.prefill_window_s": 3600.0}))
    assert lines == ["settings 2", "dispatch r2#1 a"]


def test_a_patient_policy_waits_for_a_better_instance_that_is_busy() -> None:
    """The prompt is cached where other prefill goes on: better wait for it than compute it anew."""
    blocks = tuple(range(LONG // 256))
    arrivals = {}
    for policy in ("slo_aware", "priority"):
        world = gated_world(policy)
        world.feed(known("a"), arrive("r1", prompt_digest=long_prompt(LONG, *blocks)))
        world.now = 1.0
        world.feed(progressed("r1"), succeeded("r1"), arrive("r2", prompt_digest=long_prompt(LONG // 2)))
        world.feed(known("b"))
        arrivals[policy] = dispatched_to(world.feed(arrive("r3", prompt_digest=long_prompt(LONG, *blocks))))
        if policy == "slo_aware":
            record = world.record("r3")
            assert record.waits_for == "a"
            assert record.wait_until_s == world.scheduler.next_timer_s()
            # Others may pass it meanwhile.
            assert dispatched_to(world.feed(arrive("r4", prompt_digest=long_prompt(100)))) == ["b"]
            assert dispatched_to(world.wait(record.wait_until_s - world.now)) == ["a"]
    assert arrivals == {"slo_aware": [], "priority": ["b"]}


def test_who_waits_for_an_instance_that_leaves_goes_elsewhere_at_once() -> None:
    blocks = tuple(range(LONG // 256))
    world = gated_world("slo_aware")
    world.feed(known("a"), arrive("r1", prompt_digest=long_prompt(LONG, *blocks)))
    world.now = 1.0
    world.feed(progressed("r1"), succeeded("r1"), arrive("r2", prompt_digest=long_prompt(LONG // 2)))
    world.feed(known("b"), arrive("r3", prompt_digest=long_prompt(LONG, *blocks)))
    assert world.record("r3").waits_for == "a"
    assert dispatched_to(world.feed(ev.InstanceDeregistered("a"))) == ["b"]


# -- prefixes --------------------------------------------------------------------------


def test_a_prompt_goes_where_its_start_is_cached_until_that_engine_restarts() -> None:
    blocks = tuple(range(8))

    def place(world: World, request_id: str) -> str:
        [instance_id] = dispatched_to(
            world.feed(arrive(request_id, prompt_digest=long_prompt(2100, *blocks)))
        )
        # Exactly as predicted, so that nothing but the cache tells the instances apart.
        world.now += world.record(request_id).predicted_ttft_s
        world.feed(progressed(request_id), succeeded(request_id))
        return instance_id

    world = gated_world("fifo")
    world.feed(*(known(name, key_value_token_capacity=100_000) for name in "abc"))
    assert [place(world, f"r{n}") for n in range(4)] == ["a"] * 4
    receipt = world.effects(arrive("asked", prompt_digest=long_prompt(2100, *blocks)))[-1]
    assert isinstance(receipt, fx.DispatchAttempt)
    assert "2048 tokens cached" in receipt.decision.reason
    world.feed(
        beat("a", 0, prompt_token_count=5000),
        beat("a", 0, prompt_token_count=10),
    )
    assert place(world, "after") == "b"


def test_late_news_of_an_engines_predecessor_does_not_free_what_the_new_one_holds() -> None:
    """Both ran the same prompt; the cache of the first is gone, and so is its claim on the blocks."""
    blocks = tuple(range(8))
    world = gated_world("fifo")
    pinned: dict[str, list[int]] = {}
    for how in ("registers anew", "counts anew"):
        restart: list[ev.Event] = (
            [known("a", incarnation=1)]
            if how == "registers anew"
            else [beat("a", 1, prompt_token_count=5000), beat("a", 1, prompt_token_count=10)]
        )
        world.feed(known("a", incarnation=1))
        world.feed(arrive("old", prompt_digest=long_prompt(2100, *blocks)), progressed("old"))
        world.feed(*restart, arrive("new", prompt_digest=long_prompt(2100, *blocks)))
        assert world.record("new").instance_id == "a"
        world.feed(fail("old", retryable=False))
        # All that fits is needed for what runs: only its blocks may stay.
        world.scheduler.prefixes.resize("a", 0)
        pinned[how] = [world.scheduler.prefixes.match_one("a", blocks)]
        world.feed(progressed("new"), succeeded("new"))
        world.scheduler.prefixes.resize("a", 0)
        pinned[how].append(world.scheduler.prefixes.match_one("a", blocks))
    assert pinned == {"registers anew": [8, 0], "counts anew": [8, 0]}


def test_an_engine_that_restarted_gets_work_at_once() -> None:
    """Its gate was closed for prefill that it has lost."""
    world = gated_world("fifo")
    world.feed(known(), beat("a", 0, prompt_token_count=5000))
    world.feed(arrive("r1", prompt_digest=long_prompt()), arrive("r2", prompt_digest=long_prompt()))
    assert world.record("r2").queued
    assert world.feed(beat("a", 0, prompt_token_count=10)) == ["dispatch r2#1 a"]


# -- accounts --------------------------------------------------------------------------


def test_a_tenant_is_charged_for_what_never_waited() -> None:
    """The line is gone with its last request; what it cost is remembered."""
    world = World(scheduling_policy="priority", default_concurrency_limit=1)
    world.feed(known())
    account = world.scheduler.service_books.account(LaneKey("m", RequestPriority.NORMAL), "large")
    for number in range(3):
        before_s = account.standing_s
        world.feed(arrive(f"r{number}", tenant_id="large", prompt_digest=long_prompt()))
        assert account.running_count == 1
        world.now += world.record(f"r{number}").predicted_ttft_s
        world.feed(progressed(f"r{number}"), succeeded(f"r{number}"))
        # Its prompt's work; it produced nothing.
        assert account.standing_s - before_s == pytest.approx(STEP_TIME.work_s(LONG, LONG), rel=0.1)
        assert account.running_count == 0


def test_what_was_charged_and_never_delivered_is_given_back() -> None:
    world = World(scheduling_policy="priority", default_concurrency_limit=4)
    world.feed(known(), arrive("r1", tenant_id="t", prompt_digest=long_prompt()))
    account = world.scheduler.service_books.account(LaneKey("m", RequestPriority.NORMAL), "t")
    assert account.standing_s == pytest.approx(world.record("r1").cost_s)
    assert account.running_count == 1
    world.feed(ev.RequestCancelled("r1"))
    assert (account.standing_s, account.running_count) == (0.0, 0)


def test_a_change_of_weights_between_dispatch_and_end_leaves_no_debt() -> None:
    world = World(scheduling_policy="priority", parameters={"priority.weight.t": 0.25})
    world.feed(known(), arrive("r1", tenant_id="t", prompt_digest=long_prompt()))
    account = world.scheduler.service_books.account(LaneKey("m", RequestPriority.NORMAL), "t")
    assert account.standing_s == pytest.approx(world.record("r1").cost_s / 0.25)
    world.feed(configure(parameters={"priority.weight.t": 8.0}), ev.RequestCancelled("r1"))
    assert account.standing_s == pytest.approx(0.0)
    assert account.running_count == 0


@pytest.mark.parametrize("policy", ["fifo", "slo_aware", "cost_optimized"])
def test_what_one_policy_charged_is_settled_under_another(policy: str) -> None:
    world = World(scheduling_policy="priority")
    world.feed(known(), arrive("r1", tenant_id="t", prompt_digest=long_prompt()))
    account = world.scheduler.service_books.account(LaneKey("m", RequestPriority.NORMAL), "t")
    assert account.running_count == 1
    world.feed(configure(policy), ev.RequestCancelled("r1"))
    assert (account.standing_s, account.running_count) == (0.0, 0)


@pytest.mark.parametrize("policy", ["fifo", "slo_aware", "cost_optimized"])
def test_what_nobody_charged_is_not_given_back(policy: str) -> None:
    world = World(scheduling_policy="priority")
    world.feed(known(), arrive("r1", tenant_id="t", prompt_digest=long_prompt()))
    account = world.scheduler.service_books.account(LaneKey("m", RequestPriority.NORMAL), "t")
    charged_s = account.standing_s
    world.feed(configure(policy), arrive("r2", tenant_id="t", prompt_digest=long_prompt(100)))
    world.wait(prefill_s())
    assert not world.record("r2").queued
    world.feed(configure("priority"), ev.RequestCancelled("r2"))
    assert (account.standing_s, account.running_count) == (charged_s, 1)


# -- predictions -----------------------------------------------------------------------


def test_predictions_are_kept_and_compared_with_what_came() -> None:
    world = World(scheduling_policy="fifo", default_concurrency_limit=16)
    world.feed(known(), arrive("r1", prompt_digest=long_prompt(), max_tokens=100))
    record = world.record("r1")
    assert record.predicted_ttft_s == pytest.approx(prefill_s())
    assert record.predicted_tpot_s == pytest.approx(STEP_TIME.decode_step_s(1, LONG), rel=0.1)
    assert record.cost_s > record.work_s > 0.5
    world.now = record.predicted_ttft_s
    world.feed(progressed("r1"))
    world.now += 99 * record.predicted_tpot_s
    world.feed(ev.AttemptSucceeded("r1", 1, 100))
    assert world.scheduler.book.output_lengths.observation_count == 1


def test_an_infeasible_deadline_is_refused_at_once() -> None:
    world = World()
    world.feed(known())
    lines = world.feed(arrive("r1", prompt_digest=long_prompt(200_000), slo_deadline_ms=1000.0))
    assert lines == ["reject r1 INFEASIBLE"]
    assert world.scheduler.live_count == 0


# -- settings --------------------------------------------------------------------------


def test_settings_are_versions_that_can_be_gone_back_to() -> None:
    world = World(scheduling_policy="fifo")
    default_patience = world.scheduler.settings.current.values["dispatch.patience"]
    world.feed(
        configure(
            "slo_aware",
            parameters={"dispatch.patience": default_patience + 0.2},
            comment="try it",
            expected_version=1,
        ),
        configure(routing_strategy="affinity", load_balancer="least_connections"),
    )
    scheduler = world.scheduler
    assert scheduler.settings.current.version == 3
    assert scheduler.policy_in_force == "slo_aware"
    world.now = 9.0
    assert world.feed(configure(revert_to_version=1)) == ["settings 4"]
    current = scheduler.settings.current
    assert (current.scheduling_policy, current.routing_strategy) == ("fifo", "load_balanced")
    assert current.values["dispatch.patience"] == default_patience
    assert (current.update_s, current.comment) == (9.0, "back to version 1")
    assert scheduler.policy_in_force == "fifo"
    assert scheduler.why_policy() == "back to version 1"


def test_the_policy_in_force_is_in_the_receipt() -> None:
    world = World(scheduling_policy="adaptive")
    world.feed(healthy("a"), arrive("r1"))
    [decision] = world.record("r1").decisions
    assert decision.scheduling_policy == "adaptive"
    assert decision.policy_in_force == world.scheduler.policy_in_force != "adaptive"
    assert world.scheduler.why_policy()


# -- timers and counts -----------------------------------------------------------------


def test_the_timer_is_the_earliest_of_deadlines_leases_and_forgetting() -> None:
    world = World(lease_duration_s=6.0, lost_retention_s=30.0, queue_timeout_s=100.0)
    timer = world.scheduler.next_timer_s
    assert timer() is None
    world.feed(healthy("a", incarnation=1, limit=1))
    assert timer() == 6.0
    world.feed(arrive("r1", slo_deadline_ms=2000.0))
    assert timer() == 2.0
    world.feed(succeeded("r1"))
    assert timer() == 6.0
    world.now = 5.0
    world.feed(beat("a", 1))
    assert timer() == 6.0  # Not moved by every beat; looked at when it comes.
    world.now = 6.0
    assert world.feed(ev.ClockAdvanced()) == []
    assert timer() == 11.0
    assert world.wait(5.0) == ["a READY>LOST"]
    assert timer() == 41.0
    world.feed(arrive("r2"))
    assert timer() == 41.0
    assert world.wait(30.0) == ["remove a"]
    assert timer() == 111.0
    assert world.wait(70.0) == ["end r2 EXPIRED"]
    assert timer() is None


def test_a_running_request_without_a_deadline_needs_no_timer() -> None:
    world = World()
    world.feed(healthy("a"), arrive("r1"))
    assert world.scheduler.next_timer_s() is None


def test_counts() -> None:
    world = World(default_concurrency_limit=2)
    world.feed(healthy("a"), *(arrive(f"r{n}") for n in range(5)))
    scheduler = world.scheduler
    assert (scheduler.live_count, scheduler.active_count, len(scheduler.queue)) == (5, 2, 3)
    assert [record.request_id for record in scheduler.requests()] == [f"r{n}" for n in range(5)]
    assert scheduler.find_request("r4") is world.record("r4")
    assert scheduler.find_request("r5") is None


# -- order and replay ------------------------------------------------------------------


def test_a_failing_instance_does_not_let_the_queue_be_searched_for_ever() -> None:
    """Many requests wait for the better instance; the work per event stays bounded.

    It is full again and again, say: that is no failure that it would be ejected for.
    """
    world = World(default_concurrency_limit=1)
    world.feed(healthy("bad"), healthy("good"))
    world.feed(arrive("first-on-bad"), arrive("on-good"))
    world.feed(fail("first-on-bad"))
    for number in range(100):
        lines = world.feed(arrive(f"r{number}"))
        if dispatched_to(lines) == ["bad"]:
            world.feed(fail(f"r{number}", counts_against_engine=False))
    waiting = [record for record in world.scheduler.queue if record.excluded_instance_ids]
    assert 32 <= len(waiting) < 100
    assert dispatched(world.feed(succeeded("on-good")))[0] == "first-on-bad"


def event_log(seed: int, count: int) -> list[tuple[ev.Event, float]]:
    """A busy life."""
    draw = random.Random(seed)
    world = World(routing_strategy="random")
    log: list[tuple[ev.Event, float]] = []

    def happen(event: ev.Event) -> None:
        log.append((event, world.now))
        world.feed(event)

    for name in "abcdef":
        happen(healthy(name, draw.choice("mn"), model_aliases=("m",)))
    for number in range(count):
        world.now += draw.choice([0.0, 0.0, 0.01, 0.5])
        running = [(r.request_id, r.epoch) for r in world.scheduler.requests() if not r.queued]
        request_id, epoch = draw.choice(running or [("nobody", 1)])
        name = draw.choice("abcdef")
        kinds: list[ev.Event] = [
            arrive(
                f"r{number}",
                draw.choice(world.scheduler.fleet.models()),
                priority=draw.choice(list(RequestPriority)),
                slo_deadline_ms=draw.choice([None, 4000.0]),
            ),
            progressed(request_id, epoch),
            succeeded(request_id, epoch),
            fail(request_id, epoch, engine_down=draw.random() < 0.1),
            healthy(name, draw.choice("mn"), model_aliases=("m",)),
            probe(name),
            ev.ClockAdvanced(),
            configure(
                draw.choice(SCHEDULING_POLICIES.names),
                draw.choice(["random", "random", *ROUTING_STRATEGIES.names]),
                draw.choice(LOAD_BALANCERS.names),
            ),
        ]
        happen(draw.choices(kinds, weights=[30, 10, 20, 15, 2, 8, 5, 1])[0])
    return log


def replay(log: list[tuple[ev.Event, float]], **config: Any) -> list[str]:
    world = World(routing_strategy="random", **config)
    texts: list[str] = []
    for event, now in log:
        try:
            texts += map(full_text, world.scheduler.handle(event, now))
        except SageError as error:
            texts.append(repr(error))
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_the_same_log_leads_to_the_same_effects(seed: int) -> None:
    log = event_log(seed, 1000)
    first = replay(log)
    assert replay(log) == first
    assert sum(text.startswith("DispatchAttempt") for text in first) > 200
    assert replay(log, seed=99) != first


def test_looking_at_the_next_timer_changes_nothing() -> None:
    """Whoever replays a log need not look when the one who wrote it did."""
    world = World(
        scheduling_policy="slo_aware",
        parameters={"dispatch.patience": 10.0, "dispatch.prefill_window_s": 0.05},
    )
    instances: list[ev.Event] = [known(f"i{number}", limit=3) for number in range(6)]
    world.feed(*instances)
    traffic = Traffic(world)
    draw = random.Random(1)
    for number in range(300):
        # Cached here and there, so that waiting for a better instance pays.
        blocks = tuple(range(draw.randrange(30)))
        digest = PromptDigest(draw.choice([500, 8000]), blocks, 256)
        traffic.add(draw.random() * 25.0, arrive(f"r{number}", prompt_digest=digest, max_tokens=20))
    traffic.run()
    runs: list[list[str]] = []
    for looks in (True, False):
        scheduler = Scheduler(world.scheduler.config)
        runs.append([])
        for event, now in [*((event, 0.0) for event in instances), *traffic.log]:
            runs[-1] += map(full_text, scheduler.handle(event, now))
            if looks:
                scheduler.next_timer_s()
    assert runs[0] == runs[1]


def test_news_is_looked_at_in_the_order_of_arrival_within_one_moment() -> None:
    world = World(default_concurrency_limit=1)
    world.feed(healthy("a"), arrive("running"), *(arrive(f"r{n}") for n in range(20)))
    order = []
    current = "running"
    for _ in range(20):
        [current] = dispatched(world.feed(succeeded(current)))
        order.append(current)
    assert order == [f"r{n}" for n in range(20)]


def test_states_of_instances_are_counted() -> None:
    world = World()
    world.feed(healthy("a"), healthy("b"), drain("b"), ev.InstanceRegistered(make_instance("c")))
    counts = world.scheduler.fleet.count_by_state()
    assert {state: count for state, count in counts.items() if count} == {
        InstanceState.READY: 1,
        InstanceState.DRAINED: 1,
        InstanceState.STARTING: 1,
    }
