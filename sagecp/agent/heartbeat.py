"""The stream of heartbeats: beats of every engine of this agent out, acknowledgements in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Self

import grpc

from sagecp.agent.config import MAX_INTERVAL_S, MIN_INTERVAL_S
from sagecp.agent.errors import AgentError, ControlPlaneLostError, ForgottenError
from sagecp.agent.orders import Wishes
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.wire.engine import adapters_from_proto
from sagecp.wire.times import seconds_of

Stream = grpc.aio.StreamStreamCall[Any, Any]

# An acknowledgement is missed after this many intervals, and not before so many seconds:
# a connection may look alive to TCP, and to gRPC, with nobody behind it.
_ACKNOWLEDGE_INTERVALS = 3
_MIN_ACKNOWLEDGE_S = 5.0
_MAX_ABORT_COUNT = 1024


class HeartbeatStream:
    """One stream, shared by the engines of an agent; each has a lane of it.

    It lives from the first lane to the last one, and owns the task that reads.

    Args:
        call: The open call.
    """

    def __init__(self, call: Stream) -> None:
        self._call = call
        self._lanes: dict[str, HeartbeatLane] = {}
        # Beats are numbered on, should an instance take another lane of the same stream.
        self._sequences: dict[str, int] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read(), name="heartbeat acknowledgements")
        self._reader.add_done_callback(lambda _: self._ended())
        self._was_shared = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing comes in any more."""
        return self._reader.done()

    def enter(self, instance_id: str, lane: HeartbeatLane) -> None:
        """Take an instance's responses to its lane from now on."""
        self._lanes[instance_id] = lane

    async def leave(self, instance_id: str, lane: HeartbeatLane) -> None:
        """Close a lane, and the stream with the last one."""
        if self._lanes.get(instance_id) is lane:
            del self._lanes[instance_id]
        if not self._lanes:
            self._call.cancel()
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    @property
    def is_shared(self) -> bool:
        """Whether it has several lanes, or had when it ended."""
        return self._was_shared or len(self._lanes) > 1

    def next_sequence(self, instance_id: str) -> int:
        """Return the number of an instance's next beat."""
        self._sequences[instance_id] = self._sequences.get(instance_id, 0) + 1
        return self._sequences[instance_id]

    def raise_end(self) -> None:
        """Raise what ended the stream, if it has ended.

        Raises:
            grpc.aio.AioRpcError: The control plane ended it, for a reason.
            ControlPlaneLostError: It ended without one.
        """
        if self._reader.done():
            if self._reader.cancelled():
                raise ControlPlaneLostError("the heartbeat stream was closed")
            self._reader.result()

    async def write(self, beat: pb.HeartbeatRequest, timeout_s: float) -> None:
        """Send a beat of any engine.

        Raises:
            ControlPlaneLostError: It cannot be sent in time, or the stream has ended: see :meth:`raise_end`.
        """
        async with self._writing:
            write = asyncio.ensure_future(self._call.write(beat))
            try:
                # A call that ends does not always end its write.
                await asyncio.wait(
                    {write, self._reader}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if write.done() and not write.cancelled() and write.exception() is None:
                    return
                if not write.done() and not self._reader.done():
                    raise ControlPlaneLostError("the control plane takes no more heartbeats")
                # The call has ended; its reader knows how.
                await asyncio.wait({self._reader}, timeout=1.0)
                raise ControlPlaneLostError("the heartbeat stream ended")
            finally:
                write.cancel()
                await asyncio.gather(write, return_exceptions=True)

    async def finish(self, beat: pb.HeartbeatRequest, timeout_s: float) -> None:
        """Send the last beat and let the control plane end the stream. Best effort."""
        with contextlib.suppress(TimeoutError, asyncio.InvalidStateError, grpc.RpcError):
            async with asyncio.timeout(timeout_s), self._writing:
                await self._call.write(beat)
                await self._call.done_writing()
                await asyncio.wait({self._reader})

    async def _read(self) -> None:
        try:
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.HeartbeatResponse):
                    raise ControlPlaneLostError("the control plane ended the heartbeat stream")
                # A response that names no instance is of a control plane that knows one lane alone.
                lane = self._lanes.get(response.instance_id)
                if lane is None and not response.instance_id and len(self._lanes) == 1:
                    lane = next(iter(self._lanes.values()))
                if lane is not None:
                    lane.take(response)
        finally:
            # Not later: the first lane that sees the end leaves.
            self._was_shared = len(self._lanes) > 1

    def _ended(self) -> None:
        if not self._reader.cancelled():
            self._reader.exception()  # Taken note of, even if every lane is closed by now.
        for lane in self._lanes.values():
            lane.on_change()


class HeartbeatLane:
    """One engine's part of a stream. Use as an asynchronous context manager.

    Args:
        stream: The stream.
        instance_id: Of the engine.
        judge: Turns the failure of the call into what it means.
        on_change: Called when something came in that should not wait for the next
            beat: another interval, another state or set of adapters, requests to
            abort, the end.

    Attributes:
        acknowledged_sequence: Last beat that was acknowledged; 0: none was.
        asked_interval_s: What the control plane wants between beats; ``None``: nothing yet.
        desired_state: What it wants of the instance.
        wishes: The same for the engine; ``None``: nothing was said yet.
    """

    def __init__(
        self,
        stream: HeartbeatStream,
        instance_id: str,
        judge: Callable[[grpc.aio.AioRpcError], Exception],
        on_change: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._instance_id = instance_id
        self._judge = judge
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._sent_sequence = 0
        self._leaving = False
        self._abort_request_ids: list[str] = []
        self.on_change = on_change
        self.acknowledged_sequence = 0
        self.asked_interval_s: float | None = None
        self.desired_state = pb.DESIRED_STATE_UNSPECIFIED
        self.wishes: Wishes | None = None

    async def __aenter__(self) -> Self:
        self._stream.enter(self._instance_id, self)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.leave(self._instance_id, self)

    def next_sequence(self) -> int:
        """Return the number of the next beat."""
        return self._stream.next_sequence(self._instance_id)

    async def send(self, beat: pb.HeartbeatRequest, interval_s: float) -> None:
        """Send a beat.

        Raises:
            Exception: As :meth:`check`; also when the beat cannot be sent in time.
        """
        self.check(interval_s)
        self._sent_sequence = beat.sequence
        try:
            await self._stream.write(beat, acknowledge_limit_s(interval_s))
        except ControlPlaneLostError:
            self.check(interval_s)
            raise

    def check(self, interval_s: float) -> None:
        """Make sure that the stream is alive.

        Raises:
            AgentError: The agent must stop.
            ForgottenError: The instance must be registered again.
            ControlPlaneLostError: The stream ended, or acknowledgements stopped.
        """
        try:
            self._stream.raise_end()
        except grpc.aio.AioRpcError as error:
            meaning = self._judge(error)
            if isinstance(meaning, AgentError) and self._stream.is_shared:
                # One engine's trouble ended the stream of all: its registration tells which one's.
                raise ForgottenError(str(meaning)) from None
            raise meaning from None
        silence_s = self._loop.time() - self._heard_s
        if silence_s > acknowledge_limit_s(interval_s):
            raise ControlPlaneLostError(f"the control plane acknowledged no heartbeat for {silence_s:.1f} s")

    def silence_ends_s(self, interval_s: float) -> float:
        """Return when, on the loop's clock, silence will have lasted too long."""
        return self._heard_s + acknowledge_limit_s(interval_s)

    def take_abort_request_ids(self) -> list[str]:
        """Return the requests to abort that came in since the last call."""
        taken, self._abort_request_ids = self._abort_request_ids, []
        return taken

    async def say_goodbye(self, beat: pb.HeartbeatRequest, timeout_s: float) -> None:
        """Tell the control plane that this was the last beat. Best effort.

        A goodbye ends the stream, so that only the last lane says it. The others
        :meth:`settle`: a beat that came after the deregistration would end it, too.
        """
        if self._stream.is_shared:
            await self.settle(timeout_s)
        else:
            await self._stream.finish(beat, timeout_s)

    async def settle(self, timeout_s: float) -> None:
        """Wait until every beat that was sent is acknowledged. Best effort.

        What is said over another call afterwards is then not overtaken by a beat.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                acknowledged = asyncio.Event()
                self.on_change, self._leaving = acknowledged.set, True
                while self.acknowledged_sequence < self._sent_sequence and not self._stream.has_ended:
                    await acknowledged.wait()
                    acknowledged.clear()

    def take(self, response: pb.HeartbeatResponse) -> None:
        """Take what came in for this engine."""
        self._heard_s = self._loop.time()
        changed = not self.acknowledged_sequence or self._leaving
        self.acknowledged_sequence = max(self.acknowledged_sequence, response.acknowledged_sequence)
        wishes = _wishes_of(response)
        changed = changed or wishes != self.wishes
        self.desired_state, self.wishes = response.desired_state, wishes
        if response.HasField("next_interval"):
            asked_s = seconds_of(response.next_interval)
            clamped_s = clamp_interval_s(asked_s)
            changed = changed or clamped_s != self.asked_interval_s
            self.asked_interval_s = clamped_s
        if response.abort_request_ids:
            # Bounded: what does not fit is asked again, for it still runs.
            self._abort_request_ids = [*self._abort_request_ids, *response.abort_request_ids][
                :_MAX_ABORT_COUNT
            ]
            changed = True
        if changed:
            self.on_change()


def _wishes_of(response: pb.HeartbeatResponse) -> Wishes:
    asleep: bool | None = response.desired_state == pb.DESIRED_STATE_ASLEEP
    if response.desired_state == pb.DESIRED_STATE_DRAINED:
        # On the way to sleep, or asleep for longer than its drain is known over there.
        asleep = None
    return Wishes(
        asleep=asleep,
        sleep_level=2 if response.sleep_level == 2 else 1,
        adapters=adapters_from_proto(response.desired_lora_adapters)
        if response.HasField("desired_lora_adapters")
        else None,
    )


def clamp_interval_s(interval_s: float) -> float:
    """Return an interval as agents keep it."""
    return min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)


def acknowledge_limit_s(interval_s: float) -> float:
    """Return how long silence may last."""
    return max(_ACKNOWLEDGE_INTERVALS * interval_s, _MIN_ACKNOWLEDGE_S)
