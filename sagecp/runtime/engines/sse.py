"""Splits a byte stream of server-sent events into payloads.

The rules are those of the format, narrowed to what engines send, so that
damage shows instead of being skipped:

* A line ends with LF; one CR before it belongs to the line end. A CR elsewhere
  is content.
* ``data`` lines of one event are joined with LF. An event without data is no
  event.
* Lines that start with a colon are comments. ``event``, ``id`` and ``retry``
  are accepted and ignored. Any other field is an error.
* An event that the stream's end cuts off is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_EVENT_BYTES = 16 << 20
_IGNORED_FIELDS = frozenset({b"event", b"id", b"retry"})
_LF, _CR = 0x0A, 0x0D


class SseError(Exception):
    """The bytes are not server-sent events, or an event is larger than allowed."""


class SseSplitter:
    """Finds events in a byte stream, however the stream is cut into pieces.

    Nearly every piece is exactly one event with one line of data: that case
    copies the payload once and touches no other state.

    Args:
        on_event: Takes the data of each event, in order.
        max_event_bytes: Largest event, and largest line, that is accepted.
    """

    __slots__ = ("_data", "_data_bytes", "_max_event_bytes", "_on_event", "_partial")

    def __init__(self, on_event: Callable[[bytes], None], max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._on_event = on_event
        self._max_event_bytes = max_event_bytes
        self._partial = bytearray()  # A line whose end has not come yet.
        self._data: list[bytes] = []  # Data lines of an event whose end has not come yet.
        self._data_bytes = 0

    @property
    def in_event(self) -> bool:
        """Whether the bytes so far end inside an event or a line."""
        return bool(self._partial or self._data)

    def feed(self, data: bytes, start: int, stop: int) -> None:
        """Take ``data[start:stop]`` and report the events that end in it.

        Offsets instead of a slice, because the caller's bytes hold transfer
        framing around the piece and slicing would copy it twice.

        Raises:
            SseError: See the class.
        """
        if self._partial:
            start = self._finish_partial_line(data, start, stop)
        elif (
            not self._data
            and data.find(b"\n", start, stop) == stop - 2
            and data[stop - 1] == _LF
            and data[stop - 3] != _CR
            and data.startswith(b"data: ", start)
            and stop - start <= self._max_event_bytes
        ):
            # Nearly always: one event of one line.
            self._on_event(data[start + 6 : stop - 2])
            return
        while start < stop:
            line_end = data.find(b"\n", start, stop)
            if line_end < 0:
                self._keep(data[start:stop])
                return
            self._take_line(data[start:line_end])
            start = line_end + 1

    def _finish_partial_line(self, data: bytes, start: int, stop: int) -> int:
        """Join what was kept with the rest of its line; return where the next line starts."""
        line_end = data.find(b"\n", start, stop)
        if line_end < 0:
            self._keep(data[start:stop])
            return stop
        self._keep(data[start:line_end])
        line = bytes(self._partial)
        self._partial.clear()
        self._take_line(line)
        return line_end + 1

    def _keep(self, piece: bytes) -> None:
        if len(self._partial) + len(piece) + self._data_bytes > self._max_event_bytes:
            raise self._too_large()
        self._partial += piece

    def _take_line(self, line: bytes) -> None:
        if len(line) + self._data_bytes > self._max_event_bytes:
            raise self._too_large()
        line = line.removesuffix(b"\r")
        if not line:
            if self._data:
                payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                self._data.clear()
                self._data_bytes = 0
                self._on_event(payload)
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif name and name not in _IGNORED_FIELDS:
            raise SseError("the stream holds a line that is no server-sent event")

    def _too_large(self) -> SseError:
        return SseError(f"an event is larger than {self._max_event_bytes} bytes")
