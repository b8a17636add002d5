"""Waits until an instance is as it was ordered to be, and says how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import click

from sagecp.cli import render
from sagecp.cli.failures import CliError
from sagecp.cli.watch import LONGEST_SILENCE_S
from sagecp.client import ClientError, Instance, NotFoundError, SageClient, UnavailableError, convert
from sagecp.core.fleet_event import EventKind, EventSeverity
from sagecp.v1 import fleet_service_pb2, instance_pb2

_POLL_S = 0.25


class ProgressText(Protocol):
    """Says how far an instance is."""

    def __call__(self, instance: Instance, now: float | None = None) -> str:
        """Return a line. With ``now``, in Unix seconds, also for how long it takes."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is waited for.

    Attributes:
        is_reached: Whether an instance is as it should be.
        is_off: Whether it will not be so any more.
        text: How far it is.
        off: Raised when it is off.
        gone: Raised when the instance left the fleet.
        late: Returns what is raised when the time is over.
        on_interrupt: Said when the caller stops waiting.
    """

    is_reached: Callable[[instance_pb2.Instance], bool]
    is_off: Callable[[instance_pb2.Instance], bool]
    text: ProgressText
    off: CliError
    gone: CliError
    late: Callable[[Instance], CliError]
    on_interrupt: str


async def wait_for(
    client: SageClient, message: instance_pb2.Instance, goal: Goal, timeout_s: float | None
) -> instance_pb2.Instance:
    """Look at an instance until it is as it should be, and return it.

    Args:
        client: Who is asked.
        message: How it was last seen.
        goal: What is waited for.
        timeout_s: For how long; ``None``: as long as it takes.

    Raises:
        CliError: It will not be so, or not in time.
    """
    progress = _Progress(message, goal)
    try:
        async with asyncio.timeout(timeout_s):
            await _follow(client, progress, goal)
    except TimeoutError:
        raise goal.late(convert.instance(progress.message)) from None
    except asyncio.CancelledError:
        progress.end()
        click.echo(goal.on_interrupt, err=True)
        raise
    finally:
        progress.end()
    return progress.message


@contextlib.asynccontextmanager
async def telling_trouble(client: SageClient, instance_id: str, after_sequence: int) -> AsyncIterator[None]:
    """Say on standard error, meanwhile, what goes wrong with an order to an instance.

    Args:
        client: Who is asked.
        instance_id: Of the instance.
        after_sequence: Of the last event before the order.
    """

    async def tell() -> None:
        watched = client.watch_events(
            after_sequence=after_sequence,
            min_severity=EventSeverity.WARNING,
            kinds=[EventKind.INSTANCE_ORDERED],
            instance_id=instance_id,
        )
        # Whatever is wrong with the connection, the one who waits hears of it.
        with contextlib.suppress(ClientError):
            async for each in watched:
                click.echo(render.harmless(f"{instance_id}: {each.event.message}"), err=True)

    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _follow(client: SageClient, progress: _Progress, goal: Goal) -> None:
    query = fleet_service_pb2.GetInstanceRequest(instance_id=progress.message.spec.instance_id)
    answered_s = time.monotonic()
    while not goal.is_reached(progress.message):
        await asyncio.sleep(_POLL_S)
        try:
            response = await client.connection.unary(client.connection.fleet.GetInstance, query)
        except UnavailableError:
            if time.monotonic() - answered_s > LONGEST_SILENCE_S:
                raise
            progress.note_silence()
            continue
        except NotFoundError as error:
            raise goal.gone from error
        answered_s = time.monotonic()
        progress.show(response.instance)
        if goal.is_off(response.instance):
            raise goal.off


class _Progress:
    """Says on standard error how far it is: a line that changes on a terminal, else a line per change.

    Attributes:
        message: The instance as it was last seen.
    """

    def __init__(self, message: instance_pb2.Instance, goal: Goal) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._goal = goal
        self._shown = ""
        self._is_open = False
        self.message = message
        self.show(message)

    def show(self, message: instance_pb2.Instance) -> None:
        """Say how the instance is now."""
        self.message = message
        instance = convert.instance(message)
        news = self._goal.text(instance)
        if self._on_terminal:
            self._overwrite(self._goal.text(instance, time.time()))
        elif news != self._shown and not self._goal.is_reached(message):
            click.echo(render.harmless(news), err=True)
        self._shown = news

    def note_silence(self) -> None:
        """Say that the control plane does not answer."""
        text = f"{self.message.spec.instance_id}: the control plane does not answer; trying again"
        if self._on_terminal:
            self._overwrite(text)
        elif self._shown:
            click.echo(text, err=True)
        self._shown = ""

    def end(self) -> None:
        """Clear the line that changes."""
        if self._is_open:
            self._overwrite("")
            self._is_open = False

    def _overwrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        # Not by click, which takes what clears the rest of a line for a colour.
        sys.stderr.write(f"\r{render.harmless(text)[: width - 1]}\x1b[K")
        sys.stderr.flush()
        self._is_open = True
