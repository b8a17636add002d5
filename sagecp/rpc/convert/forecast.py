"""Questions about the load to come, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sagecp.core.errors import InvalidRequestError
from sagecp.core.prediction.forecast import ForecastAccuracy, Range, SpanForecast
from sagecp.rpc.convert.field_checks import FieldChecks
from sagecp.runtime.load_recorder import ForecastAnswer, step_of
from sagecp.v1 import admin_service_pb2 as pb
from sagecp.wire.times import duration, seconds_of, timestamp

DEFAULT_HORIZON_S = 3600.0
SHORTEST_HORIZON_S, LONGEST_HORIZON_S = 300.0, 86_400.0
_MAX_NAME_LENGTH = 512


@dataclass(frozen=True, slots=True)
class ForecastQuery:
    """What is asked for; empty names: of all."""

    model: str
    tenant_id: str
    horizon_s: float


def forecast_query_from_proto(request: pb.ForecastLoadRequest) -> ForecastQuery:
    """Return what is asked for.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    checks = FieldChecks()
    horizon_s = seconds_of(request.horizon) if request.HasField("horizon") else DEFAULT_HORIZON_S
    if not SHORTEST_HORIZON_S <= horizon_s <= LONGEST_HORIZON_S:
        checks.note("horizon", f"is {horizon_s:g} s; must be 5 minutes to 24 hours")
    checks.length("model", len(request.model), _MAX_NAME_LENGTH, "characters")
    checks.length("tenant_id", len(request.tenant_id), _MAX_NAME_LENGTH, "characters")
    if checks.violations:
        raise InvalidRequestError(checks.violations)
    return ForecastQuery(request.model, request.tenant_id, horizon_s)


def forecast_to_proto(answer: ForecastAnswer, horizon_s: float) -> pb.ForecastLoadResponse:
    """Return a forecast as a message."""
    forecast = answer.forecast
    message = pb.ForecastLoadResponse(
        step=duration(step_of(horizon_s)),
        steps=[_span(answer.start_s, step) for step in forecast.steps],
        basis=forecast.basis,
        history=duration(answer.history_s),
    )
    if forecast.total is not None:
        message.total.CopyFrom(_span(answer.start_s, forecast.total))
    if forecast.accuracy is not None:
        message.error.CopyFrom(_error(forecast.accuracy))
    return message


def _span(start_s: float, span: SpanForecast) -> pb.LoadForecast:
    ranges: Mapping[str, pb.ForecastRange] = {name: _range(each) for name, each in span.values.items()}
    return pb.LoadForecast(
        start_time=timestamp(start_s + span.start_s), duration=duration(span.duration_s), **ranges
    )


def _range(value: Range) -> pb.ForecastRange:
    return pb.ForecastRange(p10=value.p10, p50=value.p50, p90=value.p90)


def _error(accuracy: ForecastAccuracy) -> pb.ForecastError:
    return pb.ForecastError(
        sample_count=accuracy.sample_count,
        weighted_error=accuracy.weighted_error,
        naive_weighted_error=accuracy.naive_weighted_error,
        coverage=accuracy.coverage,
    )
