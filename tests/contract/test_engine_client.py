"""What every engine client promises, against an engine that misbehaves in every way that engines do.

Another client joins by a line in `CLIENTS`. Each test runs on every client and on both event loops.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sagecp.runtime.engines.base import (
    EngineApi,
    EngineCall,
    EngineClient,
    EngineDelta,
    EngineEndpoint,
    EngineError,
    EngineFailedError,
    EngineOutcome,
    EngineOverloadedError,
    EngineRejectedError,
    EngineStreamBrokenError,
    EngineTimeoutError,
    EngineTimeouts,
    EngineUnauthorizedError,
    EngineUnreachableError,
)
from sagecp.runtime.engines.vllm import VllmEngineClient
from tests.support.event_loops import CoroutineTest, on_both_loops
from tests.support.scripted_engine import DONE, SSE_HEAD, Request, chunk, scripted_engine, sse, token

MakeClient = Callable[[EngineEndpoint], EngineClient]
CLIENTS: dict[str, MakeClient] = {"vllm": VllmEngineClient}
BODY = b'{"model":"tiny","prompt":"hello","stream":true}'
SHORT = EngineTimeouts(connect_s=0.1, first_token_s=0.1, inter_token_s=0.1)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}


def on_every_client_and_loop(test: CoroutineTest) -> Callable[..., None]:
    """Run a coroutine test, whose first argument makes a client, on every client and event loop."""

    @functools.wraps(test)
    async def with_client(client_name: str, **arguments: Any) -> None:
        clients: list[EngineClient] = []

        def make_client(endpoint: EngineEndpoint) -> EngineClient:
            clients.append(CLIENTS[client_name](endpoint))
            return clients[-1]

        try:
            await test(make_client, **arguments)
        finally:
            for client in clients:
                await client.close()

    own = list(inspect.signature(test).parameters.values())[1:]
    added = inspect.Parameter("client_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(with_client)["__signature__"] = inspect.Signature([added, *own])
    parametrized: Callable[..., None] = pytest.mark.parametrize("client_name", CLIENTS)(
        on_both_loops(with_client)
    )
    return parametrized


class Sink:
    """Keeps what it is given, and says when it was given something."""

    def __init__(self) -> None:
        self.reads: list[list[EngineDelta]] = []
        self.arrived = asyncio.Event()
        self.prompts: list[list[int]] = []

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        assert token_ids
        assert not self.reads
        self.prompts.append(list(token_ids))

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        assert deltas
        self.reads.append(list(deltas))
        self.arrived.set()

    @property
    def deltas(self) -> list[EngineDelta]:
        return [delta for read in self.reads for delta in read]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def make_call(api: EngineApi = EngineApi.COMPLETIONS, **fields: Any) -> EngineCall:
    return EngineCall(api, BODY, "req-1", **fields)


async def generate(
    client: EngineClient,
    sink: Sink | None = None,
    timeouts: EngineTimeouts | None = None,
    call: EngineCall | None = None,
) -> EngineOutcome:
    return await client.generate(call or make_call(), sink or Sink(), timeouts or EngineTimeouts())


async def failure(client: EngineClient, sink: Sink | None = None, **arguments: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await generate(client, sink, **arguments)
    assert "hello" not in str(caught.value)
    return caught.value


async def complete(request: Request) -> None:
    await request.stream(
        token("one", token_ids=[1]),
        token(" two", "length", token_ids=[2], stop_reason=7),
        sse({"choices": [], "usage": USAGE}),
        DONE,
    )


# Answers that are whole.


@on_every_client_and_loop
async def test_a_completion(make_client: MakeClient) -> None:
    async with scripted_engine(complete) as engine:
        sink = Sink()
        call = make_call(headers={"traceparent": "00-1-2-01"})
        outcome = await generate(make_client(EngineEndpoint(engine.url, "key-1")), sink, call=call)
        assert outcome == EngineOutcome(("length",), 3, 2, 1)
        assert [
            (d.choice_index, d.text, d.token_ids, d.token_count, d.finish_reason, d.stop_reason, d.raw)
            for d in sink.deltas
        ] == [(0, "one", [1], 1, "", "", None), (0, " two", [2], 1, "length", "7", None)]
        request = engine.requests[0]
        assert (request.method, request.path, request.body) == ("POST", "/v1/completions", BODY)
        for name, value in {
            "host": f"127.0.0.1:{engine.port}",
            "x-request-id": "req-1",
            "authorization": "Bearer key-1",
            "content-type": "application/json",
            "accept": "text/event-stream",
            "traceparent": "00-1-2-01",
        }.items():
            assert request.headers[name] == value


@on_every_client_and_loop
async def test_a_chat_completion_with_its_events(make_client: MakeClient) -> None:
    values = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]},
    ]

    async def chat(request: Request) -> None:
        await request.stream(*(sse(value) for value in values), DONE)

    async with scripted_engine(chat) as engine:
        sink = Sink()
        outcome = await generate(
            make_client(EngineEndpoint(engine.url)),
            sink,
            call=make_call(EngineApi.CHAT_COMPLETIONS, keep_raw=True),
        )
        assert outcome == EngineOutcome(("stop",))
        assert engine.requests[0].path == "/v1/chat/completions"
        assert "authorization" not in engine.requests[0].headers
        assert sink.text == "hi"
        assert [json.loads(delta.raw or b"") for delta in sink.deltas] == values


@on_every_client_and_loop
async def test_several_choices(make_client: MakeClient) -> None:
    async def two(request: Request) -> None:
        await request.stream(
            token("a", index=1), token("b"), token("", "stop", index=1), token("", "length"), DONE
        )

    async with scripted_engine(two) as engine:
        client = make_client(EngineEndpoint(engine.url))
        sink = Sink()
        outcome = await generate(client, sink, call=make_call(expected_choice_count=2))
        assert outcome.finish_reasons == ("length", "stop")
        assert [delta.choice_index for delta in sink.deltas] == [1, 0, 1, 0]
        error = await failure(client, call=make_call(expected_choice_count=3))
        assert isinstance(error, EngineStreamBrokenError)


@on_every_client_and_loop
async def test_the_sink_is_called_once_for_what_came_together(make_client: MakeClient) -> None:
    async def together(request: Request) -> None:
        await request.send(SSE_HEAD + b"".join(chunk(token(str(number))) for number in range(20)))
        await sink.arrived.wait()
        await request.send(chunk(token("", "stop") + DONE) + b"0\r\n\r\n")

    sink = Sink()
    async with scripted_engine(together) as engine:
        await generate(make_client(EngineEndpoint(engine.url)), sink)
        assert [len(read) for read in sink.reads] == [20, 1]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64, 100_000])
@pytest.mark.parametrize("framing", ["chunked", "odd chunks", "length", "until close"])
@on_every_client_and_loop
async def test_bytes_may_come_in_any_pieces(make_client: MakeClient, piece_bytes: int, framing: str) -> None:
    events = [token("é"), b": ping\n\n", token("☃", token_ids=[1, 2]), token("", "stop"), DONE]
    content = b"".join(events)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    whole = {
        "chunked": SSE_HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n",
        "odd chunks": SSE_HEAD
        + b"".join(chunk(content[at : at + 11]) for at in range(0, len(content), 11))
        + b"000;last\r\nx-trailer: 1\r\n\r\n",
        "length": head + b"Content-Length: %d\r\n\r\n" % len(content) + content,
        "until close": head + b"\r\n" + content,
    }[framing]

    async def pieces(request: Request) -> None:
        for at in range(0, len(whole), piece_bytes):
            await request.send(whole[at : at + piece_bytes])
            if piece_bytes < 10:
                await asyncio.sleep(0)
        if framing == "until close":
            request.close()

    async with scripted_engine(pieces) as engine:
        sink = Sink()
        assert (await generate(make_client(EngineEndpoint(engine.url)), sink)).finish_reasons == ("stop",)
        assert [(d.text, d.token_count) for d in sink.deltas] == [("é", 1), ("☃", 2), ("", 0)]


@on_every_client_and_loop
async def test_a_long_stream_arrives_whole(make_client: MakeClient) -> None:
    async def long(request: Request) -> None:
        await request.send(SSE_HEAD + b"".join(chunk(token(f"{number} ")) for number in range(20_000)))
        await request.send(chunk(token("", "stop")) + chunk(DONE) + b"0\r\n\r\n")

    async with scripted_engine(long) as engine:
        sink = Sink()
        await generate(make_client(EngineEndpoint(engine.url)), sink)
        assert sink.text == "".join(f"{number} " for number in range(20_000))


@on_every_client_and_loop
async def test_a_large_request_arrives_whole(make_client: MakeClient) -> None:
    async with scripted_engine(complete) as engine:
        body = b'{"prompt":"' + b"x" * (4 << 20) + b'"}'
        await generate(
            make_client(EngineEndpoint(engine.url)), call=EngineCall(EngineApi.COMPLETIONS, body, "req-1")
        )
        assert engine.requests[0].body == body


@pytest.mark.parametrize("ending", ["last chunk", "close", "reset"])
@on_every_client_and_loop
async def test_without_done_the_finish_reason_decides(make_client: MakeClient, ending: str) -> None:
    async def finish(request: Request) -> None:
        await request.send(SSE_HEAD)
        await request.send_events(token("a", "stop"))
        await sink.arrived.wait()
        if ending == "last chunk":
            await request.send(b"0\r\n\r\n")
        elif ending == "close":
            request.close()
        else:
            request.reset()

    sink = Sink()
    async with scripted_engine(finish) as engine:
        outcome = await generate(make_client(EngineEndpoint(engine.url)), sink)
        assert outcome.finish_reasons == ("stop",)


@on_every_client_and_loop
async def test_after_done_nothing_more_is_waited_for(make_client: MakeClient) -> None:
    async def forget_to_end(request: Request) -> None:
        await request.send(SSE_HEAD)
        await request.send_events(token("a", "stop"), DONE)
        await request.disconnected()

    async with scripted_engine(forget_to_end, complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        async with asyncio.timeout(0.8):
            assert (await generate(client)).finish_reasons == ("stop",)
        # The unfinished message must not become the next call's.
        sink = Sink()
        await generate(client, sink)
        assert sink.text == "one two"
        assert engine.connection_count == 2


@on_every_client_and_loop
async def test_a_message_that_ends_after_done_frees_its_connection(make_client: MakeClient) -> None:
    returned = asyncio.Event()

    async def end_late(request: Request) -> None:
        await request.send(SSE_HEAD)
        await request.send_events(token("a", "stop"), DONE)
        await returned.wait()
        await request.send(b"0\r\n\r\n")

    async with scripted_engine(end_late) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        returned.set()
        await eventually_reused(client, engine.requests)
        assert engine.connection_count == 1


async def eventually_reused(client: EngineClient, requests: list[Request]) -> None:
    """Give the loop the turns it takes to see what the engine has sent already."""
    before = len(requests)
    for _ in range(10):
        await asyncio.sleep(0.005)
    await generate(client)
    assert len(requests) == before + 1


@on_every_client_and_loop
async def test_an_engine_that_does_not_stream(make_client: MakeClient) -> None:
    async def whole(request: Request) -> None:
        body = json.dumps(
            {
                "choices": [{"index": 0, "text": "one two", "finish_reason": "stop", "token_ids": [1, 2]}],
                "usage": USAGE,
            }
        )
        await request.answer("200 OK", body.encode())

    async with scripted_engine(whole) as engine:
        sink = Sink()
        outcome = await generate(make_client(EngineEndpoint(engine.url)), sink)
        assert outcome == EngineOutcome(("stop",), 3, 2, 1)
        assert [(d.text, d.token_count, d.finish_reason) for d in sink.deltas] == [("one two", 2, "stop")]


@on_every_client_and_loop
async def test_interim_responses_are_skipped(make_client: MakeClient) -> None:
    async def slowly(request: Request) -> None:
        await request.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
        await complete(request)

    async with scripted_engine(slowly) as engine:
        assert (await generate(make_client(EngineEndpoint(engine.url)))).finish_reasons == ("length",)


# Answers that are not whole.


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([], EngineStreamBrokenError),
        ([DONE], EngineStreamBrokenError),
        ([token("a"), DONE], EngineStreamBrokenError),
        ([token("a")], EngineStreamBrokenError),
        ([token("a"), token("", "abort"), DONE], EngineStreamBrokenError),
        ([token("a"), b"data: {\n\n"], EngineStreamBrokenError),
        ([token("a"), b"data: garbage\n\n", token("", "stop"), DONE], EngineStreamBrokenError),
        ([token("a"), b"\x00\xff\x13garbage\n\n", token("", "stop"), DONE], EngineStreamBrokenError),
        ([token("a"), token("", "stop")[:-9]], EngineStreamBrokenError),
        ([token("a"), sse({"error": {"message": "died", "code": 500}}), DONE], EngineFailedError),
        ([token("a"), sse({"error": {"message": "died"}}), DONE], EngineFailedError),
        ([token("a"), token("", "error"), DONE], EngineFailedError),
        ([token("a"), sse({"error": {"message": "bad", "code": 400}}), DONE], EngineRejectedError),
        ([token("a"), sse({"error": {"message": "full", "code": 429}}), DONE], EngineOverloadedError),
        ([token("a"), sse({"error": {"message": "full", "code": 503}}), DONE], EngineOverloadedError),
    ],
)
@on_every_client_and_loop
async def test_a_stream_that_is_no_answer(
    make_client: MakeClient, events: list[bytes], kind: type[EngineError]
) -> None:
    async def stream(request: Request) -> None:
        await request.stream(*events)

    async with scripted_engine(stream) as engine:
        sink = Sink()
        error = await failure(make_client(EngineEndpoint(engine.url)), sink)
        assert type(error) is kind
        # What came before is output; nothing came of the damage.
        assert sink.text == ("a" if len(events) and events[0] == token("a") else "")
        assert not any(delta.finish_reason for delta in sink.deltas)


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("cut", ["after the head", "inside a chunk", "after a chunk", "inside the head"])
@on_every_client_and_loop
async def test_a_connection_that_ends_early(make_client: MakeClient, cut: str, ending: str) -> None:
    async def stop(request: Request) -> None:
        await request.send(
            {
                "inside the head": SSE_HEAD[:20],
                "after the head": SSE_HEAD,
                "inside a chunk": SSE_HEAD + chunk(token("a"))[:-10],
                "after a chunk": SSE_HEAD + chunk(token("a")),
            }[cut]
        )
        await asyncio.sleep(0.01)
        if ending == "close":
            request.close()
        else:
            request.reset()

    async with scripted_engine(stop) as engine:
        error = await failure(make_client(EngineEndpoint(engine.url)))
        assert type(error) is EngineStreamBrokenError
        assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"\x15\x03\x03\x00\x02\x02\x46",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\ncontent-type: text/event-stream\n\n",
        b"HTTP/1.1 200 OK\r\n folded: header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        SSE_HEAD[:-2] + b"content-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        SSE_HEAD + b"zz\r\n",
        SSE_HEAD + b"-5\r\n",
        SSE_HEAD + b"3\r\nabcdef",
        SSE_HEAD + b"ffffffff\r\n",
        SSE_HEAD + b"1" * 5000,
        SSE_HEAD + b"100000\r\n" + b"data: " + b"x" * 1000,
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n{"a":1}',
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\ngarbage",
    ],
)
@on_every_client_and_loop
async def test_what_is_no_http_answer_of_an_engine(make_client: MakeClient, answer: bytes) -> None:
    async def send(request: Request) -> None:
        await request.send(answer)
        if answer.endswith(b"x" * 1000):
            request.close()
        await request.disconnected()

    async with scripted_engine(send) as engine:
        sink = Sink()
        error = await failure(make_client(EngineEndpoint(engine.url)), sink)
        assert type(error) is EngineStreamBrokenError
        assert not sink.reads


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400 Bad Request", EngineRejectedError),
        ("404 Not Found", EngineRejectedError),
        ("422 Unprocessable Entity", EngineRejectedError),
        ("401 Unauthorized", EngineUnauthorizedError),
        ("403 Forbidden", EngineUnauthorizedError),
        ("429 Too Many Requests", EngineOverloadedError),
        ("503 Service Unavailable", EngineOverloadedError),
        ("500 Internal Server Error", EngineFailedError),
        ("502", EngineFailedError),
    ],
)
@on_every_client_and_loop
async def test_statuses(make_client: MakeClient, status: str, kind: type[EngineError]) -> None:
    async def refuse(request: Request) -> None:
        body = {"error": {"message": "because", "type": "T", "param": "max_tokens", "code": int(status[:3])}}
        await request.answer(status, json.dumps(body).encode())

    async def refuse_plainly(request: Request) -> None:
        await request.answer(status, b"because", "text/plain")

    async with scripted_engine(refuse, refuse_plainly, complete) as engine:
        client = make_client(EngineEndpoint(engine.url, "key-1"))
        for parameter in ("max_tokens", ""):
            sink = Sink()
            error = await failure(client, sink)
            assert type(error) is kind
            assert error.status == int(status[:3])  # type: ignore[attr-defined]
            assert "because" in str(error)
            assert "key-1" not in str(error)
            assert not sink.reads
            if isinstance(error, EngineRejectedError):
                assert error.parameter == parameter
        # A refusal is a whole message: the connection goes on.
        await generate(client)
        assert engine.connection_count == 1


@on_every_client_and_loop
async def test_redirects_are_not_followed(make_client: MakeClient) -> None:
    async def redirect(request: Request) -> None:
        await request.send(b"HTTP/1.1 307 Moved\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")

    async with scripted_engine(redirect) as engine:
        assert type(await failure(make_client(EngineEndpoint(engine.url)))) is EngineFailedError
        assert len(engine.requests) == 1


@pytest.mark.parametrize("ending", ["endless", "cut off"])
@on_every_client_and_loop
async def test_an_error_without_a_whole_body_is_that_error(make_client: MakeClient, ending: str) -> None:
    async def rant(request: Request) -> None:
        await request.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 99999999\r\n\r\nbecause ")
        if ending == "cut off":
            request.close()
        else:
            await request.send(*[b"x" * 65536] * 4)
            await request.disconnected()

    async with scripted_engine(rant) as engine:
        error = await failure(make_client(EngineEndpoint(engine.url)))
        assert isinstance(error, EngineRejectedError)
        assert str(error).startswith("because")
        assert len(str(error)) <= 300


@on_every_client_and_loop
async def test_an_answer_before_the_request_was_read(make_client: MakeClient) -> None:
    async def refuse_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        connections.append(writer)
        body = b'{"error":{"message":"too large"}}'
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await finished.wait()
        writer.close()

    connections: list[asyncio.StreamWriter] = []
    finished = asyncio.Event()
    server = await asyncio.start_server(refuse_early, "127.0.0.1", 0)
    try:
        client = make_client(EngineEndpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        call = EngineCall(EngineApi.COMPLETIONS, b"x" * (16 << 20), "req-1")
        for _ in range(2):
            error = await failure(client, call=call)
            assert isinstance(error, EngineRejectedError)
            assert error.status == 413
        # The rest of the first request was not taken for the start of the second.
        assert len(connections) == 2
    finally:
        finished.set()
        server.close()


# Silence.


@pytest.mark.parametrize(
    "events", [None, [], [b": ping\n\n"] * 40, [sse({"choices": [{"delta": {"role": "assistant"}}]})] * 40]
)
@on_every_client_and_loop
async def test_no_first_token(make_client: MakeClient, events: list[bytes] | None) -> None:
    async def silent(request: Request) -> None:
        try:
            if events is not None:
                await request.send(SSE_HEAD)
                for event in events:
                    await request.send_events(event)
                    await asyncio.sleep(0.01)
            await request.disconnected()
        finally:
            gone.set()

    gone = asyncio.Event()
    async with scripted_engine(silent) as engine:
        sink = Sink()
        call = make_call(keep_raw=True)  # So that even a role reaches the sink.
        error = await failure(make_client(EngineEndpoint(engine.url)), sink, timeouts=SHORT, call=call)
        assert isinstance(error, EngineTimeoutError)
        assert error.phase == "first_token"
        await gone.wait()  # The engine stops its work.


@pytest.mark.parametrize("first_token_s", [0.0, 0.15])
@pytest.mark.parametrize("events", [[], [b": ping\n\n"] * 40])
@on_every_client_and_loop
async def test_no_further_token(make_client: MakeClient, events: list[bytes], first_token_s: float) -> None:
    async def freeze(request: Request) -> None:
        try:
            await asyncio.sleep(first_token_s)
            await request.send(SSE_HEAD)
            await request.send_events(token("a"))
            for event in events:
                await request.send_events(event)
                await asyncio.sleep(0.01)
            await request.disconnected()
        finally:
            gone.set()

    gone = asyncio.Event()
    async with scripted_engine(freeze) as engine:
        sink = Sink()
        timeouts = EngineTimeouts(first_token_s=60, inter_token_s=0.1)
        error = await failure(make_client(EngineEndpoint(engine.url)), sink, timeouts=timeouts)
        assert isinstance(error, EngineTimeoutError)
        assert error.phase == "inter_token"
        assert sink.text == "a"
        await gone.wait()


@on_every_client_and_loop
async def test_slow_is_not_silent(make_client: MakeClient) -> None:
    async def slowly(request: Request) -> None:
        # Longer than either timeout in all: each piece of output starts the clock again.
        await asyncio.sleep(0.25)
        await request.send(SSE_HEAD)
        for number in range(20):
            await request.send_events(token(f"{number} "))
            await asyncio.sleep(0.025)
        await request.send_events(token("", "stop"), DONE)
        await request.send(b"0\r\n\r\n")

    async with scripted_engine(slowly) as engine:
        sink = Sink()
        timeouts = EngineTimeouts(first_token_s=5, inter_token_s=0.2)
        await generate(make_client(EngineEndpoint(engine.url)), sink, timeouts)
        assert len(sink.deltas) == 21


# The request's own time.


@pytest.mark.parametrize("tokens", [0, 3], ids=["before output", "amid output"])
@on_every_client_and_loop
async def test_a_call_ends_with_the_requests_time(make_client: MakeClient, tokens: int) -> None:
    async def endless(request: Request) -> None:
        try:
            await request.send(SSE_HEAD)
            for _ in range(tokens):
                await request.send_events(token("a"))
            while tokens:
                await request.send_events(token("a"))
                await asyncio.sleep(0.005)
            await request.disconnected()
        finally:
            gone.set()

    gone = asyncio.Event()
    async with scripted_engine(endless) as engine:
        sink = Sink()
        error = await failure(
            make_client(EngineEndpoint(engine.url)), sink, timeouts=EngineTimeouts(total_s=0.15)
        )
        assert isinstance(error, EngineTimeoutError)
        assert error.phase == "total"
        # Neither the engine's fault, nor anything that another attempt could help.
        assert not error.counts_against_engine
        assert not error.retryable
        assert bool(sink.reads) is (tokens > 0)
        await gone.wait()


@on_every_client_and_loop
async def test_the_requests_time_counts_connecting(make_client: MakeClient) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        client = make_client(EngineEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        error = await failure(client, timeouts=EngineTimeouts(connect_s=30, total_s=0.1))
        assert isinstance(error, EngineTimeoutError)
        assert error.phase == "total"


@on_every_client_and_loop
async def test_a_call_that_is_done_in_time_is_done(make_client: MakeClient) -> None:
    async with scripted_engine(complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for _ in range(3):
            outcome = await generate(client, timeouts=EngineTimeouts(total_s=30))
            assert outcome.finish_reasons == ("length",)


# What is asked beside generation.


@on_every_client_and_loop
async def test_the_prompts_token_ids_come_before_any_output(make_client: MakeClient) -> None:
    async def completion(request: Request) -> None:
        await request.stream(
            token("one", token_ids=[1], prompt_token_ids=[7, 8]),
            token("", "stop", token_ids=[2], prompt_token_ids=None),
            DONE,
        )

    async def chat(request: Request) -> None:
        role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        await request.stream(sse({**role, "prompt_token_ids": [7, 8]}), token("", "stop"), DONE)

    async def silent_about_it(request: Request) -> None:
        await request.stream(token("one"), token("", "stop", prompt_token_ids=[7]), DONE)

    async with scripted_engine(completion, chat, silent_about_it) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for expected in ([[7, 8]], [[7, 8]], []):
            sink = Sink()
            await generate(client, sink)
            assert sink.prompts == expected


@on_every_client_and_loop
async def test_a_prompt_with_impossible_token_ids_is_no_answer(make_client: MakeClient) -> None:
    async def impossible(request: Request) -> None:
        await request.stream(token("a", prompt_token_ids=[1, 2**32]), token("", "stop"), DONE)

    async with scripted_engine(impossible) as engine:
        sink = Sink()
        assert type(await failure(make_client(EngineEndpoint(engine.url)), sink)) is EngineStreamBrokenError
        assert not sink.prompts
        assert not sink.reads


@on_every_client_and_loop
async def test_the_time_of_the_last_output_is_known(make_client: MakeClient) -> None:
    async def tokens(request: Request) -> None:
        asked.set()
        await request.send(SSE_HEAD)
        await request.send_events(sse({"choices": [{"delta": {"role": "assistant"}}]}))
        await go_on.wait()
        await request.send_events(token("a"), token("", "stop"), DONE)
        await request.send(b"0\r\n\r\n")

    asked, go_on = asyncio.Event(), asyncio.Event()
    async with scripted_engine(tokens) as engine:
        client = make_client(EngineEndpoint(engine.url))
        assert client.last_output_s == -math.inf
        call = asyncio.create_task(generate(client))
        await asked.wait()
        assert client.last_output_s == -math.inf
        before_s = time.monotonic()
        go_on.set()
        await call
        # The loop's clock may tick in milliseconds.
        assert before_s - 0.01 <= client.last_output_s <= time.monotonic() + 0.01


@on_every_client_and_loop
async def test_a_probe_asks_for_one_token(make_client: MakeClient) -> None:
    async def one_token(request: Request) -> None:
        body = {"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}
        await request.answer("200 OK", json.dumps(body).encode())

    async with scripted_engine(one_token) as engine:
        health = await make_client(EngineEndpoint(engine.url)).probe("tiny", 5.0)
        assert (health.healthy, health.detail) == (True, "")
        assert health.latency_s >= 0
        request = engine.requests[0]
        assert (request.method, request.path) == ("POST", "/v1/completions")
        body = json.loads(request.body)
        assert (body["model"], body["max_tokens"], body.get("stream", False)) == ("tiny", 1, False)


@pytest.mark.parametrize(
    ("status", "body", "detail"),
    [
        ("500 Internal Server Error", b'{"error":{"message":"dead"}}', "dead"),
        ("503 Service Unavailable", b'{"error":{"message":"full"}}', "full"),
        ("404 Not Found", b'{"error":{"message":"no such model"}}', "no such model"),
        ("200 OK", b"garbage", "not understood"),
        ("200 OK", b'{"choices":[{"index":0,"text":"a","finish_reason":"abort"}]}', "aborted"),
        ("200 OK", b'{"choices":[{"index":0,"text":"a"}]}', "finish reason"),
        ("200 OK", b'{"error":{"message":"died"}}', "died"),
    ],
)
@on_every_client_and_loop
async def test_a_probe_that_finds_no_token(
    make_client: MakeClient, status: str, body: bytes, detail: str
) -> None:
    async def answer(request: Request) -> None:
        await request.answer(status, body)

    async with scripted_engine(answer) as engine:
        health = await make_client(EngineEndpoint(engine.url)).probe("tiny", 5.0)
        assert not health.healthy
        assert detail in health.detail


@on_every_client_and_loop
async def test_a_probe_of_a_hung_engine(make_client: MakeClient) -> None:
    async def hang(request: Request) -> None:
        await request.disconnected()

    async with scripted_engine(hang) as engine:
        health = await make_client(EngineEndpoint(engine.url)).probe("tiny", 0.1)
        assert not health.healthy
        assert "0.1 s" in health.detail
    # And of one that is not there at all.
    health = await make_client(EngineEndpoint(engine.url)).probe("tiny", 5.0)
    assert not health.healthy
    assert "Connection refused" in health.detail


@on_every_client_and_loop
async def test_the_text_of_tokens(make_client: MakeClient) -> None:
    async def detokenize(request: Request) -> None:
        await request.answer("200 OK", json.dumps({"prompt": "é\ufffd"}).encode())

    async with scripted_engine(detokenize) as engine:
        client = make_client(EngineEndpoint(engine.url))
        assert await client.detokenize("tiny", (1, 2), 5.0) == "é\ufffd"
        request = engine.requests[0]
        assert (request.method, request.path) == ("POST", "/detokenize")
        assert json.loads(request.body) == {"model": "tiny", "tokens": [1, 2]}


@on_every_client_and_loop
async def test_the_length_of_the_context(make_client: MakeClient) -> None:
    async def models(request: Request) -> None:
        cards = [{"id": "other", "max_model_len": 1}, {"id": "tiny", "max_model_len": 8192}]
        await request.answer("200 OK", json.dumps({"data": cards}).encode())

    async with scripted_engine(models) as engine:
        client = make_client(EngineEndpoint(engine.url))
        assert await client.context_token_count("tiny", 5.0) == 8192
        assert (engine.requests[0].method, engine.requests[0].path) == ("GET", "/v1/models")
        with pytest.raises(EngineStreamBrokenError, match="does not tell the context of 'absent'"):
            await client.context_token_count("absent", 5.0)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        ("404 Not Found", b'{"detail":"Not Found"}', EngineRejectedError),
        ("500 Internal Server Error", b"", EngineFailedError),
        ("401 Unauthorized", b"{}", EngineUnauthorizedError),
        ("200 OK", b"garbage", EngineStreamBrokenError),
        ("200 OK", b"[]", EngineStreamBrokenError),
        ("200 OK", b'{"prompt":7,"data":[{"id":"tiny"},7]}', EngineStreamBrokenError),
    ],
)
@on_every_client_and_loop
async def test_questions_that_are_not_answered(
    make_client: MakeClient, status: str, body: bytes, kind: type[EngineError]
) -> None:
    async def answer(request: Request) -> None:
        await request.answer(status, body)

    async with scripted_engine(answer) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for question in (client.detokenize("tiny", (1,), 5.0), client.context_token_count("tiny", 5.0)):
            with pytest.raises(EngineError) as caught:
                await question
            assert type(caught.value) is kind


@on_every_client_and_loop
async def test_an_engine_that_dies_of_a_question_did_not_die_of_a_request(make_client: MakeClient) -> None:
    async def die(request: Request) -> None:
        request.reset()

    async def die_amid_the_answer(request: Request) -> None:
        await request.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        request.close()

    async with scripted_engine(die, die_amid_the_answer) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for _ in range(2):
            with pytest.raises(EngineUnreachableError) as caught:
                await client.detokenize("tiny", (1,), 5.0)
            assert not caught.value.sent


@on_every_client_and_loop
async def test_questions_that_take_too_long(make_client: MakeClient) -> None:
    async def hang(request: Request) -> None:
        await request.disconnected()

    async with scripted_engine(hang) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for question in (client.detokenize("tiny", (1,), 0.1), client.context_token_count("tiny", 0.1)):
            with pytest.raises(EngineTimeoutError):
                await question


# A sink that has heard enough.


@pytest.mark.parametrize("ending", ["whole", "broken", "open"])
@on_every_client_and_loop
async def test_the_sink_may_have_the_call_cancelled(make_client: MakeClient, ending: str) -> None:
    """Even in the very read that would have ended it."""

    async def answer(request: Request) -> None:
        try:
            events = [token("a"), token("", "stop"), DONE] if ending == "whole" else [token("a")]
            last = b"data: {\n\n" if ending == "broken" else b""
            await request.send(SSE_HEAD + chunk(b"".join(events) + last))
            await request.disconnected()
        finally:
            gone.set()

    class Ending(Sink):
        def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
            super().on_deltas(deltas)
            call.cancel()

    gone = asyncio.Event()
    async with scripted_engine(answer) as engine:
        sink = Ending()
        call = asyncio.create_task(generate(make_client(EngineEndpoint(engine.url)), sink))
        with pytest.raises(asyncio.CancelledError):
            await call
        assert sink.text == "a"
        assert len(sink.reads) == 1
        await gone.wait()


# Connections.


@on_every_client_and_loop
async def test_nobody_listens(make_client: MakeClient) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        error = await failure(make_client(EngineEndpoint(f"http://127.0.0.1:{port}")))
    assert type(error) is EngineUnreachableError
    assert str(error) == f"no connection to 127.0.0.1:{port}: Connection refused"


@on_every_client_and_loop
async def test_no_connection_in_time(make_client: MakeClient) -> None:
    # A listener whose queue is full drops what arrives, as a dead host does.
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        client = make_client(EngineEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        error = await failure(client, timeouts=SHORT)
    assert type(error) is EngineUnreachableError
    assert "within 0.1 s" in str(error)


@pytest.mark.parametrize("ending", ["close", "reset"])
@on_every_client_and_loop
async def test_a_fresh_connection_that_ends_before_an_answer_is_not_retried(
    make_client: MakeClient, ending: str
) -> None:
    async def leave(request: Request) -> None:
        if ending == "close":
            request.close()
        else:
            request.reset()

    async with scripted_engine(leave, complete) as engine:
        assert type(await failure(make_client(EngineEndpoint(engine.url)))) is EngineUnreachableError
        assert len(engine.requests) == 1


@pytest.mark.parametrize("ending", ["close", "reset"])
@on_every_client_and_loop
async def test_a_stale_connection_is_replaced_once(make_client: MakeClient, ending: str) -> None:
    async def leave(request: Request) -> None:
        if ending == "close":
            request.close()
        else:
            request.reset()

    async with scripted_engine(complete, leave, complete, leave, leave, complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        sink = Sink()
        await generate(client, sink)
        assert sink.text == "one two"
        assert [request.connection_number for request in engine.requests] == [1, 1, 2]
        # The replacement fails, too: that is the engine's fault, and is reported.
        assert type(await failure(client)) is EngineUnreachableError
        assert [request.connection_number for request in engine.requests] == [1, 1, 2, 2, 3]


@on_every_client_and_loop
async def test_a_kept_connection_that_began_to_answer_is_not_replaced(make_client: MakeClient) -> None:
    async def begin(request: Request) -> None:
        await request.send(b"HTTP/1.1 2")
        await asyncio.sleep(0.01)
        request.close()

    async with scripted_engine(complete, begin, complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        assert type(await failure(client)) is EngineStreamBrokenError
        assert len(engine.requests) == 2


@on_every_client_and_loop
async def test_calls_in_turn_share_a_connection_and_calls_at_once_do_not(make_client: MakeClient) -> None:
    async with scripted_engine(complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        for _ in range(3):
            await generate(client)
        assert engine.connection_count == 1
        sinks = [Sink() for _ in range(8)]
        await asyncio.gather(*(generate(client, sink) for sink in sinks))
        assert engine.connection_count == 8
        assert [sink.text for sink in sinks] == ["one two"] * 8


@pytest.mark.parametrize("header", [b"connection: close\r\n", b"Connection: x, Close\r\n"])
@on_every_client_and_loop
async def test_a_connection_that_the_engine_will_close_is_not_kept(
    make_client: MakeClient, header: bytes
) -> None:
    async def once(request: Request) -> None:
        events = b"".join(map(chunk, (token("a", "stop"), DONE))) + b"0\r\n\r\n"
        await request.send(SSE_HEAD[:-2] + header + b"\r\n" + events)

    async with scripted_engine(once) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        await generate(client)
        assert engine.connection_count == 2


@on_every_client_and_loop
async def test_a_connection_with_bytes_nobody_asked_for_is_not_kept(make_client: MakeClient) -> None:
    async def twice(request: Request) -> None:
        events = b"".join(map(chunk, (token("a", "stop"), DONE))) + b"0\r\n\r\n"
        await request.send((SSE_HEAD + events) * 2)

    async def later(request: Request) -> None:
        await complete(request)
        await answered.wait()
        await request.send(SSE_HEAD)
        await request.disconnected()
        closed.set()

    answered, closed = asyncio.Event(), asyncio.Event()
    async with scripted_engine(twice, later, complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        await generate(client)
        assert engine.connection_count == 2
        answered.set()
        await closed.wait()
        await generate(client)
        assert engine.connection_count == 3


@pytest.mark.parametrize("moment", ["before the head", "after the head", "after a token"])
@on_every_client_and_loop
async def test_cancelling_stops_the_engine(make_client: MakeClient, moment: str) -> None:
    async def work(request: Request) -> None:
        if moment != "before the head":
            await request.send(SSE_HEAD)
        if moment == "after a token":
            await request.send_events(token("a"))
        working.set()
        await request.disconnected()
        stopped.set()

    working, stopped = asyncio.Event(), asyncio.Event()
    async with scripted_engine(work, complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        sink = Sink()
        task = asyncio.create_task(generate(client, sink))
        await working.wait()
        if moment == "after a token":
            await sink.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(0.5):
            await stopped.wait()
        await generate(client)
        assert engine.connection_count == 2


@on_every_client_and_loop
async def test_cancelling_while_connecting(make_client: MakeClient) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        client = make_client(EngineEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        task = asyncio.create_task(generate(client))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@on_every_client_and_loop
async def test_a_cancelled_call_gives_no_more_output(make_client: MakeClient) -> None:
    async def work(request: Request) -> None:
        await request.send(SSE_HEAD)
        await request.send_events(token("a"))
        await sink.arrived.wait()
        # Sent and cancelled in the same turn of the loop.
        request.writer.write(chunk(token("late")))
        task.cancel()
        await request.disconnected()

    sink = Sink()
    async with scripted_engine(work) as engine:
        task = asyncio.create_task(generate(make_client(EngineEndpoint(engine.url)), sink))
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.02)
        assert sink.text == "a"


@on_every_client_and_loop
async def test_a_sink_that_raises_ends_the_call_with_its_error(make_client: MakeClient) -> None:
    class Broken(Sink):
        def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
            raise ZeroDivisionError

    async with scripted_engine(complete) as engine:
        client = make_client(EngineEndpoint(engine.url))
        with pytest.raises(ZeroDivisionError):
            await generate(client, Broken())


# Health and the end.


@on_every_client_and_loop
async def test_health(make_client: MakeClient) -> None:
    async def well(request: Request) -> None:
        await request.answer("200 OK", b"", "text/plain")

    async def unwell(request: Request) -> None:
        await request.answer("503 Service Unavailable", b"")

    async def garbage(request: Request) -> None:
        await request.send(b"garbage\r\n\r\n")

    async def silent(request: Request) -> None:
        await request.disconnected()

    async with scripted_engine(well, unwell, garbage, silent) as engine:
        client = make_client(EngineEndpoint(engine.url))
        first = await client.health(1.0)
        assert (engine.requests[0].method, engine.requests[0].path) == ("GET", "/health")
        assert first.healthy
        assert first.detail == ""
        assert 0 <= first.latency_s < 1
        for words in ("503", "status line", "0.05 s"):
            later = await client.health(0.05)
            assert not later.healthy
            assert words in later.detail
    gone = await client.health(1.0)
    assert not gone.healthy
    assert "refused" in gone.detail


@on_every_client_and_loop
async def test_closing(make_client: MakeClient) -> None:
    async def work(request: Request) -> None:
        await request.send(SSE_HEAD)
        await request.send_events(token("a"))
        await request.disconnected()
        stopped.set()

    stopped = asyncio.Event()
    async with scripted_engine(complete, work) as engine:
        client = make_client(EngineEndpoint(engine.url))
        await generate(client)
        sink = Sink()
        task = asyncio.create_task(generate(client, sink))
        await sink.arrived.wait()
        await client.close()
        with pytest.raises(EngineError):
            await task
        await stopped.wait()
        await client.close()
        assert type(await failure(client)) is EngineUnreachableError
        assert not (await client.health(1.0)).healthy
