"""`InferenceService` over the wire: what users see of their requests."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from sagecp.config import RuntimeConfig
from sagecp.core.config import SchedulerConfig
from sagecp.runtime.engines.base import (
    EngineDelta,
    EngineFailedError,
    EngineOutcome,
    EngineRejectedError,
    EngineStreamBrokenError,
    EngineTimeoutError,
)
from sagecp.v1 import error_pb2, inference_service_pb2, request_pb2
from tests.support.rpc_rig import (
    WAIT_S,
    Rig,
    detail_of,
    failure_of,
    fields_of,
    has_detail,
    next_event,
    read_all,
    reason_of,
    remaining,
    request_spec,
    running_rig,
)
from tests.support.scripted_client import unreachable
from tests.support.waiting import until

pb = inference_service_pb2
Code = grpc.StatusCode


def objectives(deadline_s: float) -> request_pb2.Objectives:
    deadline = Duration()
    deadline.FromNanoseconds(int(deadline_s * 1e9))
    return request_pb2.Objectives(end_to_end_deadline=deadline)


# -- streams --------------------------------------------------------------------------------


async def test_a_stream_opens_carries_output_and_ends_in_so_many_words(rig: Rig) -> None:
    engine = await rig.add_engine()
    generate = rig.generate("r", "say ab")
    opened = await next_event(generate, "opened")
    assert opened.request_id == "r"
    call = await engine.next_call()
    assert call.body["prompt"] == "say ab"
    call.send("a")
    chunk = await next_event(generate, "chunk")
    assert (chunk.first_token_index, chunk.token_count, chunk.text) == (0, 1, "a")
    assert list(chunk.token_ids) == [1000]
    assert (chunk.choice_index, chunk.epoch, chunk.finish_reason) == (0, 1, "")
    call.send("b")
    chunk = await next_event(generate, "chunk")
    assert (chunk.first_token_index, chunk.text) == (1, "b")
    call.finish("length")
    chunk = await next_event(generate, "chunk")
    assert (chunk.first_token_index, chunk.token_count, chunk.finish_reason) == (2, 0, "length")
    terminal = await next_event(generate, "terminal")
    assert terminal.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert terminal.finish_reason == "length"
    assert terminal.token_count == 2
    assert terminal.usage.completion_token_count == 2
    assert terminal.usage.prompt_token_count == 7
    assert terminal.instance_id == "e1"
    assert terminal.request.request_id == "r"
    assert terminal.request.HasField("end_time")
    assert not terminal.HasField("failure")
    assert await generate.read() is grpc.aio.EOF
    assert await generate.code() is Code.OK


async def test_what_is_waiting_travels_together(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    for text in "abcdefgh":
        call.send(text)
    output_so_far = rig.stream("r")
    await next_event(output_so_far, "opened")
    chunk = await next_event(output_so_far, "chunk")
    assert (chunk.first_token_index, chunk.token_count, chunk.text) == (0, 8, "abcdefgh")
    assert list(chunk.token_ids) == list(range(1000, 1008))
    call.send("i", "j")
    chunk = await next_event(output_so_far, "chunk")
    assert (chunk.first_token_index, chunk.token_count, chunk.text) == (8, 2, "ij")
    call.finish()
    await remaining(output_so_far)


async def test_a_coalescing_window_collects_tokens() -> None:
    async with running_rig(runtime=RuntimeConfig(token_coalescing_window_s=0.2)) as rig:
        engine = await rig.add_engine()
        generate = rig.generate("r")
        await next_event(generate, "opened")
        call = await engine.next_call()
        call.send("a")
        assert (await next_event(generate, "chunk")).text == "a"
        for text in "bcd":
            call.send(text)
            await asyncio.sleep(0)
        assert (await next_event(generate, "chunk")).text == "bcd"
        call.finish()
        await remaining(generate)


async def test_a_late_reader_of_a_long_output_gets_it_in_pieces(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    (await engine.next_call()).answer(*["x"] * 2000)
    output = await read_all(rig.stream("r"))
    assert output.text == "x" * 2000
    assert len(output.chunks) == 4
    assert max(chunk.token_count for chunk in output.chunks) == 512


async def test_choices_are_told_apart_and_indices_run_over_all(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r", sampling=request_pb2.SamplingParameters(n=2))
    call = await engine.next_call()
    assert call.body["n"] == 2
    call.send("a", "b")
    call.send("x", choice_index=1)
    call.send("c")
    call.send("y", choice_index=1)
    call.finish("stop")
    output = await read_all(rig.stream("r"))
    assert output.error is None
    assert [output.text_of(index) for index in (0, 1)] == ["abc", "xy"]
    assert [(chunk.first_token_index, chunk.choice_index) for chunk in output.chunks if chunk.text] == [
        (0, 0),
        (2, 1),
        (3, 0),
        (4, 1),
    ]
    assert [chunk.choice_index for chunk in output.chunks if chunk.finish_reason] == [0, 1]
    assert output.terminal.token_count == 5


async def test_events_of_the_engine_travel_along_when_asked_for(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r", include_openai_events=True)
    call = await engine.next_call()
    assert call.call.keep_raw
    call.send("a", raw=b'{"one": 1}')
    call.send("b", raw=b'{"two": 2}')
    call.finish()
    output = await read_all(rig.stream("r"))
    assert [event for chunk in output.chunks for event in chunk.openai_events] == [
        b'{"one": 1}',
        b'{"two": 2}',
    ]
    assert output.text == "ab"


async def test_large_events_are_spread_over_messages(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r", include_openai_events=True)
    call = await engine.next_call()
    for _ in range(100):
        call.send("a", raw=b"x" * 100_000)
    call.finish()
    # 10 MB in all: no message may pass what a client accepts by default.
    output = await read_all(rig.stream("r"))
    assert output.error is None
    assert output.terminal.token_count == 100
    assert sum(len(chunk.openai_events) for chunk in output.chunks) == 100


async def test_a_stop_string_is_named(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    call.send_deltas([EngineDelta(0, "a", [1], 1, "stop", "END")])
    call.complete(EngineOutcome(("stop",)))
    output = await read_all(rig.stream("r"))
    assert (output.chunks[0].finish_reason, output.chunks[0].stop_reason) == ("stop", "END")
    # The engine counted nothing, so we did; what it did not say is absent.
    assert output.terminal.usage.completion_token_count == 1
    assert not output.terminal.usage.HasField("prompt_token_count")


@pytest.mark.parametrize("index", range(6))
async def test_a_reader_resumes_at_any_token(rig: Rig, index: int) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    call.send("a", "b")
    call.send("c")
    half = rig.stream("r", from_token_index=min(index, 3))
    await next_event(half, "opened")
    call.send("d", "e")
    call.finish()
    messages = await remaining(half)
    texts = "".join(message.chunk.text for message in messages[:-1])
    assert texts == "abcde"[min(index, 3) :]
    output = await read_all(rig.stream("r", from_token_index=index))
    assert output.text == "abcde"[index:]
    assert output.terminal.token_count == 5


async def test_a_reader_ahead_of_the_stream_is_refused(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    (await engine.next_call()).send("a")
    error = await failure_of(rig.stream("r", from_token_index=2))
    assert error.code() is Code.OUT_OF_RANGE
    assert reason_of(error) == "TOKEN_INDEX_OUT_OF_RANGE"
    assert "at most 1" in (error.details() or "")


async def test_several_readers_see_the_same(rig: Rig) -> None:
    engine = await rig.add_engine()
    generate = rig.generate("r")
    await next_event(generate, "opened")
    others = [rig.stream("r") for _ in range(3)]
    for other in others:
        await next_event(other, "opened")
    call = await engine.next_call()
    for text in "abc":
        call.send(text)
        assert (await next_event(generate, "chunk")).text == text
    call.finish()
    for other in others:
        texts = [message.chunk.text for message in await remaining(other)]
        assert "".join(texts) == "abc"
    await remaining(generate)


async def test_only_so_many_read_one_request() -> None:
    async with running_rig(runtime=RuntimeConfig(max_streams_per_request=2)) as rig:
        await rig.add_engine()
        await rig.submit("r")
        readers = [rig.stream("r") for _ in range(2)]
        for reader in readers:
            await next_event(reader, "opened")
        error = await failure_of(rig.stream("r"))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert reason_of(error) == "TOO_MANY_STREAMS"
        readers[0].cancel()
        await until(lambda: rig.manager.requests.get("r").output.reader_count == 1)
        await next_event(rig.stream("r"), "opened")


async def test_a_request_outlives_the_retention_of_its_output_while_somebody_reads_it() -> None:
    async with running_rig(runtime=RuntimeConfig(retained_request_count=0)) as rig:
        engine = await rig.add_engine()
        generate = rig.generate("r")
        await next_event(generate, "opened")
        (await engine.next_call()).answer("a", "b")
        messages = await remaining(generate)
        assert messages[-1].terminal.state == request_pb2.REQUEST_STATE_SUCCEEDED
        assert "".join(message.chunk.text for message in messages[:-1]) == "ab"
        assert reason_of(await failure_of(rig.stream("r"))) == "REQUEST_NOT_FOUND"


# -- leaving ----------------------------------------------------------------------------------


async def test_leaving_generate_stops_the_engine_at_once(rig: Rig) -> None:
    engine = await rig.add_engine()
    generate = rig.generate("r")
    await next_event(generate, "opened")
    call = await engine.next_call()
    call.send("a")
    await next_event(generate, "chunk")
    generate.cancel()
    await call.wait_ended()
    assert call.cancelled
    assert await rig.state_of("r") == "CANCELLED"


async def test_leaving_a_waiting_request_takes_it_out_of_the_queue(rig: Rig) -> None:
    engine = await rig.add_engine(limit=1)
    await rig.submit("first")
    generate = rig.generate("second")
    await next_event(generate, "opened")
    generate.cancel()
    await until(lambda: len(rig.manager.scheduler.queue) == 0)
    assert len(engine.calls) == 1


async def test_a_client_that_vanishes_stops_the_engine(rig: Rig) -> None:
    engine = await rig.add_engine()
    async with grpc.aio.insecure_channel(
        rig.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = Rig(rig.server, rig.manager, rig.fleet, channel)
        generate = stub.generate("r")
        await next_event(generate, "opened")
        call = await engine.next_call()
    await call.wait_ended()
    assert call.cancelled


async def test_the_callers_deadline_stops_the_engine(rig: Rig) -> None:
    engine = await rig.add_engine()
    error = await failure_of(rig.generate("r", timeout=0.3))
    assert error.code() is Code.DEADLINE_EXCEEDED
    call = await engine.next_call()
    await call.wait_ended()
    assert call.cancelled
    assert await rig.state_of("r") == "CANCELLED"


async def test_a_detached_generate_goes_on(rig: Rig) -> None:
    engine = await rig.add_engine()
    generate = rig.generate("r", detach=True)
    await next_event(generate, "opened")
    call = await engine.next_call()
    generate.cancel()
    await until(lambda: rig.manager.requests.get("r").output.reader_count == 0)
    call.answer("a", "b")
    output = await read_all(rig.stream("r"))
    assert (output.text, output.error) == ("ab", None)


async def test_leaving_a_stream_changes_nothing_unless_asked_for(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    stream = rig.stream("r")
    await next_event(stream, "opened")
    stream.cancel()
    await until(lambda: rig.manager.requests.get("r").output.reader_count == 0)
    assert not call.ended.is_set()
    stream = rig.stream("r", cancel=True)
    await next_event(stream, "opened")
    stream.cancel()
    await call.wait_ended()
    assert call.cancelled


async def test_only_the_call_that_made_a_request_ends_it_by_leaving(rig: Rig) -> None:
    engine = await rig.add_engine()
    await rig.submit("r")
    call = await engine.next_call()
    repetition = rig.generate("r")
    await next_event(repetition, "opened")
    repetition.cancel()
    await until(lambda: rig.manager.requests.get("r").output.reader_count == 0)
    assert not call.ended.is_set()
    call.answer("x")
    assert (await read_all(rig.stream("r"))).text == "x"


# -- ends that are no success -------------------------------------------------------------------

FAILURES = {
    "rejected": (EngineRejectedError("too long", 400, "prompt"), Code.INVALID_ARGUMENT, "ENGINE_REJECTED"),
    "failed": (EngineFailedError("out of memory", 500), Code.UNAVAILABLE, "ENGINE_FAILED"),
    "silent": (EngineTimeoutError("silent for 60 s", "inter_token"), Code.UNAVAILABLE, "ENGINE_TIMEOUT"),
    "gone": (unreachable(), Code.UNAVAILABLE, "ENGINE_UNREACHABLE"),
    "cut off": (EngineStreamBrokenError("no finish reason"), Code.UNAVAILABLE, "ENGINE_FAILED"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failed_request_says_so_in_its_last_message_and_then_in_the_status(
    rig: Rig, name: str
) -> None:
    failure, code, reason = FAILURES[name]
    engine = await rig.add_engine()
    generate = rig.generate("r")
    call = await engine.next_call()
    call.send("a")
    call.fail(failure)
    output = await read_all(generate)
    assert output.text == "a"
    assert output.terminal.state == request_pb2.REQUEST_STATE_FAILED
    assert error_pb2.ErrorReason.Name(output.terminal.failure.reason) == f"ERROR_REASON_{reason}"
    assert output.terminal.failure.code == code.value[0]
    assert output.terminal.token_count == 1
    assert output.error is not None
    assert output.error.code() is code
    assert reason_of(output.error) == reason
    assert output.error.details() == output.terminal.failure.message
    # The failure of the request, not of the call: a retry of the call would tell the same.
    info = detail_of(output.error, error_details_pb2.ErrorInfo)
    assert info.metadata["scope"] == "request"
    # Whoever reads it later is told the same.
    again = await read_all(rig.stream("r"))
    assert again.terminal == output.terminal
    assert again.error is not None
    assert again.error.code() is code


async def test_a_cancelled_request_ends_its_streams(rig: Rig) -> None:
    engine = await rig.add_engine()
    stream = rig.generate("r")
    await next_event(stream, "opened")
    call = await engine.next_call()
    response = await rig.inference.CancelRequest(pb.CancelRequestRequest(request_id="r", cause="enough"))
    assert response.cancelled
    assert response.request.state == request_pb2.REQUEST_STATE_CANCELLED
    await call.wait_ended()
    terminal = await next_event(stream, "terminal")
    assert terminal.state == request_pb2.REQUEST_STATE_CANCELLED
    assert "enough" in terminal.failure.message
    error = await failure_of(stream)
    assert error.code() is Code.CANCELLED
    assert reason_of(error) == "REQUEST_CANCELLED"
    response = await rig.inference.CancelRequest(pb.CancelRequestRequest(request_id="r"))
    assert not response.cancelled
    assert response.request.state == request_pb2.REQUEST_STATE_CANCELLED


async def test_an_expired_request_ends_its_streams(rig: Rig) -> None:
    engine = await rig.add_engine()
    output = await read_all(rig.generate("r", objectives=objectives(0.05)))
    assert output.terminal.state == request_pb2.REQUEST_STATE_EXPIRED
    assert output.error is not None
    assert output.error.code() is Code.DEADLINE_EXCEEDED
    assert reason_of(output.error) == "DEADLINE_EXCEEDED"
    assert "deadline of 50 ms passed while it ran on e1" in (output.error.details() or "")
    await engine.calls[0].wait_ended()


# -- requests -------------------------------------------------------------------------------------


async def test_submit_runs_whether_or_not_anybody_reads(rig: Rig) -> None:
    engine = await rig.add_engine()
    request = await rig.submit(
        "r",
        user_id="u",
        session_id="s",
        labels={"k": "v"},
        priority=request_pb2.REQUEST_PRIORITY_HIGH,
        objectives=objectives(60),
    )
    assert request.state == request_pb2.REQUEST_STATE_DISPATCHED
    assert request.HasField("deadline_time")
    (await engine.next_call()).answer("a", "b")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    response = await rig.inference.GetRequest(pb.GetRequestRequest(request_id="r"))
    request = response.request
    assert request.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert (request.user_id, request.session_id, request.tenant_id) == ("u", "s", "default")
    assert dict(request.labels) == {"k": "v"}
    assert request.priority == request_pb2.REQUEST_PRIORITY_HIGH
    assert (request.model, request.instance_id, request.finish_reason) == ("tiny", "e1", "stop")
    assert request.usage.completion_token_count == 2
    (attempt,) = request.attempts
    assert (attempt.epoch, attempt.instance_id) == (1, "e1")
    for name in ("create_time", "dispatch_time", "first_token_time", "end_time"):
        assert request.HasField(name)


async def test_a_server_made_id_names_the_request(rig: Rig) -> None:
    engine = await rig.add_engine()
    generate = rig.generate()
    opened = await next_event(generate, "opened")
    assert opened.request_id
    assert await rig.state_of(opened.request_id) == "DISPATCHED"
    (await engine.next_call()).answer("x")
    await remaining(generate)


async def test_repeating_a_request_is_not_a_second_one(rig: Rig) -> None:
    engine = await rig.add_engine()
    sampling = request_pb2.SamplingParameters(logit_bias={5: 1.0, 6: -1.0}, temperature=0.5)
    first = pb.SubmitRequest(spec=request_spec("r", "hello", sampling=sampling))
    assert (await rig.inference.Submit(first)).created
    assert not (await rig.inference.Submit(first)).created
    # Generate of the same is a reader of the same.
    generate = rig.generate("r", "hello", sampling=sampling)
    await next_event(generate, "opened")
    (await engine.next_call()).answer("x")
    await remaining(generate)
    assert not (await rig.inference.Submit(first)).created
    assert len(engine.calls) == 1
    error = await failure_of(rig.inference.Submit(pb.SubmitRequest(spec=request_spec("r", "other"))))
    assert error.code() is Code.ALREADY_EXISTS
    assert reason_of(error) == "REQUEST_ID_CONFLICT"


async def test_a_hundred_repetitions_at_once_are_one_request(rig: Rig) -> None:
    engine = await rig.add_engine()
    submit = pb.SubmitRequest(spec=request_spec("r", "hello"))
    responses = await asyncio.gather(*(rig.inference.Submit(submit) for _ in range(100)))
    assert sum(response.created for response in responses) == 1
    assert len(engine.calls) == 1


async def test_the_queue_is_visible(rig: Rig) -> None:
    await rig.add_engine(limit=1)
    for number in range(3):
        await rig.submit(f"r{number}")
    response = await rig.inference.GetRequest(pb.GetRequestRequest(request_id="r2"))
    assert response.request.state == request_pb2.REQUEST_STATE_QUEUED
    assert response.request.queue_position == 1
    assert not response.request.HasField("dispatch_time")


async def test_a_lost_attempt_is_shown_and_explained(rig: Rig) -> None:
    engines = {name: await rig.add_engine(name) for name in ("e1", "e2")}
    generate = rig.generate("r")
    await next_event(generate, "opened")
    first = rig.manager.requests.get("r").record.instance_id
    (await engines.pop(first).next_call()).fail(EngineFailedError("broken", 503))
    (second,) = engines
    (await engines[second].next_call()).answer("x")
    messages = await remaining(generate)
    assert messages[0].notice.failover.epoch == 2
    assert messages[0].notice.failover.failure.message == f"instance {first}: broken"
    assert messages[1].chunk.epoch == 2
    assert messages[-1].terminal.instance_id == second
    response = await rig.inference.ExplainRequest(pb.ExplainRequestRequest(request_id="r"))
    assert [(d.epoch, d.instance_id) for d in response.decisions] == [(1, first), (2, second)]
    decision = response.decisions[0]
    assert decision.request_id == "r"
    assert decision.scheduling_policy == "adaptive"
    assert decision.load_balancer == "predicted_latency"
    assert decision.candidate_count == 2
    assert decision.candidates[0].instance_id == first
    assert decision.reason
    assert decision.config_version == 1
    lost, won = response.request.attempts
    assert lost.failure.reason == error_pb2.ERROR_REASON_ENGINE_FAILED
    assert "broken" in lost.failure.message
    assert not won.HasField("failure")


async def test_lists_come_in_pages_the_newest_first(rig: Rig) -> None:
    engine = await rig.add_engine()
    engine.automatic = lambda call: call.answer("x")
    for number in range(7):
        await rig.submit(f"r{number}")
    found: list[str] = []
    token = ""
    pages = 0
    while True:
        response = await rig.inference.ListRequests(pb.ListRequestsRequest(page_size=3, page_token=token))
        found += [request.request_id for request in response.requests]
        pages += 1
        if pages == 1:
            # Arriving meanwhile: on no later page, and nothing is shown twice.
            await rig.submit("newer")
        token = response.next_page_token
        if not token:
            break
    assert pages == 3
    assert found == [f"r{number}" for number in reversed(range(7))]


async def test_lists_can_be_filtered(rig: Rig) -> None:
    one = await rig.add_engine("e1", model="one")
    two = await rig.add_engine("e2", model="two")
    one.automatic = lambda call: call.answer("x")
    await rig.submit("a", model="one", user_id="u1", session_id="s1")
    await rig.submit("b", model="two", user_id="u2")
    await rig.submit("c", model="two", user_id="u1")
    await until(lambda: rig.manager.scheduler.live_count == 2)
    assert len(two.calls) == 2

    async def listed(**filters: Any) -> list[str]:
        response = await rig.inference.ListRequests(pb.ListRequestsRequest(**filters))
        return [request.request_id for request in response.requests]

    assert await listed() == ["c", "b", "a"]
    assert await listed(model="two") == ["c", "b"]
    assert await listed(instance_id="e1") == ["a"]
    assert await listed(user_id="u1") == ["c", "a"]
    assert await listed(session_id="s1") == ["a"]
    assert await listed(states=[request_pb2.REQUEST_STATE_SUCCEEDED]) == ["a"]
    assert await listed(states=[request_pb2.REQUEST_STATE_UNSPECIFIED]) == ["c", "b", "a"]
    assert await listed(model="two", user_id="u1") == ["c"]
    assert await listed(model="three") == []


@pytest.mark.parametrize("token", ["x", "!!", "cg==", "aW5zdGFuY2U6YQ==", "cmVxdWVzdDp4eHg="])
async def test_a_page_token_of_somebody_else_is_refused(rig: Rig, token: str) -> None:
    error = await failure_of(
        rig.inference.ListRequests(
            pb.ListRequestsRequest(page_token=token, page_size=5000, states=[99])  # type: ignore[list-item]
        )
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"page_token", "page_size", "states"}


# -- refusals ---------------------------------------------------------------------------------------


async def test_an_unknown_model_is_told_what_exists(rig: Rig) -> None:
    await rig.add_engine("e1", model="one")
    await rig.add_engine("e2", model="two")
    for call in (
        rig.inference.Submit(pb.SubmitRequest(spec=request_spec(model="three"))),
        rig.generate(model="three"),
    ):
        error = await failure_of(call)
        assert error.code() is Code.NOT_FOUND
        assert reason_of(error) == "MODEL_NOT_FOUND"
        info = detail_of(error, error_details_pb2.ErrorInfo)
        assert dict(info.metadata) == {"model": "three", "available_models": "one,two"}
        assert "models served now: one, two" in (error.details() or "")
        assert not has_detail(error, error_details_pb2.RetryInfo)


async def test_every_bad_field_is_named_in_one_answer(rig: Rig) -> None:
    await rig.add_engine()
    spec = request_pb2.RequestSpec(
        request_id="no id",
        model="tiny",
        prompt=request_pb2.Prompt(text=""),
        sampling=request_pb2.SamplingParameters(max_tokens=0, temperature=-1.0, n=1000, top_p=7.0),
        priority=42,  # type: ignore[arg-type]
        cost_budget_usd=-1.0,
    )
    for call in (
        rig.inference.Submit(pb.SubmitRequest(spec=spec)),
        rig.inference.Generate(pb.GenerateRequest(spec=spec)),
    ):
        error = await failure_of(call)
        assert error.code() is Code.INVALID_ARGUMENT
        assert reason_of(error) == "INVALID_REQUEST"
        assert fields_of(error) == {
            "spec.request_id",
            "spec.prompt.text",
            "spec.sampling.max_tokens",
            "spec.sampling.temperature",
            "spec.sampling.n",
            "spec.sampling.top_p",
            "spec.priority",
            "spec.cost_budget_usd",
        }


async def test_an_absent_spec_is_an_empty_one(rig: Rig) -> None:
    error = await failure_of(rig.inference.Submit(pb.SubmitRequest()))
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"spec.prompt"}


async def test_an_opaque_body_that_is_not_json_is_refused_at_once(rig: Rig) -> None:
    engine = await rig.add_engine()
    body = request_pb2.OpenAiBody(api=request_pb2.OPEN_AI_API_COMPLETIONS, json=b"{broken")
    error = await failure_of(
        rig.inference.Submit(pb.SubmitRequest(spec=request_spec(prompt=request_pb2.Prompt(openai=body))))
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"spec.prompt.openai.json"}
    assert engine.calls == []


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with running_rig(scheduler=SchedulerConfig(max_queued_request_count=1)) as rig:
        await rig.add_engine(limit=1)
        await rig.submit("r1")
        await rig.submit("r2")
        error = await failure_of(rig.inference.Submit(pb.SubmitRequest(spec=request_spec("r3"))))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert reason_of(error) == "QUEUE_FULL"
        assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0


UNKNOWN = {
    "GetRequest": lambda rig, name: rig.inference.GetRequest(pb.GetRequestRequest(request_id=name)),
    "CancelRequest": lambda rig, name: rig.inference.CancelRequest(pb.CancelRequestRequest(request_id=name)),
    "ExplainRequest": lambda rig, name: rig.inference.ExplainRequest(
        pb.ExplainRequestRequest(request_id=name)
    ),
    "Stream": lambda rig, name: rig.stream(name),
}


@pytest.mark.parametrize("method", UNKNOWN)
async def test_a_request_that_nobody_knows(rig: Rig, method: str) -> None:
    error = await failure_of(UNKNOWN[method](rig, "nobody"))
    assert error.code() is Code.NOT_FOUND
    assert reason_of(error) == "REQUEST_NOT_FOUND"
    assert detail_of(error, error_details_pb2.ErrorInfo).metadata["request_id"] == "nobody"
    error = await failure_of(UNKNOWN[method](rig, ""))
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == {"request_id"}


async def test_sessions_come_later(rig: Rig) -> None:
    session = rig.inference.Session(timeout=WAIT_S)
    error = await failure_of(session)
    assert error.code() is Code.UNIMPLEMENTED
    assert reason_of(error) == "NOT_IMPLEMENTED"
    assert "use Submit, Stream and Generate" in (error.details() or "")


async def test_the_message_that_asked_is_not_held_while_its_stream_runs(rig: Rig) -> None:
    """Prompts may be large, and streams are many: the request's record has what it needs."""
    engine = await rig.add_engine()
    stream = rig.generate("r1")
    await next_event(stream, "opened")
    call = await engine.next_call()
    kind = inference_service_pb2.GenerateRequest
    held = [each for each in gc.get_objects() if isinstance(each, kind) and each.spec.request_id == "r1"]
    assert len(held) == 1, "the caller's own"
    call.finish()
    await remaining(stream)
