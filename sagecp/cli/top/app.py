"""The console itself: panels, keys, and what they lead to."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from rich.console import Console
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Input
from textual.worker import Worker

from sagecp.cli.top.fleet_view import SORT_KEYS
from sagecp.cli.top.model import Picture
from sagecp.cli.top.orders import Orders
from sagecp.cli.top.panel import Panel
from sagecp.cli.top.panels import (
    EventPanel,
    FleetPanel,
    HeaderPanel,
    KeyPanel,
    ListPanel,
    QueuePanel,
    StripPanel,
)
from sagecp.cli.top.source import Watcher
from sagecp.cli.top.style import STYLE
from sagecp.client import SageClient

# Figures of the header grow old even when nothing comes.
_CLOCK_S = 1.0
# Its name depends on the version of Textual.
_ANSI_THEMES = ("ansi-dark", "textual-ansi")
_DRAW_PAUSE_S = 0.1
# Lines of the header, the strip and the keys; and what the panels get at least.
_FIXED_HEIGHT = 6
_LEAST_FLEET_HEIGHT, _LEAST_BOTTOM_HEIGHT, _BOTTOM_SHARE = 8, 6, 0.28


class TopApp(App[None]):
    """`sagecp top`.

    Args:
        client: To the control plane; one that does not retry by itself.
        read_only: Whether keys that change something are refused.
        interval_s: Between two reads.
        backoff_s: Bounds of the pause after a lost connection.

    Attributes:
        picture: What was read.
        failure: The defect that ended the console, if one did.
    """

    CSS = STYLE
    TITLE = "sagecp top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", show=False),
        Binding("question_mark,h", "help", show=False),
        Binding("i", "details", show=False),
        Binding("d", "drain", show=False),
        Binding("r", "resume", show=False),
        Binding("w", "sleep", show=False),
        Binding("P", "policy", show=False),
        Binding("e", "explain(True)", show=False),
        Binding("E", "explain(False)", show=False),
        Binding("s", "sort(1)", show=False),
        Binding("S", "sort(-1)", show=False),
        Binding("slash", "filter", show=False),
        Binding("z", "zoom", show=False),
        Binding("p", "pause", show=False),
        Binding("escape", "leave", show=False),
    ]

    def __init__(
        self,
        client: SageClient,
        *,
        read_only: bool = False,
        interval_s: float = 1.0,
        backoff_s: tuple[float, float] = (0.5, 8.0),
    ) -> None:
        # Shades of grey say nothing on a terminal of 16 colours, and NO_COLOR wants none; the
        # terminal's own colours can be told from each other, or be left out.
        self._has_few_colors = "NO_COLOR" in os.environ or Console().color_system in {None, "standard"}
        super().__init__(ansi_color=True if self._has_few_colors else None)
        self.client = client
        self.read_only = read_only
        self.picture = Picture()
        self.failure: Exception | None = None
        self.fleet = FleetPanel(self.picture)
        self._header = HeaderPanel(self.picture, server=client.connection.target, read_only=read_only)
        self._strip = StripPanel(self.picture, lambda: self.fleet.view.selected_id)
        self._filter = Input(
            placeholder="words of an id, a state, a model, a host; Esc shows all", id="filter"
        )
        queues, happened = QueuePanel(self.picture), EventPanel(self.picture)
        self._bottom = Horizontal(queues, happened, id="bottom")
        keys = KeyPanel(read_only=read_only)
        self._panels: list[Panel] = [self._header, self.fleet, self._strip, queues, happened, keys]
        self._keys = keys
        self._watch_worker: Worker[None] | None = None
        self._watcher = Watcher(
            client,
            self.picture,
            on_change=self._show_soon,
            visible_ids=self.fleet.visible_ids,
            interval_s=interval_s,
            backoff_s=backoff_s,
        )
        self._is_due = False
        self._fleet_height: int | None = None
        self.orders = Orders(self)

    def compose(self) -> ComposeResult:
        """Lay the panels out."""
        yield self._header
        yield self.fleet
        yield self._strip
        yield self._bottom
        yield self._filter
        yield self._keys

    def on_mount(self) -> None:
        """Begin to read."""
        if self._has_few_colors:
            self.theme = next((name for name in _ANSI_THEMES if name in self.available_themes), self.theme)
        self._filter.display = False
        self.fleet.focus()
        self.set_interval(_CLOCK_S, self._header.update)
        self._watch()

    def _watch(self) -> None:
        self._watch_worker = self.run_worker(self._watcher.run(), name="watcher", exit_on_error=True)

    # What came is shown a moment later, so that many changes are drawn once.

    def _show_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self.set_timer(_DRAW_PAUSE_S, self.show_picture)

    def show_picture(self) -> None:
        """Draw what changed."""
        self._is_due = False
        if self._is_covered:
            # It is drawn when that goes.
            return
        self.fleet.view.arrange(self.picture)
        self._share_room()
        for panel in self._panels:
            panel.update()

    @property
    def _is_covered(self) -> bool:
        """Whether a screen that is read or answered is over the panels, or all is over."""
        return len(self.screen_stack) != 1

    def _share_room(self) -> None:
        """Give the table what it needs, but not all: a small fleet leaves the rest to what happens."""
        room = self.size.height - _FIXED_HEIGHT
        bottom = max(_LEAST_BOTTOM_HEIGHT, int(room * _BOTTOM_SHARE))
        wanted = max(_LEAST_FLEET_HEIGHT, len(self.picture.instances) + 3)
        height = None if self.screen.has_class("zoomed") else max(3, min(wanted, room - bottom))
        if height != self._fleet_height:
            self._fleet_height = height
            self.fleet.styles.height = "1fr" if height is None else height

    def on_resize(self) -> None:
        """Share the room anew."""
        self._show_soon()

    def on_fleet_panel_selected(self) -> None:
        """Show how the newly chosen instance goes."""
        self._strip.update()

    def on_fleet_panel_opened(self) -> None:
        """Show the chosen instance in full."""
        self.action_details()

    # Looking

    def action_sort(self, step: int) -> None:
        """Sort by the next column."""
        view = self.fleet.view
        view.sort_index = (view.sort_index + step) % len(SORT_KEYS)
        view.top = 0
        self.fleet.rearrange()

    def action_filter(self) -> None:
        """Ask for words."""
        if self._is_covered:
            return
        self._filter.display = True
        self._filter.value = self.fleet.view.filter_text
        self._filter.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what matches while it is typed."""
        self.fleet.view.filter_text = event.value.strip()
        self.fleet.rearrange()
        self._strip.update()

    def on_input_submitted(self, _event: Input.Submitted) -> None:
        """Keep the filter."""
        self._close_filter()

    def action_leave(self) -> None:
        """Leave the filter and show all, or give the screen back to all panels."""
        if self._is_covered:
            return
        if self._filter.display or self.fleet.view.filter_text:
            self._filter.value = ""
            self.fleet.view.filter_text = ""
            self.fleet.rearrange()
            self._close_filter()
        elif self.screen.has_class("zoomed"):
            self.action_zoom()

    def _close_filter(self) -> None:
        self._filter.display = False
        self.fleet.focus()

    def action_zoom(self) -> None:
        """Give the panel with the focus the whole screen, or take it back."""
        if self._is_covered:
            return
        panel = self.focused
        zoomed = not self.screen.has_class("zoomed")
        if zoomed and not isinstance(panel, ListPanel):
            return
        self.screen.set_class(zoomed, "zoomed")
        for each in self._panels:
            if isinstance(each, ListPanel):
                each.display = not zoomed or each is panel
        self._strip.display = not zoomed or panel is self.fleet
        self._bottom.display = not zoomed or panel is not self.fleet
        self.call_after_refresh(self.show_picture)

    def action_pause(self) -> None:
        """Hold the picture, or let it go on."""
        if self._watch_worker is not None:
            self._watch_worker.cancel()
            self._watch_worker = None
            self._header.paused_s = time.monotonic()
        else:
            self._header.paused_s = None
            self._watch()
        self._header.update()

    @property
    def is_paused(self) -> bool:
        """Whether the picture is held."""
        return self._watch_worker is None

    def action_help(self) -> None:
        """Explain the keys and the columns."""
        self.orders.show_help()

    def action_details(self) -> None:
        """Show the chosen instance in full."""
        self.orders.show_details(self.fleet.view.selected_id)

    def action_explain(self, of_instance: bool) -> None:
        """List recent requests, to explain one."""
        self.orders.explain(self.fleet.view.selected_id if of_instance else "")

    # Acting

    def action_drain(self) -> None:
        """Drain the chosen instance."""
        self.orders.drain(self.fleet.view.selected_id)

    def action_resume(self) -> None:
        """Have the chosen instance take work again."""
        self.orders.resume(self.fleet.view.selected_id)

    def action_sleep(self) -> None:
        """Have the chosen instance sleep, or wake up."""
        self.orders.sleep_or_wake(self.fleet.view.selected_id)

    def action_policy(self) -> None:
        """Change how requests are ordered and placed."""
        self.orders.change_policy()

    # Ending

    def _handle_exception(self, error: Exception) -> None:
        if not self.screen_stack:
            # All is over; what Textual makes of keys that were typed meanwhile is of no interest.
            return
        # The command line turns it into a line; a traceback is for --debug.
        self.failure = self.failure or error
        super()._handle_exception(error)

    def _print_error_renderables(self) -> None:
        self._exit_renderables.clear()
