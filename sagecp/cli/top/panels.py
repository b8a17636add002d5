"""The panels of the screen. What they show is made by the pure functions beside this file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from sagecp.cli.top.event_view import event_lines
from sagecp.cli.top.fleet_view import FleetView, fleet_lines
from sagecp.cli.top.header_view import header_lines, key_line
from sagecp.cli.top.model import Picture
from sagecp.cli.top.panel import Panel
from sagecp.cli.top.queue_view import queue_lines
from sagecp.cli.top.strip_view import strip_lines
from sagecp.cli.top.text import Line

_MOUSE_STEP = 3


class HeaderPanel(Panel):
    """The state of the control plane; never dimmed, as it tells a lost connection."""

    def __init__(self, picture: Picture, *, server: str, read_only: bool) -> None:
        super().__init__(panel_id="header")
        self._picture, self._server, self._read_only = picture, server, read_only
        self.paused_s: float | None = None

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the three lines."""
        return header_lines(
            self._picture,
            width,
            time.monotonic(),
            server=self._server,
            read_only=self._read_only,
            paused_s=self.paused_s,
        )


class KeyPanel(Panel):
    """The keys."""

    def __init__(self, *, read_only: bool) -> None:
        super().__init__(panel_id="keys")
        self._read_only = read_only

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the line."""
        return [key_line(width, read_only=self._read_only)]


class ListPanel(Panel):
    """A panel that can have the focus and be scrolled."""

    can_focus = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "step(-1)", show=False),
        Binding("down,j", "step(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown,space", "page(1)", show=False),
        Binding("home,g", "end(-1)", show=False),
        Binding("end,G", "end(1)", show=False),
    ]

    def __init__(self, picture: Picture, *, panel_id: str) -> None:
        super().__init__(panel_id=panel_id)
        self._picture = picture

    @property
    def is_dimmed(self) -> bool:
        """Whether the picture is old."""
        return self._picture.is_stale

    def scroll_by(self, step: int) -> None:
        """Go so many lines further down."""
        raise NotImplementedError

    def action_step(self, step: int) -> None:
        """Go a line up or down."""
        self.scroll_by(step)
        self.update()

    def action_page(self, direction: int) -> None:
        """Go a page up or down."""
        self.scroll_by(direction * max(1, self.size.height - 3))
        self.update()

    def action_end(self, direction: int) -> None:
        """Go to the first or the last line."""
        self.scroll_by(direction * 1_000_000)
        self.update()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Go down."""
        self.action_step(_MOUSE_STEP)
        event.stop()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Go up."""
        self.action_step(-_MOUSE_STEP)
        event.stop()


class FleetPanel(ListPanel):
    """The instances.

    Attributes:
        view: Which are shown, in which order, and which one is chosen.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", show=False)]

    class Selected(Message):
        """Another instance was chosen."""

    class Opened(Message):
        """The chosen instance is to be shown in full."""

    def __init__(self, picture: Picture) -> None:
        super().__init__(picture, panel_id="fleet")
        self.view = FleetView()

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the table."""
        return fleet_lines(self._picture, self.view, width, height, time.monotonic(), focused=self.has_focus)

    def rearrange(self) -> None:
        """Choose and sort the rows anew, and show them."""
        self.view.arrange(self._picture)
        self.update()

    def visible_ids(self) -> list[str]:
        """Return the instances on the screen."""
        rows = max(0, self.size.height - 2)
        return [row.instance_id for row in self.view.rows[self.view.top : self.view.top + rows]]

    def scroll_by(self, step: int) -> None:
        """Choose another instance."""
        before = self.view.selected_id
        self.view.move(step)
        if self.view.selected_id != before:
            self.post_message(self.Selected())

    def action_open(self) -> None:
        """Show the chosen instance in full."""
        self.post_message(self.Opened())

    def on_click(self, event: events.Click) -> None:
        """Choose the instance under the pointer."""
        row = event.y - 2
        if 0 <= row < len(self.visible_ids()):
            self.view.go_to(self.view.top + row)
            self.update()
            self.post_message(self.Selected())


class StripPanel(Panel):
    """How the chosen instance goes."""

    def __init__(self, picture: Picture, instance_id: Callable[[], str]) -> None:
        super().__init__(panel_id="strip")
        self._picture, self._instance_id = picture, instance_id

    @property
    def is_dimmed(self) -> bool:
        """Whether the picture is old."""
        return self._picture.is_stale

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the two lines."""
        return strip_lines(self._picture, self._instance_id(), width, time.monotonic())


class QueuePanel(ListPanel):
    """What waits."""

    def __init__(self, picture: Picture) -> None:
        super().__init__(picture, panel_id="queues")
        self._top = 0

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the queues by class, tenant and model."""
        return queue_lines(self._picture, width, height, focused=self.has_focus, top=self._top)

    def scroll_by(self, step: int) -> None:
        """Scroll the tenants and models."""
        status = self._picture.status
        count = len(status.queued_by_tenant) + len(status.queued_by_model) + 8 if status else 0
        self._top = max(0, min(count - self.size.height + 1, self._top + step))


class EventPanel(ListPanel):
    """What happened."""

    def __init__(self, picture: Picture) -> None:
        super().__init__(picture, panel_id="events")
        self._top = 0
        self._seen_count = 0

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the latest events; while scrolled back, new ones do not move what is read."""
        new_count = self._picture.event_count - self._seen_count
        self._seen_count = self._picture.event_count
        if self._top:
            self._top = min(self._top + new_count, self._last_top())
        return event_lines(self._picture, width, height, focused=self.has_focus, top=self._top)

    def scroll_by(self, step: int) -> None:
        """Go back to older events, or towards the newest."""
        self._top = max(0, min(self._last_top(), self._top + step))

    def _last_top(self) -> int:
        return max(0, len(self._picture.events) - max(1, self.size.height - 1))
