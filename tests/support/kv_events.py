"""KV-cache events as vLLM publishes them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

Key = int | bytes


def engine_keys(token_ids: Sequence[int], block_size: int) -> list[int]:
    """Hashes of the full blocks of a prompt, as an engine has them: chained, and none of ours."""
    keys, value = [], b""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        value = hashlib.sha256(value + array("i", token_ids[start : start + block_size]).tobytes()).digest()
        keys.append(int.from_bytes(value[:8], "big"))
    return keys


def stored(
    keys: Sequence[Key], parent: Key | None, token_ids: Sequence[int], block_size: int
) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(keys),
        "parent_block_hash": parent,
        "token_ids": list(token_ids),
        "block_size": block_size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(keys),
        "group_idx": 0,
    }


def removed(keys: Sequence[Key]) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(keys), "medium": "GPU", "group_idx": 0}


def cleared() -> dict[str, Any]:
    return {"type": "AllBlocksCleared"}


def payload_of(*events: Any, time_s: float = 1.0) -> bytes:
    return msgspec.msgpack.encode([time_s, list(events), 0])


class Publisher:
    """An engine's publisher: numbered batches, and a socket that tells past ones again.

    Attributes:
        batches: Every batch so far.
    """

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._sockets: list[zmq.asyncio.Socket] = []
        self._replies: asyncio.Task[None] | None = None
        self.batches: list[bytes] = []
        self.port = self.replay_port = 0

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def replay_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.replay_port}"

    async def start(self) -> None:
        """Listen, on the ports it had before, and count from the start."""
        self.batches = []
        self._socket, self.port = self._listen(zmq.XPUB, self.port)
        router, self.replay_port = self._listen(zmq.ROUTER, self.replay_port)
        self._replies = asyncio.create_task(self._reply(router))

    async def stop(self) -> None:
        """End, as the process of an engine does."""
        if self._replies is not None:
            self._replies.cancel()
            await asyncio.gather(self._replies, return_exceptions=True)
        for socket in self._sockets:
            socket.close(0)
        self._sockets = []

    async def close(self) -> None:
        await self.stop()
        self._context.destroy(0)

    async def wait_for_subscriber(self) -> None:
        async with asyncio.timeout(20):
            await self._socket.recv()

    async def publish(self, *events: Any, lose: bool = False, payload: bytes = b"") -> None:
        """Send a batch, or only note that it was meant to be sent."""
        self.batches.append(payload or payload_of(*events, time_s=time.time()))
        if not lose:
            number = (len(self.batches) - 1).to_bytes(8, "big")
            await self._socket.send_multipart([b"", number, self.batches[-1]])

    def _listen(self, kind: int, port: int) -> tuple[zmq.asyncio.Socket, int]:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        return socket, int(str(socket.get_string(zmq.LAST_ENDPOINT)).rsplit(":", 1)[1])

    async def _reply(self, router: zmq.asyncio.Socket) -> None:
        while True:
            client, _, first = await router.recv_multipart()
            for number, payload in enumerate(self.batches):
                if number >= int.from_bytes(first, "big"):
                    await router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await router.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])
