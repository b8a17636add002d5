"""What happens around every call: the access log, metrics, and silence about content."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from sagecp.log import configure_logging
from sagecp.runtime.engines.base import EngineFailedError
from sagecp.v1 import admin_service_pb2, inference_service_pb2, request_pb2
from tests.support.metrics_text import sample_of
from tests.support.rpc_rig import Rig, failure_of, next_event, remaining, request_spec, running_rig, untyped
from tests.support.waiting import until

pb = inference_service_pb2
STATUS = admin_service_pb2.GetStatusRequest()
CANARY = "canary-7f3a"


def access_lines(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.name == "sagecp.access"]


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


async def test_one_line_per_call_says_who_what_and_how_it_went(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.admin.GetStatus(STATUS, metadata=(("x-request-id", "call-1"),))
    await until(lambda: len(access_lines(caplog)) == 1)
    (line,) = access_lines(caplog)
    assert line.levelno == logging.INFO
    assert line.method == "/sagecp.v1.AdminService/GetStatus"
    assert (line.code, line.reason, line.rpc_id) == ("OK", "", "call-1")
    assert line.peer.startswith("ipv4:127.0.0.1:")
    assert 0 < line.duration_ms < 60_000
    caplog.clear()
    await failure_of(rig.inference.GetRequest(pb.GetRequestRequest(request_id="nobody")))
    await until(lambda: len(access_lines(caplog)) == 1)
    (line,) = access_lines(caplog)
    assert (line.code, line.reason, line.levelno) == ("NOT_FOUND", "REQUEST_NOT_FOUND", logging.INFO)


async def test_a_stream_is_logged_at_its_end_with_how_it_ended(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await rig.add_engine()
    caplog.clear()
    finished = rig.generate("r1")
    (await engine.next_call()).answer("x")
    await remaining(finished)
    failed = rig.generate("r2")
    (await engine.next_call()).fail(EngineFailedError("broken", 500))
    call = await engine.next_call()
    call.send("x")
    call.fail(EngineFailedError("broken", 500))
    await failure_of(failed)
    left = rig.generate("r3")
    await next_event(left, "opened")
    left.cancel()
    await until(lambda: len(access_lines(caplog)) == 3)
    assert [(line.code, line.reason) for line in access_lines(caplog)] == [
        ("OK", ""),
        ("UNAVAILABLE", "ENGINE_FAILED"),
        ("CANCELLED", ""),
    ]


async def test_a_defect_of_ours_is_an_error_in_the_log(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.manager, "get_status", lambda: 1 / 0)
    await failure_of(rig.admin.GetStatus(STATUS))
    await until(lambda: len(access_lines(caplog)) == 1)
    (line,) = access_lines(caplog)
    assert (line.code, line.levelno) == ("INTERNAL", logging.ERROR)


@pytest.fixture
def log_file() -> Iterator[io.StringIO]:
    """Everything that the process would write, in the form that a server writes it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_no_content_reaches_a_log(log_file: io.StringIO) -> None:
    async with running_rig() as rig:
        engine = await rig.add_engine()
        spec = request_spec(
            "r",
            f"prompt {CANARY}",
            sampling=request_pb2.SamplingParameters(stop=[CANARY], bad_words=[CANARY]),
            labels={"k": CANARY},
            user_id=CANARY,
        )
        generate = rig.inference.Generate(pb.GenerateRequest(spec=spec))
        call = await engine.next_call()
        call.send(f"answer {CANARY}")
        call.finish()
        await remaining(generate)
        # Refused, failed, cut off, crashed: all the ways in which text could slip into a message.
        spec.sampling.temperature = 99.0
        spec.request_id = f"no id {CANARY}"
        await failure_of(rig.inference.Submit(pb.SubmitRequest(spec=spec)))
        body = request_pb2.OpenAiBody(
            api=request_pb2.OPEN_AI_API_COMPLETIONS, json=f'{{"prompt": "{CANARY}'.encode()
        )
        await failure_of(rig.generate(prompt=request_pb2.Prompt(openai=body)))
        chat = request_pb2.ChatPrompt(messages=[request_pb2.ChatMessage(role="user", text=CANARY)])
        lost = rig.generate("lost", prompt=request_pb2.Prompt(chat=chat))
        (await engine.next_call()).fail(EngineFailedError("broken", 500))
        call = await engine.next_call()
        call.send(CANARY)
        call.fail(RuntimeError("a defect"))
        await failure_of(lost)
        left = rig.generate("left", CANARY)
        await next_event(left, "opened")
        left.cancel()
        await (await engine.next_call()).wait_ended()
        await failure_of(rig.generate(model=f"model {CANARY}"))
        await rig.admin.GetStatus(STATUS, metadata=(("authorization", f"Bearer {CANARY}"), ("x-y", CANARY)))
    text = log_file.getvalue()
    assert CANARY not in text
    lines = [json.loads(line) for line in text.splitlines()]
    # It was not silence that kept the secret.
    assert {"call", "instance changed", "attempt crashed"} <= {line["event"] for line in lines}
    assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)


async def test_calls_are_counted_and_timed(rig: Rig) -> None:
    def sample(name: str, **labels: str) -> float | None:
        return sample_of("".join(rig.server.exporter.calls.pieces()), name, **labels)

    engine = await rig.add_engine()
    generate = rig.generate("r")
    await next_event(generate, "opened")
    method = "sagecp.v1.InferenceService/Generate"
    assert sample("sagecp_rpc_open", method=method) == 1.0
    assert sample("sagecp_rpc_handled_total", method=method, code="OK") is None
    (await engine.next_call()).answer("x")
    await remaining(generate)
    await until(lambda: sample("sagecp_rpc_open", method=method) == 0.0)
    assert sample("sagecp_rpc_handled_total", method=method, code="OK") == 1.0
    assert sample("sagecp_rpc_duration_seconds_count", method=method) == 1.0
    await failure_of(rig.inference.GetRequest(pb.GetRequestRequest(request_id="nobody")))
    await until(
        lambda: (
            sample(
                "sagecp_rpc_handled_total", method="sagecp.v1.InferenceService/GetRequest", code="NOT_FOUND"
            )
            == 1.0
        )
    )


async def test_invented_methods_make_no_series(rig: Rig) -> None:
    for number in range(20):
        call = untyped(rig.channel).unary_unary(f"/sagecp.v1.InferenceService/Invented{number}")
        error = await failure_of(call(b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "Invented" not in "".join(rig.server.exporter.calls.pieces())


GET_STATUS = "sagecp.v1.AdminService/GetStatus"


async def test_prometheus_can_read_them_over_http() -> None:
    async with running_rig(metrics_listen="127.0.0.1:0") as rig:
        await rig.admin.GetStatus(STATUS)
        url = f"http://127.0.0.1:{rig.server.metrics_port}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=5) as response:
                text: str = response.read().decode()
                return text

        text = await asyncio.to_thread(read)
        assert sample_of(text, "sagecp_rpc_handled_total", code="OK", method=GET_STATUS) == 1.0
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(read)
