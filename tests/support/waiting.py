"""Waiting for what cannot be awaited as an event, and finding what was left running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], what: str = "", timeout_s: float = 10.0) -> None:
    """Let the loop run until a condition holds.

    Raises:
        AssertionError: It never did.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    turns = 0
    while not condition():
        assert loop.time() < deadline_s, f"not so within {timeout_s:g} s: {what or condition}"
        turns += 1
        # Most conditions hold within a few turns of the loop; others wait for a socket or a timer.
        await asyncio.sleep(0 if turns < 50 else 0.002)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run: to see that nothing happens."""
    for _ in range(count):
        await asyncio.sleep(0)


def other_tasks() -> set[asyncio.Task[object]]:
    """Return every task of the loop but the one that asks."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
