"""What `?` shows."""

from __future__ import annotations

from sagecp.cli.top.text import Line

_SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Look",
        (
            ("up down, j k", "choose an instance, or scroll the panel"),
            ("PgUp PgDn, g G", "a page, or to the beginning and the end"),
            ("Tab", "go to the next panel"),
            ("z", "give the panel the whole screen, and take it back"),
            ("s S", "sort the instances by the next, the previous column"),
            ("/", "show only instances with these words; Esc shows all"),
            ("p", "hold the picture, and let it go on"),
            ("i, Enter", "everything about the chosen instance"),
            ("e", "its recent requests, and why one went where it went"),
            ("E", "the same, of all instances"),
        ),
    ),
    (
        "Act",
        (
            ("d", "drain the chosen instance: it gets no new work"),
            ("r", "have it take work again"),
            ("w", "have its engine sleep, or wake up"),
            ("P", "change how requests are ordered and placed"),
        ),
    ),
    (
        "Columns",
        (
            ("LOAD", "requests that the control plane has there, of the most it puts there"),
            ("RUN/WT", "requests that the engine runs, and that wait inside it"),
            ("KV", "share of the KV cache in use"),
            ("TTFT", "mean time to first token of its recent requests"),
            ("GPU MEM °C", "mean use, memory in use, and temperature of the hottest GPU"),
            ("bars", "the last 100 s; under the table the last 5 min at most, 5 s each"),
            ("● ◌ ◐ ○ ✖", "ready, starting, draining, drained, unhealthy or lost"),
        ),
    ),
)


def help_lines(_width: int, *, read_only: bool) -> list[Line]:
    """Return the help; in read-only mode without the keys that change something."""
    lines: list[Line] = []
    for heading, entries in _SECTIONS:
        if read_only and heading == "Act":
            lines += [(("read-only: keys that change something do nothing", "yellow"),), ()]
            continue
        lines.append(((heading, "bold"),))
        lines += [((f"  {key:<16}", "bold cyan"), (what, "")) for key, what in entries]
        lines.append(())
    return lines
