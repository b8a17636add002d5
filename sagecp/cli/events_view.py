"""What `sagecp events` asks for and prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from sagecp.cli import render
from sagecp.cli.connect import talk
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import is_for_programs, print_entry
from sagecp.cli.watch import LONGEST_SILENCE_S
from sagecp.client import RetryPolicy, SageClient
from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent
from sagecp.wire.events import event_to_proto

_DAY_S = 86_400.0
# A person who mistyped an address hears of it at once; a stream that broke is taken up again.
_RETRY = RetryPolicy(max_attempt_count=1, resume_s=LONGEST_SILENCE_S)
_WIDE = (
    render.Column("SEQUENCE", right=True),
    render.Column("TIME"),
    render.Column("SEVERITY", state=True),
    render.Column("KIND", optional=True),
    render.Column("INSTANCE", flexible=True),
    render.Column("REQUEST", flexible=True, optional=True),
    render.Column("MESSAGE", flexible=True, least_width=24),
    render.Column("ATTRIBUTES", flexible=True, optional=True),
)
_TABLE = (
    render.Column("TIME"),
    render.Column("SEVERITY", state=True),
    render.Column("KIND", optional=True),
    render.Column("ABOUT", flexible=True),
    render.Column("MESSAGE", flexible=True, least_width=50),
)
Show = Callable[[Sequence[FleetEvent]], None]


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are asked for.

    Attributes:
        severity: Name of the least, in any case; empty: all.
        kinds: Names, in any case; empty: all.
        instance_id: Empty: all.
        after_sequence: Only those after it.
    """

    severity: str = ""
    kinds: Sequence[str] = ()
    instance_id: str = ""
    after_sequence: int = 0

    @property
    def min_severity(self) -> EventSeverity | None:
        """The least severity; ``None``: any."""
        return EventSeverity[self.severity.upper()] if self.severity else None

    @property
    def event_kinds(self) -> list[EventKind]:
        """The kinds."""
        return [EventKind[name.upper()] for name in self.kinds]


def run(
    connection: ServerOptions,
    only: EventFilter,
    show: Show,
    *,
    limit: int,
    since_s: float | None,
    follow: bool,
) -> None:
    """List events, the latest last, and go on with what happens if that is asked for.

    Args:
        connection: Where and how.
        only: Which ones.
        show: What prints them.
        limit: Most of those that have happened; 0: all.
        since_s: Of those, only of this time before now, in seconds.
        follow: Whether to go on.
    """

    async def conversation(client: SageClient) -> None:
        # Asked for first, so that nothing falls between the list and the stream.
        last_sequence = (await client.get_status()).last_event_sequence if follow else 0
        past = await _past(client, only, limit, None if since_s is None else time.time() - since_s)
        show(past)
        if follow:
            after = max([last_sequence, *(event.sequence for event in past)])
            await _follow(client, only, max(after, only.after_sequence), show)

    talk(connection, conversation, _RETRY)


async def _past(client: SageClient, only: EventFilter, limit: int, after_s: float | None) -> list[FleetEvent]:
    found: list[FleetEvent] = []
    listed = client.list_events(
        min_severity=only.min_severity, kinds=only.event_kinds, instance_id=only.instance_id
    )
    async for event in listed:
        if event.sequence <= only.after_sequence or (after_s is not None and event.time_s < after_s):
            break
        found.append(event)
        if limit and len(found) == limit:
            break
    return found[::-1]


async def _follow(client: SageClient, only: EventFilter, after_sequence: int, show: Show) -> None:
    watched = client.watch_events(
        after_sequence=after_sequence,
        min_severity=only.min_severity,
        kinds=only.event_kinds,
        instance_id=only.instance_id,
    )
    async for each in watched:
        if each.skipped_count:
            click.echo(f"{render.plural(each.skipped_count, 'event')} before this one were dropped", err=True)
        show([each.event])


def printer(output: str, *, headers: bool) -> Show:
    """Return what prints events."""
    wide = output == "wide"
    table = render.TablePrinter(_WIDE if wide else _TABLE, headers=headers)

    def show(events: Sequence[FleetEvent]) -> None:
        if is_for_programs(output):
            for event in events:
                print_entry(event_to_proto(event), output)
        else:
            table.print([_wide_row(event) if wide else _row(event) for event in events])

    return show


def _row(event: FleetEvent) -> list[str]:
    about = event.instance_id or event.request_id
    return [
        _short_time(event.time_s),
        event.severity.name,
        event.kind.name.lower(),
        about or render.NONE,
        event.message,
    ]


def _wide_row(event: FleetEvent) -> list[str]:
    return [
        str(event.sequence),
        render.clock_time(event.time_s),
        event.severity.name,
        event.kind.name.lower(),
        event.instance_id or render.NONE,
        event.request_id or render.NONE,
        event.message,
        ", ".join(f"{key}={value}" for key, value in sorted(event.attributes.items())) or render.NONE,
    ]


def _short_time(moment_s: float) -> str:
    """Return the time of day, with the day where it is another one."""
    is_recent = abs(time.time() - moment_s) < _DAY_S / 2
    return time.strftime("%H:%M:%S" if is_recent else "%m-%d %H:%M:%S", time.localtime(moment_s))
