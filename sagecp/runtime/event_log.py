"""What happened to the fleet of late, in memory, and those who watch it happen."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sagecp.core.errors import TooManyStreamsError
from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent

CAPACITY = 10_000
"""Events that are kept."""
RECENT_WARNING_COUNT = 20
"""Warnings and errors that are shown with the state of the control plane."""
MAX_WATCH_COUNT = 1_000
"""Most watchers at once."""
MAX_MESSAGE_LENGTH = 1_024
"""A longer message is cut: what agents and engines say is no measure."""
# After so many events that it does not want, a watcher lets others run.
_SCAN_COUNT = 1_000


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Chooses among events.

    Attributes:
        min_severity: This one and above.
        kinds: Only these; empty: all.
        instance_id: Only of this instance; ``""``: all, and what concerns none.
    """

    min_severity: EventSeverity = EventSeverity.INFO
    kinds: frozenset[EventKind] = frozenset()
    instance_id: str = ""

    def passes(self, event: FleetEvent) -> bool:
        """Return whether an event is wanted."""
        return (
            event.severity >= self.min_severity
            and (not self.kinds or event.kind in self.kinds)
            and (not self.instance_id or event.instance_id == self.instance_id)
        )


class EventLog:
    """The latest events of this process, numbered from 1. One event loop owns it.

    Args:
        wall_time: Unix seconds.
        capacity: Events that are kept.

    Attributes:
        last_sequence: Number of the latest event; 0: there was none.
        warnings: The latest events that somebody should look at, the latest last.
        counts: How many there were of each kind and severity.
    """

    def __init__(self, wall_time: Callable[[], float], capacity: int = CAPACITY) -> None:
        self._wall_time = wall_time
        self._capacity = capacity
        # The event with number n is at n modulo the capacity.
        self._ring: list[FleetEvent] = []
        self._watches: set[EventWatch] = set()
        self.last_sequence = 0
        self.warnings: deque[FleetEvent] = deque(maxlen=RECENT_WARNING_COUNT)
        self.counts: Counter[tuple[EventKind, EventSeverity]] = Counter()

    @property
    def first_sequence(self) -> int:
        """Number of the oldest event that is kept; one above the last where there is none."""
        return self.last_sequence - len(self._ring) + 1

    def add(
        self,
        severity: EventSeverity,
        kind: EventKind,
        message: str,
        *,
        instance_id: str = "",
        request_id: str = "",
        attributes: Mapping[str, str] | None = None,
    ) -> FleetEvent:
        """Keep an event, and let those who watch have it."""
        self.last_sequence += 1
        self.counts[kind, severity] += 1
        if len(message) > MAX_MESSAGE_LENGTH:
            message = message[: MAX_MESSAGE_LENGTH - 1] + "…"
        event = FleetEvent(
            sequence=self.last_sequence,
            time_s=self._wall_time(),
            severity=severity,
            kind=kind,
            message=message,
            instance_id=instance_id,
            request_id=request_id,
            attributes=attributes or {},
        )
        if len(self._ring) < self._capacity:
            self._ring.append(event)
        else:
            self._ring[(self.last_sequence - 1) % self._capacity] = event
        if severity >= EventSeverity.WARNING:
            self.warnings.append(event)
        for watch in self._watches:
            watch.wake()
        return event

    def event(self, sequence: int) -> FleetEvent:
        """Return the event with a number; it must be kept."""
        return self._ring[(sequence - 1) % self._capacity]

    def newest_first(self, wanted: EventFilter, before_sequence: int | None = None) -> Iterator[FleetEvent]:
        """Yield the events that are wanted, the newest first; those before a number where one is given."""
        last = self.last_sequence if before_sequence is None else before_sequence - 1
        for sequence in range(min(last, self.last_sequence), self.first_sequence - 1, -1):
            event = self.event(sequence)
            if wanted.passes(event):
                yield event

    def watch(self, wanted: EventFilter, after_sequence: int | None = None) -> EventWatch:
        """Return an iterator over what happens from now on, or since a number. Use it as a context.

        A number above the last is one of an earlier process: then everything that is kept is new.

        Raises:
            TooManyStreamsError: Too many watch already.
        """
        if len(self._watches) >= MAX_WATCH_COUNT:
            raise TooManyStreamsError(
                f"{MAX_WATCH_COUNT} streams watch events already, the limit; end some, or poll ListEvents",
                retry_after_s=1.0,
            )
        if after_sequence is None:
            after_sequence = self.last_sequence
        elif after_sequence > self.last_sequence:
            after_sequence = 0
        watch = EventWatch(self, wanted, after_sequence, self._watches.discard)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End every watch, when it has had what was added so far."""
        for watch in list(self._watches):
            watch.end()


class EventWatch:
    """One who watches. What waits for it is what the log keeps: no memory of its own, however slow it is.

    Yields events with the number of those that were dropped since the last one it was given, be
    they wanted or not.
    """

    def __init__(
        self,
        log: EventLog,
        wanted: EventFilter,
        after_sequence: int,
        forget: Callable[[EventWatch], None],
    ) -> None:
        self._log = log
        self._wanted = wanted
        self._seen_sequence = after_sequence
        self._skipped_count = 0
        self._forget = forget
        self._news = asyncio.Event()
        self._ended = False

    def __enter__(self) -> EventWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget(self)

    def wake(self) -> None:
        """There is a new event."""
        self._news.set()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._forget(self)
        self._news.set()

    def __aiter__(self) -> EventWatch:
        return self

    async def __anext__(self) -> tuple[FleetEvent, int]:
        scanned_count = 0
        while True:
            self._news.clear()
            while self._seen_sequence < self._log.last_sequence:
                first = self._log.first_sequence
                if self._seen_sequence + 1 < first:
                    self._skipped_count += first - 1 - self._seen_sequence
                    self._seen_sequence = first - 1
                self._seen_sequence += 1
                event = self._log.event(self._seen_sequence)
                if self._wanted.passes(event):
                    skipped_count, self._skipped_count = self._skipped_count, 0
                    return event, skipped_count
                scanned_count += 1
                if scanned_count % _SCAN_COUNT == 0:
                    await asyncio.sleep(0)
            if self._ended:
                raise StopAsyncIteration
            await self._news.wait()
