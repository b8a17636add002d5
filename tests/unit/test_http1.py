"""The HTTP/1.1 client: its wire format without sockets, then connections over real ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.runtime.engines.base import (
    EngineApi,
    EngineCall,
    EngineDelta,
    EngineEndpoint,
    EngineOverloadedError,
    EngineTimeouts,
    EngineUnreachableError,
)
from sagecp.runtime.engines.http1 import HttpClient, HttpTimeoutError
from sagecp.runtime.engines.http1_connection import (
    ConnectionPool,
    HttpConnectError,
    HttpConnection,
    HttpDisconnectedError,
    PoolOptions,
)
from sagecp.runtime.engines.http1_wire import (
    HeadReader,
    HttpLimits,
    HttpProtocolError,
    ResponseHead,
    encode_request_head,
    make_body_decoder,
    parse_response_head,
)
from sagecp.runtime.engines.vllm import VllmEngineClient, _Generation
from tests.support.event_loops import on_both_loops
from tests.support.scripted_engine import DONE, SSE_HEAD, Request, chunk, scripted_engine, token

LIMITS = HttpLimits(max_head_bytes=200, max_chunk_bytes=1000, max_body_bytes=500)


# Heads.


def test_a_head() -> None:
    head = parse_response_head(
        b"HTTP/1.1 404 Not Found\r\nContent-Type: Text/HTML; charset=x\r\nx-A:1\r\nX-a:  2 3\t\r\nempty:"
    )
    assert head == ResponseHead(
        404, 1, {"content-type": "Text/HTML; charset=x", "x-a": "1, 2 3", "empty": ""}
    )
    assert head.content_type == "text/html"


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        (1, None, True),
        (1, "close", False),
        (1, "Keep-Alive, Close", False),
        (0, None, False),
        (0, "keep-alive", True),
    ],
)
def test_keeping_connections(version: int, connection: str | None, keeps: bool) -> None:
    headers = {} if connection is None else {"connection": connection}
    assert ResponseHead(200, version, headers).keeps_connection is keeps


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"garbage",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/2 200 OK",
        b"http/1.1 200 OK",
        b"HTTP/1.1 200 OK\x00",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\nspace before : x",
        b"HTTP/1.1 200 OK\r\n: x",
        b"HTTP/1.1 200 OK\r\na: b\r\n folded",
        b"HTTP/1.1 200 OK\r\na: b\nc: d",
        b"HTTP/1.1 200 OK\r\na: b\rc: d",
        b"HTTP/1.1 200 OK\r\na: \x00",
        b"HTTP/1.1 200 OK\r\n\xc3\xa9: x",
    ],
)
def test_malformed_heads(head: bytes) -> None:
    with pytest.raises(HttpProtocolError):
        parse_response_head(head)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_head_or_the_one_error(data: bytes) -> None:
    for head in (data, b"HTTP/1.1 200 OK\r\n" + data):
        with contextlib.suppress(HttpProtocolError):
            parse_response_head(head)


def test_the_head_reader_finds_the_end_wherever_reads_cut_it() -> None:
    whole = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\na: b\r\n\r\nbody"
    for cut in range(len(whole) - 3):
        reader = HeadReader(200)
        found = reader.feed(whole[:cut])
        rest = b""
        if found is None:
            found = reader.feed(whole[cut:])
        else:
            rest = whole[cut:]
        assert found is not None
        head, data, position = found
        assert head.status == 200
        assert data[position:] + rest == b"body"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\na: " + b"x" * 200,
        b"HTTP/1.1 200 OK\r\na: " + b"x" * 200 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
    ],
)
def test_a_head_has_a_largest_size(head: bytes) -> None:
    with pytest.raises(HttpProtocolError, match="200 bytes"):
        HeadReader(200).feed(head)
    reader = HeadReader(200)
    with pytest.raises(HttpProtocolError, match="200 bytes"):
        deque((reader.feed(bytes([byte])) for byte in head), maxlen=0)


def test_a_request_head() -> None:
    assert (
        encode_request_head("POST", "/v1/x", "host:1", {"A": "b"}, 3)
        == b"POST /v1/x HTTP/1.1\r\nHost: host:1\r\nA: b\r\nContent-Length: 3\r\n\r\n"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"a": "b\r\nX: y"},
        {"a": "b\nX"},
        {"a": "\x00"},
        {"a": "snow ☃"},
        {"a\r\nb": "x"},
        {"a b": "x"},
        {"": "x"},
        {"a:": "x"},
        {"é": "x"},
        {"Content-Length": "5"},
        {"transfer-encoding": "chunked"},
        {"Host": "elsewhere"},
    ],
)
def test_headers_cannot_smuggle(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        encode_request_head("GET", "/", "host", headers, None)


@pytest.mark.parametrize("target", ["", "x", "/a b", "/a\r\nX: y", "/é", "http://elsewhere/"])
def test_targets_cannot_smuggle(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        encode_request_head("GET", target, "host", {}, None)


# Bodies.


def decode(headers: dict[str, str], pieces: list[bytes], status: int = 200) -> tuple[bytes, bytes | None]:
    """Return the body, and what follows it (None: it has not ended)."""
    decoder = make_body_decoder(ResponseHead(status, 1, headers), LIMITS)
    body = b""

    def sink(data: bytes, start: int, stop: int) -> None:
        nonlocal body
        assert 0 <= start < stop <= len(data)
        body += data[start:stop]

    for number, piece in enumerate(pieces):
        # Starts behind other bytes, as after a head.
        end = decoder.feed(b"??" + piece, 2, sink)
        if end >= 0:
            return body, (b"??" + piece)[end:] + b"".join(pieces[number + 1 :])
    return body, None


CHUNKED = {"transfer-encoding": "chunked"}


@pytest.mark.parametrize(
    ("headers", "data", "expected"),
    [
        (CHUNKED, b"3\r\nabc\r\n0\r\n\r\nrest", (b"abc", b"rest")),
        (CHUNKED, b"3\r\nabc\r\n2\r\n\r\n\r\n0\r\n\r\n", (b"abc\r\n", b"")),
        (CHUNKED, b"00A;x=y\r\n0123456789\r\n0;z\r\nt: 1\r\nu: 2\r\n\r\n", (b"0123456789", b"")),
        (CHUNKED, b"a \r\n0123456789\r\n000\r\n\r\n", (b"0123456789", b"")),
        (CHUNKED, b"3\r\nabc\r\n", (b"abc", None)),
        (CHUNKED, b"5\r\nab", (b"ab", None)),
        ({"content-length": "3"}, b"abcrest", (b"abc", b"rest")),
        ({"content-length": "5"}, b"abc", (b"abc", None)),
        ({"content-length": "0"}, b"rest", (b"", b"rest")),
        ({}, b"abc", (b"abc", None)),
    ],
)
def test_bodies(headers: dict[str, str], data: bytes, expected: tuple[bytes, bytes | None]) -> None:
    assert decode(headers, [data]) == expected
    assert decode(headers, [bytes([byte]) for byte in data]) == expected
    for cut in range(1, len(data)):
        assert decode(headers, [data[:cut], data[cut:]]) == expected


def test_a_status_without_a_body() -> None:
    assert decode({}, [b""], status=204) == (b"", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"x\r\n",
        b"0x3\r\nabc\r\n",
        b"+3\r\nabc\r\n",
        b"1_0\r\n",
        b"-1\r\n",
        b" 3\r\nabc\r\n",
        b"3\nabc\n0\n\n" + b"x" * 1100,
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n\n",
        b"3\r\nabc\r\r\n",
        b"3e9\r\n",
        b"000000003\r\nabc\r\n",
        b"1" * 1100,
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 50,
        b"0\r\na: " + b"b" * 300,
    ],
)
def test_damaged_chunks(data: bytes) -> None:
    for pieces in ([data], [bytes([byte]) for byte in data]):
        with pytest.raises(HttpProtocolError):
            decode(CHUNKED, pieces)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": "3", "transfer-encoding": "chunked"},
        {"content-length": "3, 3"},
        {"content-length": "-3"},
        {"content-length": "+3"},
        {"content-length": ""},
        {"content-length": "9" * 30},
        {"transfer-encoding": "gzip"},
        {"transfer-encoding": "chunked, chunked"},
        {"content-encoding": "gzip"},
    ],
)
def test_contradictory_framing(headers: dict[str, str]) -> None:
    with pytest.raises(HttpProtocolError):
        make_body_decoder(ResponseHead(200, 1, headers), LIMITS)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=6) | st.sampled_from([b"0\r\n", b"\r\n", b"3\r\nabc\r\n"]), max_size=6))
def test_any_bytes_are_chunks_or_the_one_error(pieces: list[bytes]) -> None:
    def outcome(parts: list[bytes]) -> tuple[bytes, bytes | None] | str:
        try:
            return decode(CHUNKED, parts)
        except HttpProtocolError as error:
            return str(error)

    pieces = [piece for piece in pieces if piece]
    whole, cut = outcome([b"".join(pieces)]), outcome(pieces)
    assert whole == cut or b"".join(pieces) == b""


# Everything between a socket's bytes and the deltas, without a socket.


class _Transport(asyncio.Transport):
    """Takes requests and lets nothing through."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True


class _Sink:
    def __init__(self) -> None:
        self.deltas: list[EngineDelta] = []

    def on_prompt(self, token_ids: Any) -> None:
        pass

    def on_deltas(self, deltas: Any) -> None:
        assert deltas
        self.deltas.extend(deltas)


TOKENS = st.tuples(st.text(max_size=6), st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=3))
NOISE = st.sampled_from([b"", b": ping\n\n", b"event: x\r\nid: 1\n", b"\r\n"])


@settings(deadline=None)
@given(
    tokens=st.lists(TOKENS, max_size=8),
    noise=st.lists(NOISE, min_size=10, max_size=10),
    crlf=st.booleans(),
    framing=st.sampled_from(["chunked", "length", "until close"]),
    chunk_sizes=st.lists(st.integers(1, 90), max_size=30),
    read_sizes=st.lists(st.integers(1, 120), max_size=40),
)
def test_any_events_chunks_and_reads_give_the_same_deltas(
    tokens: list[tuple[str, list[int] | None]],
    noise: list[bytes],
    crlf: bool,
    framing: str,
    chunk_sizes: list[int],
    read_sizes: list[int],
) -> None:
    events = [token(text, token_ids=ids) for text, ids in tokens] + [token("", "stop"), DONE]
    if crlf:
        events = [event.replace(b"\n", b"\r\n") for event in events]
    content = b"".join(extra + event for extra, event in zip(noise, events, strict=False))
    if framing == "chunked":
        stream = SSE_HEAD
        sizes = iter(chunk_sizes)
        position = 0
        while position < len(content):
            size = next(sizes, len(content))
            stream += chunk(content[position : position + size])
            position += size
        stream += b"0\r\n\r\n"
    else:
        length = f"content-length: {len(content)}\r\n" if framing == "length" else ""
        stream = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{length}\r\n".encode() + content

    async def read() -> list[EngineDelta]:
        loop = asyncio.get_running_loop()
        pool = ConnectionPool("unused", 1, None, HttpLimits(), PoolOptions())
        connection, transport, sink = HttpConnection(pool, loop), _Transport(), _Sink()
        connection.connection_made(transport)
        generation = _Generation(EngineCall(EngineApi.COMPLETIONS, b"{}", "r"), sink, EngineTimeouts())
        result = generation.begin(connection)
        generation.unanswered = b"head", b"{}"
        connection.start(generation, *generation.unanswered)
        sizes = iter(read_sizes)
        position = 0
        while position < len(stream):
            piece = stream[position : position + next(sizes, 1 << 16)]
            connection.get_buffer(-1)[: len(piece)] = piece
            connection.buffer_updated(len(piece))
            position += len(piece)
        assert result.done()
        assert (await result).finish_reasons == ("stop",)
        assert generation.unanswered is None, "an answer that takes minutes does not hold a large body"
        # A whole message leaves a connection for the next call.
        assert not transport.aborted
        assert pool.idle_count == (framing != "until close")
        generation.dispose()
        connection.abort()
        await pool_done(pool, connection)
        return sink.deltas

    async def pool_done(pool: ConnectionPool, connection: HttpConnection) -> None:
        connection.connection_lost(None)
        await pool.close()

    deltas = asyncio.run(read())
    expected = [(text, ids, len(ids) if ids is not None else 1) for text, ids in tokens if text or ids] + [
        ("", None, 0)
    ]
    assert [(delta.text, delta.token_ids, delta.token_count) for delta in deltas] == expected


# Over sockets.


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that a timer or the peer brings about, and that announces itself to nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def well(request: Request) -> None:
    await request.answer("200 OK", json.dumps({"path": request.path, "body": request.body.decode()}).encode())


@on_both_loops
async def test_get_and_json() -> None:
    async with scripted_engine(well) as server:
        client = HttpClient(server.url + "/prefix/", headers={"User-Agent": "test"})
        response = await client.get("/metrics?x=1", timeout_s=5)
        assert response.status == 200
        assert response.json() == {"path": "/prefix/metrics?x=1", "body": ""}
        assert "content-length" not in server.requests[0].headers
        response = await client.request_json("POST", "/y", {"a": [1]}, timeout_s=5)
        assert response.json() == {"path": "/prefix/y", "body": '{"a":[1]}'}
        assert server.requests[1].headers["content-type"] == "application/json"
        assert server.requests[1].headers["user-agent"] == "test"
        assert server.connection_count == 1
        await client.close()


@on_both_loops
async def test_what_is_not_json() -> None:
    async def plain(request: Request) -> None:
        await request.answer("500 No", b"<html>")

    async with scripted_engine(plain) as server:
        client = HttpClient(server.url)
        response = await client.get("/", timeout_s=5)
        assert response.status == 500
        with pytest.raises(HttpProtocolError, match="HTTP 500"):
            response.json()
        await client.close()


@on_both_loops
async def test_a_collected_body_has_a_largest_size() -> None:
    async def large(request: Request) -> None:
        await request.answer("200 OK", b"x" * 501)

    async with scripted_engine(large) as server:
        client = HttpClient(server.url, limits=LIMITS)
        with pytest.raises(HttpProtocolError, match="500 bytes"):
            await client.get("/", timeout_s=5)
        assert len((await client.request("GET", "/", timeout_s=5, max_body_bytes=501)).body) == 501
        await client.close()


@on_both_loops
async def test_the_timeout_covers_the_whole_body() -> None:
    async def trickle(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while True:
            await request.send(b"x")
            await asyncio.sleep(0.01)

    async with scripted_engine(trickle) as server:
        client = HttpClient(server.url)
        with pytest.raises(HttpTimeoutError, match=r"GET /slow within 0\.1 s"):
            await client.get("/slow", timeout_s=0.1)
        assert client.pool.open_count == 0
        await client.close()


@pytest.mark.parametrize(
    ("headers", "ending"),
    [
        (b"content-length: 10\r\n", "close"),
        (b"content-length: 10\r\n", "reset"),
        (b"transfer-encoding: chunked\r\n", "close"),
        (b"", "reset"),
    ],
)
@on_both_loops
async def test_a_body_cut_off(headers: bytes, ending: str) -> None:
    async def cut(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n5\r\nabc")
        await asyncio.sleep(0.02)  # A reset discards what was not read.
        if ending == "close":
            request.close()
        else:
            request.reset()

    async with scripted_engine(cut) as server:
        client = HttpClient(server.url)
        with pytest.raises(HttpDisconnectedError) as caught:
            await client.get("/", timeout_s=5)
        assert caught.value.response_started
        await client.close()


@on_both_loops
async def test_a_body_that_ends_with_the_connection() -> None:
    async def until_close(request: Request) -> None:
        await request.send(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def")
        request.close()

    async with scripted_engine(until_close) as server:
        client = HttpClient(server.url)
        assert (await client.get("/", timeout_s=5)).body == b"abcdef"
        assert client.pool.open_count == 0
        await client.close()


@on_both_loops
async def test_idle_connections_are_few_and_do_not_stay() -> None:
    release = asyncio.Event()

    async def together(request: Request) -> None:
        if len(server.requests) == 4:
            release.set()
        await release.wait()
        await well(request)

    async with scripted_engine(together) as server:
        client = HttpClient(server.url, options=PoolOptions(max_idle_count=2, idle_timeout_s=0.1))
        await asyncio.gather(*(client.get("/", timeout_s=5) for _ in range(4)))
        assert server.connection_count == 4
        assert client.pool.open_count == client.pool.idle_count == 2
        await until(lambda: client.pool.open_count == 0)
        assert (await client.get("/", timeout_s=5)).status == 200
        await client.close()
        assert client.pool.open_count == 0


@on_both_loops
async def test_a_connection_that_the_server_closed_while_idle_is_not_used() -> None:
    async def once(request: Request) -> None:
        await well(request)
        request.close()

    async with scripted_engine(once) as server:
        client = HttpClient(server.url)
        await client.get("/", timeout_s=5)
        await until(lambda: client.pool.open_count == 0)
        await client.get("/", timeout_s=5)
        assert len(server.requests) == 2
        await client.close()


@on_both_loops
async def test_a_request_that_a_kept_connection_lost_is_sent_once_more_whole() -> None:
    async def dies(request: Request) -> None:
        request.close()

    async with scripted_engine(well, dies, well) as server:
        client = HttpClient(server.url)
        await client.request("POST", "/", timeout_s=5, body=b"first")
        response = await client.request("POST", "/again", timeout_s=5, body=b"x" * 200_000)
        assert response.status == 200
        first, lost, again = server.requests
        assert lost.connection_number == first.connection_number
        assert again.connection_number != lost.connection_number
        assert (again.path, again.body) == (lost.path, lost.body) == ("/again", b"x" * 200_000)
        await client.close()


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context for 127.0.0.1, and one of a client that trusts it."""
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    return server_side, client_side


@on_both_loops
async def test_tls() -> None:
    async def stream(request: Request) -> None:
        await request.stream(*(token(f"{number} ") for number in range(3000)), token("", "stop"), DONE)

    server_side, client_side = tls_contexts()
    async with scripted_engine(stream, ssl_context=server_side) as server:
        client = VllmEngineClient(EngineEndpoint(server.url), ssl_context=client_side)
        for _ in range(2):
            sink = _Sink()
            call = EngineCall(EngineApi.COMPLETIONS, b"{}", "r")
            outcome = await client.generate(call, sink, EngineTimeouts())
            assert outcome.finish_reasons == ("stop",)
            assert "".join(delta.text for delta in sink.deltas) == "".join(f"{n} " for n in range(3000))
        assert server.connection_count == 1
        await client.close()


@on_both_loops
async def test_an_untrusted_certificate_is_refused() -> None:
    server_side, _ = tls_contexts()
    async with scripted_engine(well, ssl_context=server_side) as server:
        client = HttpClient(server.url)
        with pytest.raises(HttpConnectError, match=r"no TLS connection .*certificate"):
            await client.get("/", timeout_s=5)
        assert not server.requests
        await client.close()


@on_both_loops
async def test_tls_to_a_silent_server_ends_with_the_connect_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        await finished.wait()
        writer.close()

    finished = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = VllmEngineClient(EngineEndpoint(url))
    with pytest.raises(EngineUnreachableError, match=r"within 0\.1 s"):
        await client.generate(
            EngineCall(EngineApi.COMPLETIONS, b"{}", "r"), _Sink(), EngineTimeouts(connect_s=0.1)
        )
    finished.set()
    await client.close()
    server.close()


@on_both_loops
async def test_an_engine_gets_no_more_connections_than_allowed() -> None:
    release = asyncio.Event()

    async def wait(request: Request) -> None:
        if len(server.requests) == 2:
            both.set()
        await release.wait()
        await request.stream(token("", "stop"), DONE)

    both = asyncio.Event()
    call = EngineCall(EngineApi.COMPLETIONS, b"{}", "r")
    async with scripted_engine(wait) as server:
        client = VllmEngineClient(EngineEndpoint(server.url), max_connection_count=2)
        tasks = [asyncio.create_task(client.generate(call, _Sink(), EngineTimeouts())) for _ in range(2)]
        await both.wait()
        with pytest.raises(EngineOverloadedError, match="all 2 connections"):
            await client.generate(call, _Sink(), EngineTimeouts())
        release.set()
        await asyncio.gather(*tasks)
        await client.generate(call, _Sink(), EngineTimeouts())
        await client.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host:port",
        "http://user:secret@host",
        "http://host?x=1",
        "http://host#x",
        "http://ho st",
        "http://host/\r\nx: y",
        "http://[::1",
        "http://hôst",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as caught:
        HttpClient(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\r\nb", "schlüssel-☃"])
def test_an_api_key_that_is_none_is_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="Authorization") as caught:
        VllmEngineClient(EngineEndpoint("http://127.0.0.1:1", key))
    assert key not in str(caught.value)
