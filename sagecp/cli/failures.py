"""From what went wrong to a line that says it, a line that says what to do, and an exit code."""

from __future__ import annotations

import re
from typing import IO, Any

import click

from sagecp.cli.exit_codes import ExitCode


class CliError(click.ClickException):
    """A command cannot do what it was asked to do.

    Attributes:
        hint: What to do about it; empty: nothing to add.
        code: Exit code of the process.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = ExitCode.UNEXPECTED) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = int(exit_code)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print both lines on standard error."""
        print_error(self.message, self.hint)


def print_error(message: str, hint: str = "") -> None:
    """Print an error and what to do about it."""
    click.secho("error: ", err=True, fg="red", bold=True, nl=False)
    # Servers' words are shown, their control characters are not.
    click.echo("".join(char for char in message if char.isprintable() or char in "\n\t"), err=True)
    if hint:
        click.secho("hint: ", err=True, fg="cyan", nl=False)
        click.echo(hint, err=True)


def from_client_error(error: Any, *, server: str = "") -> CliError:  # noqa: ANN401 - a ClientError, imported late
    """Return a `sagecp.client.ClientError` for a person.

    Args:
        error: What the client raised.
        server: Address that was asked.
    """
    from sagecp import client

    message: str = error.message
    if isinstance(error, client.StreamLostError):
        return CliError(
            message,
            hint=f"go on with: sagecp stream {error.request_id} --from {error.next_token_index}",
            exit_code=ExitCode.UNREACHABLE,
        )
    if isinstance(error, client.RequestFailedError):
        return _request_failed(error)
    if isinstance(error, client.InvalidArgumentError):
        return CliError(_with_violations(error), exit_code=ExitCode.INVALID)
    if isinstance(error, client.UnavailableError):
        return _unavailable(error, server)
    code, hint = ExitCode.UNEXPECTED, ""
    if isinstance(error, client.NotFoundError):
        code = ExitCode.NOT_FOUND_OR_CONFLICT
        what = "instances" if error.reason is None or "REQUEST" not in error.reason.name else "requests"
        hint = f"sagecp {what} lists those that exist"
    elif isinstance(error, client.ConflictError):
        code = ExitCode.NOT_FOUND_OR_CONFLICT
    elif isinstance(error, client.AccessError):
        code, hint = ExitCode.NOT_PERMITTED, "check the credential: --cert and --key, or --token"
    elif isinstance(error, client.OverloadedError):
        code, hint = _overloaded(error)
    elif isinstance(error, client.DeadlineError):
        code = ExitCode.DEADLINE
        if not error.ended_request and error.reason is None:
            message, hint = f"no answer from {server} in time", "--timeout allows more"
    elif isinstance(error, client.UnsupportedError):
        hint = "this server does not have it; compare versions: sagecp version, sagecp status"
        if error.reason is None:
            hint = f"is {server} a sagecp control plane? An older one does not know newer calls"
    elif error.rpc_id:
        hint = f"the server's log has the details under {error.rpc_id}"
    return CliError(message, hint=hint, exit_code=code)


def _request_failed(error: Any) -> CliError:  # noqa: ANN401 - a RequestFailedError
    state, code, hint = error.state.name, ExitCode.REQUEST_FAILED, f"sagecp requests get {error.request_id}"
    if state == "EXPIRED":
        code = ExitCode.DEADLINE
    elif error.code.name == "INVALID_ARGUMENT":
        code, hint = ExitCode.INVALID, ""
    return CliError(f"request {error.request_id} {state}: {error.message}", hint=hint, exit_code=code)


def _with_violations(error: Any) -> str:  # noqa: ANN401 - an InvalidArgumentError
    if not error.violations:
        return str(error.message)
    if len(error.violations) == 1 and not error.violations[0].field:
        return str(error.violations[0].description)
    lines = [f"  {each.field.removeprefix('spec.')}: {each.description}" for each in error.violations]
    return "refused as invalid:\n" + "\n".join(lines)


def _unavailable(error: Any, server: str) -> CliError:  # noqa: ANN401 - an UnavailableError
    if error.ended_request:
        return CliError(error.message, exit_code=ExitCode.REQUEST_FAILED)
    if error.reason is not None:
        return CliError(error.message, hint="try again in a moment", exit_code=ExitCode.UNREACHABLE)
    text = error.message.lower()
    hint = "is it running? start one with sagecp serve, or name another with --server"
    if "ssl" in text or "tls" in text or "handshake" in text or "certificate" in text:
        hint = "is the server's TLS as given here? Without TLS, leave out --tls and --ca-cert"
    elif "socket closed" in text or "reset" in text or "goaway" in text:
        hint = "if the server speaks TLS, give --ca-cert FILE, or --tls"
    elif "resolving" in text or "resolution" in text or "domain name" in text:
        hint = "the host name is not known; check --server"
    # The core's text goes through every address; its end says why.
    why = re.sub(
        r"^.*(?:last error: |connect: |Failed to connect to remote host: )",
        "",
        error.message,
        flags=re.DOTALL,
    )
    why = re.sub(r"^(?:UNKNOWN|UNAVAILABLE): ", "", why)
    return CliError(
        f"cannot reach the control plane at {server}: {why}", hint=hint, exit_code=ExitCode.UNREACHABLE
    )


def _overloaded(error: Any) -> tuple[ExitCode, str]:  # noqa: ANN401 - an OverloadedError
    if error.reason is None and "larger than max" in error.message:
        return ExitCode.INVALID, "the message is too large for the server; send less"
    if error.retry_after_s is not None:
        return ExitCode.REQUEST_FAILED, f"try again in {error.retry_after_s:.1f} s"
    return ExitCode.REQUEST_FAILED, "try again later, or with less at once"
