"""What `sagecp top` shows, without a terminal: lines for a picture, a width and a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sagecp.cli.top.event_view import event_lines
from sagecp.cli.top.fleet_view import SORT_KEYS, FleetView, fleet_lines, matches
from sagecp.cli.top.header_view import header_lines, key_line
from sagecp.cli.top.model import EventRow, InstanceRow, MetricsView, Picture, StatusView
from sagecp.cli.top.queue_view import queue_lines
from sagecp.cli.top.strip_view import strip_lines
from sagecp.cli.top.text import Line, fit, fit_line, line_text, plain, width_of
from sagecp.cli.top.trend import BUCKET_COUNT, BUCKET_S, Trend, bars

NOW_S = 10_000.0
UNIX_S = 1_700_000_000.0


def row(instance_id: str, state: str = "READY", **fields: object) -> InstanceRow:
    fields = {"load": 1, "limit": 4, "read_s": NOW_S, **fields}
    return InstanceRow(instance_id=instance_id, state=state, **fields)  # type: ignore[arg-type]


def status(**fields: object) -> StatusView:
    values: dict[str, object] = {
        "version": "1.2.3",
        "start_time_s": UNIX_S - 60,
        "uptime_s": 60.0,
        "order": "adaptive",
        "in_force": "slo_aware",
        "reason": "nothing to judge by yet",
        "placement": "predicted_latency",
        "config_version": 3,
        "count_by_state": {"READY": 2, "LOST": 1},
        "queued_by_class": {"HIGH": 2, "NORMAL": 5},
        "queued_by_tenant": {"acme": 4, "globex": 3},
        "queue_capacity": 100,
        "active": 6,
    }
    return StatusView(**{**values, **fields})  # type: ignore[arg-type]


def picture(*rows: InstanceRow, **fields: object) -> Picture:
    made = Picture()
    made.put_status(status(**fields), NOW_S, UNIX_S)
    made.put_metrics(
        MetricsView(
            requests_per_second=12.3,
            tokens_per_second=2405.0,
            ttft_p50_s=0.041,
            ttft_p95_s=0.112,
            slo_compliance=0.992,
        ),
        NOW_S,
    )
    made.put_instances(rows, UNIX_S)
    return made


def texts(lines: list[Line]) -> list[str]:
    return [line_text(line) for line in lines]


def table(made: Picture, view: FleetView, width: int = 80, height: int = 12) -> list[str]:
    view.arrange(made)
    return texts(fleet_lines(made, view, width, height, NOW_S, focused=True))


# -- trends -----------------------------------------------------------------------------------------


def test_a_trend_keeps_the_last_value_of_every_bucket() -> None:
    trend = Trend()
    for number in range(4):
        trend.add(float(number), NOW_S + number * BUCKET_S)
        trend.add(float(number) + 0.5, NOW_S + number * BUCKET_S + 1)
    assert trend.recent(5, NOW_S + 3 * BUCKET_S) == [None, 0.5, 1.5, 2.5, 3.5]
    assert trend.recent(2, NOW_S + 3 * BUCKET_S, buckets_each=2) == [1.0, 3.0]


def test_what_was_not_read_for_a_while_is_taken_for_unchanged_but_not_for_ever() -> None:
    trend = Trend()
    trend.add(7.0, NOW_S)
    assert trend.recent(3, NOW_S + 2 * BUCKET_S) == [7.0, 7.0, 7.0]
    late = trend.recent(10, NOW_S + 9 * BUCKET_S)
    assert late == [7.0] * 7 + [None] * 3
    trend.add(None, NOW_S + 9 * BUCKET_S)
    assert trend.recent(1, NOW_S + 9 * BUCKET_S) == [None]


def test_a_trend_forgets_what_is_older_than_it_is_long() -> None:
    trend = Trend()
    trend.add(1.0, NOW_S)
    trend.add(2.0, NOW_S + BUCKET_COUNT * BUCKET_S)
    values = trend.recent(BUCKET_COUNT, NOW_S + BUCKET_COUNT * BUCKET_S)
    assert values == [None] * (BUCKET_COUNT - 1) + [2.0]


@pytest.mark.parametrize(
    ("values", "top", "drawn"),
    [
        ([0.0, 0.5, 1.0], 1.0, "▁▅█"),
        ([0.0, 0.0], None, "▁▁"),
        ([None, 2.0, 4.0], None, " ▅█"),
        ([5.0], 1.0, "█"),
        ([], None, ""),
    ],
)
def test_bars(values: list[float | None], top: float | None, drawn: str) -> None:
    assert bars(values, top) == drawn


# -- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "width", "right", "fitted"),
    [
        ("abc", 5, False, "abc  "),
        ("abc", 5, True, "  abc"),
        ("abcdef", 4, False, "abc…"),
        ("日本語", 5, False, "日本…"),
        ("日本語", 4, False, "日 …"),
        ("abc", 0, False, ""),
    ],
)
def test_text_is_cut_or_padded_to_cells(text: str, width: int, right: bool, fitted: str) -> None:
    assert fit(text, width, right=right) == fitted
    assert width_of(((fit(text, width, right=right), ""),)) == width


def test_a_line_is_cut_where_its_room_ends() -> None:
    assert fit_line((("abc", "red"), ("defg", "")), 5) == (("abc", "red"), ("d…", ""))
    assert fit_line((("abc", "red"),), 5) == (("abc", "red"), ("  ", ""))


def test_what_a_server_says_cannot_steer_the_terminal() -> None:
    assert plain("a\x1b[31mb\x1b[0m\nc\x07") == "a[31mb[0m c"


# -- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 130, 160, 250])
@pytest.mark.parametrize("height", [1, 2, 5, 12])
def test_lines_are_exactly_as_wide_as_the_screen(width: int, height: int) -> None:
    made = picture(row("a" * 60, note="GPU 3 XID, drain: 日本語 " * 5), row("b", "LOST"), row("c"))
    made.add_event(EventRow(time_s=UNIX_S, severity=3, message="日本語 " * 40, instance_id="b"))
    view = FleetView()
    view.arrange(made)
    shown = [
        *fleet_lines(made, view, width, height, NOW_S, focused=True),
        *header_lines(made, width, NOW_S, server="cp:1", read_only=True, paused_s=NOW_S),
        *strip_lines(made, view.selected_id, width, NOW_S),
        *queue_lines(made, width, height, focused=False),
        *event_lines(made, width, height, focused=False),
        key_line(width, read_only=False),
    ]
    assert {width_of(line) for line in shown} == {width}


def test_in_80_columns_every_figure_has_room() -> None:
    made = picture(
        row(
            "engine-with-a-rather-long-name", "UNHEALTHY", load=256, limit=256, running=1234, waiting=987,
            key_value_usage=1.0, ttft_s=0.0123, gpu_utilization=1.0, gpu_memory_usage=0.994,
            temperature_celsius=101,
        )
    )  # fmt: skip
    head, line = table(made, FleetView())[1:3]
    assert head.split() == ["INSTANCE", "STATE", "LOAD", "RUN/WT", "KV", "TTFT", "GPU", "MEM", "°C"]
    assert line.split()[3:] == ["UNHEALTHY", "256/256", "1.23k/…", "100%", "12.3", "ms", "100%", "99%", "101"]


def test_what_is_not_known_is_not_zero() -> None:
    line = table(picture(row("a")), FleetView())[2]
    assert line.split()[3:] == ["READY", "1/4", "-/-", "-", "-", "-", "-", "-"]


def test_wide_terminals_show_more() -> None:
    made = picture(row("a", model="llama", note="asleep"))
    assert "llama" not in table(made, FleetView())[2]
    wide = table(made, FleetView(), width=200)[2]
    assert "llama" in wide
    assert "asleep" in wide
    assert "▃" in wide


def test_states_are_told_by_word_and_mark() -> None:
    states = ("READY", "STARTING", "DRAINING", "DRAINED", "UNHEALTHY", "LOST")
    made = picture(*(row(state.lower(), state) for state in states))
    lines = table(made, FleetView())
    for state, mark in zip(states, "●◌◐○✖✖", strict=True):
        line = next(line for line in lines[2:] if state.lower() in line)
        assert state in line
        assert mark in line


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("id", "abcd"),
        ("state", "cabd"),
        ("load", "bcad"),
        ("KV", "acbd"),
        ("TTFT", "cabd"),
        ("GPU", "bacd"),
        ("temperature", "abcd"),
    ],
)
def test_sorting(name: str, order: str) -> None:
    made = picture(
        row("a", load=1, limit=10, key_value_usage=0.9, ttft_s=0.1, gpu_utilization=0.1),
        row("b", load=9, limit=10, key_value_usage=0.1, gpu_utilization=0.9),
        row("c", "LOST", load=4, limit=10, key_value_usage=0.5, ttft_s=0.2),
        row("d", load=0, limit=10),
    )
    view = FleetView(sort_index=[key.name for key in SORT_KEYS].index(name))
    view.arrange(made)
    assert "".join(each.instance_id for each in view.rows) == order


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", True),
        ("ENGINE", True),
        ("ready llama", True),
        ("rack-7", True),
        ("asleep", True),
        ("lost", False),
    ],
)
def test_filters(text: str, found: bool) -> None:
    assert matches(row("engine-1", model="llama", host_id="rack-7", note="asleep"), text) is found


def test_the_selection_stays_on_its_instance_and_in_sight() -> None:
    made = picture(*(row(f"e{number:02d}") for number in range(30)))
    view = FleetView()
    table(made, view, height=7)
    view.go_to(20)
    shown = table(made, view, height=7)
    assert any(line.startswith("▶ ● e20") for line in shown)
    made.keep_only([f"e{number:02d}" for number in range(10, 30)], UNIX_S)
    assert any(line.startswith("▶ ● e20") for line in table(made, view, height=7))
    made.forget("e20", UNIX_S)
    table(made, view, height=7)
    assert view.selected_id == "e21"
    made.keep_only([], UNIX_S)
    assert "no instance is registered" in table(made, view, height=7)[2]
    assert view.selected_id == ""


def test_what_a_filter_hides_cannot_be_chosen() -> None:
    made = picture(row("a"), row("b"))
    view = FleetView()
    view.arrange(made)
    view.filter_text = "nothing has this"
    assert "no instance matches" in table(made, view)[2]
    assert view.selected_id == ""


def test_lines_that_are_as_they_were_are_not_made_anew() -> None:
    made = picture(row("a"), row("b"))
    view = FleetView()
    view.arrange(made)
    first = fleet_lines(made, view, 80, 12, NOW_S, focused=True)
    made.put_instances([row("b", load=3, read_s=NOW_S + 1)], UNIX_S)
    view.arrange(made)
    second = fleet_lines(made, view, 80, 12, NOW_S + 1, focused=True)
    assert second[2] is first[2]
    assert "3/4" in line_text(second[3])


# -- the picture ------------------------------------------------------------------------------------


def test_an_answer_that_comes_late_does_not_replace_a_newer_one() -> None:
    made = picture(row("a", load=3, read_s=NOW_S + 5))
    made.put_instances([row("a", load=1, read_s=NOW_S)], UNIX_S)
    assert made.instances["a"].load == 3


def test_without_events_of_the_server_changes_of_state_are_told() -> None:
    made = picture(row("a"))
    made.server_events = False
    made.put_instances([row("a", "LOST", state_reason="its lease ended")], UNIX_S)
    made.forget("a", UNIX_S)
    assert [(event.severity_word, event.message) for event in made.events] == [
        ("WARN", "READY -> LOST: its lease ended"),
        ("WARN", "left the fleet: its lease ended"),
    ]


def test_events_are_taken_once_and_a_restart_begins_anew() -> None:
    made = picture()
    for sequence in (1, 2, 2, 1, 3):
        made.add_event(EventRow(time_s=UNIX_S, severity=1, message=str(sequence), sequence=sequence))
    assert [event.message for event in made.events] == ["1", "2", "3"]
    made.put_status(status(start_time_s=UNIX_S, uptime_s=0.0), NOW_S, UNIX_S)
    made.add_event(EventRow(time_s=UNIX_S, severity=1, message="1", sequence=1))
    assert [event.message for event in made.events][-2:] == ["the control plane was restarted", "1"]


# -- the header and the other panels ----------------------------------------------------------------


def test_the_header_in_80_columns() -> None:
    first, second, third = texts(
        header_lines(picture(), 80, NOW_S, server="10.0.0.7:50051", read_only=False, paused_s=None)
    )
    assert " ".join(first.split()) == "sagecp top 10.0.0.7:50051 v1.2.3 up 60 s ● connected"
    assert second.startswith(" policy adaptive > slo_aware  placed by predicted_latency  v3  because nothing")
    assert " ".join(third.split()) == (
        "SLO 99.2% 12.3 req/s 2.4k tok/s TTFT p50 41.0 ms p95 112 ms wait 7 run 6"
    )


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda made: None, "● connected"),
        (lambda made: made.put_status(status(accepting=False), NOW_S, UNIX_S), "STOPPING, takes no work"),
        (
            lambda made: made.note_loss("connection refused", NOW_S - 12, UNIX_S, NOW_S + 3),
            "CONNECTION LOST 12 s ago",
        ),
        (lambda made: made.note_loss("refused", NOW_S, UNIX_S, NOW_S + 3), "next try in 3 s"),
    ],
)
def test_the_header_says_how_the_connection_is(prepare: Callable[[Picture], None], says: str) -> None:
    made = picture()
    prepare(made)
    lines = header_lines(made, 100, NOW_S, server="cp:1", read_only=False, paused_s=None)
    assert says in line_text(lines[0])


@pytest.mark.parametrize(("rate", "says"), [(None, "SLO -"), (0.992, "99.2%"), (0.5, "50% LOW")])
def test_a_missed_objective_is_not_told_by_colour_alone(rate: float | None, says: str) -> None:
    made = picture()
    made.put_metrics(MetricsView(slo_compliance=rate), NOW_S)
    lines = header_lines(made, 100, NOW_S, server="cp:1", read_only=False, paused_s=None)
    assert says in line_text(lines[2])


def test_keys_that_change_something_are_not_offered_in_read_only_mode() -> None:
    assert "d drain" in line_text(key_line(120, read_only=False))
    shown = line_text(key_line(120, read_only=True))
    assert "i info" in shown
    assert all(word not in shown for word in ("drain", "resume", "policy", "sleep"))


def test_what_waits_by_class_and_tenant_beside_or_below_each_other() -> None:
    wide = texts(queue_lines(picture(), 50, 7, focused=False))
    assert wide[0].startswith("─ Waiting 7 of 100 ")
    assert wide[2].split() == ["HIGH", "2", "│", "acme", "4"]
    assert wide[3].split() == ["NORMAL", "5", "│", "globex", "3"]
    narrow = texts(queue_lines(picture(), 24, 6, focused=False, top=4))
    assert [line.split() for line in narrow[1:]] == [
        ["LOW", "0"],
        ["BACKGROUND", "0"],
        ["by", "tenant"],
        ["acme", "4"],
        ["globex", "3"],
    ]


def test_events_are_newest_first_with_their_severity_in_words() -> None:
    made = picture()
    made.add_event(EventRow(time_s=UNIX_S, severity=1, message="e1 is READY", instance_id="e1"))
    made.add_event(EventRow(time_s=UNIX_S, severity=3, message="lease ended", instance_id="e2"))
    first, second = texts(event_lines(made, 60, 5, focused=False))[1:]
    assert first.split()[1:] == ["ERROR", "e2", "lease", "ended"]
    assert second.split()[1:] == ["info", "e1", "is", "READY"]


def test_the_strip_says_what_is_out_of_the_ordinary() -> None:
    made = picture(
        row(
            "a", "UNHEALTHY", state_reason="no progress for 30 s", note="GPU 3 XID", model="llama", ttft_s=0.5
        )
    )
    words, figures = texts(strip_lines(made, "a", 120, NOW_S))
    assert " ".join(words.split()) == "a UNHEALTHY GPU 3 XID serves llama no progress for 30 s"
    assert figures.split()[0] == "load"
    assert "25%" in figures
    assert "500 ms" in figures
