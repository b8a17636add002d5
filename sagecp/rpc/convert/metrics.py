"""Questions about metrics, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.types import RequestPriority
from sagecp.rpc.convert.common import check_enum
from sagecp.runtime.metrics_table import MetricsTable
from sagecp.runtime.monitor import DEFAULT_WINDOW_S
from sagecp.runtime.monitor_keys import MetricsDimension, MetricsKey
from sagecp.runtime.monitor_slices import LONGEST_WINDOW_S
from sagecp.v1 import admin_service_pb2, metrics_pb2, request_pb2
from sagecp.wire.times import seconds_of

SHORTEST_WINDOW_S = 1.0
DEFAULT_INTERVAL_S = 5.0
SHORTEST_INTERVAL_S = 0.1
LONGEST_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class MetricsQuery:
    """What is asked for; ``dimension`` is what to group by, or ``None``."""

    window_s: float
    match: MetricsKey
    dimension: MetricsDimension | None


def query_from_proto(request: admin_service_pb2.GetMetricsRequest) -> MetricsQuery:
    """Return what is asked for.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    violations: list[FieldViolation] = []
    query = _query(request, "", violations)
    if violations:
        raise InvalidRequestError(violations)
    return query


def watch_from_proto(request: admin_service_pb2.WatchMetricsRequest) -> tuple[MetricsQuery, float]:
    """Return what is asked for, and how often in seconds.

    Raises:
        InvalidRequestError: Names every bad field.
    """
    violations: list[FieldViolation] = []
    query = _query(request.query, "query.", violations)
    interval_s = seconds_of(request.interval) if request.HasField("interval") else DEFAULT_INTERVAL_S
    if not SHORTEST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
        violations.append(FieldViolation("interval", f"is {interval_s:g} s; must be 100 ms to 1 hour"))
    if violations:
        raise InvalidRequestError(violations)
    return query, interval_s


def _query(
    request: admin_service_pb2.GetMetricsRequest, prefix: str, violations: list[FieldViolation]
) -> MetricsQuery:
    window_s = seconds_of(request.window) if request.HasField("window") else DEFAULT_WINDOW_S
    if not SHORTEST_WINDOW_S <= window_s <= LONGEST_WINDOW_S:
        violations.append(FieldViolation(f"{prefix}window", f"is {window_s:g} s; must be 1 s to 1 hour"))
    priority = None
    if check_enum(f"{prefix}priority", request.priority, request_pb2.RequestPriority.DESCRIPTOR, violations):
        priority = RequestPriority(request.priority)
    dimension = None
    if check_enum(f"{prefix}group_by", request.group_by, metrics_pb2.MetricsDimension.DESCRIPTOR, violations):
        dimension = _DIMENSIONS[request.group_by]
    match = MetricsKey(request.model, request.instance_id, request.tenant_id, priority)
    return MetricsQuery(window_s, match, dimension)


_DIMENSIONS = {
    metrics_pb2.METRICS_DIMENSION_MODEL: MetricsDimension.MODEL,
    metrics_pb2.METRICS_DIMENSION_INSTANCE: MetricsDimension.INSTANCE,
    metrics_pb2.METRICS_DIMENSION_TENANT: MetricsDimension.TENANT,
    metrics_pb2.METRICS_DIMENSION_PRIORITY: MetricsDimension.PRIORITY,
}


def metrics_to_proto(table: MetricsTable, place: int, message: metrics_pb2.PerformanceMetrics) -> None:
    """Fill a message with the metrics of one group of a table.

    Field by field: there may be a thousand groups, and messages made from keyword
    arguments cost almost three times as much.
    """
    completed, failed, cancelled, violations = table.ended[place]
    live, gpus = table.live[place], table.gpus[place]
    message.total_request_count = completed + failed + cancelled + live.active + live.queued
    message.completed_request_count = completed
    message.failed_request_count = failed
    message.cancelled_request_count = cancelled
    message.active_request_count = live.active
    message.queued_request_count = live.queued
    messages = message.latency, message.ttft, message.tpot, message.queue_wait
    figures = zip(
        messages, table.sample_counts[place], table.means_s[place], table.quantiles_s[place], strict=True
    )
    for duration, count, mean_s, quantiles_s in figures:
        if not count:
            # There even if it is all zero.
            duration.SetInParent()
            continue
        duration.sample_count = count
        duration.mean_s = mean_s
        duration.p50_s, duration.p95_s, duration.p99_s = quantiles_s
    message.tokens_per_second = table.tokens_per_second[place]
    message.requests_per_second = table.requests_per_second[place]
    message.slo_violation_count = violations
    if (utilization := gpus.average_utilization) is not None:
        message.average_gpu_utilization = utilization
    if (total_gib := gpus.total_memory_gib) is not None:
        message.total_gpu_memory_gib = total_gib
    if (used_gib := gpus.used_memory_gib) is not None:
        message.used_gpu_memory_gib = used_gib
    if (compliance_rate := table.slo_compliance_rate[place]) is not None:
        message.slo_compliance_rate = compliance_rate
    if (cost_usd := table.cost_usd[place]) is not None:
        message.cost_usd = cost_usd
    if (price_usd := table.usd_per_million_output_tokens[place]) is not None:
        message.usd_per_million_output_tokens = price_usd
