"""Screens over the console: a choice to make, and a text to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from sagecp.cli.top.text import Line, plain

# A longer list gets the whole screen.
_MOST_IN_A_BOX = 8
_HINT = "Enter chooses, Esc goes back"


@dataclass(frozen=True, slots=True)
class Choice:
    """Something that can be chosen.

    Attributes:
        choice_id: What the dialog returns.
        text: As it is shown.
        key: Chooses it at once; ``""``: none.
        enabled: Whether it can be chosen; others are headings.
    """

    choice_id: str
    text: str
    key: str = ""
    enabled: bool = True


class ChoiceDialog(ModalScreen[str]):
    """Asks for a choice; dismissed with its id, or with ``""`` when there is none.

    Args:
        heading: What it is about.
        text: What should be known before.
        choices: At least one.
        chosen_id: The one that is highlighted at first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "go_back", show=False)]

    def __init__(
        self,
        heading: str,
        text: str,
        choices: Sequence[Choice],
        *,
        chosen_id: str = "",
    ) -> None:
        super().__init__()
        self._heading, self._text = heading, text
        self._choices, self._chosen_id = choices, chosen_id
        self._is_left = False
        # Held, because it may be asked for before it is on the screen and after it left it.
        self._options = OptionList(
            *(
                Option(
                    Text(plain(each.text), "" if each.enabled else "bold"), each.choice_id, not each.enabled
                )
                for each in choices
            )
        )
        self.set_class(len(choices) > _MOST_IN_A_BOX, "wide")

    def compose(self) -> ComposeResult:
        """Lay the dialog out."""
        with Vertical(classes="dialog"):
            yield Static(Text(plain(self._heading)), classes="heading")
            if self._text:
                yield Static(Text(plain(self._text)), classes="words")
            yield self._options
            keys = ", ".join(each.key for each in self._choices if each.key)
            yield Static(Text(f"{_HINT}; keys: {keys}" if keys else _HINT), classes="hint")

    def on_mount(self) -> None:
        """Highlight what is to be highlighted."""
        for index, each in enumerate(self._choices):
            if each.enabled and (each.choice_id == self._chosen_id or not self._chosen_id):
                self._options.highlighted = index
                return

    def on_key(self, event: events.Key) -> None:
        """Choose by key."""
        for each in self._choices:
            if each.enabled and each.key and event.character == each.key:
                event.stop()
                self._leave(each.choice_id)
                return

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Return the choice."""
        self._leave(event.option.id or "")

    def action_go_back(self) -> None:
        """Return without a choice."""
        self._leave("")

    def _leave(self, choice_id: str) -> None:
        # Keys that were typed before it was gone come here as well.
        if not self._is_left:
            self._is_left = True
            self.dismiss(choice_id)


class TextScreen(ModalScreen[None]):
    """A text to read; it may change while it is read.

    Args:
        heading: What it is about.
        lines: Makes the text for a width.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "go_back", show=False),
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move(-15)", show=False),
        Binding("pagedown,space", "move(15)", show=False),
        Binding("home,g", "move(-100000)", show=False),
        Binding("end,G", "move(100000)", show=False),
    ]

    def __init__(self, heading: str, lines: Callable[[int], Sequence[Line]]) -> None:
        super().__init__()
        self._lines = lines
        # Held, because keys may come before they are on the screen and after they left it.
        self._heading = Static(Text(plain(heading)), classes="heading")
        self._body = Static(id="text")
        self._scroll = VerticalScroll(self._body)
        self._shown: Text | None = None
        self._is_left = False

    def compose(self) -> ComposeResult:
        """Lay the screen out."""
        with Vertical(classes="dialog"):
            yield self._heading
            yield self._scroll
            yield Static(Text("Esc goes back, arrows scroll"), classes="hint")

    def on_mount(self) -> None:
        """Lay the text out."""
        self.call_after_refresh(self.show)

    def on_resize(self) -> None:
        """Lay the text out for the new size."""
        self.call_after_refresh(self.show)

    def show(self) -> None:
        """Make the text anew."""
        width = max(20, self._scroll.scrollable_content_region.width)
        text = Text(no_wrap=True, overflow="ellipsis")
        for line in self._lines(width):
            for piece, style in line:
                text.append(piece, style or None)
            text.append("\n")
        if text != self._shown:
            self._shown = text
            self._body.update(text)

    def set_heading(self, heading: str) -> None:
        """Say what it is about."""
        self._heading.update(Text(plain(heading)))

    def action_move(self, lines: int) -> None:
        """Scroll."""
        self._scroll.scroll_relative(y=lines, animate=False)

    def action_go_back(self) -> None:
        """Go back to the console."""
        # Keys that were typed before it was gone come here as well.
        if not self._is_left:
            self._is_left = True
            self.dismiss()
