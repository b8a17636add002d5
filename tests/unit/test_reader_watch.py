"""Which readers are detached, and when: looks at chosen times, no server."""

from __future__ import annotations

import asyncio

import pytest

from sagecp.core.errors import ReaderStalledError
from sagecp.rpc.reader_watch import Reader, ReaderWatch
from sagecp.v1 import inference_service_pb2 as pb


def message(size: int) -> pb.StreamResponse:
    return pb.StreamResponse(chunk=pb.TokenChunk(text="x" * size))


class Stream:
    """A task that writes to somebody who never reads."""

    def __init__(self, watch: ReaderWatch) -> None:
        self.reader: Reader | None = None
        self.task = asyncio.create_task(self._write(watch))

    async def _write(self, watch: ReaderWatch) -> None:
        with watch.reading() as self.reader:
            await asyncio.Event().wait()

    async def outcome(self) -> str:
        """Return how the task ended; it must have been told to already."""
        try:
            await asyncio.wait_for(self.task, 5)
        except ReaderStalledError as error:
            return f"{error.reason.name}: {error.message}"
        except asyncio.CancelledError:
            return "cancelled"
        return "went on"


async def streams(watch: ReaderWatch, *sizes: int) -> list[Stream]:
    opened = [Stream(watch) for _ in sizes]
    await asyncio.sleep(0)
    for stream, size in zip(opened, sizes, strict=True):
        assert stream.reader is not None
        stream.reader.message = message(size) if size else None
    return opened


async def test_only_who_takes_nothing_for_the_whole_timeout_is_detached() -> None:
    watch = ReaderWatch(10.0, 1 << 20)
    stalled, slow, idle = await streams(watch, 100, 100, 0)
    assert slow.reader is not None
    for now in range(10):
        watch.look(float(now))
        slow.reader.message = message(100)
    assert watch.detached_count == 0
    watch.look(10.0)
    assert (await stalled.outcome()).startswith("READER_STALLED: ")
    slow.reader.message = None
    watch.look(10_000.0)
    assert watch.detached_count == 1
    assert len(watch.readers) == 2
    for stream in (slow, idle):
        assert not stream.task.done()
        stream.task.cancel()
        assert await stream.outcome() == "cancelled"
    assert not watch.readers


async def test_a_reader_is_detached_once() -> None:
    watch = ReaderWatch(1.0, 1 << 20)
    (stalled,) = await streams(watch, 100)
    for now in (0.0, 1.0, 2.0, 3.0):
        watch.look(now)
    assert stalled.task.cancelling() == 1
    assert "nothing was read from it for 1 s" in await stalled.outcome()


async def test_beyond_the_total_the_longest_stalled_go_first_and_no_more_than_needed() -> None:
    watch = ReaderWatch(1000.0, 2_500)
    first = await streams(watch, 1000)
    watch.look(0.0)
    second = await streams(watch, 1000)
    watch.look(1.0)
    third = await streams(watch, 1000)
    watch.look(2.0)
    assert watch.detached_count == 0, "the third is not known to stall yet"
    watch.look(3.0)
    assert "more than 2500 bytes unread in all" in await first[0].outcome()
    assert watch.detached_count == 1
    for stream in (*second, *third):
        assert not stream.task.done()
        stream.task.cancel()
        assert await stream.outcome() == "cancelled"


async def test_a_caller_that_leaves_at_the_same_time_needs_no_answer() -> None:
    watch = ReaderWatch(1.0, 1 << 20)
    (stalled,) = await streams(watch, 100)
    watch.look(0.0)
    watch.look(1.0)
    stalled.task.cancel()
    assert await stalled.outcome() == "cancelled"


async def test_the_watch_looks_by_itself() -> None:
    watch = ReaderWatch(0.05, 1 << 20)
    watching = asyncio.create_task(watch.run())
    (stalled,) = await streams(watch, 100)
    assert "nothing was read" in await stalled.outcome()
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
