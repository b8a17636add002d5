"""Waiting for what another process will be, without holding up the loop."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

WAIT_S = 60.0
"""How long a test waits for what is to come within seconds, on however busy a machine."""


async def becomes(
    probe: Callable[[], Awaitable[T]],
    accept: Callable[[T], bool],
    what: str,
    *,
    timeout_s: float = WAIT_S,
    interval_s: float = 0.02,
) -> T:
    """Ask until the answer is acceptable, and return it.

    A probe that fails counts as an answer that is not: what is asked may be down.

    Raises:
        AssertionError: It never was; shows the last answer. Or the probe says that it cannot be any more.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            value = await probe()
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - what is asked may be down in any way
            last = error
        else:
            if accept(value):
                return value
            last = value
        assert time.monotonic() < deadline_s, f"not so within {timeout_s:g} s: {what}; last: {last!r}"
        await asyncio.sleep(interval_s)


def note(figure: str) -> None:
    """Report a measured figure; pytest shows it with -s or -rP. No test depends on one."""
    sys.stdout.write(f"{figure}\n")
