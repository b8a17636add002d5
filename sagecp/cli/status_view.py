"""What `sagecp status` asks for and prints."""

from __future__ import annotations

from collections.abc import Mapping

import click

from sagecp.cli import render
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import SageClient, convert
from sagecp.core.types import ControlPlaneStatus, RequestPriority
from sagecp.v1 import admin_service_pb2 as pb

_MOST_SHOWN = 8


async def fetch(client: SageClient) -> pb.GetStatusResponse:
    """Return the state of the control plane."""
    return await client.connection.unary(client.connection.admin.GetStatus, pb.GetStatusRequest())


def show(message: pb.GetStatusResponse, server: str, output: str) -> None:
    """Print the state of the control plane at an address."""
    if is_for_programs(output):
        print_object(message, output)
        return
    now = convert.control_plane_status(message)
    order = now.scheduling_policy
    if message.policy_in_force and message.policy_in_force != order:
        order += f" ({message.policy_in_force} in force)"
    if now.policy_reason:
        order += f": {now.policy_reason}"
    placement = now.routing_strategy + (f", {now.load_balancer}" if now.load_balancer else "")
    health = render.state_text("SERVING") if now.accepting else render.state_text("DRAINING")
    states = {
        render.state_text(state): count for state, count in _by_name(now.instance_count_by_state).items()
    }
    render.print_pairs(
        [
            ("control plane", f"{server} {health}, version {now.version}"),
            ("up", f"{render.duration(now.uptime_s)}, since {render.clock_time(now.start_time_s)}"),
            ("process", _process_text(now)),
            ("event loop lag", render.duration(now.event_loop_lag_s)),
            ("instances", _counts(states, value_first=True) or "none"),
            ("models", _wrapped(", ".join(now.models) or "none")),
            ("active", render.plural(now.active_requests, "request")),
            ("queued", f"{render.count(now.queued_requests)} of at most {render.count(now.queue_capacity)}"),
            ("  by model", _wrapped(_counts(_by_name(now.queued_count_by_model)))),
            ("  by priority", _counts(_by_importance(now.queued_count_by_priority))),
            ("  by tenant", _wrapped(_counts(_by_size(now.queued_count_by_tenant)))),
            ("order", _wrapped(order)),
            ("placement", f"{placement} (configuration {now.config_version})"),
            ("heartbeats", _wrapped(_heartbeats_text(now))),
        ]
    )
    _show_loops(now)
    _show_predictions(message)
    _show_step_times(message)
    _show_plans(message)
    _show_faults(now)


def _wrapped(text: str) -> str:
    return render.wrapped(text, len("event loop lag"))


def _by_importance(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by class, the most important first; classes of a newer server last."""
    known = [priority.name for priority in sorted(RequestPriority) if priority.name in counts]
    return {name: counts[name] for name in [*known, *sorted(counts.keys() - set(known))]}


def _by_name(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _by_size(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts, the largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _counts(counts: Mapping[str, int], *, value_first: bool = False) -> str:
    """Return those counts that are not zero, the first few of them."""
    texts = [
        f"{render.count(count)} {name}" if value_first else f"{name or render.NONE} {render.count(count)}"
        for name, count in counts.items()
        if count
    ]
    more = len(texts) - _MOST_SHOWN
    return ", ".join(texts[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _process_text(now: ControlPlaneStatus) -> str:
    parts = []
    if now.cpu_seconds:
        share = now.cpu_seconds / now.uptime_s if now.uptime_s else 0.0
        parts.append(f"{render.duration(now.cpu_seconds)} of CPU ({render.percent(share)} of a core)")
    if now.resident_memory_bytes:
        parts.append(f"{now.resident_memory_bytes / 2**20:,.0f} MiB of memory")
    return ", ".join(parts)


def _heartbeats_text(now: ControlPlaneStatus) -> str:
    refused = sum(now.refused_heartbeat_count_by_reason.values())
    reasons = _counts(_by_size(now.refused_heartbeat_count_by_reason))
    lease = f"; a lease is {render.duration(now.lease_duration_s)}" if now.lease_duration_s else ""
    return (
        f"{render.count(now.heartbeat_count)} taken, {render.count(refused)} refused"
        f"{f' ({reasons})' if reasons else ''}{lease}"
    )


def _show_loops(now: ControlPlaneStatus) -> None:
    if not now.loops:
        return
    click.echo()
    render.print_table(
        (
            render.Column("LOOP"),
            render.Column("EVERY", right=True),
            render.Column("LAST RUN", right=True),
            render.Column("RUNS", right=True),
        ),
        [
            (
                loop.name,
                render.duration(loop.interval_s),
                f"{render.age(loop.last_run_time_s)} ago" if loop.last_run_time_s else "not yet",
                render.count(loop.run_count),
            )
            for loop in now.loops
        ],
    )


def _show_predictions(message: pb.GetStatusResponse) -> None:
    if not message.prediction_accuracy:
        return
    click.echo()
    render.print_table(
        (
            render.Column("PREDICTED"),
            render.Column("COMPARED", right=True),
            render.Column("ACTUAL/PREDICTED", right=True),
            render.Column("MEDIAN ERROR", right=True),
            render.Column("P90 ERROR", right=True),
            render.Column("BELOW BOUND", right=True, optional=True),
        ),
        [
            (
                each.quantity,
                render.count(each.sample_count),
                f"{each.bias:.2f}",
                f"{each.median_error:,.0%}",
                f"{each.p90_error:,.0%}",
                f"{each.coverage:.0%}" if each.HasField("coverage") else render.NONE,
            )
            for each in message.prediction_accuracy
        ],
    )


def _show_step_times(message: pb.GetStatusResponse) -> None:
    if not message.step_time_accuracy:
        return
    click.echo()
    render.print_table(
        (
            render.Column("STEPS OF", flexible=True),
            render.Column("OBSERVED", right=True),
            render.Column("ACTUAL/PLANNED", right=True),
            render.Column("DECODES", right=True),
            render.Column("PREFILLS", right=True),
            render.Column("PLANNED BY", flexible=True, optional=True),
        ),
        [
            (
                each.kind,
                render.count(each.observation_count),
                f"{each.observed_ratio:.2f}{' drift' if each.drifting else ''}",
                f"{each.decode_ratio:.2f}" if each.decode_ratio else render.NONE,
                f"{each.prefill_ratio:.2f}" if each.prefill_ratio else render.NONE,
                each.source,
            )
            for each in message.step_time_accuracy
        ],
    )


def _show_plans(message: pb.GetStatusResponse) -> None:
    if not message.fleet_plans:
        return
    click.echo()
    for each in message.fleet_plans:
        head = f"plan of {each.model} on {each.gpu_count} x {each.gpu_name}: "
        text = head + each.message
        click.echo(render.harmless(click.style(text, fg="yellow") if each.change_advised else text))


def _show_faults(now: ControlPlaneStatus) -> None:
    if not now.recent_faults:
        return
    click.echo()
    render.print_table(
        (
            render.Column("FAULT", right=True),
            render.Column("INSTANCE", flexible=True),
            render.Column("REQUEST", flexible=True, optional=True),
            render.Column("WHAT", flexible=True, least_width=50),
        ),
        [
            (
                f"{render.age(fault.time_s)} ago",
                fault.instance_id or render.NONE,
                fault.request_id or render.NONE,
                fault.message,
            )
            for fault in now.recent_faults
        ],
    )
