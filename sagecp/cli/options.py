"""Options that commands share, and the types of their values."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


class DurationType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """A duration with its unit: 500ms, 5s, 2m, 1h; a bare number counts seconds. In seconds."""

    name = "duration"

    def __init__(self, *, least_s: float = 0.0) -> None:
        self._least_s = least_s

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(us|ms|s|m|h|d|)\s*", value)
        if match is None:
            self.fail(f"{value!r} is not a duration; for example 500ms, 5s or 2m", param, ctx)
        seconds = float(match[1]) * _UNITS_S[match[2]]
        if seconds < self._least_s:
            self.fail(f"{value!r} is too short; at least {self._least_s:g}s", param, ctx)
        return seconds


class JsonPairType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """KEY=JSON, such as ``min_p=0.05`` or ``chat_template_kwargs={"enable_thinking": false}``."""

    name = "key=json"

    def convert(
        self, value: str | tuple[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Return key and value; a value that is no JSON is a string."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=JSON; for example min_p=0.05", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            if text[:1] in '[{"':
                self.fail(f"the value of {key} is not valid JSON: {text}", param, ctx)
            return key, text


class PairType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """KEY=VALUE."""

    name = "key=value"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return key and value."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text


class NumberPairType(PairType):
    """NAME=NUMBER."""

    name = "name=number"

    def convert(  # type: ignore[override]  # a number instead of a text
        self, value: str | tuple[str, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Return name and number."""
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = None
        if not equals or not name.strip() or number is None:
            self.fail(f"{value!r} is not NAME=NUMBER; for example priority.boost_high_s=60", param, ctx)
        return name.strip(), number


DURATION = DurationType()
JSON_PAIR = JsonPairType()
PAIR = PairType()
NUMBER_PAIR = NumberPairType()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a command reaches the control plane.

    Attributes:
        server: Host and port.
        tls: Whether to speak TLS with gRPC's own authorities.
        timeout_s: For calls; ``None``: 30 s for single calls, no limit for streams.
    """

    server: str
    tls: bool
    ca_file: str
    certificate_file: str
    private_key_file: str
    server_name: str
    token: str
    timeout_s: float | None


def no_color(function: F) -> F:
    """Add --no-color; NO_COLOR does the same."""
    option = click.option(
        "--no-color",
        is_flag=True,
        expose_value=False,
        callback=_set_color,
        help="Plain output; also: NO_COLOR, or no terminal.",
    )
    return option(function)


def _set_color(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value or os.environ.get("NO_COLOR"):
        ctx.color = False


def debug_option(function: F) -> F:
    """Add --debug, which `main` looks for."""
    return click.option("--debug", is_flag=True, expose_value=False, hidden=True)(function)


def server_options(function: F) -> F:
    """Add the options of every command that talks to a control plane; they arrive as ``connection``."""
    server = click.option(
        "-s",
        "--server",
        envvar="SAGECP_SERVER",
        default="127.0.0.1:50051",
        metavar="ADDR",
        help="Host and port of the control plane.  [SAGECP_SERVER; 127.0.0.1:50051]",
    )
    return _connection_options(function, server)


def optional_server_options(function: F) -> F:
    """Add the options of a command that talks to a control plane only where one is named."""
    server = click.option(
        "-s",
        "--server",
        default="",
        metavar="ADDR",
        help="Ask this control plane, instead of doing it here.",
    )
    return _connection_options(function, server)


def _connection_options(function: F, server_option: Callable[[Any], Any]) -> F:
    @functools.wraps(function)
    def wrapper(
        server: str,
        tls: bool,
        ca_cert: str,
        cert: str,
        key: str,
        server_name: str,
        token: str,
        timeout: float | None,
        **rest: Any,  # noqa: ANN401 - the command's own
    ) -> Any:  # noqa: ANN401 - whatever the command returns
        options = ServerOptions(server, tls, ca_cert, cert, key, server_name, token, timeout)
        return function(connection=options, **rest)

    decorated: Any = wrapper
    for option in reversed(
        [
            server_option,
            click.option(
                "--timeout",
                type=DURATION,
                metavar="T",
                help="Give up after this time: 500ms, 5s, 2m.  [30s; streams: none]",
            ),
            click.option("--tls", is_flag=True, help="Speak TLS, trusting well-known authorities."),
            click.option(
                "--ca-cert", default="", envvar="SAGECP_CA_CERT", metavar="FILE",
                help="Speak TLS, trusting this authority.",
            ),
            click.option(
                "--cert", default="", envvar="SAGECP_CERT", metavar="FILE",
                help="Own certificate chain, for mutual TLS.",
            ),
            click.option("--key", default="", envvar="SAGECP_KEY", metavar="FILE", help="Its private key."),
            click.option(
                "--server-name", default="", metavar="NAME",
                help="Name expected in the server's certificate.",
            ),
            click.option("--token", default="", envvar="SAGECP_TOKEN", hidden=True),
        ]
    ):  # fmt: skip
        decorated = option(decorated)
    result: F = debug_option(no_color(decorated))
    return result


def output_option(function: F) -> F:
    """Add -o; it arrives as ``as_json``."""
    option = click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        callback=lambda _ctx, _parameter, value: value == "json",
        help="table for people, json for programs (one object per line).",
    )
    return option(function)


_FORMATS = {
    "table": "table for people",
    "wide": "wide with more columns",
    "json": "json for programs (one object per line)",
    "yaml": "yaml",
    "name": "name for ids alone",
}


def format_option(*formats: str) -> Callable[[F], F]:
    """Return a decorator that adds -o for some formats, the first by default; it arrives as ``output``."""

    def check(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
        import importlib.util

        if value == "yaml" and importlib.util.find_spec("yaml") is None:
            raise CliError(
                "-o yaml needs the Python package PyYAML, which is not installed",
                hint="pip install 'sagecp[cli]', or -o json",
                exit_code=ExitCode.INVALID,
            )
        return value

    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        callback=check,
        help=", ".join(_FORMATS[name] for name in formats) + ".",
    )


one_format_option = format_option("table", "json", "yaml")
list_format_option = format_option("table", "wide", "json", "yaml", "name")


def list_options(function: F) -> F:
    """Add how a list is printed: ``output``, ``headers``, ``sort_by`` and ``reverse``."""
    decorated: Any = function
    for option in (
        click.option("--reverse", is_flag=True, help="The other way round."),
        click.option(
            "--sort-by", default="", metavar="COLUMN", help="What is listed, by a column of -o wide."
        ),
        headers_option,
        list_format_option,
    ):
        decorated = option(decorated)
    result: F = decorated
    return result


def headers_option(function: F) -> F:
    """Add --no-headers; it arrives as ``headers``."""
    return click.option(
        "--no-headers",
        "headers",
        is_flag=True,
        callback=lambda _ctx, _parameter, value: not value,
        help="Rows alone, for scripts.",
    )(function)


interval_option = click.option(
    "--interval",
    "interval_s",
    type=DurationType(least_s=0.1),
    default="1s",
    show_default=True,
    metavar="T",
    help="How often to look.",
)


class DefaultCommandGroup(click.Group):
    """A group that runs one of its commands when none is named.

    So `sagecp instances -o json` is `sagecp instances list -o json`.
    """

    default_command = "list"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front of options."""
        # While the shell completes, nothing yet may still become the name of a command.
        nothing = not args and not ctx.resilient_parsing
        if nothing or (args and args[0].startswith("-") and args[0] not in {"-h", "--help"}):
            args.insert(0, self.default_command)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the commands, and the options of the default one."""
        if not incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        command = self.commands[self.default_command]
        with command.make_context(self.default_command, [], parent=ctx, resilient_parsing=True) as below:
            return command.shell_complete(below, incomplete)
