"""Scheduling: the configuration and its changes, and the receipts of decisions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct

from sagecp.core.errors import ErrorReason, FieldViolation, InvalidRequestError, UnknownNameError
from sagecp.core.placement import CandidateRow, PlacementInputs
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.registry import Registry
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES, make_strategy
from sagecp.core.settings import MAX_COMMENT_LENGTH, PARAMETERS, SchedulingSettings, SettingsChange
from sagecp.core.types import CandidateScore, SchedulingDecision
from sagecp.rpc.convert.common import prefixed
from sagecp.v1 import admin_service_pb2, scheduling_pb2
from sagecp.wire.times import duration, timestamp

_REGISTRIES: Mapping[str, Registry[Any]] = {
    "scheduling_policy": SCHEDULING_POLICIES,
    "routing_strategy": ROUTING_STRATEGIES,
    "load_balancer": LOAD_BALANCERS,
}


class UnknownNamesError(InvalidRequestError):
    """A name of the configuration is not known; names every other bad field, too."""

    reason = ErrorReason.UNKNOWN_POLICY


def settings_to_proto(settings: SchedulingSettings, update_time_s: float) -> scheduling_pb2.SchedulingConfig:
    """Return one version of the settings as a message; ``update_time_s`` is its Unix time."""
    message = scheduling_pb2.SchedulingConfig(
        version=settings.version,
        scheduling_policy=settings.scheduling_policy,
        routing_strategy=settings.routing_strategy,
        load_balancer=settings.load_balancer,
        update_time=timestamp(update_time_s),
        comment=settings.comment,
    )
    for name in sorted(settings.parameters):
        message.parameters.fields[name].number_value = settings.parameters[name]
    return message


def parameters_to_proto(values: Mapping[str, float]) -> list[scheduling_pb2.SchedulingParameter]:
    """Return every parameter that exists, by name, with its value among ``values``.

    A declaration that stands for many names is followed by those that have a value.
    """
    declared = {parameter.name: parameter for parameter in PARAMETERS}
    names = sorted({*declared, *values})
    found = [(name, declared.get(name) or PARAMETERS.find(name)) for name in names]
    return [
        scheduling_pb2.SchedulingParameter(
            name=name,
            value=values.get(name, parameter.default),
            default_value=parameter.default,
            minimum=parameter.minimum,
            maximum=parameter.maximum,
            description=parameter.description,
        )
        for name, parameter in found
        if parameter is not None
    ]


def change_from_proto(request: admin_service_pb2.UpdateSchedulingConfigRequest) -> SettingsChange:
    """Return the change that an operator wants, validated as a whole.

    Raises:
        UnknownNamesError: A name is not known; names every bad field.
        InvalidRequestError: Names every bad field.
    """
    violations: list[FieldViolation] = []
    config = request.config
    if request.revert_to_version:
        if request.HasField("config"):
            violations.append(
                FieldViolation("config", "is set beside revert_to_version; give the one or the other")
            )
        if request.reset_parameters:
            violations.append(
                FieldViolation(
                    "reset_parameters",
                    "is set beside revert_to_version, which restores the parameters of that version",
                )
            )
    elif not request.HasField("config") and not request.reset_parameters:
        violations.append(
            FieldViolation("config", "is not set; say what to change, or give revert_to_version")
        )
    unknown = _unknown_names(config)
    within = [*unknown]
    parameters = numbers_from_struct(config.parameters, "parameters", within)
    within += PARAMETERS.violations(parameters)
    if len(config.comment) > MAX_COMMENT_LENGTH:
        within.append(
            FieldViolation(
                "comment", f"has {len(config.comment)} characters; at most {MAX_COMMENT_LENGTH} are allowed"
            )
        )
    violations += prefixed("config", within)
    if violations:
        raise (UnknownNamesError if unknown else InvalidRequestError)(violations)
    return SettingsChange(
        scheduling_policy=config.scheduling_policy,
        routing_strategy=config.routing_strategy,
        load_balancer=config.load_balancer,
        parameters=parameters,
        reset_parameters=request.reset_parameters,
        comment=config.comment,
        expected_version=request.expected_version,
        revert_to_version=request.revert_to_version,
    )


def _unknown_names(config: scheduling_pb2.SchedulingConfig) -> list[FieldViolation]:
    found = []
    for field, registry in _REGISTRIES.items():
        name: str = getattr(config, field)
        try:
            if name:
                registry.get(name)
        except UnknownNameError as error:
            found.append(FieldViolation(field, error.message))
    return found


def numbers_from_struct(struct: Struct, field: str, violations: list[FieldViolation]) -> dict[str, float]:
    """Return the numbers of a Struct by name; what is no number is noted as a violation.

    Args:
        struct: Names and values.
        field: Its path, for violations.
        violations: Takes one for each value that is not a number.
    """
    numbers = {}
    for name in sorted(struct.fields):
        value = struct.fields[name]
        kind = value.WhichOneof("kind")
        if kind == "number_value":
            numbers[name] = value.number_value
        else:
            what = (kind or "null_value").removesuffix("_value")
            violations.append(FieldViolation(f"{field}[{name!r}]", f"is of kind {what}; must be a number"))
    return numbers


def decision_to_proto(decision: SchedulingDecision, wall_time_s: float) -> scheduling_pb2.SchedulingDecision:
    """Return a receipt as a message; ``wall_time_s`` is its time in Unix seconds.

    What scores are made of is found out here, from the receipt's inputs: only
    who asks pays for it.
    """
    message = scheduling_pb2.SchedulingDecision(
        request_id=decision.request_id,
        epoch=decision.epoch,
        instance_id=decision.instance_id,
        decision_time=timestamp(wall_time_s),
        queue_wait=duration(decision.queue_wait_s),
        scheduling_policy=decision.scheduling_policy,
        routing_strategy=decision.routing_strategy,
        load_balancer=decision.load_balancer,
        config_version=decision.config_version,
        reason=decision.reason,
        candidates=[_score_to_proto(score) for score in decision.candidates],
        candidate_count=decision.candidate_count,
        policy_in_force=decision.policy_in_force,
    )
    if decision.inputs is not None:
        message.inputs.CopyFrom(_inputs_to_proto(decision.inputs))
        _add_terms(message, decision, decision.inputs)
    return message


def _score_to_proto(score: CandidateScore) -> scheduling_pb2.CandidateScore:
    return scheduling_pb2.CandidateScore(
        instance_id=score.instance_id,
        score=score.score,
        terms=dict(score.terms),
        excluded_reason=score.excluded_reason,
    )


def _add_terms(
    message: scheduling_pb2.SchedulingDecision, decision: SchedulingDecision, inputs: PlacementInputs
) -> None:
    # Chance is in the inputs already: this generator is never asked.
    strategy = make_strategy(decision.routing_strategy, decision.load_balancer, random.Random(0))
    rows = {row.instance_id: row for row in inputs.candidates}
    for candidate in message.candidates:
        row = rows.get(candidate.instance_id)
        if row is None:
            continue
        candidate.terms.update(strategy.terms(inputs.request, row, inputs.parameters))
        if row.plan_mismatch:
            candidate.terms["plan_preference"] = inputs.parameters["placement.plan_preference"]
        if not row.is_open and not candidate.excluded_reason:
            candidate.excluded_reason = f"busy for {_short_time(row.opens_in_s)}"


def _short_time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def _inputs_to_proto(inputs: PlacementInputs) -> scheduling_pb2.PlacementInputs:
    # The rows' fields and the messages' have the same names.
    return scheduling_pb2.PlacementInputs(
        request=scheduling_pb2.PlacementRequestInputs(**inputs.request._asdict()),
        candidates=[_candidate_to_proto(row) for row in inputs.candidates],
        parameters=dict(inputs.parameters),
    )


def _candidate_to_proto(row: CandidateRow) -> scheduling_pb2.PlacementCandidateInputs:
    values = row._asdict()
    values["is_open"] = bool(row.is_open)
    values["step_time"] = _step_time_to_proto(row.step_time)
    return scheduling_pb2.PlacementCandidateInputs(**values)


def _step_time_to_proto(step: StepTimeParameters) -> scheduling_pb2.StepTimeConstants:
    return scheduling_pb2.StepTimeConstants(
        overhead_s=step.overhead_s,
        memory_base_s=step.memory_base_s,
        memory_per_token_s=step.memory_per_token_s,
        compute_base_s=step.compute_base_s,
        compute_per_token_s=step.compute_per_token_s,
        context_per_token_s=step.context_per_token_s,
        attention_per_token_pair_s=step.attention_per_token_pair_s,
    )
