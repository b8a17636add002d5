"""The bytes of HTTP/1.1: request heads, response heads and message bodies, without any I/O.

Strict where leniency would hide damage or let two readers disagree about where
a message ends: bare line ends, folded headers, conflicting lengths and unknown
transfer codings are errors. Everything a server controls has a bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

# Takes ``data[start:stop]``, a piece of a body.
BodySink = Callable[[bytes, int, int], None]

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t \x21-\x7e\x80-\xff]*)?")
_HEADER_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*"
    rb"((?:[\x21-\x7e\x80-\xff](?:[\t \x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_REQUEST_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_REQUEST_TARGET = re.compile(r"/[\x21-\x7e]*")
# These say where a request ends or how the connection is used: only this module sets them.
_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "expect", "upgrade"})
_REQUEST_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t \x21-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_END_OF_HEAD = b"\r\n\r\n"


class HttpError(Exception):
    """An exchange did not complete."""


class HttpProtocolError(HttpError):
    """The peer's bytes are not the HTTP/1.1 that is understood here, or exceed a bound."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on what a server may send, in bytes.

    Attributes:
        max_head_bytes: Status line and headers of a response; also its trailers.
        max_chunk_bytes: One chunk of a chunked body.
        max_body_bytes: A body that is collected rather than streamed.
    """

    max_head_bytes: int = 32 << 10
    max_chunk_bytes: int = 64 << 20
    max_body_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of a response.

    Attributes:
        status: Three-digit status.
        minor_version: 1 for HTTP/1.1, 0 for HTTP/1.0.
        headers: Values by lower-case name; repeated headers are joined with a comma.
    """

    status: int
    minor_version: int
    headers: Mapping[str, str]

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case, or ``""``."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def keeps_connection(self) -> bool:
        """Whether the server allows another request on the connection."""
        options = {option.strip() for option in self.headers.get("connection", "").lower().split(",")}
        if "close" in options:
            return False
        return self.minor_version == 1 or "keep-alive" in options


def encode_request_head(
    method: str, target: str, host: str, headers: Mapping[str, str], content_length: int | None
) -> bytes:
    """Return the head of a request.

    Raises:
        ValueError: The target, a header name or a value holds what HTTP does
            not allow there, or a header is one that frames the message.
    """
    if not _REQUEST_TARGET.fullmatch(target):
        raise ValueError(f"request target {target!r} is not valid")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    for name, value in headers.items():
        if not _REQUEST_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise ValueError(f"header name {name!r} is not valid here")
        if not _REQUEST_VALUE.fullmatch(value):
            raise ValueError(f"the value of header {name} holds a control or non-Latin-1 character")
        lines.append(f"{name}: {value}")
    if content_length is not None:
        lines.append(f"Content-Length: {content_length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def parse_response_head(head: bytes) -> ResponseHead:
    """Parse a head, given without the empty line that ends it.

    Raises:
        HttpProtocolError: It is not a well-formed HTTP/1.0 or 1.1 response head.
    """
    lines = head.split(b"\r\n")
    status_line = _STATUS_LINE.fullmatch(lines[0])
    if status_line is None:
        raise HttpProtocolError("the answer does not start with an HTTP/1.1 status line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise HttpProtocolError("the answer holds a malformed header line")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return ResponseHead(int(status_line[2]), int(status_line[1]), headers)


class HeadReader:
    """Collects the bytes of a response head, and skips interim (1xx) responses.

    Args:
        max_bytes: Bound on everything up to the end of the final head.
    """

    __slots__ = ("_max_bytes", "_pending", "_used_bytes")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending = b""
        self._used_bytes = 0

    def feed(self, data: bytes) -> tuple[ResponseHead, bytes, int] | None:
        """Take bytes; return the head, the bytes that hold the body's start, and its position in them.

        Returns:
            ``None`` until the head is complete.

        Raises:
            HttpProtocolError: Not a response, or too large.
        """
        if self._pending:
            data = self._pending + data
        start = 0
        while True:
            end = data.find(_END_OF_HEAD, start)
            used_bytes = self._used_bytes + (len(data) if end < 0 else end) - start
            if used_bytes > self._max_bytes:
                raise HttpProtocolError(f"the answer's headers exceed {self._max_bytes} bytes")
            if end < 0:
                pending = data[start:]
                if not b"HTTP/1.".startswith(pending[:7]) or pending.count(b"\n") != pending.count(b"\r\n"):
                    # Whatever speaks here would never send the empty line that is waited for.
                    raise HttpProtocolError("the answer does not start with an HTTP/1.1 status line")
                self._pending = pending
                return None
            head = parse_response_head(data[start:end])
            start = end + len(_END_OF_HEAD)
            if head.status >= 200:
                return head, data, start
            if head.status == 101:
                raise HttpProtocolError("the server switched protocols without being asked to")
            self._used_bytes = used_bytes


class BodyDecoder(Protocol):
    """Finds the end of a body and hands on what is inside the framing."""

    ends_with_connection: bool

    def feed(self, data: bytes, start: int, sink: BodySink) -> int:
        """Take ``data[start:]``; return the position after the body's end, or -1 if it goes on.

        Raises:
            HttpProtocolError: The framing is damaged or exceeds a bound.
        """


def make_body_decoder(head: ResponseHead, limits: HttpLimits) -> BodyDecoder:
    """Return the decoder that a response's headers call for (to any request but HEAD).

    Raises:
        HttpProtocolError: The headers contradict each other, or use a coding that was not asked for.
    """
    headers = head.headers
    if headers.get("content-encoding", "identity").lower() not in {"identity", ""}:
        raise HttpProtocolError("the answer is compressed, which was not asked for")
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if head.status in {204, 304}:
        return LengthDecoder(0)
    if coding is not None:
        if length is not None or head.minor_version == 0:
            raise HttpProtocolError("the answer has both a transfer coding and a length, or is HTTP/1.0")
        if coding.lower() != "chunked":
            raise HttpProtocolError("the answer uses a transfer coding other than chunked")
        return ChunkedDecoder(limits)
    if length is not None:
        if not _LENGTH.fullmatch(length.encode("latin-1")):
            raise HttpProtocolError("the answer's Content-Length is not one number")
        return LengthDecoder(int(length))
    return UntilCloseDecoder()


class LengthDecoder:
    """A body of known length."""

    __slots__ = ("_remaining_bytes", "ends_with_connection")

    def __init__(self, length_bytes: int) -> None:
        self._remaining_bytes = length_bytes
        self.ends_with_connection = False

    def feed(self, data: bytes, start: int, sink: BodySink) -> int:
        """See :class:`BodyDecoder`."""
        stop = min(len(data), start + self._remaining_bytes)
        if stop > start:
            self._remaining_bytes -= stop - start
            sink(data, start, stop)
        return -1 if self._remaining_bytes else stop


class UntilCloseDecoder:
    """A body that ends with the connection."""

    __slots__ = ("ends_with_connection",)

    def __init__(self) -> None:
        self.ends_with_connection = True

    def feed(self, data: bytes, start: int, sink: BodySink) -> int:
        """See :class:`BodyDecoder`."""
        if start < len(data):
            sink(data, start, len(data))
        return -1


# Engines send chunks of a few sizes over and over; a dictionary is a third of
# the price of validating and parsing the line.
_KNOWN_SIZES: dict[bytes, int] = {}
_MAX_KNOWN_SIZES = 4096
_MAX_CHUNK_LINE_BYTES = 1024

_AT_SIZE, _IN_DATA, _AFTER_DATA, _IN_TRAILERS = range(4)


class ChunkedDecoder:
    """A chunked body. Pieces are handed on as they come, so no chunk is held in memory."""

    __slots__ = (
        "_limits",
        "_partial",
        "_remaining_bytes",
        "_state",
        "_trailer_bytes",
        "ends_with_connection",
    )

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._state = _AT_SIZE
        self._remaining_bytes = 0
        self._partial = b""  # Start of a size line, of the line end after a chunk, or of a trailer line.
        self._trailer_bytes = 0
        self.ends_with_connection = False

    def feed(self, data: bytes, start: int, sink: BodySink) -> int:
        """See :class:`BodyDecoder`."""
        if self._partial:
            # Rare: a read ended inside the framing, which is a few bytes long.
            shift = start - len(self._partial)
            data, self._partial = self._partial + data[start:], b""
            stop = self.feed(data, 0, sink)
            return stop if stop < 0 else stop + shift
        position, end = start, len(data)
        max_chunk_bytes = self._limits.max_chunk_bytes
        state = self._state
        # A sink that raises leaves the state behind; nothing is fed after that.
        while position < end:
            if state == _AT_SIZE:
                line_end = data.find(b"\r\n", position)
                if line_end < 0:
                    self._keep(data, position, _MAX_CHUNK_LINE_BYTES)
                    break
                line = data[position:line_end]
                size = _KNOWN_SIZES.get(line)
                if size is None:
                    size = _parse_chunk_line(line)
                if size > max_chunk_bytes:
                    raise HttpProtocolError(f"a chunk exceeds {max_chunk_bytes} bytes")
                position = line_end + 2
                chunk_end = position + size
                if size == 0:
                    state = _IN_TRAILERS
                elif chunk_end + 2 <= end:
                    # Nearly always: the whole chunk came in one read.
                    if data[chunk_end] != 0x0D or data[chunk_end + 1] != 0x0A:
                        raise HttpProtocolError("a chunk is not followed by a line end")
                    sink(data, position, chunk_end)
                    position = chunk_end + 2
                else:
                    state = _IN_DATA
                    self._remaining_bytes = size
            elif state == _IN_DATA:
                stop = min(end, position + self._remaining_bytes)
                self._remaining_bytes -= stop - position
                if self._remaining_bytes == 0:
                    state = _AFTER_DATA
                sink(data, position, stop)
                position = stop
            elif state == _AFTER_DATA:
                if not b"\r\n".startswith(data[position : position + 2]):
                    raise HttpProtocolError("a chunk is not followed by a line end")
                if position + 2 > end:
                    self._keep(data, position, 2)
                    break
                position += 2
                state = _AT_SIZE
            elif state == _IN_TRAILERS:
                line_end = data.find(b"\r\n", position)
                if line_end < 0:
                    self._keep(data, position, self._limits.max_head_bytes)
                    break
                self._trailer_bytes += line_end + 2 - position
                if self._trailer_bytes > self._limits.max_head_bytes:
                    raise HttpProtocolError(f"the trailers exceed {self._limits.max_head_bytes} bytes")
                if line_end == position:
                    return line_end + 2
                if not _HEADER_LINE.fullmatch(data, position, line_end):
                    raise HttpProtocolError("the answer holds a malformed trailer line")
                position = line_end + 2
        self._state = state
        return -1

    def _keep(self, data: bytes, position: int, max_bytes: int) -> None:
        if len(data) - position > max_bytes:
            raise HttpProtocolError("a line of the chunked framing is too long")
        self._partial = data[position:]


def _parse_chunk_line(line: bytes) -> int:
    match = _CHUNK_LINE.fullmatch(line)
    if match is None:
        raise HttpProtocolError("a chunk does not start with its size")
    size = int(match[1], 16)
    if len(line) <= 4 and len(_KNOWN_SIZES) < _MAX_KNOWN_SIZES:
        _KNOWN_SIZES[line] = size
    return size
