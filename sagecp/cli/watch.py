"""Watches things by asking again and again, and tells which of them have changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import click

from sagecp.client import NotFoundError, SageClient, UnavailableError

T = TypeVar("T")

# A control plane that restarts is waited for; one that stays away is not.
LONGEST_SILENCE_S = 60.0
_MOST_LOOKED_UP = 50


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """Where the things that are watched come from.

    Attributes:
        fetch: Returns those that match.
        fetch_one: Returns one by its id; raises `NotFoundError` where it is no more.
        identify: Returns the id of a thing.
        news: Returns what a change of is worth telling.
        is_over: Whether nothing more will happen to a thing.
        gone: Returns how a thing is shown that is no more.
        ends: Whether the watch ends when everything is over or gone.
    """

    fetch: Callable[[SageClient], Awaitable[Sequence[T]]]
    fetch_one: Callable[[SageClient, str], Awaitable[T]]
    identify: Callable[[T], str]
    news: Callable[[T], Hashable]
    is_over: Callable[[T], bool]
    gone: Callable[[T], T]
    ends: bool = False


class Patience:
    """Bears with a control plane that does not answer, for a while, and says so once."""

    def __init__(self) -> None:
        self._silent_since_s: float | None = None

    def answered(self) -> None:
        """Note an answer."""
        self._silent_since_s = None

    def bear(self, error: UnavailableError) -> None:
        """Note that there was none.

        Raises:
            UnavailableError: It has been too long.
        """
        now = time.monotonic()
        if self._silent_since_s is None:
            self._silent_since_s = now
            click.echo("the control plane does not answer; trying again", err=True)
        elif now - self._silent_since_s > LONGEST_SILENCE_S:
            raise error


async def watch(
    client: SageClient, source: Source[T], interval_s: float, show: Callable[[Sequence[T]], None]
) -> None:
    """Show everything once, and then what changes, until the source ends or the caller leaves.

    Args:
        client: Who is asked.
        source: For what.
        interval_s: How often.
        show: Called with the things that are new or have changed.

    Raises:
        ClientError: It went wrong, or nobody answered for a minute.
    """
    known: dict[str, T] = {}
    # The first answer decides whether there is anything to watch; later failures may pass.
    changed = _changes(source, known, await source.fetch(client))
    show(changed)
    patience = Patience()
    while not source.ends or not all(source.is_over(thing) for thing in known.values()):
        await asyncio.sleep(interval_s)
        try:
            found = await source.fetch(client)
            changed = [*await _missing(client, source, known, found), *_changes(source, known, found)]
        except UnavailableError as error:
            patience.bear(error)
            continue
        except NotFoundError:
            # The one thing that is watched is no more.
            changed = [source.gone(thing) for thing in known.values()]
            known.clear()
        patience.answered()
        if changed:
            show(changed)


def _changes(source: Source[T], known: dict[str, T], found: Sequence[T]) -> list[T]:
    """Take in what was found; return what is new in it."""
    changed = []
    for thing in found:
        name = source.identify(thing)
        before = known.get(name)
        if before is None or source.news(before) != source.news(thing):
            changed.append(thing)
        known[name] = thing
    return changed


async def _missing(client: SageClient, source: Source[T], known: dict[str, T], found: Sequence[T]) -> list[T]:
    """Look after what is not found any more: it is over, or gone, or only does not match now."""
    here = {source.identify(thing) for thing in found}
    changed = []
    looked_up = 0
    for name in [name for name in known if name not in here]:
        if source.is_over(known[name]):
            del known[name]
        elif looked_up < _MOST_LOOKED_UP:
            looked_up += 1
            try:
                thing = await source.fetch_one(client, name)
            except NotFoundError:
                thing = source.gone(known.pop(name))
            else:
                if source.news(thing) == source.news(known[name]):
                    continue
                known[name] = thing
            changed.append(thing)
    return changed
