"""Bounds: what is beyond one is refused, and everything else goes on."""

from __future__ import annotations

import asyncio
import collections
import logging

import grpc
import pytest

from sagecp.config import RuntimeConfig, ServerConfig
from sagecp.core.config import SchedulerConfig
from sagecp.rpc.server import channel_options
from sagecp.v1 import admin_service_pb2, inference_service_pb2, request_pb2
from tests.support.metrics_text import sample_of
from tests.support.rpc_rig import (
    Rig,
    failure_of,
    next_event,
    read_all,
    reason_of,
    remaining,
    request_spec,
    running_rig,
)
from tests.support.waiting import other_tasks, until

Code = grpc.StatusCode
pb = inference_service_pb2
STATUS = admin_service_pb2.GetStatusRequest()


async def test_a_message_beyond_the_limit_is_refused_and_the_connection_lives(rig: Rig) -> None:
    await rig.add_engine()
    running = rig.generate("running")
    await next_event(running, "opened")
    error = await failure_of(
        rig.inference.Submit(pb.SubmitRequest(spec=request_spec("big", "x" * (4 << 20))))
    )
    assert error.code() is Code.RESOURCE_EXHAUSTED
    # The same channel, and the stream that shares its connection.
    assert (await rig.admin.GetStatus(STATUS)).accepting
    (await rig.fleet["e1"].next_call()).answer("x")
    await remaining(running)
    assert await running.code() is Code.OK


async def test_a_message_just_below_the_limit_is_taken(rig: Rig) -> None:
    engine = await rig.add_engine()
    text = "x" * ((4 << 20) - 1000)
    await rig.submit("big", text)
    assert len((await engine.next_call()).body["prompt"]) == len(text)


async def test_a_smaller_limit_can_be_set() -> None:
    async with running_rig(max_message_bytes=10_000) as rig:
        await rig.add_engine()
        error = await failure_of(
            rig.inference.Submit(pb.SubmitRequest(spec=request_spec("big", "x" * 10_000)))
        )
        assert error.code() is Code.RESOURCE_EXHAUSTED
        await rig.submit("small", "x" * 9_000)


async def test_metadata_beyond_the_limit_is_refused_and_the_connection_lives(rig: Rig) -> None:
    error = await failure_of(rig.admin.GetStatus(STATUS, metadata=(("x-large", "x" * 20_000),)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    await rig.admin.GetStatus(STATUS, metadata=(("x-fine", "x" * 7_000),))


async def test_calls_beyond_the_limit_are_refused_and_the_rest_goes_on() -> None:
    async with running_rig(max_concurrent_rpcs=5) as rig:
        engine = await rig.add_engine()
        streams = [rig.generate(f"r{number}") for number in range(5)]
        for stream in streams:
            await next_event(stream, "opened")
        error = await failure_of(rig.admin.GetStatus(STATUS))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        for _ in streams:
            (await engine.next_call()).answer("x")
        for stream in streams:
            assert (await remaining(stream))[-1].HasField("terminal")
        assert (await rig.admin.GetStatus(STATUS)).accepting


async def test_connections_beyond_the_limit_are_refused_and_the_rest_goes_on() -> None:
    async with running_rig(max_connections=2) as rig:
        await rig.admin.GetStatus(STATUS)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(rig.server.address, options=options) for _ in range(4)]
        outcomes = await asyncio.gather(
            *(
                Rig(rig.server, rig.manager, rig.fleet, one).admin.GetStatus(STATUS, timeout=2)
                for one in channels
            ),
            return_exceptions=True,
        )
        answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(answered) <= 2
        assert (await rig.admin.GetStatus(STATUS)).accepting
        await asyncio.gather(*(one.close() for one in channels))


async def test_prompts_that_wait_are_bounded_in_bytes() -> None:
    async with running_rig(scheduler=SchedulerConfig(max_queued_bytes=10_000)) as rig:
        await rig.add_engine(limit=1)
        await rig.submit("running")
        await rig.submit("waiting", "x" * 8_000)
        error = await failure_of(
            rig.inference.Submit(pb.SubmitRequest(spec=request_spec("more", "x" * 2_000)))
        )
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert reason_of(error) == "QUEUE_FULL"
        assert "bytes" in (error.details() or "")


async def test_a_burst_of_calls_is_answered_to_the_last_one(rig: Rig) -> None:
    engine = await rig.add_engine()
    engine.automatic = lambda call: call.answer("x")

    async def one() -> str:
        try:
            return (await read_all(rig.generate(timeout=60))).text
        except AssertionError:
            return "cut"

    # On one connection, twice as many as it carries at once: the rest waits, nothing is refused.
    outcomes = collections.Counter(await asyncio.gather(*(one() for _ in range(2_000))))
    assert outcomes == {"x": 2_000}


async def test_a_burst_of_streams_leaves_nothing_behind() -> None:
    async with running_rig(runtime=RuntimeConfig(retained_request_count=5)) as rig:
        engine = await rig.add_engine(limit=1_000)
        await remaining_of_one(rig)
        before = len(other_tasks())
        streams = [rig.generate(f"r{number}") for number in range(500)]
        await asyncio.gather(*(next_event(stream, "opened") for stream in streams))
        calls = [await engine.next_call() for _ in streams]
        # A third ends well, a third is left by its reader, a third is left before anything came.
        for number, call in enumerate(calls):
            if number % 3 == 0:
                call.answer("a", "b")
            elif number % 3 == 1:
                call.send("a")
        for number, call in enumerate(calls):
            stream = streams[int(call.request_id.removeprefix("r"))]
            if number % 3 == 0:
                await remaining(stream)
            else:
                stream.cancel()
        await asyncio.gather(*(call.wait_ended() for call in calls))
        assert sum(call.cancelled for call in calls) == 333
        streams.clear()
        await until(lambda: rig.manager.scheduler.live_count == 0, "no request lives")
        await until(lambda: len(other_tasks()) <= before, "no task is left")
        handles = list(rig.manager.requests.newest_first())
        assert len(handles) == 5
        assert all(not handle.output._waiters for handle in handles)
        assert all(handle.output.reader_count == 0 for handle in handles)
        assert all(handle.task is None for handle in handles)
        assert len(rig.manager.scheduler.queue) == 0
        assert rig.manager.coordinator.get_metrics().running_count == 0
        assert rig.manager.instance("e1").in_flight_count == 0
        assert rig.manager.instance("e1").reserved_token_count == 0
        assert (
            sample_of(
                "".join(rig.server.exporter.calls.pieces()),
                "sagecp_rpc_open",
                method="sagecp.v1.InferenceService/Generate",
            )
            == 0
        )


async def remaining_of_one(rig: Rig) -> None:
    """Run one request, so that what grpc makes once exists."""
    engine = rig.fleet["e1"]
    stream = rig.generate("warm-up")
    (await engine.next_call()).answer("x")
    await remaining(stream)


async def test_readers_that_vanish_while_much_is_written_cause_no_error(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = await rig.add_engine()
    for number in range(40):
        async with grpc.aio.insecure_channel(
            rig.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            generate = Rig(rig.server, rig.manager, rig.fleet, channel).generate(f"r{number}")
            await next_event(generate, "opened")
            call = await engine.next_call()
            call.send(*["x" * 20_000] * 20)
            if number % 2:
                await next_event(generate, "chunk")
            if number % 4 < 2:
                generate.cancel()
        call.send(*["x" * 20_000] * 20)
        await call.wait_ended()
        assert call.cancelled
    await until(lambda: rig.manager.scheduler.live_count == 0)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_reader_that_never_reads_holds_up_nobody(rig: Rig) -> None:
    engine = await rig.add_engine()
    lazy = rig.generate("lazy")
    await next_event(lazy, "opened")
    call = await engine.next_call()
    for _ in range(200):
        call.send("x" * 20_000)
    call.finish()
    await until(lambda: rig.manager.scheduler.live_count == 0)
    assert await rig.state_of("lazy") == "SUCCEEDED"
    other = rig.generate("other")
    (await engine.next_call()).answer("y")
    assert "".join(message.chunk.text for message in await remaining(other)) == "y"
    text = "".join(message.chunk.text for message in await remaining(lazy))
    assert len(text) == 200 * 20_000


def test_the_options_that_were_measured_are_set() -> None:
    options = dict(channel_options(ServerConfig(max_connections=7, max_message_bytes=8 << 20)))
    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.server_handshake_timeout_ms"] == 5_000
    assert options["grpc.http2.ping_timeout_ms"] == 5_000
    assert options["grpc.server.max_pending_requests"] == 20_000
    assert options["grpc.max_metadata_size"] == 8 << 10
    assert options["grpc.max_concurrent_streams"] == 1_000
    assert options["grpc.max_allowed_incoming_connections"] == 7
    assert options["grpc.max_receive_message_length"] == 8 << 20


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(config: ServerConfig) -> list[tuple[str, int]]:
        options = dict(channel_options(config))
        assert "grpc.server_handshake_timeout_ms" in options
        return list({**options, "grpc.server_handshake_timeout_ms": 300}.items())

    monkeypatch.setattr("sagecp.rpc.server.channel_options", hurried)
    async with running_rig() as rig:
        host, port = rig.server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # The server speaks first (SETTINGS), hears nothing, and hangs up.
        await asyncio.wait_for(reader.read(), 4)
        writer.close()


async def test_many_labels_and_long_lists_are_cheap_to_refuse(rig: Rig) -> None:
    spec = request_pb2.RequestSpec(
        prompt=request_pb2.Prompt(text="x"),
        labels={f"k{number}": "v" * 100 for number in range(20_000)},
        sampling=request_pb2.SamplingParameters(stop=["x" * 2000] * 100),
    )
    loop = asyncio.get_running_loop()
    before_s = loop.time()
    error = await failure_of(rig.inference.Submit(pb.SubmitRequest(spec=spec)))
    assert error.code() is Code.INVALID_ARGUMENT
    assert loop.time() - before_s < 5.0
