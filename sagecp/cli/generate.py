"""`sagecp generate`, `sagecp submit` and `sagecp stream`: asking for tokens."""

from __future__ import annotations

from typing import Any

import click

from sagecp.cli.complete import complete_requests
from sagecp.cli.options import ServerOptions, output_option, server_options
from sagecp.cli.request_options import make_spec, request_options

_stats_option = click.option("--stats", is_flag=True, help="At the end, say on standard error what it took.")


_EXAMPLES = """\b
Examples:
  sagecp generate "Tell me a story" --max-tokens 64 --stats
  echo "Why is the sky blue?" | sagecp generate - --chat
  sagecp generate --openai-json body.json -o json
"""


@click.command("generate", epilog=_EXAMPLES)
@request_options
@_stats_option
@click.option("--detach", is_flag=True, help="Let the request run on when this command ends.")
@output_option
@server_options
def generate(
    connection: ServerOptions, as_json: bool, request: dict[str, Any], stats: bool, detach: bool
) -> int:
    """Send PROMPT and print the answer as it is made.

    PROMPT is plain text, or - to read it from standard input. Ctrl-C cancels
    the request.
    """
    from sagecp.cli.token_output import Output, follow_generate

    spec = make_spec(request)
    output = Output(as_json=as_json, stats=stats, choice_count=spec.sampling.n or 1)
    return follow_generate(connection, spec, output, detach=detach)


@click.command("submit")
@request_options
@click.option("--wait", is_flag=True, help="Wait for the end; the exit code says how it ended.")
@output_option
@server_options
def submit(connection: ServerOptions, as_json: bool, request: dict[str, Any], wait: bool) -> int:
    """Hand in PROMPT and print the id of the request.

    The request runs whether or not anybody reads it; `sagecp stream ID`
    prints its output, now or later.
    """
    from sagecp.cli.token_output import hand_in

    return hand_in(connection, make_spec(request), as_json=as_json, wait=wait)


@click.command("stream")
@click.argument("request_id", shell_complete=complete_requests)
@click.option(
    "--from",
    "from_token_index",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Begin at this token.",
)
@click.option("--cancel-on-exit", is_flag=True, help="Ctrl-C, or a lost connection, cancels the request.")
@_stats_option
@output_option
@server_options
def stream(
    connection: ServerOptions,
    as_json: bool,
    request_id: str,
    from_token_index: int,
    cancel_on_exit: bool,
    stats: bool,
) -> int:
    """Print the output of a request: what exists already, then what arrives.

    Ctrl-C leaves the request running. A lost connection is resumed without a
    gap or a repetition.
    """
    from sagecp.cli.token_output import Output, follow_stream

    output = Output(as_json=as_json, stats=stats, choice_count=1)
    return follow_stream(
        connection, request_id, output, from_token_index=from_token_index, cancel_on_exit=cancel_on_exit
    )
