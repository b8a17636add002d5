"""`sagecp explain`: why a request went where it went."""

from __future__ import annotations

import click

from sagecp.cli.options import ServerOptions, output_option, server_options


@click.command("explain")
@click.argument("request_id")
@output_option
@server_options
def explain(connection: ServerOptions, as_json: bool, request_id: str) -> None:
    """Say why a request went where it went: each dispatch, with the candidates and their scores."""
    from sagecp.cli import render
    from sagecp.cli.connect import talk
    from sagecp.cli.json_output import print_message
    from sagecp.client import SageClient, convert
    from sagecp.v1 import inference_service_pb2 as pb

    async def fetch(client: SageClient) -> pb.ExplainRequestResponse:
        return await client.connection.unary(
            client.connection.inference.ExplainRequest,
            pb.ExplainRequestRequest(request_id=request_id),
            request_id=request_id,
        )

    message = talk(connection, fetch)
    if as_json:
        print_message(message)
        return
    status = convert.request_status(message.request)
    click.echo(f"{status.request_id} {render.state_text(status.state.name)}")
    if not message.decisions:
        click.echo("not dispatched so far")
    for each in map(convert.decision, message.decisions):
        balancer = f" with {each.load_balancer}" if each.load_balancer else ""
        click.echo()
        render.print_pairs(
            [
                (
                    f"attempt {each.epoch}",
                    f"on {each.instance_id}, {render.clock_time(each.decision_time_s)}",
                ),
                ("waited", render.duration(each.queue_wait_s)),
                ("ordered by", each.scheduling_policy),
                ("placed by", f"{each.routing_strategy}{balancer} (configuration {each.config_version})"),
                ("because", each.reason),
                ("candidates", render.count(each.candidate_count)),
            ]
        )
        if each.candidates:
            click.echo()
            columns = (
                render.Column("  INSTANCE", flexible=True),
                render.Column("SCORE", right=True),
                render.Column("MADE OF", flexible=True),
            )
            rows = [
                (
                    f"{'*' if candidate.instance_id == each.instance_id else ' '} {candidate.instance_id}",
                    f"{candidate.score:.4g}",
                    candidate.excluded_reason
                    or ", ".join(f"{name} {value:.4g}" for name, value in candidate.terms.items()),
                )
                for candidate in each.candidates
            ]
            render.print_table(columns, rows)
