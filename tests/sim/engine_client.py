"""A plain HTTP client for tests of the simulated engine: raw bytes in, raw bytes out."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from sagecp.sim.engine_server import EngineServer

TIMEOUT_S = 20.0


@dataclass
class Answer:
    """One HTTP answer as it came."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False
    """Whether the body ended as its framing says."""

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """What the events of a stream carry."""
        return [
            line.removeprefix("data: ")
            for line in self.body.decode("utf-8", "replace").split("\n\n")
            if line.startswith("data: ")
        ]

    @property
    def values(self) -> list[dict[str, Any]]:
        """The JSON of a stream's events."""
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    @property
    def text(self) -> str:
        """The text of a stream with one choice."""
        choices = [choice for value in self.values for choice in value.get("choices", [])]
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)

    @property
    def token_ids(self) -> list[int]:
        choices = [choice for value in self.values for choice in value.get("choices", [])]
        return [token for choice in choices for token in choice.get("token_ids") or []]

    @property
    def finish_reason(self) -> str | None:
        reasons = [c["finish_reason"] for value in self.values for c in value.get("choices", [])]
        return next((reason for reason in reasons if reason is not None), None)


class Exchange:
    """A request whose answer is read piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.answer = Answer(0, {})

    async def head(self) -> None:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode().split("\r\n")[:-2]
        self.answer.status = int(first.split(" ")[1])
        self.answer.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    async def chunk(self) -> bytes | None:
        """Read the next chunk; None at the end of the body."""
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        data = await self.reader.readexactly(size + 2)
        if size == 0:
            self.answer.complete = True
            return None
        self.answer.chunks.append(data[:-2])
        return data[:-2]

    async def rest(self) -> Answer:
        """Read to the end, or to where the connection breaks."""
        try:
            if self.answer.headers.get("transfer-encoding") == "chunked":
                while await self.chunk() is not None:
                    pass
            else:
                size = int(self.answer.headers.get("content-length", "0"))
                self.answer.chunks.append(await self.reader.readexactly(size))
                self.answer.complete = True
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        self.close()
        return self.answer

    def close(self) -> None:
        self.writer.close()


async def open_exchange(
    port: int,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    raw_body: bytes | None = None,
) -> Exchange:
    """Send a request and read nothing yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    data = raw_body if raw_body is not None else b"" if body is None else json.dumps(body).encode()
    lines = {"Host": "engine", "Content-Length": str(len(data))}
    if data or raw_body is not None:
        lines["Content-Type"] = "application/json"
    lines.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    return Exchange(reader, writer)


async def send(port: int, path: str, body: Any = None, **options: Any) -> Answer:
    """Send a request and read the whole answer."""
    async with asyncio.timeout(TIMEOUT_S):
        exchange = await open_exchange(port, path, body, **options)
        try:
            await exchange.head()
        except (asyncio.IncompleteReadError, ConnectionError):
            exchange.close()
            return exchange.answer
        return await exchange.rest()


async def complete(server: EngineServer, **fields: Any) -> Answer:
    """Ask for a completion; greedy unless told otherwise."""
    return await send(server.port, "/v1/completions", completion(**fields))


def completion(**fields: Any) -> dict[str, Any]:
    """Make the body of a completion request."""
    return {"model": "tiny", "prompt": "Hello world", "max_tokens": 8, "temperature": 0, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    """Make the body of a chat request."""
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Let the loop turn until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.002)


def metric(scrape: bytes, name: str, **labels: str) -> float:
    """Return the value of one sample of a scrape."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(scrape.decode()):
        for sample in family.samples:
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                return sample.value
    raise AssertionError(f"no sample {name} {labels}")
