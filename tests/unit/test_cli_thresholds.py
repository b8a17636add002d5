"""Thresholds in the notation of monitoring plugins."""

from __future__ import annotations

import pytest

from sagecp.cli.thresholds import parse_range


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("10", [0, 5, 10], [-0.1, 10.1]),
        ("10:", [10, 1e9], [9.9, -1]),
        ("~:10", [-1e9, 0, 10], [10.1]),
        ("10:20", [10, 15, 20], [9.9, 20.1]),
        ("@10:20", [9.9, 20.1], [10, 15, 20]),
        ("@~:0", [0.1], [0, -1]),
        (":5", [0, 5], [-1, 6]),
        ("-5:-2.5", [-5, -3], [-2, -6]),
        ("0.25", [0.25], [0.26]),
        (" 1: ", [1], [0]),
        ("~:", [-1e9, 1e9], []),
    ],
)
def test_ranges(text: str, good: list[float], bad: list[float]) -> None:
    limit = parse_range(text)
    assert limit.text == text.strip()
    assert not [value for value in good if limit.alerts(value)]
    assert all(limit.alerts(value) for value in bad)


@pytest.mark.parametrize("text", ["", "@", ":", "x", "1:x", "1,5", "1;2", "1:2:3", "nan", "inf", "~"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="is no range; for example 10"):
        parse_range(text)


def test_a_range_that_ends_before_it_starts() -> None:
    with pytest.raises(ValueError, match="start is above its end"):
        parse_range("20:10")
