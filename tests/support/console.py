"""`sagecp top` without a terminal: what is on its screen, and its keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from textual import events
from textual.pilot import Pilot

from sagecp.cli.top.app import TopApp
from sagecp.client import NO_RETRY, SageClient

WAIT_S = 20.0


class Console:
    """A running console.

    Attributes:
        app: The console itself.
    """

    def __init__(self, app: TopApp, pilot: Pilot[None]) -> None:
        self.app = app
        self._pilot = pilot

    @property
    def lines(self) -> list[str]:
        """What is on the screen, line by line, each exactly as wide as the screen."""
        strips = self.app.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip) for strip in strips]

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(self.lines)

    def line_with(self, text: str) -> str:
        """Return the first line that has a text."""
        return next((line for line in self.lines if text in line), "")

    def press(self, *keys: str) -> None:
        """Press keys, one after the other; nothing is waited for."""
        for key in keys:
            character = key if len(key) == 1 else {"slash": "/", "question_mark": "?"}.get(key)
            self.app.post_message(events.Key(key, character))

    async def until(self, *texts: str, absent: str = "") -> str:
        """Wait until the screen has every text, and not the absent one; return what is on it.

        Raises:
            AssertionError: It never has.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + WAIT_S
        while True:
            shown = self.text
            if all(text in shown for text in texts) and not (absent and absent in shown):
                return shown
            assert loop.time() < end_s, f"{texts} {absent and f'without {absent!r} '}never showed:\n{shown}"
            await asyncio.sleep(0.01)

    async def resize(self, width: int, height: int) -> None:
        """Give the terminal another size."""
        await self._pilot.resize_terminal(width, height)


@contextlib.asynccontextmanager
async def running_console(
    address: str, *, size: tuple[int, int] = (80, 24), **options: Any
) -> AsyncIterator[Console]:
    """Run a console against a server until the context ends."""
    options.setdefault("interval_s", 0.05)
    options.setdefault("backoff_s", (0.02, 0.1))
    async with SageClient(address, retry=NO_RETRY, timeout_s=WAIT_S) as client:
        app = TopApp(client, **options)
        async with app.run_test(size=size, notifications=True) as pilot:
            yield Console(app, pilot)
