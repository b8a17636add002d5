"""The instances table as lines: chosen, sorted, and laid out for a width. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sagecp.cli import render
from sagecp.cli.top.model import InstanceRow, InstanceTrends, Picture
from sagecp.cli.top.text import Line, Span, fit, fit_line, line_text, state_mark, state_style, title
from sagecp.cli.top.trend import BUCKET_S, Trend, bars

# Order of states when sorted by them: what needs eyes first.
_STATE_ORDER = {"LOST": 0, "UNHEALTHY": 1, "STARTING": 2, "DRAINING": 3, "DRAINED": 4, "READY": 5}
_SPARK_WIDTH = 10
# One bar of a sparkline in the table stands for 10 s.
_SPARK_BUCKETS = 2
_MIN_ID_WIDTH, _MAX_ID_WIDTH = 12, 40
_MIN_NOTE_WIDTH = 14


@dataclass(frozen=True, slots=True)
class SortKey:
    """An order of the table.

    Attributes:
        name: As it is shown.
        of: What to compare; ``None`` sorts last.
        descending: Whether the largest come first.
    """

    name: str
    of: Callable[[InstanceRow], float | str | None]
    descending: bool = True


SORT_KEYS = (
    SortKey("id", lambda row: row.instance_id, descending=False),
    SortKey("state", lambda row: _STATE_ORDER.get(row.state, 0), descending=False),
    SortKey("load", lambda row: row.load / row.limit if row.limit else row.load),
    SortKey("KV", lambda row: row.key_value_usage),
    SortKey("TTFT", lambda row: row.ttft_s),
    SortKey("GPU", lambda row: row.gpu_utilization),
    SortKey("temperature", lambda row: row.temperature_celsius),
)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A line, and what it was made of: it is as it was as long as that is."""

    row: InstanceRow
    look: tuple[int, int, bool, bool]
    line: Line


@dataclass(slots=True)
class FleetView:
    """Which instances are shown, in which order, and which one is chosen.

    Attributes:
        selected_id: The chosen instance; ``""``: none.
        top: Index of the first row on the screen.
        drawn: Lines of the rows on the screen, as they were last made.
    """

    sort_index: int = 0
    filter_text: str = ""
    selected_id: str = ""
    top: int = 0
    rows: list[InstanceRow] = field(default_factory=list)
    drawn: dict[str, _Drawn] = field(default_factory=dict)

    @property
    def sort_key(self) -> SortKey:
        """The order in use."""
        return SORT_KEYS[self.sort_index]

    def arrange(self, picture: Picture) -> None:
        """Choose and sort the rows anew; the selection stays on its instance."""
        rows = [row for row in picture.instances.values() if matches(row, self.filter_text)]
        key = self.sort_key
        # By id first, so that equal rows keep their places from tick to tick.
        rows.sort(key=lambda row: row.instance_id)
        known = [row for row in rows if key.of(row) is not None]
        known.sort(key=key.of, reverse=key.descending)  # type: ignore[arg-type]
        index = self.selected_index
        self.rows = known + [row for row in rows if key.of(row) is None]
        if not self.rows:
            # Nothing that is not seen can be acted on.
            self.selected_id = ""
        elif self.selected_index is None:
            # The chosen one left: its neighbour takes its place.
            self.selected_id = self.rows[min(index or 0, len(self.rows) - 1)].instance_id

    @property
    def selected_index(self) -> int | None:
        """Where the chosen instance is among the rows."""
        for index, row in enumerate(self.rows):
            if row.instance_id == self.selected_id:
                return index
        return None

    def move(self, step: int) -> None:
        """Choose another row, so many further down."""
        if not self.rows:
            return
        index = self.selected_index
        self.go_to(0 if index is None else index + step)

    def go_to(self, index: int) -> None:
        """Choose a row by its index; the nearest there is."""
        if self.rows:
            self.selected_id = self.rows[max(0, min(len(self.rows) - 1, index))].instance_id

    def scroll(self, height: int) -> list[InstanceRow]:
        """Return the rows on a screen of so many, the chosen one among them."""
        index = self.selected_index
        if index is not None:
            self.top = max(min(self.top, index), index - height + 1)
        self.top = max(0, min(self.top, len(self.rows) - height))
        return self.rows[self.top : self.top + height]


def matches(row: InstanceRow, text: str) -> bool:
    """Return whether a row has every word of a filter in its id, state, model, host or note."""
    if not text:
        return True
    all_of_it = f"{row.instance_id} {row.state} {row.model} {row.host_id} {row.note}".lower()
    return all(word in all_of_it for word in text.lower().split())


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    cell: Callable[[InstanceRow, InstanceTrends, float], Span]
    right: bool = True


def _cache(row: InstanceRow, _trends: InstanceTrends, _now_s: float) -> Span:
    share = row.key_value_usage
    if share is None:
        return render.NONE, "dim"
    # A full cache preempts. A GPU that is busy, or whose memory is taken, is as it should be.
    return f"{share * 100:.0f}%", "bold red" if share >= 0.95 else "yellow" if share >= 0.8 else ""


def _load(row: InstanceRow, _trends: InstanceTrends, _now_s: float) -> Span:
    return f"{row.load}/{row.limit or render.NONE}", "yellow" if row.limit and row.load >= row.limit else ""


def _share(value: float | None) -> Span:
    return (render.NONE, "dim") if value is None else (f"{value * 100:.0f}%", "")


def _temperature(row: InstanceRow, _trends: InstanceTrends, _now_s: float) -> Span:
    value = row.temperature_celsius
    if value is None:
        return render.NONE, "dim"
    return f"{value:.0f}", "bold red" if value >= 90 else "yellow" if value >= 80 else ""


def _number(value: int | None) -> str:
    return render.NONE if value is None else render.compact(value)


def _duration(value: float | None) -> Span:
    return render.duration(value), "dim" if value is None else ""


def _spark(of: Callable[[InstanceTrends], Trend], top: float | None) -> _Column:
    # It stands beside its figure, whose title is enough for both.
    def cell(_row: InstanceRow, trends: InstanceTrends, now_s: float) -> Span:
        return bars(of(trends).recent(_SPARK_WIDTH, now_s, _SPARK_BUCKETS), top), "cyan"

    return _Column("", _SPARK_WIDTH, cell, right=False)


_STATE = _Column("STATE", 9, lambda row, _t, _n: (row.state, state_style(row.state)), right=False)
_LOAD = _Column("LOAD", 7, _load)
_QUEUE = _Column("RUN/WT", 7, lambda row, _t, _n: (f"{_number(row.running)}/{_number(row.waiting)}", ""))
_KV = _Column("KV", 4, _cache)
_TTFT = _Column("TTFT", 7, lambda row, _t, _n: _duration(row.ttft_s))
_GPU = _Column("GPU", 4, lambda row, _t, _n: _share(row.gpu_utilization))
_MEMORY = _Column("MEM", 4, lambda row, _t, _n: _share(row.gpu_memory_usage))
_HEAT = _Column("°C", 3, _temperature)
_MODEL = _Column("MODEL", 16, lambda row, _t, _n: (row.model, ""), right=False)
_LOAD_SPARK = _spark(lambda trends: trends.load, 1.0)
_KV_SPARK = _spark(lambda trends: trends.key_value, 1.0)
_TTFT_SPARK = _spark(lambda trends: trends.ttft, None)
_GPU_SPARK = _spark(lambda trends: trends.gpu, 1.0)

_NARROW = (_STATE, _LOAD, _QUEUE, _KV, _TTFT, _GPU, _MEMORY, _HEAT)
_WIDER = (
    _STATE, _LOAD, _LOAD_SPARK, _QUEUE, _KV, _KV_SPARK, _TTFT, _TTFT_SPARK, _GPU, _GPU_SPARK, _MEMORY, _HEAT,
)  # fmt: skip
_WIDEST = (_MODEL, *_WIDER)
_CURSOR_WIDTH = 4


def _layout(width: int) -> tuple[tuple[_Column, ...], int, int]:
    """Return the columns after the id, the width of the id, and that of the note (0: none)."""
    for columns in (_WIDEST, _WIDER, _NARROW):
        used = _CURSOR_WIDTH + sum(column.width + 1 for column in columns)
        room = width - used
        if room >= _MIN_ID_WIDTH + (1 + _MIN_NOTE_WIDTH if columns is not _NARROW else 0):
            break
    if room < _MIN_ID_WIDTH + 1 + _MIN_NOTE_WIDTH:
        return columns, max(1, room), 0
    id_width = max(_MIN_ID_WIDTH, min(_MAX_ID_WIDTH, room // 2))
    return columns, id_width, room - id_width - 1


def fleet_lines(
    picture: Picture, view: FleetView, width: int, height: int, now_s: float, *, focused: bool
) -> list[Line]:
    """Return the table: a title, a head, and as many rows as have room.

    Args:
        picture: What was read.
        view: What of it is shown; its ``rows`` are up to date.
        width: In cells.
        height: In lines.
        now_s: On the clock of ``read_s``.
        focused: Whether keys go to the table.
    """
    room = max(0, height - 2)
    shown = view.scroll(room)
    columns, id_width, note_width = _layout(width)
    lines = [_title(picture, view, len(shown), width, focused=focused), _head(columns, id_width, width)]
    bucket = int(now_s / BUCKET_S)
    drawn: dict[str, _Drawn] = {}
    for row in shown:
        chosen = row.instance_id == view.selected_id
        look = (bucket, width, chosen, chosen and focused)
        before = view.drawn.get(row.instance_id)
        if before is None or before.row is not row or before.look != look:
            trends = picture.trends.get(row.instance_id) or InstanceTrends()
            spans = _row_spans(row, trends, columns, id_width, note_width, now_s, chosen=chosen)
            line = fit_line(spans, width)
            if chosen and focused:
                line = ((line_text(line), "bold reverse"),)
            before = _Drawn(row, look, line)
        drawn[row.instance_id] = before
        lines.append(before.line)
    view.drawn = drawn
    if not shown and room:
        lines.append(fit_line(((_nothing(picture, view), "dim"),), width))
    return lines


def _row_spans(
    row: InstanceRow,
    trends: InstanceTrends,
    columns: Sequence[_Column],
    id_width: int,
    note_width: int,
    now_s: float,
    *,
    chosen: bool,
) -> list[Span]:
    spans: list[Span] = [
        (("▶ " if chosen else "  ") + state_mark(row.state) + " ", state_style(row.state)),
        (fit(row.instance_id, id_width), "bold" if chosen else ""),
    ]
    for column in columns:
        text, style = column.cell(row, trends, now_s)
        spans += [(" ", ""), (fit(text, column.width, right=column.right), style)]
    if note_width:
        spans += [(" ", ""), (fit(row.note, note_width), "yellow" if row.state != "READY" else "")]
    return spans


def _head(columns: Sequence[_Column], id_width: int, width: int) -> Line:
    text = " " * _CURSOR_WIDTH + fit("INSTANCE", id_width)
    for column in columns:
        text += " " + fit(column.title, column.width, right=column.right)
    return fit_line(((text, "dim"),), width)


def _title(picture: Picture, view: FleetView, shown_count: int, width: int, *, focused: bool) -> Line:
    count = len(picture.instances)
    text = f"Instances {len(view.rows)} of {count}" if view.filter_text else f"Instances {count}"
    if view.filter_text:
        text += f" with {view.filter_text!r}"
    states = picture.status.count_by_state if picture.status else {}
    parts = [f"{state_mark(state)} {number} {state}" for state, number in states.items() if number]
    if parts and width > 60:
        text += ": " + ", ".join(parts)
    more = f"by {view.sort_key.name}"
    if shown_count < len(view.rows):
        more = f"{view.top + 1}-{view.top + shown_count}, {more}"
    return title(text, width, focused=focused, more=more)


def _nothing(picture: Picture, view: FleetView) -> str:
    if picture.read_s is None:
        return "    waiting for the control plane"
    if view.filter_text and picture.instances:
        return "    no instance matches the filter; / changes it"
    return "    no instance is registered; beside an engine: sagecp agent --engine URL --control-plane ADDR"
