"""The options that describe a request, and what they become."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, JSON_PAIR, PAIR

if TYPE_CHECKING:
    from sagecp.core.errors import FieldViolation
    from sagecp.v1 import request_pb2

F = TypeVar("F", bound=Callable[..., Any])

_PRIORITIES = ["critical", "high", "normal", "low", "background"]
_OPTIONS = (
    click.argument("prompt", required=False),
    click.option("--model", help="Served name; not needed where one model is served."),
    click.option("--chat", is_flag=True, help="Send the prompt as a chat message."),
    click.option("--system", metavar="TEXT", help="System message; implies --chat."),
    click.option("--token-ids", metavar="IDS", help="The prompt as token ids: 1,2,3."),
    click.option(
        "--openai-json", metavar="FILE", help="An OpenAI request body to pass through; - for stdin."
    ),
    click.option("-m", "--max-tokens", type=int, metavar="N", help="Most tokens to make."),
    click.option("-t", "--temperature", type=float, metavar="X", help="0 (greedy) to 2."),
    click.option("--top-p", type=float, metavar="X", help="Share of probability kept."),
    click.option("--top-k", type=int, metavar="N", help="Likeliest tokens kept."),
    click.option("--min-p", type=float, metavar="X", help="Least relative probability kept."),
    click.option("--presence-penalty", type=float, metavar="X"),
    click.option("--frequency-penalty", type=float, metavar="X"),
    click.option("--repetition-penalty", type=float, metavar="X"),
    click.option("--seed", type=int, metavar="N", help="Of the request's random generator."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeatable."),
    click.option("-n", "--n", type=int, metavar="N", help="Answers to make."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on to --max-tokens."),
    click.option(
        "--param",
        "params",
        type=JSON_PAIR,
        multiple=True,
        metavar="KEY=JSON",
        help="Any other parameter, or a field of the engine's own; repeatable.",
    ),
    click.option("--priority", type=click.Choice(_PRIORITIES, case_sensitive=False), help="Class. [normal]"),
    click.option("--deadline", "deadline_s", type=DURATION, metavar="T", help="Expires after: 5s."),
    click.option("--ttft", "ttft_s", type=DURATION, metavar="T", help="Objective to the first token: 500ms."),
    click.option("--tpot", "tpot_s", type=DURATION, metavar="T", help="Objective per further token: 50ms."),
    click.option("--cost-budget", "cost_budget_usd", type=float, metavar="USD", help="Most it may cost."),
    click.option("--user", "user_id", help="End user, for fairness."),
    click.option("--session", "session_id", help="Session, for affinity."),
    click.option("--label", "labels", type=PAIR, multiple=True, metavar="K=V", help="Repeatable."),
    click.option("--request-id", help="Own id; a repetition is recognised by it."),
)
# What of the options has the same name in `sagecp.client.RequestOptions`.
_PLAIN = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "n", "ignore_eos", "priority", "deadline_s", "ttft_s", "tpot_s",
    "cost_budget_usd", "user_id", "session_id", "request_id",
)  # fmt: skip
_OWN = {"prompt", "chat", "system", "token_ids", "openai_json", "params", "stop", "labels"}


def request_options(function: F) -> F:
    """Add the options of a request; they arrive as ``request``, a dict for :func:`make_spec`."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:  # noqa: ANN401 - whatever the command returns
        request = {name: values.pop(name) for name in (*_PLAIN, *_OWN)}
        return function(request=request, **values)

    decorated: Any = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    result: F = decorated
    return result


def make_spec(values: dict[str, Any]) -> request_pb2.RequestSpec:
    """Return the request that the command line describes.

    Raises:
        CliError: Parts contradict each other, or do not fit.
    """
    from sagecp.cli.failures import from_client_error
    from sagecp.client import ClientError
    from sagecp.client.requests import KNOWN_OPTIONS, request_spec

    options: dict[str, Any] = {name: values[name] for name in _PLAIN if values[name] is not None}
    if values["stop"]:
        options["stop"] = list(values["stop"])
    if values["labels"]:
        options["labels"] = dict(values["labels"])
    extras: dict[str, Any] = {}
    for key, value in values["params"]:
        (options if key in KNOWN_OPTIONS else extras)[key] = value
    if extras:
        options["engine_extras"] = {**options.get("engine_extras", {}), **extras}
    prompt = _read_prompt(values, options)
    try:
        return request_spec(prompt, options)  # type: ignore[arg-type]  # built from the same names
    except ClientError as error:
        # What does not even fit the message is never sent, so the server cannot name the other bad fields.
        error.violations = _all_violations(error.violations, options)
        raise from_client_error(error) from error


def _all_violations(found: Sequence[FieldViolation], options: dict[str, Any]) -> tuple[FieldViolation, ...]:
    """Return every bad field: those that were found, and those that the server would find."""
    from sagecp.core.errors import FieldViolation
    from sagecp.core.types import RequestMetadata, SamplingParameters
    from sagecp.core.validation import request_violations

    numbers: dict[str, Any] = {
        name: value
        for name, value in options.items()
        if name in SamplingParameters.__dataclass_fields__ and isinstance(value, (int, float))
    }
    metadata = RequestMetadata(
        request_id=options.get("request_id", ""),
        max_tokens=options.get("max_tokens"),
        sampling=SamplingParameters(stop=tuple(options.get("stop", ())), **numbers),
        slo_deadline_ms=_milliseconds(options.get("deadline_s")),
        ttft_slo_ms=_milliseconds(options.get("ttft_s")),
        tpot_slo_ms=_milliseconds(options.get("tpot_s")),
        cost_budget=options.get("cost_budget_usd"),
        labels=options.get("labels", {}),
    )
    violations = {f"spec.{each.field}": each for each in request_violations(metadata)}
    rest = [each for each in found if each.field not in violations]
    return (*(FieldViolation(field, each.description) for field, each in violations.items()), *rest)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _read_prompt(values: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Return the plain prompt, or put another kind of prompt into ``options``."""
    prompt, system, token_ids, body = (
        values["prompt"], values["system"], values["token_ids"], values["openai_json"],
    )  # fmt: skip
    given = [
        name
        for name, value in (("PROMPT", prompt), ("--token-ids", token_ids), ("--openai-json", body))
        if value is not None
    ]
    if len(given) != 1:
        what = f"{' and '.join(given)} contradict each other" if given else "there is no prompt"
        raise CliError(
            what,
            hint="give one of: PROMPT (- reads it from standard input), --token-ids, --openai-json",
            exit_code=ExitCode.INVALID,
        )
    if body is not None:
        options["openai"] = _read_body(body)
        return None
    if token_ids is not None:
        try:
            options["token_ids"] = [int(text) for text in token_ids.replace(",", " ").split()]
        except ValueError:
            raise CliError(
                f"--token-ids {token_ids!r} is not a list of numbers",
                hint="for example --token-ids 1,15043,29892",
                exit_code=ExitCode.INVALID,
            ) from None
        return None
    text: str = sys.stdin.read() if prompt == "-" else prompt
    if values["chat"] or system is not None:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        options["messages"] = messages
        return None
    return text


def _read_body(name: str) -> tuple[str, bytes]:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        body = json.loads(content)
        if not isinstance(body, dict):
            raise ValueError("is no JSON object")
    except OSError as error:
        raise CliError(f"cannot read {name}: {error.strerror}", exit_code=ExitCode.INVALID) from error
    except ValueError as error:
        raise CliError(
            f"{name} is no JSON object: {error}",
            hint="give the body as it would be sent to /v1/completions or /v1/chat/completions",
            exit_code=ExitCode.INVALID,
        ) from error
    return ("CHAT_COMPLETIONS" if "messages" in body else "COMPLETIONS"), content
