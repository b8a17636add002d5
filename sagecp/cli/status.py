"""`sagecp status`: the control plane at a glance."""

from __future__ import annotations

import textwrap

import click

from sagecp.cli.options import ServerOptions, output_option, server_options

# Columns before the values, and the least that a long value is given.
_NAMES_WIDTH = 16
_LEAST_WIDTH = 30


@click.command("status")
@output_option
@server_options
def status(connection: ServerOptions, as_json: bool) -> None:
    """Show the state of the control plane: fleet, queue, scheduling and recent faults."""
    from sagecp.cli import render
    from sagecp.cli.connect import talk
    from sagecp.cli.json_output import print_message
    from sagecp.client import SageClient, convert
    from sagecp.v1 import admin_service_pb2 as pb

    async def fetch(client: SageClient) -> pb.GetStatusResponse:
        return await client.connection.unary(client.connection.admin.GetStatus, pb.GetStatusRequest())

    message = talk(connection, fetch)
    if as_json:
        print_message(message)
        return
    now = convert.control_plane_status(message)
    fleet = [
        f"{render.count(number)} {render.state_text(state)}"
        for state, number in sorted(now.instance_count_by_state.items())
        if number
    ]
    queues = [
        f"{model} {render.count(number)}"
        for model, number in sorted(now.queued_count_by_model.items())
        if number
    ]
    classes = [
        f"{name} {render.count(number)}" for name, number in now.queued_count_by_priority.items() if number
    ]
    health = render.state_text("SERVING") if now.accepting else render.state_text("DRAINING")
    order = now.scheduling_policy
    if message.policy_in_force and message.policy_in_force != order:
        order += f" ({message.policy_in_force} in force)"
    if now.policy_reason:
        order += f": {now.policy_reason}"
    placement = now.routing_strategy + (f", {now.load_balancer}" if now.load_balancer else "")
    render.print_pairs(
        [
            ("control plane", f"{connection.server} {health}, version {now.version}"),
            ("up", f"{render.duration(now.uptime_s)}, since {render.clock_time(now.start_time_s)}"),
            ("instances", ", ".join(fleet) or "none"),
            ("models", ", ".join(now.models) or "none"),
            ("active", render.plural(now.active_requests, "request")),
            ("queued", f"{render.count(now.queued_requests)} of at most {render.count(now.queue_capacity)}"),
            ("  by model", ", ".join(queues)),
            ("  by priority", ", ".join(classes)),
            ("order", textwrap.fill(order, max(_LEAST_WIDTH, render.terminal_width() - _NAMES_WIDTH))),
            ("placement", f"{placement} (configuration {now.config_version})"),
            ("event loop lag", render.duration(now.event_loop_lag_s)),
        ]
    )
    if message.prediction_accuracy:
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
    if now.recent_faults:
        click.echo()
        render.print_table(
            (
                render.Column("FAULT", right=True),
                render.Column("INSTANCE", flexible=True),
                render.Column("REQUEST", flexible=True),
                render.Column("WHAT", flexible=True),
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
