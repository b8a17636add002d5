"""A panel of lines that draws only those that changed."""

from __future__ import annotations

from functools import lru_cache

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from sagecp.cli.top.text import Line, dimmed, fit_line


@lru_cache(maxsize=256)
def _style(words: str) -> Style:
    return Style.parse(words) if words else Style.null()


class Panel(Widget):
    """Shows lines made by :meth:`lines`, and nothing else.

    A screen of figures changes in few places at a time: `update` makes the lines
    anew, which is cheap, and has only those drawn that differ, which is not.
    """

    def __init__(self, *, panel_id: str) -> None:
        super().__init__(id=panel_id)
        self._drawn: list[Line] = []

    def lines(self, width: int, height: int) -> list[Line]:
        """Return what to show, each line exactly so wide; missing ones are blank."""
        raise NotImplementedError

    @property
    def is_dimmed(self) -> bool:
        """Whether all is shown as something that may be no longer so."""
        return False

    def update(self) -> None:
        """Make the lines anew, and draw those that changed."""
        width, height = self.size
        if not width or not height or not self.display:
            return
        made = self._made(width, height)
        for y, line in enumerate(made):
            if y >= len(self._drawn) or line != self._drawn[y]:
                self.refresh(Region(0, y, width, 1))
        self._drawn = made

    def _made(self, width: int, height: int) -> list[Line]:
        made = self.lines(width, height)[:height]
        if self.is_dimmed:
            made = [dimmed(line) for line in made]
        return made + [fit_line((), width)] * (height - len(made))

    def on_resize(self) -> None:
        """Lay the lines out for the new size."""
        self._drawn = []
        self.update()

    def on_focus(self) -> None:
        """Show that keys go here."""
        self.update()

    def on_blur(self) -> None:
        """Show that keys go elsewhere."""
        self.update()

    def render_line(self, y: int) -> Strip:
        """Return a line for the terminal."""
        width = self.size.width
        base = self.rich_style
        if y >= len(self._drawn):
            return Strip.blank(width, base)
        return Strip([Segment(text, base + _style(style)) for text, style in self._drawn[y]], width)
