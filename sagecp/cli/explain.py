"""`sagecp explain`: why a request went where it went."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from sagecp.cli.complete import complete_requests
from sagecp.cli.options import ServerOptions, output_option, server_options

if TYPE_CHECKING:
    from sagecp.core.types import SchedulingDecision
    from sagecp.v1 import inference_service_pb2

# Columns before the values, and the least that a long value is given.
_NAMES_WIDTH = 14
_LEAST_WIDTH = 30


@click.command("explain")
@click.argument("request_id", shell_complete=complete_requests)
@click.option(
    "--rerun",
    is_flag=True,
    help="Make each decision again, here, from its receipt, and compare.",
)
@output_option
@server_options
def explain(connection: ServerOptions, as_json: bool, request_id: str, rerun: bool) -> int:
    """Say why a request went where it went: each dispatch, with the candidates and their scores.

    The best candidates are listed, best first; `*` marks the one chosen. The
    receipt holds everything the choice was made from: --rerun makes it again.
    """
    from sagecp.cli.connect import talk
    from sagecp.cli.exit_codes import ExitCode
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
    decisions = [convert.decision(each) for each in message.decisions]
    if as_json:
        print_message(message)
    else:
        show_heading(message)
    same = True
    for each in decisions:
        if not as_json:
            show_decision(each)
        if rerun:
            same = _run_again(each, as_json=as_json) and same
    return ExitCode.OK if same else ExitCode.UNEXPECTED


def show_explanation(message: inference_service_pb2.ExplainRequestResponse) -> None:
    """Print a request and each of its dispatches."""
    from sagecp.client import convert

    show_heading(message)
    for each in message.decisions:
        show_decision(convert.decision(each))


def show_heading(message: inference_service_pb2.ExplainRequestResponse) -> None:
    """Print which request it is, and how it is."""
    from sagecp.cli import render
    from sagecp.cli.requests_view import cost_text
    from sagecp.client import convert

    status = convert.request_status(message.request)
    click.echo(f"{status.request_id} {render.state_text(status.state.name)}")
    if cost := cost_text(status):
        click.echo(f"cost: {cost}")
    if not message.decisions:
        click.echo("not dispatched so far")


def show_decision(decision: SchedulingDecision) -> None:
    """Print one dispatch."""
    from sagecp.cli import render

    balancer = f" with {decision.load_balancer}" if decision.load_balancer else ""
    order = decision.scheduling_policy
    if decision.policy_in_force not in {"", order}:
        order += f" ({decision.policy_in_force} in force)"
    click.echo()
    render.print_pairs(
        [
            (
                f"attempt {decision.epoch}",
                f"on {decision.instance_id}, {render.clock_time(decision.decision_time_s)}",
            ),
            ("waited", render.duration(decision.queue_wait_s)),
            ("ordered by", order),
            ("placed by", f"{decision.routing_strategy}{balancer} (configuration {decision.config_version})"),
            (
                "because",
                textwrap.fill(decision.reason, max(_LEAST_WIDTH, render.terminal_width() - _NAMES_WIDTH)),
            ),
            ("candidates", render.count(decision.candidate_count)),
        ]
    )
    if not decision.candidates:
        return
    click.echo()
    # The terms have the same names for every candidate, as a rule: a column each.
    names = sorted({name for each in decision.candidates for name in each.terms})
    columns = [
        render.Column("  INSTANCE", flexible=True),
        render.Column("SCORE", right=True),
        *(render.Column(name.upper(), right=True, optional=True) for name in names),
        render.Column("NOT NOW BECAUSE", flexible=True),
    ]
    rows = [
        [
            f"{'*' if each.instance_id == decision.instance_id else ' '} {each.instance_id}",
            f"{each.score:.4g}",
            *(f"{each.terms[name]:.4g}" if name in each.terms else render.NONE for name in names),
            each.excluded_reason,
        ]
        for each in decision.candidates
    ]
    if not any(each.excluded_reason for each in decision.candidates):
        columns.pop()
        rows = [row[:-1] for row in rows]
    render.print_table(columns, rows)


def _run_again(decision: SchedulingDecision, *, as_json: bool) -> bool:
    """Make a decision again, print how it compares, and return whether it is the same."""
    import json

    from sagecp.cli.exit_codes import ExitCode
    from sagecp.cli.failures import CliError
    from sagecp.core.errors import SageError
    from sagecp.core.receipts import run_again

    try:
        chosen, scores = run_again(decision)
    except SageError as error:
        raise CliError(
            f"attempt {decision.epoch} cannot be run again: {error}",
            hint="is the server of another version? compare: sagecp version, sagecp status",
            exit_code=ExitCode.UNEXPECTED,
        ) from error
    # The receipt's inputs hold the candidates of its scores, and the chosen one where it is not among them.
    receipt = {each.instance_id: each.score for each in decision.candidates}
    differing = [
        each for each in scores if each.instance_id in receipt and receipt[each.instance_id] != each.score
    ]
    same = chosen == decision.instance_id and not differing
    if as_json:
        click.echo(
            json.dumps(
                {
                    "request_id": decision.request_id,
                    "epoch": decision.epoch,
                    "rerun_instance_id": chosen,
                    "same_choice": chosen == decision.instance_id,
                    "same_scores": not differing,
                }
            )
        )
        return same
    click.echo()
    if same:
        click.echo(f"run again here: the same choice, {chosen}, and the same scores, bit for bit")
        return True
    if chosen != decision.instance_id:
        click.echo(f"run again here: another choice, {chosen or 'to wait'}")
    for each in differing:
        click.echo(
            f"run again here: {each.instance_id} scores {each.score!r}, not {receipt[each.instance_id]!r}"
        )
    return False
