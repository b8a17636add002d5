"""Reports: their figures on data whose result is known, and pages that hold what they promise."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sagecp.sim.fleet.experiment import Bounds, Contender, RunResult, RunTask, Workload
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.intervals import mean_confidence
from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.compare_report import compare_page
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.report.html_report import run_page
from sagecp.sim.fleet.report.json_report import report_json
from sagecp.sim.fleet.report.summary import (
    METRICS,
    best_baseline,
    summarise_bounds,
    summarise_goodput,
    summarise_loads,
)
from sagecp.sim.fleet.report.svg import nice_top
from tests.support.sim_traces import mixed_requests, write_trace

SCALES = (1.0, 2.0, 3.0)
SEEDS = (0, 1, 2)
# Attainment by scale, which a seed moves by a little.
CURVES = {
    "own": (1.0, 0.98, 0.88),
    "worse": (0.99, 0.90, 0.50),
    "base": (0.99, 0.95, 0.75),
    "bad_base": (0.6, 0.5, 0.4),
}
HOSTILE = '<script>alert("x")</script>&amp;'


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A real run, whose figures the tests replace where they need to know them."""
    path = write_trace(tmp_path_factory.mktemp("trace") / "trace.jsonl", mixed_requests(80))
    workload = Workload(trace_path=path, fleet="2x8b-h100")
    return RunTask(workload=workload, contender=Contender(label="own"), with_charts=True).execute()


def contents_of(run: RunResult, labels: dict[str, Contender], **more: Any) -> ReportContents:
    """Return a report in which every contender has its curve, at 10, 20 and 30 requests per second."""
    runs = []
    for label in labels:
        for scale, attainment in zip(SCALES, CURVES[label], strict=True):
            for seed in SEEDS:
                # The seed changes the load and the attainment of all contenders alike.
                statistics = dataclasses.replace(run.statistics, attainment=attainment - 0.01 * seed)
                runs.append(
                    dataclasses.replace(
                        run,
                        label=label,
                        scale=scale,
                        seed=seed,
                        load_per_s=10.0 * scale + seed,
                        statistics=statistics,
                        charts=run.charts if seed == 0 else None,
                    )
                )
    settings: dict[str, Any] = {
        "command": "sagecp simulate --trace 'a b'",
        "version": "0",
        "workload": Workload(trace_path=Path("trace.jsonl"), fleet="2x8b-h100"),
        "fleet": read_fleet("2x8b-h100"),
        "trace_name": "trace",
        "trace_request_count": 80,
        "trace_duration_s": 4.0,
        "is_closed_loop": False,
        "contenders": tuple(labels.values()),
        "scales": SCALES,
        "seeds": SEEDS,
        "runs": tuple(runs),
        **more,
    }
    return ReportContents(**settings)


def contenders(*labels: str) -> dict[str, Contender]:
    return {label: Contender(label=label, baseline="min_ttft" if "base" in label else "") for label in labels}


@pytest.fixture
def comparison(one_run: RunResult) -> ReportContents:
    bounds = tuple(
        Bounds(scale, seed, 1.0 - 0.01 * seed, 0.5, 0.4, 0.3, 40.0) for scale in SCALES for seed in SEEDS
    )
    return contents_of(one_run, contenders(*CURVES), bounds=bounds)


class TestFigures:
    def test_loads_are_means_with_intervals(self, comparison: ReportContents) -> None:
        own = next(each for each in summarise_loads(comparison) if (each.label, each.scale) == ("own", 2.0))
        assert own.figures["attainment"] == mean_confidence([0.98, 0.97, 0.96])
        assert own.load_per_s.mean == pytest.approx(21.0)

    def test_goodput_is_interpolated_seed_by_seed(self, comparison: ReportContents) -> None:
        found = {each.label: each for each in summarise_goodput(comparison)}
        # Between 0.98 at 20 and 0.88 at 30 per second, and so on: 0.01 less is one per second less, while
        # the seed adds one.
        assert found["own"].rate.mean == pytest.approx(28.0)
        assert found["own"].bound == "exact"
        # Attainment 0.90, 0.89, 0.88 at 20 + seed: met exactly, then interpolated from 10 + seed.
        expected = [20.0, 11.0 + 10.0 * 8 / 9, 12.0 + 10.0 * 7 / 9]
        assert found["worse"].rate.mean == pytest.approx(sum(expected) / 3)
        assert found["bad_base"].bound == "at_most"
        assert found["bad_base"].rate.mean == pytest.approx(11.0)

    def test_ratios_are_to_the_best_baseline_in_pairs(self, comparison: ReportContents) -> None:
        goodputs = summarise_goodput(comparison)
        best = best_baseline(comparison, goodputs)
        assert best is not None
        assert best.label == "base"
        found = {each.label: each for each in goodputs}
        assert found["base"].ratio is None
        base = [20.0 + seed + 10.0 * (0.05 - 0.01 * seed) / 0.2 for seed in SEEDS]
        own = found["own"].ratio
        expected = mean_confidence([28.0 / rate for rate in base])
        assert own is not None
        assert (own.mean, own.low, own.high) == pytest.approx((expected.mean, expected.low, expected.high))
        # What is at most 11 per second is at most so much of the baseline.
        assert found["bad_base"].ratio_bound == "at_most"

    def test_beyond_the_loads_that_were_run(self, one_run: RunResult) -> None:
        high = contents_of(one_run, contenders("own", "base"), scales=SCALES[:2])
        high = dataclasses.replace(high, runs=tuple(run for run in high.runs if run.scale in high.scales))
        own, base = summarise_goodput(high)
        assert own.bound == base.bound == "at_least"
        assert own.ratio_bound == "unknown"

    def test_without_baselines_there_is_no_ratio(self, one_run: RunResult) -> None:
        (own,) = summarise_goodput(contents_of(one_run, contenders("own")))
        assert own.ratio is None

    def test_bounds_are_means_over_the_same_seeds(self, comparison: ReportContents) -> None:
        found = summarise_bounds(comparison)
        assert [each.scale for each in found] == list(SCALES)
        assert [each.attainment for each in found] == [pytest.approx(0.99)] * 3

    @pytest.mark.parametrize(
        ("value", "top"), [(0.7, 0.8), (1.0, 1.0), (4.54, 5.0), (19.0, 20.0), (101.0, 150.0)]
    )
    def test_axes_end_at_round_values(self, value: float, top: float) -> None:
        assert nice_top(value) == pytest.approx(top)


class TestJson:
    def test_it_is_strict_json_with_every_figure(self, comparison: ReportContents) -> None:
        text = report_json(comparison)
        report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert text == report_json(comparison)
        assert (report["format"], report["version"]) == ("sagecp-simulation-report", 1)
        assert set(report) == {
            "format", "version", "sagecp_version", "command", "trace", "fleet", "world", "scales", "seeds",
            "contenders", "summary", "target_attainment", "goodput", "bounds", "bounds_by_seed",
            "event_logs", "runs",
        }  # fmt: skip
        assert len(report["runs"]) == len(CURVES) * len(SCALES) * len(SEEDS)
        assert len(report["summary"]) == len(CURVES) * len(SCALES)
        for each in report["summary"]:
            assert set(each) == {"label", "scale", "load_per_s", "figures"}
            assert set(each["figures"]) == {metric.name for metric in METRICS}
            attainment = each["figures"]["attainment"]
            assert attainment["low"] < attainment["mean"] < attainment["high"]
            assert attainment["count"] == len(SEEDS)
        for each in report["goodput"]:
            assert set(each) == {"label", "rate_per_s", "bound", "ratio_to_best_baseline", "ratio_bound"}
        assert {each["label"] for each in report["contenders"]} == set(CURVES)


class Page(HTMLParser):
    """A page taken apart; everything that is opened is closed, in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.charts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "svg":
            self.charts.append(dict(attrs)["aria-label"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(text: str) -> Page:
    """Return a page after a look at what holds for all of them."""
    page = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name in {"src", "href"} or name.startswith("on")]
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    # A number that could not be placed, in a drawing or a sentence.
    assert not re.search(r"\b(?:nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    return page


class TestPages:
    def test_a_run_at_several_loads(self, one_run: RunResult) -> None:
        contents = contents_of(one_run, contenders("own"))
        page = check_page(run_page(contents))
        for chart in (
            "met every objective against load",
            "Distribution of time to first token",
            "Distribution of time per further token",
            "requests per second that arrive",
            "requests that wait in the scheduler",
            "Requests on each instance over time",
            "Time to the first token by prompt length",
        ):
            assert chart in page.charts, f"there is no {chart!r} among {page.charts}"
        assert contents.command in page.words
        assert page.tags.count("details") >= 2

    def test_a_run_at_one_load(self, one_run: RunResult) -> None:
        contents = contents_of(one_run, contenders("own"))
        single = dataclasses.replace(
            contents, scales=(1.0,), seeds=(0,), runs=tuple(r for r in contents.runs if r.scale == 1.0)[:1]
        )
        page = check_page(run_page(single))
        assert "met every objective against load" not in page.charts
        assert "Distribution of time to first token" in page.charts
        tenants = {each.tenant_id for each in one_run.statistics.tenants}
        assert tenants <= set(page.words)

    def test_a_comparison(self, comparison: ReportContents) -> None:
        page = check_page(compare_page(comparison))
        for chart in (
            "met every objective against load",
            "Goodput of each contender",
            "of the prompt tokens against load",
            "of the longest third against load",
        ):
            assert chart in page.charts, f"there is no {chart!r} among {page.charts}"
        text = " ".join(page.words)
        for label in CURVES:
            assert label in text
        assert "dotted: no policy can be above" in text
        assert "own reaches 70.0 % of that" in text
        assert "What no policy can exceed" in text

    def test_one_load_has_no_goodput(self, comparison: ReportContents) -> None:
        single = dataclasses.replace(
            comparison, scales=(1.0,), bounds=(), runs=tuple(r for r in comparison.runs if r.scale == 1.0)
        )
        page = check_page(compare_page(single))
        assert "Goodput of each contender" not in page.charts
        assert "What no policy can exceed" not in page.words

    def test_names_are_text(self, one_run: RunResult) -> None:
        hostile = Contender(label="own", parameters={HOSTILE: 1.0})
        contents = contents_of(one_run, {"own": hostile}, trace_name=HOSTILE, command=HOSTILE)
        for text in (run_page(contents), compare_page(contents)):
            page = check_page(text)
            assert HOSTILE in page.words

    def test_a_run_in_which_nothing_was_served(self, tmp_path: Path) -> None:
        rows = [{**row, "model": "other"} for row in mixed_requests(5)]
        workload = Workload(trace_path=write_trace(tmp_path / "t.jsonl", rows), fleet="2x8b-h100")
        run = RunTask(workload=workload, contender=Contender(label="own"), with_charts=True).execute()
        contents = contents_of(run, contenders("own"), scales=(1.0,), seeds=(0,), runs=(run,))
        page = check_page(run_page(contents))
        assert page.words.count("Nothing was measured.") == 2
        figures = json.loads(report_json(contents))["summary"][0]["figures"]
        assert figures["ttft_p50_s"] is None
        assert figures["attainment"]["mean"] == 0.0


def test_charts_shorten_labels_that_carry_many_parameters() -> None:
    assert words.shortened("slo_aware/locality") == "slo_aware/locality"
    long = words.shortened("dynamo?overlap_weight=2&prefill_weight=16")
    assert long == "dynamo?overlap_weight=2&prefi…"
    assert len(long) == 30
