"""The sockets: batches of KV-cache events from an engine's publisher, and again what was missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from sagecp.agent.kv_events.address import KvEventsAddress
from sagecp.agent.kv_events.follower import EventFollower, Taken

_REPLAY_TIMEOUT_S = 2.0
# Batches that wait here while the agent does something else; those beyond are dropped, which leaves a gap.
_MAX_WAITING_BATCHES = 10_000
# Then others get their turn.
_BATCHES_PER_TURN = 32
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_SEQUENCE_BYTES = 8
_END_OF_REPLAY = -1


async def follow_events(
    address: KvEventsAddress, follower: EventFollower, logger: structlog.typing.FilteringBoundLogger
) -> None:
    """Follow a publisher until cancelled; connects again by itself.

    Args:
        address: Of the publisher.
        follower: Takes the batches.
        logger: Is told of troubles.

    Raises:
        zmq.ZMQError: There can be no such socket.
    """
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    try:
        subscriber.linger = 0
        subscriber.rcvhwm = _MAX_WAITING_BATCHES
        subscriber.subscribe(b"")
        monitor = subscriber.get_monitor_socket(_MONITORED)
        subscriber.connect(address.endpoint)
        await _Following(context, subscriber, address, follower, logger).run(monitor)
    finally:
        subscriber.disable_monitor()
        subscriber.close()
        context.destroy(linger=0)


class _Following:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        subscriber: zmq.asyncio.Socket,
        address: KvEventsAddress,
        follower: EventFollower,
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._context = context
        self._subscriber = subscriber
        self._address = address
        self._follower = follower
        self._logger = logger
        self._told_trouble = ""

    async def run(self, monitor: zmq.asyncio.Socket) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(self._subscriber, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            ready = dict(await poller.poll())
            if monitor in ready:
                event = (await recv_monitor_message(monitor))["event"]
                if event == zmq.EVENT_DISCONNECTED:
                    # The publisher's process ended, as a rule, and its engine's cache with it.
                    self._logger.info("the engine's KV-cache events broke off")
                    await self._discard_waiting()
                    self._follower.reset()
                else:
                    self._logger.info("following KV-cache events", endpoint=self._address.endpoint)
                    await self._replay(0)
            if self._subscriber in ready:
                await self._take_waiting()

    async def _discard_waiting(self) -> None:
        """Drop what an engine said that is gone."""
        with contextlib.suppress(zmq.Again):
            while True:
                await self._subscriber.recv_multipart(zmq.NOBLOCK)

    async def _take_waiting(self) -> None:
        for _ in range(_BATCHES_PER_TURN):
            try:
                frames = await self._subscriber.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            await self._take(frames)
        await asyncio.sleep(0)

    async def _take(self, frames: list[bytes]) -> None:
        # Topic, number, batch.
        if len(frames) != 3 or len(frames[1]) != _SEQUENCE_BYTES:
            self._tell("the engine's KV-cache events are in an unknown format", f"{len(frames)} frames")
            return
        sequence = int.from_bytes(frames[1], "big")
        if self._follower.take(sequence, frames[2]) is Taken.AFTER_A_GAP:
            first = self._follower.next_sequence or 0
            await self._replay(first)
            if self._follower.take(sequence, frames[2], skip_gap=True) is Taken.TAKEN:
                self._logger.warning(
                    "KV-cache events are missing",
                    first=first,
                    last=sequence - 1,
                    reason="what is cached is told anew",
                )
        if self._follower.trouble:
            self._tell("KV-cache events cannot be read", self._follower.trouble)

    def _tell(self, event: str, reason: str) -> None:
        if reason != self._told_trouble:
            self._logger.warning(event, reason=reason)
        self._told_trouble = reason

    async def _replay(self, first: int) -> None:
        """Take past batches from a number on, as far as the publisher still has them."""
        if not self._address.replay_endpoint:
            return
        with contextlib.suppress(TimeoutError):
            async for sequence, payload in self._past_batches(first):
                self._follower.take(sequence, payload, skip_gap=True)
            return
        self._tell("past KV-cache events cannot be had", f"{self._address.replay_endpoint} does not answer")

    async def _past_batches(self, first: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield numbered batches.

        Raises:
            TimeoutError: The publisher does not say anything.
        """
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.linger = 0
            # A publisher drops what does not fit.
            socket.rcvhwm = 0
            socket.connect(self._address.replay_endpoint)
            async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                await socket.send_multipart([b"", first.to_bytes(_SEQUENCE_BYTES, "big")])
            while True:
                async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                    frames = await socket.recv_multipart()
                # An empty one, and in later versions the topic, come before them.
                number, payload = frames[-2:] if len(frames) > 2 else (b"", b"")
                sequence = int.from_bytes(number, "big", signed=True)
                if sequence == _END_OF_REPLAY or len(number) != _SEQUENCE_BYTES:
                    return
                yield sequence, payload
        finally:
            socket.close()
