"""The error tree, and its agreement with the contract's numbers and names."""

from __future__ import annotations

import enum
from typing import Any

import pytest

from sagecp.core import errors, types
from sagecp.core.errors import (
    ErrorReason,
    Failure,
    FieldViolation,
    IllegalTransitionError,
    InstanceNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestFailedError,
    RequestIdConflictError,
    RequestNotFoundError,
    SageError,
    StaleIncarnationError,
)
from sagecp.v1 import error_pb2, fleet_service_pb2, instance_pb2, request_pb2

# Python enum, the contract's, its prefix, and whether Python has a member for zero.
PAIRS: list[tuple[type[enum.Enum], Any, str, bool]] = [
    (ErrorReason, error_pb2.ErrorReason, "ERROR_REASON_", False),
    (types.RequestPriority, request_pb2.RequestPriority, "REQUEST_PRIORITY_", False),
    (types.RequestState, request_pb2.RequestState, "REQUEST_STATE_", False),
    (types.FailoverMode, request_pb2.FailoverMode, "FAILOVER_MODE_", True),
    (types.OpenAiApi, request_pb2.OpenAiApi, "OPEN_AI_API_", False),
    (types.InstanceState, instance_pb2.InstanceState, "INSTANCE_STATE_", False),
    (types.EngineCondition, fleet_service_pb2.EngineCondition, "ENGINE_CONDITION_", True),
]


@pytest.mark.parametrize(("ours", "contract", "prefix", "has_zero"), PAIRS)
def test_numbers_and_names_equal_the_contract(
    ours: type[enum.Enum], contract: Any, prefix: str, has_zero: bool
) -> None:
    theirs = {name.removeprefix(prefix): number for name, number in contract.items()}
    assert theirs.pop("UNSPECIFIED") == 0
    mine = {member.name: member.value for member in ours}
    zero = [name for name, number in mine.items() if number == 0]
    assert len(zero) == has_zero
    for name in zero:
        del mine[name]
    assert mine == theirs


def test_parallelism_names_equal_the_contract() -> None:
    from sagecp.v1 import parallelism_pb2

    names = {name.removeprefix("PARALLELISM_TYPE_") for name in parallelism_pb2.ParallelismType.keys()}  # noqa: SIM118
    assert {member.name for member in types.ParallelismType} == names - {"UNSPECIFIED"}
    assert all(member.value == member.name.lower() for member in types.ParallelismType)


def error_classes() -> list[type[SageError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [value for value in found if issubclass(value, SageError)]


@pytest.mark.parametrize("error_class", error_classes())
def test_every_error_is_documented_and_has_a_reason(error_class: type[SageError]) -> None:
    assert error_class.__doc__
    assert isinstance(error_class.reason, ErrorReason)


def test_reasons_belong_to_one_class_each() -> None:
    # A step that the core refuses itself says the same as an order that an operator may not give.
    shared = {SageError, RequestFailedError, IllegalTransitionError}
    reasons = [c.reason for c in error_classes() if c not in shared]
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize(
    ("error", "message", "metadata"),
    [
        (
            InvalidRequestError([FieldViolation("a.b", "is -1; must be 0 or more")]),
            "a.b: is -1; must be 0 or more",
            {},
        ),
        (
            ModelNotFoundError("m9", ["m2", "m1"]),
            "model 'm9' is not served; models served now: m1, m2",
            {"model": "m9", "available_models": "m1,m2"},
        ),
        (
            ModelNotFoundError("m9", []),
            "model 'm9' is not served; no instance is registered yet; start an agent beside an engine",
            {"model": "m9", "available_models": ""},
        ),
        (
            ModelNotFoundError("", ["m1", "m2"]),
            "no model was named, and not exactly one is served; models served now: m1, m2",
            {"model": "", "available_models": "m1,m2"},
        ),
        (
            RequestNotFoundError("r1"),
            "request 'r1' is not known; it was never accepted, or ended too long ago to be kept",
            {"request_id": "r1"},
        ),
        (
            RequestIdConflictError("r1"),
            "request id 'r1' was used before with a different body; choose another id",
            {"request_id": "r1"},
        ),
        (
            InstanceNotFoundError("a"),
            "instance 'a' is not registered; register it first",
            {"instance_id": "a"},
        ),
        (
            StaleIncarnationError("a", 1, 2),
            "instance 'a' is registered with incarnation 2; 1 is older: another agent owns this id",
            {"instance_id": "a"},
        ),
    ],
)
def test_messages_say_what_was_wrong_and_what_to_do(
    error: SageError, message: str, metadata: dict[str, str]
) -> None:
    assert str(error) == error.message == message
    assert error.metadata == metadata
    assert error.retry_after_s is None
    assert error.as_failure() == Failure(error.reason, message)


def test_many_violations_are_counted_and_all_are_kept() -> None:
    error = InvalidRequestError([FieldViolation(f"f{n}", "is bad") for n in range(11)])
    assert str(error).startswith("f0: is bad; f1: is bad; ")
    assert str(error).endswith("f7: is bad; and 3 more")
    assert len(error.violations) == 11


def test_many_models_are_not_all_listed() -> None:
    error = ModelNotFoundError("x", [f"m{n:03}" for n in range(50)])
    assert str(error).endswith("m018, m019, ...")
    assert error.metadata["available_models"].count(",") == 19
    assert len(error.available) == 50


def test_a_retry_time_travels_with_the_error() -> None:
    assert QueueFullError("full", retry_after_s=2.5).retry_after_s == 2.5


def test_a_failed_request_carries_its_own_reason() -> None:
    failure = Failure(ErrorReason.ENGINE_TIMEOUT, "no token for 30 s")
    error = RequestFailedError(failure)
    assert error.reason is ErrorReason.ENGINE_TIMEOUT
    assert error.as_failure() == failure
    assert RequestFailedError.reason is ErrorReason.INTERNAL
