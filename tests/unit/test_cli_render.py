"""What people read."""

from __future__ import annotations

import pytest

from sagecp.cli import render


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0 s"), (0.000_000_5, "0 us"), (0.000_25, "250 us"), (0.001_234, "1.23 ms"),
        (0.009_99, "9.99 ms"), (0.012_34, "12.3 ms"), (0.0999, "99.9 ms"), (0.123, "123 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"), (1.234, "1.23 s"), (12.34, "12.3 s"), (99.94, "99.9 s"),
        (99.96, "1m 40s"),
        (125, "2m 05s"), (3599.6, "1h 00m"), (7265, "2h 01m"), (200_000, "2d 07h"), (-1.5, "-1.50 s"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1234, "1.23k"), (4_500_000, "4.5M"), (7e9, "7G")],
)
def test_compact_counts(number: float | None, text: str) -> None:
    assert render.compact(number) == text


def test_shares_and_counts() -> None:
    assert (render.percent(None), render.percent(0.0), render.percent(0.1234)) == ("-", "0%", "12.3%")
    assert (render.count(1234567), render.plural(1, "token"), render.plural(2, "token")) == (
        "1,234,567", "1 token", "2 tokens",
    )  # fmt: skip
    assert (render.span(None, 1.0), render.span(1.0, 1.5), render.span(2.0, 1.0)) == ("-", "500 ms", "0 s")


COLUMNS = (
    render.Column("NAME", flexible=True),
    render.Column("STATE", state=True),
    render.Column("COUNT", right=True),
)


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table(COLUMNS, [["a", "READY", "1"], ["long name", "LOST", "1,000"]])
    assert capsys.readouterr().out.splitlines() == [
        "NAME       STATE  COUNT",
        "a          READY      1",
        "long name  LOST   1,000",
    ]


def test_narrow_terminals_shorten_what_may_be_shortened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    render.print_table(COLUMNS, [["an-instance-with-a-very-long-name", "UNHEALTHY", "1,000"]])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert "an-instance-with-a-ve…" in lines[1]
    assert lines[1].endswith("UNHEALTHY  1,000")


def test_narrow_terminals_leave_out_what_is_optional(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = (COLUMNS[0], render.Column("MODEL", optional=True), render.Column("CLASS", optional=True))
    rows = [["engine", "model", "NORMAL"]]
    for width, head in ((23, "NAME    MODEL  CLASS"), (19, "NAME    MODEL"), (12, "NAME")):
        monkeypatch.setenv("COLUMNS", str(width))
        render.print_table(columns, rows)
        assert capsys.readouterr().out.splitlines()[0] == head


def test_without_a_terminal_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    render.print_table(COLUMNS, [["x" * 300, "READY", "1"]])
    assert "x" * 300 in capsys.readouterr().out


def test_wide_characters_take_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table(COLUMNS, [["模型", "READY", "1"], ["abcd", "READY", "2"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "模型  READY      1"
    assert lines[2] == "abcd  READY      2"


def test_empty_tables_keep_their_head(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table(COLUMNS, [])
    assert capsys.readouterr().out == "NAME  STATE  COUNT\n"


def test_pairs_leave_out_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_pairs([("name", "x"), ("empty", ""), ("longer", "one\ntwo")])
    assert capsys.readouterr().out.splitlines() == ["name    x", "longer  one", "        two"]


def test_what_others_wrote_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b]0;title\x07b\x1b[2Jc\rd\ne"
    render.print_table((render.Column("NAME"),), [[evil]])
    render.print_pairs([("name", evil), ("state", "\x1b[32mREADY\x1b[0m")])
    shown = capsys.readouterr().out
    assert "a]0;titleb[2Jcd e" in shown
    assert not set(shown) & {"\x07", "\r"}
    assert shown.count("\x1b") in {0, 2}, "colours of our own stay"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "$0.00"),
        (1234.5, "$1,234.50"),
        (1.0, "$1.00"),
        (0.5, "$0.500"),
        (0.0123456, "$0.0123"),
        (3.2e-6, "$0.00000320"),
        (1e-15, "$0.00"),
    ],
)
def test_dollars_of_every_size(value: float | None, text: str) -> None:
    assert render.usd(value) == text
