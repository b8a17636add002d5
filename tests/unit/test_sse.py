"""Server-sent events: the same bytes give the same events, however reads cut them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.runtime.engines.sse import SseError, SseSplitter


def split(*pieces: bytes, max_event_bytes: int = 1 << 20) -> list[bytes]:
    events: list[bytes] = []
    splitter = SseSplitter(events.append, max_event_bytes)
    for piece in pieces:
        # Surrounded by bytes that are not the splitter's: it must keep to its range.
        splitter.feed(b"data: before\n\n" + piece + b"data: after\n\n", 14, 14 + len(piece))
    return events


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\r\n\r\n", [b"a"]),
        (b"data: a\n\r\ndata: b\r\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\ndata: b\ndata:\n\n", [b"a\nb\n"]),
        (b"data: a\n\ndata: b\n\ndata: c\n\n", [b"a", b"b", b"c"]),
        (b": keep-alive\n\ndata: a\n\n:\n\n", [b"a"]),
        (b"data: a\n: comment inside\ndata: b\n\n", [b"a\nb"]),
        (b"event: token\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"event: nothing\n\n\n\n", []),
        (b"data\n\n", [b""]),
        (b"data: \n\n", [b""]),
        (b"data: a\rb\n\n", [b"a\rb"]),
        (b"data: unfinished", []),
        (b"data: unfinished\n", []),
        (b"", []),
    ],
)
def test_events(stream: bytes, expected: list[bytes]) -> None:
    assert split(stream) == expected
    assert split(*(bytes([byte]) for byte in stream)) == expected
    for cut in range(len(stream)):
        assert split(stream[:cut], stream[cut:]) == expected


@pytest.mark.parametrize(
    "stream",
    [
        b"<html>502 Bad Gateway</html>\n\n",
        b"data: a\n\n\x00\xff\x00\n\n",
        b"daxa: a\n\n",
        b" data: a\n\n",
        b"\xef\xbb\xbfdata: a\n\n",
    ],
)
def test_what_is_no_event_is_an_error_and_not_skipped(stream: bytes) -> None:
    with pytest.raises(SseError, match="no server-sent event"):
        split(stream)


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 100 + b"\n\n",  # in one piece
        b"data: " + b"x" * 100,  # its end not even in sight
        b"data: xxxxxxxxx\n" * 10 + b"\n",  # over many lines
        b": " + b"x" * 100 + b"\n",  # no event at all, but a line
    ],
)
def test_an_event_has_a_largest_size(stream: bytes) -> None:
    for pieces in ([stream], [bytes([byte]) for byte in stream]):
        with pytest.raises(SseError, match="larger than 64 bytes"):
            split(*pieces, max_event_bytes=64)


def test_size_is_counted_for_each_event() -> None:
    stream = b"data: " + b"x" * 50 + b"\n\n"
    assert len(split(*[stream] * 10, max_event_bytes=64)) == 10
    assert len(split(*(bytes([byte]) for byte in stream * 10), max_event_bytes=64)) == 10


def test_it_knows_whether_it_is_inside_an_event() -> None:
    splitter = SseSplitter(lambda _: None)
    for piece, inside in [(b"data: a", True), (b"\n", True), (b"\n", False), (b": ", True), (b"\n", False)]:
        splitter.feed(piece, 0, len(piece))
        assert splitter.in_event is inside


LINE = st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").rstrip(b"\r"))
LINE_END = st.sampled_from([b"\n", b"\r\n"])
NOISE = st.sampled_from([b"", b": ping", b"event: x", b"id: 1", b"retry"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream and its events."""
    stream, expected = b"", []
    for lines in draw(st.lists(st.lists(LINE, min_size=1, max_size=3), max_size=8)):
        noise = draw(NOISE)
        if noise:
            stream += noise + draw(LINE_END)
        for line in lines:
            stream += b"data: " + line + draw(LINE_END)
        stream += draw(LINE_END)
        expected.append(b"\n".join(lines))
    return stream, expected


@settings(deadline=None)
@given(streams(), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_events(
    case: tuple[bytes, list[bytes]], cuts: list[int]
) -> None:
    stream, expected = case
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert split(*pieces) == expected


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6))
def test_any_bytes_give_events_or_the_one_error(pieces: list[bytes]) -> None:
    def outcome(*parts: bytes) -> list[bytes] | str:
        try:
            return split(*parts)
        except SseError as error:
            return str(error)

    assert outcome(*pieces) == outcome(b"".join(pieces))
