"""Figures over several seeds: means with 95 % intervals, goodput, and comparisons in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sagecp.core.types import DurationQuantiles
from sagecp.sim.fleet.experiment import RunResult
from sagecp.sim.fleet.intervals import GoodputAt, Interval, goodput_at, mean_confidence
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.statistics import RunStatistics

TARGET_ATTAINMENT = 0.9
"""Attainment that goodput is asked for at."""

Bound = Literal["exact", "at_least", "at_most", "unknown"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a run.

    Attributes:
        title: For people.
        kind: How it is written, see :func:`sagecp.sim.fleet.report.words.text_of`.
        read: From a run's statistics; ``None``: undefined there.
        about: What it means, in a sentence.
    """

    name: str
    title: str
    kind: str
    read: Callable[[RunStatistics], float | None]
    about: str


def _known(quantiles: DurationQuantiles, name: str) -> float | None:
    """Return a quantile; ``None`` where nothing was measured."""
    value: float = getattr(quantiles, name)
    return value if quantiles.sample_count else None


METRICS: tuple[Metric, ...] = (
    Metric("attainment", "SLO attainment", "share", lambda s: s.attainment,
           "Requests that met every objective, over all; a rejected one is a miss."),
    Metric("token_weighted_attainment", "Weighted by tokens", "share",
           lambda s: s.token_weighted_attainment,
           "The same, with every request counted as often as it has prompt tokens."),
    Metric("goodput_per_s", "Goodput", "rate", lambda s: s.goodput_per_s,
           "Requests per second that met every objective."),
    Metric("long_attainment", "Longest third", "share", lambda s: s.attainment_by_length["long"].attainment,
           "Attainment of the third of the requests with the longest prompts."),
    Metric("worst_tenant_attainment", "Worst tenant", "share",
           lambda s: s.worst_tenant_attainment if len(s.tenants) > 1 else None,
           "Lowest attainment of a tenant with 50 requests or more, where there are several tenants."),
    Metric("ttft_p50_s", "TTFT p50", "seconds", lambda s: _known(s.ttft, "p50_s"),
           "Median time to the first token."),
    Metric("ttft_p95_s", "TTFT p95", "seconds", lambda s: _known(s.ttft, "p95_s"), "95th percentile of it."),
    Metric("ttft_p99_s", "TTFT p99", "seconds", lambda s: _known(s.ttft, "p99_s"), "99th percentile of it."),
    Metric("tpot_p50_s", "TPOT p50", "seconds", lambda s: _known(s.tpot, "p50_s"),
           "Median time per further token."),
    Metric("tpot_p95_s", "TPOT p95", "seconds", lambda s: _known(s.tpot, "p95_s"), "95th percentile of it."),
    Metric("prefix_hit_share", "Prefix hits", "share", lambda s: s.prefix_hit_share,
           "Prompt tokens that engines had cached."),
    Metric("rejected_share", "Rejected", "share", lambda s: s.rejected_share, "Requests refused at once."),
    Metric("failed_share", "Failed", "share", lambda s: s.failed_share,
           "Requests given to an instance whose memory could never hold them, and refused by its engine."),
    Metric("usd_per_1000_good", "Per 1,000 good", "usd", lambda s: s.usd_per_1000_good,
           "Price of the fleet's time per 1,000 requests that met every objective."),
    Metric("jain_index", "Jain's index", "number", lambda s: s.jain_index if len(s.tenants) > 1 else None,
           "Fairness between tenants: 1 is even, 1/n is everything to one."),
    Metric("preemption_count", "Preemptions", "number", lambda s: float(s.preemption_count),
           "Times that an engine took a request's memory away."),
)  # fmt: skip
"""Every figure that is summed up over seeds."""

METRICS_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A contender at one load.

    Attributes:
        load_per_s: Offered per second, over the seeds.
        figures: By the metric's name; ``None``: undefined in every run.
    """

    label: str
    scale: float
    load_per_s: Interval
    figures: dict[str, Interval | None]


@dataclass(frozen=True, slots=True)
class GoodputSummary:
    """The largest load at which a contender keeps the target attainment.

    Attributes:
        rate: Per second, interpolated for each seed, over the seeds.
        bound: ``at_least``: some seed kept it at every load that was tried; ``at_most``:
            some kept it at none; ``unknown``: both occur.
        ratio: To the best baseline, seed by seed; ``None``: there is no baseline, or it is the best one.
        ratio_bound: Likewise of the ratio.
    """

    label: str
    rate: Interval
    bound: Bound
    ratio: Interval | None = None
    ratio_bound: Bound = "exact"


def summarise_loads(contents: ReportContents) -> tuple[LoadSummary, ...]:
    """Return every contender at every load, contender by contender."""
    return tuple(
        _load_summary(contender.label, scale, contents.runs_of(contender.label, scale))
        for contender in contents.contenders
        for scale in contents.scales
    )


@dataclass(frozen=True, slots=True)
class BoundsSummary:
    """Mean bounds at one scale over the seeds, which the mean of runs is below. ``None``: unknown."""

    scale: float
    attainment: float | None
    infinite_hit_share: float | None
    belady_hit_share: float | None
    pooled_lru_hit_share: float | None
    limit_per_s: float | None


def summarise_bounds(contents: ReportContents) -> tuple[BoundsSummary, ...]:
    """Return the mean bounds of every scale that has some."""
    found: list[BoundsSummary] = []
    for scale in contents.scales:
        here = [each for each in contents.bounds if each.scale == scale]
        if here:
            found.append(
                BoundsSummary(
                    scale,
                    _mean([each.attainment for each in here]),
                    _mean([each.infinite_hit_share for each in here]),
                    _mean([each.belady_hit_share for each in here]),
                    _mean([each.pooled_lru_hit_share for each in here]),
                    _mean([each.limit_per_s for each in here]),
                )
            )
    return tuple(found)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def told_columns(names: Sequence[str], loads: Sequence[LoadSummary]) -> tuple[str, ...]:
    """Return the metrics of some that are known and other than 0 anywhere: the others tell nothing."""
    return tuple(
        name
        for name in names
        if any((value := load.figures[name]) is not None and value.mean != 0.0 for load in loads)
    )


def _load_summary(label: str, scale: float, runs: Sequence[RunResult]) -> LoadSummary:
    figures: dict[str, Interval | None] = {}
    for metric in METRICS:
        values = [value for run in runs if (value := metric.read(run.statistics)) is not None]
        figures[metric.name] = mean_confidence(values) if values else None
    return LoadSummary(label, scale, mean_confidence([run.load_per_s for run in runs]), figures)


def summarise_goodput(contents: ReportContents) -> tuple[GoodputSummary, ...]:
    """Return every contender's goodput at the target, with its ratio to the best baseline's."""
    by_seed = {each.label: _goodput_by_seed(contents, each.label) for each in contents.contenders}
    means = {label: mean_confidence([each.rate_per_s for each in found]) for label, found in by_seed.items()}
    baselines = [each.label for each in contents.contenders if each.baseline]
    # The first of equals, in the order in which they are shown.
    best = max(baselines, key=lambda label: means[label].mean, default=None)
    found: list[GoodputSummary] = []
    for contender in contents.contenders:
        label = contender.label
        bound = _common_bound([each.bound for each in by_seed[label]])
        if best is None or label == best:
            found.append(GoodputSummary(label, means[label], bound))
            continue
        ratios = [
            own.rate_per_s / other.rate_per_s
            for own, other in zip(by_seed[label], by_seed[best], strict=True)
            if other.rate_per_s > 0
        ]
        others = [_inverse(each.bound) for each in by_seed[best]]
        ratio_bound = _common_bound([each.bound for each in by_seed[label]] + others)
        ratio = mean_confidence(ratios) if ratios else None
        found.append(GoodputSummary(label, means[label], bound, ratio, ratio_bound))
    return tuple(found)


def best_baseline(contents: ReportContents, goodput: Sequence[GoodputSummary]) -> GoodputSummary | None:
    """Return the baseline of the highest goodput, which the others are compared with."""
    baselines = {each.label for each in contents.contenders if each.baseline}
    return max(
        (each for each in goodput if each.label in baselines), key=lambda each: each.rate.mean, default=None
    )


def _goodput_by_seed(contents: ReportContents, label: str) -> list[GoodputAt]:
    found: list[GoodputAt] = []
    for seed in contents.seeds:
        points = [
            (run.load_per_s, run.statistics.attainment or 0.0)
            for run in contents.runs_of(label)
            if run.seed == seed
        ]
        found.append(goodput_at(points, TARGET_ATTAINMENT))
    return found


def _inverse(bound: Bound) -> Bound:
    inverses: dict[Bound, Bound] = {"at_least": "at_most", "at_most": "at_least"}
    return inverses.get(bound, bound)


def _common_bound(bounds: Sequence[Bound]) -> Bound:
    """Return what the mean of bounded values is."""
    one_sided = {bound for bound in bounds if bound != "exact"}
    if not one_sided:
        return "exact"
    return one_sided.pop() if len(one_sided) == 1 else "unknown"
