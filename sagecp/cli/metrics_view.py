"""What `sagecp metrics` asks for and prints."""

from __future__ import annotations

import click

from sagecp.cli import render
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import SageClient, convert
from sagecp.core.types import DurationQuantiles, PerformanceMetrics
from sagecp.v1 import admin_service_pb2, metrics_pb2, request_pb2


def query(
    *,
    window_s: float | None = None,
    group_by: str | None = None,
    model: str = "",
    instance_id: str = "",
    tenant_id: str = "",
    priority: str | None = None,
) -> admin_service_pb2.GetMetricsRequest:
    """Return the message for the command's options."""
    message = admin_service_pb2.GetMetricsRequest(model=model, instance_id=instance_id, tenant_id=tenant_id)
    if window_s is not None:
        message.window.FromNanoseconds(round(window_s * 1e9))
        message.window.SetInParent()
    if group_by:
        message.group_by = metrics_pb2.MetricsDimension.Value(f"METRICS_DIMENSION_{group_by.upper()}")
    if priority:
        message.priority = request_pb2.RequestPriority.Value(f"REQUEST_PRIORITY_{priority.upper()}")
    return message


async def fetch(
    client: SageClient, message: admin_service_pb2.GetMetricsRequest
) -> metrics_pb2.MetricsSnapshot:
    """Return the metrics."""
    return (await client.connection.unary(client.connection.admin.GetMetrics, message)).snapshot


def show(snapshot: metrics_pb2.MetricsSnapshot, group_by: str, output: str) -> None:
    """Print metrics."""
    if is_for_programs(output):
        print_object(snapshot, output)
        return
    figures = convert.metrics(snapshot)
    overall = figures.overall
    requests = (
        ("accepted", overall.total_requests),
        ("succeeded", overall.completed_requests),
        ("failed", overall.failed_requests),
        ("cancelled", overall.cancelled_requests),
        ("active", overall.active_requests),
        ("queued", overall.queued_requests),
    )
    render.print_pairs(
        [
            ("requests", ", ".join(f"{render.count(number)} {name}" for name, number in requests)),
            (
                "throughput",
                f"{overall.requests_per_second:.3g} requests/s, {overall.tokens_per_second:.4g} tokens/s",
            ),
            ("objectives", _objectives(overall)),
            ("cost", _cost(overall)),
            ("GPUs", _gpus(overall)),
            ("window", render.duration(figures.window_s)),
        ]
    )
    click.echo()
    render.print_table(
        (
            render.Column("LATENCY"),
            *(render.Column(title, right=True) for title in ("SAMPLES", "MEAN", "P50", "P95", "P99")),
        ),
        [
            _quantile_row(name, quantiles)
            for name, quantiles in (
                ("time to first token", overall.ttft),
                ("time per output token", overall.tpot),
                ("end to end", overall.latency),
                ("wait in the queue", overall.queue_wait),
            )
        ],
    )
    if group_by:
        click.echo()
        _show_groups(group_by, dict(figures.groups))


def _quantile_row(name: str, quantiles: DurationQuantiles) -> list[str]:
    if not quantiles.sample_count:
        return [name, "0", *[render.NONE] * 4]
    seconds = (quantiles.mean_s, quantiles.p50_s, quantiles.p95_s, quantiles.p99_s)
    return [name, render.count(quantiles.sample_count), *map(render.duration, seconds)]


def _objectives(metrics: PerformanceMetrics) -> str:
    if metrics.slo_compliance_rate is None and not metrics.slo_violations:
        return "no request had any"
    return (
        f"{render.percent(metrics.slo_compliance_rate)} met in the window, "
        f"{render.count(metrics.slo_violations)} missed since the start"
    )


def _cost(metrics: PerformanceMetrics) -> str:
    if metrics.cost_usd is None:
        return ""
    price = metrics.usd_per_million_output_tokens
    per_token = "" if price is None else f", {render.usd(price)} per million output tokens"
    return f"{render.usd(metrics.cost_usd)} of requests that ended in the window{per_token}"


def _gpus(metrics: PerformanceMetrics) -> str:
    if metrics.average_gpu_utilization is None and metrics.total_gpu_memory_gb is None:
        return "none reports"
    used, total = metrics.used_gpu_memory_gb, metrics.total_gpu_memory_gb
    memory = f", {used or 0:.1f} of {total:.1f} GiB used" if total is not None else ""
    return f"{render.percent(metrics.average_gpu_utilization)} busy{memory}"


def _per_million(metrics: PerformanceMetrics) -> str:
    price = metrics.usd_per_million_output_tokens
    return render.NONE if price is None else f"{price:.3g}"


def _show_groups(dimension: str, groups: dict[str, PerformanceMetrics]) -> None:
    def median(quantiles: DurationQuantiles) -> str:
        return render.duration(quantiles.p50_s) if quantiles.sample_count else render.NONE

    def tail(quantiles: DurationQuantiles) -> str:
        return render.duration(quantiles.p99_s) if quantiles.sample_count else render.NONE

    # With the medians and 99th percentiles of the figures above, within 80 columns; where there are
    # prices, cost as well, for which some of them make room.
    titles = ["DONE", "FAIL", "RUN", "TOK/S", "TTFT50", "TTFT99", "TPOT50", "E2E50", "E2E99"]
    has_costs = any(each.cost_usd is not None for each in groups.values())
    if has_costs:
        titles += ["COST", "$/MTOK"]
    optional = {"TTFT50", "E2E50", "FAIL", "RUN"} if has_costs else set()
    render.print_table(
        (
            render.Column(dimension.upper(), flexible=True),
            *(render.Column(title, right=True, optional=title in optional) for title in titles),
        ),
        [
            (
                value,
                render.compact(each.completed_requests),
                render.compact(each.failed_requests),
                render.compact(each.active_requests),
                render.compact(each.tokens_per_second),
                median(each.ttft),
                tail(each.ttft),
                median(each.tpot),
                median(each.latency),
                tail(each.latency),
                *([render.usd(each.cost_usd), _per_million(each)] if has_costs else []),
            )
            for value, each in sorted(groups.items())
        ],
    )
