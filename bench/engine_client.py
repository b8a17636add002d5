"""CPU per token of reading an engine's streams.

    python -m bench.engine_client [--rounds 5] [--streams 64] [--tokens 128]

Compares, interleaved within one run, this project's client, aiohttp with the
cheapest way of reading a stream that it offers, and a protocol that throws
every byte away (the floor: what the event loop and the system calls cost). The
server is a process of its own, writes one chunk for each token as vLLM does,
and either as fast as it can or with 20 ms between a stream's tokens, every
stream in its own phase. CPU time is the measuring process's own, with
everything in it: connections, requests, and the waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import aiohttp
import msgspec
import uvloop

from bench.processes import machine, print_table, write_json
from sagecp.runtime.engines.base import EngineApi, EngineCall, EngineDelta, EngineEndpoint, EngineTimeouts
from sagecp.runtime.engines.vllm import VllmEngineClient

_TIMEOUTS = EngineTimeouts()
_RESPONSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 21:31:39 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _frame(payload: str) -> bytes:
    event = f"data: {payload}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _token_frame(index: int, finish_reason: str) -> bytes:
    return _frame(
        '{"id":"cmpl-8aa8138fd4b6a4ea","object":"text_completion","created":1795469499,"model":"tiny",'
        f'"choices":[{{"index":0,"text":" w{index}","logprobs":null,"finish_reason":{finish_reason},'
        f'"stop_reason":null,"prompt_token_ids":null,"token_ids":[{1000 + index}]}}]}}'
    )


_LAST_FRAMES = (
    _frame(
        '{"id":"cmpl-8aa8138fd4b6a4ea","object":"text_completion","created":1795469499,"model":"tiny",'
        '"choices":[],"usage":{"prompt_tokens":3,"total_tokens":131,"completion_tokens":128}}'
    )
    + _frame("[DONE]")
    + b"0\r\n\r\n"
)


class _Server(asyncio.Protocol):
    """Streams tokens to whoever posts; the path says how many and how fast: /TOKENS/GAP_MS/..."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._received = b""
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._received = b""
        _, token_count, gap_ms, *_ = head.split(b" ", 2)[1].decode().split("/")
        self._frames = [
            _token_frame(index, '"length"' if index == int(token_count) - 1 else "null")
            for index in range(int(token_count))
        ]
        self._gap_s = int(gap_ms) / 1000
        self._transport.write(_RESPONSE_HEAD)
        self._next_s = self._loop.time() + random.random() * self._gap_s
        self._index = 0
        self._schedule()

    def _schedule(self) -> None:
        if self._gap_s:
            self._next_s += self._gap_s
            self._loop.call_at(self._next_s, self._send)
        else:
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(self._frames[self._index])
        self._index += 1
        if self._index < len(self._frames):
            self._schedule()
        else:
            self._transport.write(_LAST_FRAMES)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def _server_process() -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.engine_client", "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@dataclass(frozen=True, slots=True)
class _Load:
    port: int
    stream_count: int
    token_count: int
    gap_ms: int
    repeat_count: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.token_count}/{self.gap_ms}"

    @property
    def total_token_count(self) -> int:
        return self.stream_count * self.token_count * self.repeat_count


_BODY = b'{"model":"tiny","prompt":"hello","stream":true}'


class _CountingSink:
    """What every reader feeds: text and ids are looked at, as a relay would."""

    def __init__(self) -> None:
        self.token_count = 0

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Ignore it."""

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        for delta in deltas:
            self.token_count += delta.token_count


async def _run_sagecp(load: _Load) -> int:
    client = VllmEngineClient(EngineEndpoint(load.base_url))
    sink = _CountingSink()

    async def stream(number: int) -> None:
        for _ in range(load.repeat_count):
            call = EngineCall(EngineApi.COMPLETIONS, _BODY, f"bench-{number}")
            await client.generate(call, sink, _TIMEOUTS)

    await asyncio.gather(*(stream(number) for number in range(load.stream_count)))
    await client.close()
    return sink.token_count


async def _run_aiohttp(load: _Load) -> int:
    decode = msgspec.json.Decoder().decode
    sink = _CountingSink()

    async def stream(session: aiohttp.ClientSession) -> None:
        for _ in range(load.repeat_count):
            rest = b""
            async with session.post(load.base_url + "/v1/completions", data=_BODY) as response:
                async for piece in response.content.iter_any():
                    *events, rest = (rest + piece).split(b"\n\n")
                    deltas = []
                    for event in events:
                        payload = event[6:]
                        if payload == b"[DONE]":
                            continue
                        for choice in decode(payload)["choices"]:
                            ids = choice["token_ids"]
                            deltas.append(
                                EngineDelta(
                                    choice["index"],
                                    choice["text"],
                                    ids,
                                    len(ids),
                                    choice["finish_reason"] or "",
                                )
                            )
                    sink.on_deltas(deltas)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(stream(session) for _ in range(load.stream_count)))
    return sink.token_count


class _Discard(asyncio.BufferedProtocol):
    """Reads until the last chunk, which is found by its length; looks at nothing else."""

    buffer = memoryview(bytearray(64 << 10))

    def __init__(self, load: _Load) -> None:
        self._frames_bytes = sum(
            len(_token_frame(index, '"length"' if index == load.token_count - 1 else "null"))
            for index in range(load.token_count)
        )
        self._expected_bytes = len(_RESPONSE_HEAD) + self._frames_bytes + len(_LAST_FRAMES)
        self._load = load
        self._left = load.repeat_count
        self._read_bytes = 0
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def _ask(self) -> None:
        path = f"/{self._load.token_count}/{self._load.gap_ms}/v1/completions"
        self._transport.write(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY
        )

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._read_bytes += nbytes
        if self._read_bytes == self._expected_bytes:
            self._read_bytes = 0
            self._left -= 1
            if self._left:
                self._ask()
            else:
                self._transport.close()
                self.finished.set_result(None)


async def _run_discard(load: _Load) -> int:
    loop = asyncio.get_running_loop()
    connections = await asyncio.gather(
        *(
            loop.create_connection(lambda: _Discard(load), "127.0.0.1", load.port)
            for _ in range(load.stream_count)
        )
    )
    await asyncio.gather(*(protocol.finished for _, protocol in connections))
    return load.total_token_count


_Reader = Callable[[_Load], Awaitable[int]]
_LoopFactory = Callable[[], asyncio.AbstractEventLoop]
_READERS: dict[str, _Reader] = {
    "sagecp": _run_sagecp,
    "aiohttp iter_any": _run_aiohttp,
    "bytes thrown away": _run_discard,
}
_LOOPS: dict[str, _LoopFactory] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def _measure(reader: _Reader, loop_factory: _LoopFactory, load: _Load) -> float:
    """Return microseconds of CPU per token."""

    async def main() -> float:
        start_s = time.process_time()
        token_count = await reader(load)
        used_s = time.process_time() - start_s
        if token_count != load.total_token_count:
            raise RuntimeError(f"read {token_count} tokens of {load.total_token_count}")
        return used_s

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main()) / load.total_token_count * 1e6


def _profile(load: _Load) -> None:
    profiler = cProfile.Profile()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        profiler.enable()
        runner.run(_run_sagecp(load))
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--profile", action="store_true", help="profile the unpaced reader instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve())
        return
    with _server_process() as port:
        loads = {
            "unpaced": _Load(port, arguments.streams, arguments.tokens, 0, 6),
            "paced 20 ms": _Load(port, arguments.streams, arguments.tokens, 20, 1),
        }
        if arguments.profile:
            _profile(loads["unpaced"])
            return
        figures: dict[tuple[str, str, str], list[float]] = {}
        for number in range(arguments.rounds + 1):
            for pace, load in loads.items():
                for loop_name, loop_factory in _LOOPS.items():
                    for name, reader in _READERS.items():
                        microseconds = _measure(reader, loop_factory, load)
                        if number:  # The first round warms up.
                            figures.setdefault((pace, loop_name, name), []).append(microseconds)
            print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"{arguments.streams} streams of {arguments.tokens} tokens")
    print("CPU us per token of the reading process: median (least to most)\n")
    header = ("reader", *(f"{pace}, {loop}" for pace in loads for loop in _LOOPS))
    rows = [
        (
            name,
            *(
                f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
                for pace in loads
                for loop in _LOOPS
                for values in [figures[pace, loop, name]]
            ),
        )
        for name in _READERS
    ]
    print_table(header, rows)
    write_json(arguments.json, {" / ".join(key): values for key, values in figures.items()})


if __name__ == "__main__":
    main()
