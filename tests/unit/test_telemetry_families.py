"""Counters, histograms and gauges, and how they are written."""

from __future__ import annotations

import math

import pytest

from sagecp.rpc.telemetry.families import PIECE_LINES, counter, gauges, histogram, label_text, number_text
from sagecp.rpc.telemetry.tenant_labels import OTHER, TenantLabels
from tests.support.samples import read_samples


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (True, "1"),
        (10**18, "1000000000000000000"),
        (0.1, "0.1"),
        (1e-9, "1e-09"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_are_written_so_that_prometheus_reads_them(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize("value", ['say "so"', "back\\slash", "two\nlines", "äöü", "", "a,b={c}"])
def test_any_value_of_a_label_is_read_back_as_it_was(value: str) -> None:
    text = gauges("m", "Help.", ("name",), [((value,), 1)])
    assert read_samples(text) == {("m", ("name", value)): 1.0}


def test_help_stays_on_its_line() -> None:
    assert (
        gauges("m", "two\nlines \\ here", (), [((), 1)]).splitlines()[0] == "# HELP m two\\nlines \\\\ here"
    )


def test_labels_and_values_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        label_text(("a", "b"), ("1",))


def test_a_family_without_series_is_not_written() -> None:
    assert gauges("m", "Help.", ("a",), []) == ""
    assert list(counter("m_total", "Help.").pieces()) == []


def test_counters_are_told_apart_by_labels_and_count_exactly() -> None:
    family = counter("m_total", "Help.", ("a",))
    family.cell("x").add()
    family.cell("x").add(2**53 - 1)
    family.cell("y").add(0.25)
    assert family.cell("x") is family.cell("x")
    text = "".join(family.pieces())
    assert read_samples(text) == {("m_total", ("a", "x")): 2.0**53, ("m_total", ("a", "y")): 0.25}
    assert "9007199254740992\n" in text
    family.drop("x")
    family.drop("never there")
    assert len(family) == 1


def test_a_counter_without_labels_has_no_braces() -> None:
    family = counter("m_total", "Help.")
    family.cell().add()
    assert list(family.pieces()) == ["# HELP m_total Help.\n# TYPE m_total counter\nm_total 1\n"]


def test_buckets_hold_everything_up_to_their_bounds() -> None:
    family = histogram("m_seconds", "Help.", ("a",), (0.1, 1, 10))
    cell = family.cell("x")
    for value in (0.05, 0.1, 0.5, 1.0, 5.0, 100.0):
        cell.observe(value)
    assert cell.count == 6
    samples = read_samples("".join(family.pieces()))
    buckets = [samples["m_seconds_bucket", ("a", "x"), ("le", bound)] for bound in ("0.1", "1", "10", "+Inf")]
    assert buckets == [2, 4, 5, 6]
    assert samples["m_seconds_count", ("a", "x")] == 6
    assert samples["m_seconds_sum", ("a", "x")] == pytest.approx(106.65)


def test_large_families_come_in_pieces_and_series_may_come_and_go_between() -> None:
    family = counter("m_total", "Help.", ("a",))
    for number in range(3 * PIECE_LINES):
        family.cell(str(number)).add()
    pieces = family.pieces()
    text = next(pieces)
    family.cell("new").add()
    family.drop("0")
    rest = list(pieces)
    assert len(rest) >= 2
    assert len(read_samples(text + "".join(rest))) == 3 * PIECE_LINES


def test_busy_tenants_have_names_and_keep_them() -> None:
    retired: list[str] = []
    labels = TenantLabels(2, 60.0, retired.append)
    assert labels.label("a", 0.0) == "a"
    assert labels.label("b", 1.0) == "b"
    # All places are taken by tenants that were just heard of.
    assert labels.label("c", 59.0) == OTHER
    assert labels.label("a", 59.5) == "a"
    # b was silent for a minute; a was not.
    assert labels.label("c", 61.0) == "c"
    assert retired == ["b"]
    assert labels.label("b", 62.0) == OTHER
    assert labels.label("a", 62.0) == "a"


def test_the_number_of_named_tenants_is_bounded_whoever_comes() -> None:
    named: set[str] = set()
    labels = TenantLabels(10, 5.0, named.discard)
    for number in range(1000):
        label = labels.label(f"t{number * 7919 % 97}", float(number) / 3)
        if label != OTHER:
            named.add(label)
        assert len(named) <= 10
