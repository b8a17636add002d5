"""What happened, newest first. Pure."""

from __future__ import annotations

import time

from sagecp.cli.top.model import EventRow, Picture
from sagecp.cli.top.text import Line, fit_line, plain, title

_STYLES = {1: "dim", 2: "bold yellow", 3: "bold red"}


def event_lines(picture: Picture, width: int, height: int, *, focused: bool, top: int = 0) -> list[Line]:
    """Return the latest events.

    Args:
        picture: What was read.
        width: In cells.
        height: In lines, with the title.
        focused: Whether keys go to it.
        top: Events that are scrolled past.
    """
    text = "Events" if picture.server_events is not False else "Changes seen from here"
    more = f"{top + 1} of {len(picture.events)}" if top else ""
    lines = [title(text, width, focused=focused, more=more)]
    events = picture.events
    shown = range(top, min(len(events), top + height - 1))
    lines += [fit_line(_event(events[-1 - index]), width) for index in shown]
    if not events:
        lines.append(fit_line(((" nothing happened yet", "dim"),), width))
    return lines


def _event(event: EventRow) -> Line:
    moment = time.strftime("%H:%M:%S", time.localtime(event.time_s))
    style = _STYLES.get(event.severity, "")
    about = event.instance_id or event.request_id
    message = plain(event.message)
    line = [(f" {moment} ", "dim"), (f"{event.severity_word:<5} ", style)]
    # Most sentences name what they are about; a name is not said twice.
    if about and about not in message:
        line.append((f"{plain(about)} ", "bold"))
    line.append((message, "" if event.severity < 3 else "bold"))
    return tuple(line)
