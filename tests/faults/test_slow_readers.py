"""Rows 28 and 29 of the fault matrix: readers that do not read lose their stream, nobody anything else."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from sagecp.client import RetryPolicy, SageClient
from sagecp.config import RuntimeConfig
from sagecp.rpc.reader_watch import ReaderWatch
from tests.support.processes import ROOT
from tests.support.rpc_rig import Rig, next_event, reason_of, remaining, running_rig
from tests.support.scripted_client import ScriptedCall
from tests.support.waiting import until

STALL_S = 0.4
# The smallest windows there are, and none that grow: the server's writes wait early.
SMALL_WINDOWS = (("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0))
HELD_LIMIT_BYTES = 64 << 10
PIECE = "x" * 20_000
PIECE_COUNT = 400
# More than the windows of a client without options take up.
LONG_PIECE_COUNT = 1_000


def runtime(**fields: Any) -> RuntimeConfig:
    return RuntimeConfig(**{"reader_stall_timeout_s": STALL_S, **fields})


def watch_of(rig: Rig) -> ReaderWatch:
    return rig.server._readers


async def flood(call: ScriptedCall, count: int = PIECE_COUNT) -> None:
    """Let an engine produce much, piece by piece, as engines do."""
    for _ in range(count):
        call.send(PIECE)
        await asyncio.sleep(0)


def held_bytes(rig: Rig) -> list[int]:
    """Return the size of every message that waits to be written."""
    return [reader.message.ByteSize() for reader in watch_of(rig).readers if reader.message is not None]


async def lost_stream(call: Any) -> grpc.aio.AioRpcError:
    """Read what there is of a stream, and return what it ended with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await remaining(call)
    return caught.value


async def test_row_28_a_reader_that_never_reads_is_detached_and_the_request_goes_on() -> None:
    async with running_rig(runtime=runtime(), channel_options=SMALL_WINDOWS) as rig:
        engine = await rig.add_engine()
        await rig.submit("lazy")
        lazy = rig.stream("lazy")
        await next_event(lazy, "opened")
        call = await engine.next_call()
        await flood(call)
        assert len(held_bytes(rig)) == 1
        assert max(held_bytes(rig)) <= HELD_LIMIT_BYTES
        other = rig.generate("other")
        (await engine.next_call()).answer("y")
        assert [message.WhichOneof("event") for message in await remaining(other)][-1] == "terminal"
        await until(lambda: watch_of(rig).detached_count == 1, "the reader is detached")
        await until(lambda: not watch_of(rig).readers, "its stream is gone here")
        assert await rig.state_of("lazy") == "RUNNING"
        call.send("the end")
        call.finish()
        error = await lost_stream(lazy)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(error) == "READER_STALLED"
        text = "".join(message.chunk.text for message in await remaining(rig.stream("lazy")))
        assert text == PIECE * PIECE_COUNT + "the end"


async def test_row_28_a_stalled_reader_of_generate_leaves_as_any_other_does() -> None:
    async with running_rig(runtime=runtime(), channel_options=SMALL_WINDOWS) as rig:
        engine = await rig.add_engine()
        left, kept = rig.generate("left"), rig.generate("kept", detach=True)
        calls = {}
        for _ in range(2):
            call = await engine.next_call()
            calls[call.request_id] = call
        for stream in (left, kept):
            await next_event(stream, "opened")
        for call in calls.values():
            await flood(call)
        await calls["left"].wait_ended()
        assert calls["left"].cancelled
        await until(lambda: watch_of(rig).detached_count == 2)
        assert await rig.state_of("left") == "CANCELLED"
        assert await rig.state_of("kept") == "RUNNING"
        calls["kept"].finish()
        for stream in (left, kept):
            assert reason_of(await lost_stream(stream)) == "READER_STALLED"


async def test_row_28_one_piece_of_many_small_ones_stays_small() -> None:
    """What a late reader finds comes in messages that are bounded each, events of the engine included."""
    async with running_rig(runtime=runtime()) as rig:
        engine = await rig.add_engine()
        await rig.submit("late", include_openai_events=True)
        call = await engine.next_call()
        for number in range(200):
            call.send("t" * 1000, raw=b'{"n":%d,"pad":"%s"}' % (number, b"p" * 2000))
        call.finish()
        await until(lambda: rig.manager.scheduler.live_count == 0)
        chunks = [m.chunk for m in await remaining(rig.stream("late")) if m.HasField("chunk")]
        assert sum(chunk.token_count for chunk in chunks) == 200
        assert max(chunk.ByteSize() for chunk in chunks) <= HELD_LIMIT_BYTES
        assert len(chunks) < 30


async def test_row_28_beyond_the_total_the_longest_stalled_are_detached_first() -> None:
    limit_bytes = 5 * (40 << 10)
    settings = runtime(reader_stall_timeout_s=8.0, max_unread_bytes=limit_bytes)
    async with running_rig(runtime=settings, channel_options=SMALL_WINDOWS) as rig:
        engine = await rig.add_engine(limit=64)
        for number in range(12):
            await rig.submit(f"r{number}")
            await flood(await engine.next_call(), 60)
        streams = []
        for number in range(12):
            # A connection each: one reader's unread bytes are no other's.
            channel = grpc.aio.insecure_channel(
                rig.server.address, options=[("grpc.use_local_subchannel_pool", 1), *SMALL_WINDOWS]
            )
            lone = Rig(rig.server, rig.manager, rig.fleet, channel)
            stream = lone.stream(f"r{number}")
            await next_event(stream, "opened")
            streams.append((channel, stream))
        await until(lambda: watch_of(rig).detached_count > 0, "some are detached")
        await until(lambda: sum(held_bytes(rig)) <= limit_bytes, "what waits is within the total")
        assert watch_of(rig).detached_count < 12, "no more than it takes"
        assert rig.manager.scheduler.live_count == 12, "no request is lost"
        for channel, _ in streams:
            await channel.close()
        for handle in rig.manager.requests.live():
            await rig.manager.cancel_request(handle.request_id)


@pytest.mark.parametrize("how", ["cancels", "closes"])
async def test_row_28_a_reader_that_leaves_while_a_write_waits_for_it_is_no_fault_of_ours(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_rig(runtime=runtime(reader_stall_timeout_s=60.0)) as rig:
        engine = await rig.add_engine()
        options = [("grpc.use_local_subchannel_pool", 1), *SMALL_WINDOWS]
        channel = grpc.aio.insecure_channel(rig.server.address, options=options)
        leaving = Rig(rig.server, rig.manager, rig.fleet, channel).generate("leaving")
        await next_event(leaving, "opened")
        call = await engine.next_call()
        await flood(call)
        assert len(held_bytes(rig)) == 1, "a write waits"
        if how == "cancels":
            leaving.cancel()
        await channel.close()
        await call.wait_ended()
        assert call.cancelled
        await until(lambda: not watch_of(rig).readers)
        assert await rig.state_of("leaving") == "CANCELLED"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_row_28_our_client_goes_on_where_its_reader_stopped() -> None:
    async with (
        running_rig(runtime=runtime()) as rig,
        SageClient(rig.server.address, retry=RetryPolicy(base_s=0.001, max_s=0.01)) as client,
    ):
        engine = await rig.add_engine()
        stream = client.generate("hello", request_id="pausing", model="tiny", detach=True)
        first = asyncio.ensure_future(anext(stream))
        call = await engine.next_call()
        await flood(call, LONG_PIECE_COUNT)
        call.finish()
        texts = [(await first).text]
        await until(lambda: watch_of(rig).detached_count == 1, "the reader is detached")
        texts += [chunk.text async for chunk in stream]
        assert "".join(texts) == PIECE * LONG_PIECE_COUNT
        assert stream.next_token_index == LONG_PIECE_COUNT


async def test_row_29_slow_streams_hold_little_and_all_end_well() -> None:
    """Many readers that take a message now and then; the whole number is `bench.slow_readers`'s."""
    stream_count = 300
    async with running_rig(runtime=runtime(reader_stall_timeout_s=30.0)) as rig:
        engine = await rig.add_engine(limit=stream_count)
        streams = [rig.generate(f"slow-{number}", timeout=60) for number in range(stream_count)]
        calls = [await engine.next_call() for _ in streams]
        for _ in range(50):
            for call in calls:
                call.send("token ")
            await asyncio.sleep(0)
        for call in calls:
            call.finish()
        counts = []
        for stream in streams:
            tokens = 0
            async for message in stream:
                tokens += message.chunk.token_count
                await asyncio.sleep(0)
            counts.append(tokens)
        assert counts == [50] * stream_count
        assert watch_of(rig).detached_count == 0
        assert not watch_of(rig).readers


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_row_29_ten_thousand_slow_streams(tmp_path: Path) -> None:
    """A server, two engines and the readers, each a process of its own."""
    count = 10_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count + 2_000:
        pytest.skip(
            f"each of {count} requests needs a connection to an engine, and files are limited to less"
        )
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.slow_readers", "--streams", str(count), "--seconds", "20"]
    # Slowly enough for a machine that has other things to do.
    command += ["--opened-per-s", "250", "--json", str(figures)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, stdout=subprocess.DEVNULL)
    samples = json.loads(figures.read_text())
    # A machine that has other things to do opens fewer in the time; each costs the same.
    open_count = max(sample["open_count"] for sample in samples)
    assert open_count >= 0.5 * count
    before_mib = samples[0]["resident_mib"]
    held_mib = max(sample["resident_mib"] for sample in samples) - before_mib
    assert before_mib + held_mib * count / max(open_count, 1) <= 512.0
