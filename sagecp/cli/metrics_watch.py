"""What `sagecp metrics --watch` asks for and prints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import grpc

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import is_for_programs, print_entry
from sagecp.cli.watch import Patience
from sagecp.client import SageClient, UnavailableError, convert
from sagecp.client.errors import from_rpc_error
from sagecp.core.types import DurationQuantiles, PerformanceMetrics
from sagecp.v1 import admin_service_pb2, metrics_pb2

_FIGURES = ("DONE", "FAIL", "RUN", "QUEUED", "REQ/S", "TOK/S", "TTFT50", "TTFT99", "TPOT50", "TPOT99", "SLO")
# Left out first where the terminal is narrow.
_OPTIONAL = {"TPOT99", "REQ/S", "FAIL"}
_ALL = "all"
_PAUSE_S = 1.0
Show = Callable[[metrics_pb2.MetricsSnapshot], None]


def run(
    connection: ServerOptions, query: admin_service_pb2.GetMetricsRequest, interval_s: float, show: Show
) -> None:
    """Show the metrics at every interval, until the caller leaves.

    Args:
        connection: Where and how; its timeout bounds the whole.
        query: Which metrics.
        interval_s: How often, in seconds.
        show: What prints them.

    Raises:
        CliError: The server refused, or the connection broke.
    """
    request = admin_service_pb2.WatchMetricsRequest(query=query)
    request.interval.FromNanoseconds(round(interval_s * 1e9))

    talk(connection, lambda client: _follow(client, request, connection.timeout_s, show))


async def _follow(
    client: SageClient, request: admin_service_pb2.WatchMetricsRequest, timeout_s: float | None, show: Show
) -> None:
    patience = Patience()
    began = False
    while True:
        call = client.connection.admin.WatchMetrics(
            request, metadata=client.connection.metadata, timeout=timeout_s
        )
        try:
            async for response in call:
                began = True
                patience.answered()
                show(response.snapshot)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            # Somebody who mistyped an address hears of it at once.
            if not began or not isinstance(error, UnavailableError):
                raise error from None
            patience.bear(error)
        else:
            return
        finally:
            call.cancel()
        await asyncio.sleep(_PAUSE_S)


def printer(group_by: str, output: str, *, headers: bool) -> Show:
    """Return what prints metrics: a line for all together, and one per value of a dimension."""
    columns = [render.Column("TIME")]
    if group_by:
        columns.append(render.Column(group_by.upper(), flexible=True))
    columns += [render.Column(title, right=True, optional=title in _OPTIONAL) for title in _FIGURES]
    table = render.TablePrinter(columns, headers=headers)

    def rows(snapshot: metrics_pb2.MetricsSnapshot) -> Iterator[list[str]]:
        metrics = convert.metrics(snapshot)
        moment = time.strftime("%H:%M:%S", time.localtime(metrics.time_s))
        if not group_by:
            yield [moment, *_figures(metrics.overall)]
            return
        yield [moment, _ALL, *_figures(metrics.overall)]
        for value, each in sorted(metrics.groups.items()):
            yield ["", value, *_figures(each)]

    def show(snapshot: metrics_pb2.MetricsSnapshot) -> None:
        if is_for_programs(output):
            print_entry(snapshot, output)
        else:
            table.print(list(rows(snapshot)))

    return show


def _figures(metrics: PerformanceMetrics) -> list[str]:
    def quantile(quantiles: DurationQuantiles, seconds: float) -> str:
        return render.duration(seconds) if quantiles.sample_count else render.NONE

    return [
        render.compact(metrics.completed_requests),
        render.compact(metrics.failed_requests),
        render.compact(metrics.active_requests),
        render.compact(metrics.queued_requests),
        f"{metrics.requests_per_second:.3g}",
        render.compact(metrics.tokens_per_second),
        quantile(metrics.ttft, metrics.ttft.p50_s),
        quantile(metrics.ttft, metrics.ttft.p99_s),
        quantile(metrics.tpot, metrics.tpot.p50_s),
        quantile(metrics.tpot, metrics.tpot.p99_s),
        render.percent(metrics.slo_compliance_rate),
    ]
