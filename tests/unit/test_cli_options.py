"""Values of options, and what flags become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, JSON_PAIR, PAIR
from sagecp.cli.request_options import make_spec, request_options
from sagecp.cli.serve import _with_flags, serve
from sagecp.config import ServerConfig
from sagecp.v1 import request_pb2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5),
        ("1.5s", 1.5),
        ("2m", 120),
        ("1h", 3600),
        ("1d", 86400),
        ("3", 3),
        ("250us", 0.00025),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5x", "-1s", "s", "1 000", "inf", "nan", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="500ms, 5s or 2m"):
        DURATION.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("min_p=0.05", ("min_p", 0.05)),
        ("x=true", ("x", True)),
        ("x=plain words", ("x", "plain words")),
        ('x={"a": [1]}', ("x", {"a": [1]})),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_json_pairs(text: str, pair: tuple[str, Any]) -> None:
    assert JSON_PAIR.convert(text, None, None) == pair


@pytest.mark.parametrize("text", ["x", "=1", 'x={"a"', "x=[1,"])
def test_what_is_no_json_pair(text: str) -> None:
    with pytest.raises(click.BadParameter):
        JSON_PAIR.convert(text, None, None)


def test_pairs() -> None:
    assert PAIR.convert("a=b=c", None, None) == ("a", "b=c")
    with pytest.raises(click.BadParameter):
        PAIR.convert("a", None, None)


def spec_of(*arguments: str) -> request_pb2.RequestSpec:
    """Return the request that a command line describes."""
    made: list[request_pb2.RequestSpec] = []

    @click.command()
    @request_options
    def command(request: dict[str, Any]) -> None:
        made.append(make_spec(request))

    command.main(list(arguments), standalone_mode=False)
    return made[0]


def test_flags_become_the_request() -> None:
    spec = spec_of(
        "hi", "--model", "m", "-m", "5", "-t", "0", "--top-p", "0.5", "--top-k", "3", "--seed", "9",
        "--stop", "a", "--stop", "b", "--n", "2", "--ignore-eos", "--priority", "HIGH", "--deadline", "5s",
        "--ttft", "500ms", "--tpot", "50ms", "--user", "u", "--session", "s", "--label", "k=v",
        "--request-id", "r", "--param", "min_tokens=2",
        "--param", 'chat_template_kwargs={"enable_thinking": false}',
    )  # fmt: skip
    sampling = spec.sampling
    assert (spec.prompt.text, spec.model, spec.request_id) == ("hi", "m", "r")
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (5, 0, 3, 9)
    assert (sampling.n, sampling.min_tokens, list(sampling.stop)) == (2, 2, ["a", "b"])
    assert sampling.HasField("temperature")
    assert sampling.ignore_eos
    assert not sampling.engine_extras.fields["chat_template_kwargs"].struct_value["enable_thinking"]
    assert spec.priority == request_pb2.REQUEST_PRIORITY_HIGH
    assert spec.objectives.end_to_end_deadline.seconds == 5
    assert spec.objectives.time_to_first_token.nanos == 500_000_000
    assert (spec.user_id, spec.session_id, dict(spec.labels)) == ("u", "s", {"k": "v"})


def test_nothing_is_set_that_was_not_given() -> None:
    spec = spec_of("hi")
    assert not spec.HasField("sampling")
    assert not spec.HasField("objectives")
    assert spec.priority == request_pb2.REQUEST_PRIORITY_UNSPECIFIED


def test_kinds_of_prompts(tmp_path: Path) -> None:
    chat = spec_of("hi", "--system", "Be brief.").prompt.chat
    assert [(message.role, message.text) for message in chat.messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]
    assert len(spec_of("hi", "--chat").prompt.chat.messages) == 1
    assert list(spec_of("--token-ids", "1,2 3").prompt.token_ids.ids) == [1, 2, 3]
    body = tmp_path / "body.json"
    body.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    openai = spec_of("--openai-json", str(body)).prompt.openai
    assert openai.api == request_pb2.OPEN_AI_API_CHAT_COMPLETIONS
    assert openai.json == body.read_bytes()
    body.write_text("[1]")
    with pytest.raises(CliError, match="no JSON object"):
        spec_of("--openai-json", str(body))


def test_every_bad_value_is_named_although_nothing_is_sent() -> None:
    with pytest.raises(CliError) as caught:
        spec_of("hi", "-m", "-5", "-t", "9", "--deadline", "0s", "--label", f"{'k' * 64}=v")
    for name in ("sampling.max_tokens", "sampling.temperature", "objectives.end_to_end_deadline", "labels["):
        assert name in caught.value.message


def config_of(*arguments: str, base: ServerConfig | None = None) -> ServerConfig:
    context = serve.make_context("serve", list(arguments))
    flags = dict(context.params)
    flags.pop("config_file")
    config: ServerConfig = _with_flags(base or ServerConfig(), flags)
    return config


def test_serve_flags_win_over_the_file_and_leave_the_rest() -> None:
    assert config_of() == ServerConfig()
    base = ServerConfig(listen="127.0.0.1:1", metrics_listen="127.0.0.1:2", log_level="debug")
    config = config_of(
        "--listen", "127.0.0.1:7", "--metrics-listen", "off", "--drain-timeout", "500ms", "--max-queue", "9",
        "--tls-cert", "c", "--tls-key", "k", "--client-ca", "a", "--scheduling-policy", "fifo",
        "--routing-strategy", "random", "--load-balancer", "least_connections", "--insecure-listen",
        base=base,
    )  # fmt: skip
    assert (config.listen, config.metrics_listen, config.log_level) == ("127.0.0.1:7", "", "debug")
    assert (config.runtime.drain_timeout_s, config.scheduler.max_queued_request_count) == (0.5, 9)
    assert (config.tls.certificate_file, config.tls.private_key_file, config.tls.client_ca_file) == (
        "c",
        "k",
        "a",
    )
    assert (config.scheduler.scheduling_policy, config.scheduler.routing_strategy) == ("fifo", "random")
    assert config.scheduler.load_balancer == "least_connections"
    assert config.insecure_listen
