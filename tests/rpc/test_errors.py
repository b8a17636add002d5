"""What goes wrong, as it arrives: codes and details that survive the trailers, and nothing of our insides."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from sagecp.v1 import admin_service_pb2, inference_service_pb2, request_pb2
from tests.support.rpc_rig import (
    Rig,
    detail_of,
    failure_of,
    fields_of,
    reason_of,
    remaining,
    request_spec,
    status_of,
    untyped,
)

Code = grpc.StatusCode
pb = inference_service_pb2


async def test_an_error_names_the_call_so_that_an_operator_can_find_it(rig: Rig) -> None:
    call = rig.inference.GetRequest(
        pb.GetRequestRequest(request_id="nobody"), metadata=(("x-request-id", "user-chose-this"),)
    )
    error = await failure_of(call)
    assert detail_of(error, error_details_pb2.RequestInfo).request_id == "user-chose-this"
    assert ("x-request-id", "user-chose-this") in tuple(error.trailing_metadata())
    error = await failure_of(rig.inference.GetRequest(pb.GetRequestRequest(request_id="nobody")))
    made = detail_of(error, error_details_pb2.RequestInfo).request_id
    assert len(made) == 16


async def test_the_calls_id_comes_back_on_success_too(rig: Rig) -> None:
    call = rig.admin.GetStatus(admin_service_pb2.GetStatusRequest(), metadata=(("x-request-id", "abc"),))
    await call
    assert ("x-request-id", "abc") in tuple(await call.trailing_metadata())
    await rig.add_engine()
    rig.fleet["e1"].automatic = lambda call: call.answer("x")
    generate = rig.generate()
    await remaining(generate)
    assert dict(await generate.trailing_metadata())["x-request-id"]


@pytest.mark.parametrize("sent", ["", "x" * 4000], ids=["empty", "long"])
async def test_a_useless_id_is_replaced_or_cut(rig: Rig, sent: str) -> None:
    call = rig.admin.GetStatus(admin_service_pb2.GetStatusRequest(), metadata=(("x-request-id", sent),))
    await call
    returned = dict(await call.trailing_metadata())["x-request-id"]
    assert 1 <= len(returned) <= 128


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, "é" * 5000, "模型" * 2500, "100% " * 1000, "a\r\nb\x00" * 500],
    ids=["ascii", "accents", "ideographs", "percent signs", "control characters"],
)
async def test_whatever_a_user_writes_the_right_error_arrives(rig: Rig, text: str) -> None:
    # The wrong one would be RESOURCE_EXHAUSTED, from a client that refuses the trailers.
    await rig.add_engine()
    error = await failure_of(rig.generate(model=text))
    assert (error.code(), reason_of(error)) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    error = await failure_of(
        rig.generate(text, labels={f"{number}{text}": text for number in range(100)}, user_id=text)
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert "spec.request_id" in fields_of(error)
    error = await failure_of(rig.inference.GetRequest(pb.GetRequestRequest(request_id=text)))
    assert (error.code(), reason_of(error)) == (Code.NOT_FOUND, "REQUEST_NOT_FOUND")


async def test_more_bad_fields_than_fit_are_counted(rig: Rig) -> None:
    labels = {f"{'k' * 64}{number}": "" for number in range(1000)}
    error = await failure_of(rig.generate(labels=labels))
    violations = detail_of(error, error_details_pb2.BadRequest).field_violations
    assert len(violations) > 10
    rest = 1001 - (len(violations) - 1)  # 1,000 keys, and that there are so many.
    assert violations[-1].description == f"and {rest} more bad fields"


def raw_call(rig: Rig, method: str, data: bytes) -> Any:
    """Send bytes as they are."""
    return untyped(rig.channel).unary_unary(f"/sagecp.v1.{method}")(data)


UNARY = ["InferenceService/Submit", "FleetService/RegisterInstance", "AdminService/GetMetrics"]


@pytest.mark.parametrize("method", UNARY)
async def test_bytes_that_are_no_message(rig: Rig, method: str, caplog: pytest.LogCaptureFixture) -> None:
    error = await failure_of(raw_call(rig, method, b"\xff\xff\xff\xff"))
    assert error.code() is Code.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_REQUEST"
    assert "Traceback" not in caplog.text


async def test_bytes_that_are_no_message_on_streams(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    generate = untyped(rig.channel).unary_stream("/sagecp.v1.InferenceService/Generate")
    error = await failure_of(generate(b"\xff\xff\xff"))
    assert error.code() is Code.INVALID_ARGUMENT
    beats = untyped(rig.channel).stream_stream("/sagecp.v1.FleetService/Heartbeat")()
    await beats.write(b"\xff\xff\xff")
    error = await failure_of(beats)
    assert error.code() is Code.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text


async def test_text_that_is_not_utf_8(rig: Rig) -> None:
    # SubmitRequest.spec.request_id = b"\xff", which no correct client can send.
    error = await failure_of(raw_call(rig, "InferenceService/Submit", b"\n\x03\n\x01\xff"))
    assert error.code() is Code.INVALID_ARGUMENT


async def test_a_method_that_does_not_exist(rig: Rig) -> None:
    error = await failure_of(raw_call(rig, "InferenceService/Nothing", b""))
    assert error.code() is Code.UNIMPLEMENTED


async def break_manager(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        secret = "canary-in-a-local-variable"
        raise KeyError(secret)

    monkeypatch.setattr(rig.manager, "status_of", broken)
    monkeypatch.setattr(rig.manager, "get_status", broken)
    monkeypatch.setattr(rig.manager, "accept", broken)


async def test_a_defect_shows_nothing_of_our_insides(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await break_manager(rig, monkeypatch)
    submit = pb.SubmitRequest(spec=request_spec(text="prompt-canary"))
    for start in (
        lambda: rig.admin.GetStatus(admin_service_pb2.GetStatusRequest()),
        lambda: rig.inference.Submit(submit),
        lambda: rig.generate(text="prompt-canary"),
    ):
        caplog.clear()
        error = await failure_of(start())
        assert error.code() is Code.INTERNAL
        assert reason_of(error) == "INTERNAL"
        shown = f"{error.details()} {status_of(error)} {error.debug_error_string()}"
        for inside in ("canary", "KeyError", "Traceback", ".py", "broken"):
            assert inside not in shown
        # The log has it, under the id that the user was given.
        rpc_id = detail_of(error, error_details_pb2.RequestInfo).request_id
        assert rpc_id in (error.details() or "")
        (record,) = [record for record in caplog.records if record.message == "call crashed"]
        assert record.rpc_id == rpc_id  # type: ignore[attr-defined]
        assert "KeyError" in caplog.text
        assert "prompt-canary" not in caplog.text
    monkeypatch.undo()
    assert (await rig.admin.GetStatus(admin_service_pb2.GetStatusRequest())).accepting


async def test_a_defect_in_the_middle_of_a_stream_ends_it_and_frees_the_engine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await rig.add_engine()
    generate = rig.generate("r")
    call = await engine.next_call()

    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr("sagecp.rpc.servicers.relay.fill_chunk", broken)
    call.send("x")
    error = await failure_of(generate)
    assert error.code() is Code.INTERNAL
    await call.wait_ended()
    assert call.cancelled


async def test_an_engines_words_reach_the_user_whole(rig: Rig) -> None:
    from sagecp.runtime.engines.base import EngineRejectedError

    engine = await rig.add_engine()
    engine.automatic = lambda call: call.fail(
        EngineRejectedError("This model's maximum context length is 10 tokens.", 400, "prompt")
    )
    error = await failure_of(rig.generate(sampling=request_pb2.SamplingParameters(max_tokens=5)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert "maximum context length is 10 tokens" in (error.details() or "")
    assert "parameter prompt" in (error.details() or "")
