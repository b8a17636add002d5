"""Simulated runs as values: what to run goes in, figures come out, in this process or in several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sagecp.core.errors import SageError
from sagecp.core.settings import SettingsHistory
from sagecp.sim.fleet.controller import Controller
from sagecp.sim.fleet.event_log import EventLogWriter
from sagecp.sim.fleet.fleet_file import SimInstance, read_fleet
from sagecp.sim.fleet.outcomes import OutcomeArrays
from sagecp.sim.fleet.rates import follow_rates, read_rates
from sagecp.sim.fleet.report.run_charts import RunCharts, rounded, run_charts
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationOptions, SimulationResult
from sagecp.sim.fleet.statistics import RunStatistics, summarise
from sagecp.sim.fleet.traces import DEFAULT_SESSIONS_PER_S, Trace, read_trace, transform

Progress = Callable[[float], None]


class ContenderError(ValueError):
    """A policy or baseline cannot be made of its name and parameters; says what is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Who decides in a run: the production scheduler with some settings, or a baseline.

    Attributes:
        label: How reports call it, unique in an experiment.
        baseline: Name of a baseline; empty: the production scheduler.
        parameters: Of either, where they differ from their defaults. Only baselines have words
            among theirs.
    """

    label: str
    baseline: str = ""
    scheduling_policy: str = "slo_aware"
    routing_strategy: str = "load_balanced"
    load_balancer: str = "predicted_latency"
    parameters: Mapping[str, float | str] = field(default_factory=dict)

    def check(self) -> None:
        """Make sure that it can be made.

        Raises:
            ContenderError: A name or a parameter is not known, or not allowed.
        """
        if self.baseline:
            self._make_baseline(0, stale=False)
            return
        try:
            SettingsHistory(
                self.scheduling_policy, self.routing_strategy, self.load_balancer, self._numbers()
            )
        except SageError as error:
            raise ContenderError(error.message) from error

    def _numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.parameters.items()}

    def setup(self, seed: int, model_error: float) -> SchedulerSetup:
        """Return how the production scheduler is set up."""
        return SchedulerSetup(
            scheduling_policy=self.scheduling_policy,
            routing_strategy=self.routing_strategy,
            load_balancer=self.load_balancer,
            parameters=self._numbers(),
            name=self.label,
            model_error=model_error,
            seed=seed,
        )

    def _make_baseline(self, seed: int, *, stale: bool) -> Controller:
        from sagecp.sim.fleet.baselines.registry import make_baseline

        parameters: dict[str, object] = {"stale": True} if stale else {}
        try:
            return make_baseline(self.baseline, seed=seed, **{**parameters, **self.parameters})
        except SageError as error:
            raise ContenderError(error.message) from error
        except (TypeError, ValueError) as error:
            raise ContenderError(str(error)) from error

    def make_controller(self, workload: Workload, trace: Trace, seed: int) -> Controller:
        """Return a fresh controller for a run."""
        if self.baseline:
            return self._make_baseline(seed, stale=workload.options.gauge_interval_s > 0)
        return SchedulerController(self.setup(seed, workload.model_error), trace.block_token_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What arrives, at which fleet, in which world.

    Attributes:
        trace_path: The trace.
        fleet: As :func:`read_fleet` takes it.
        rates_path: Rates that arrivals follow, see :func:`follow_rates`; ``None``: they stay as recorded.
        start_s: Window of the trace, like the following as in :func:`transform`.
        options: How the world differs from a perfect one.
        model_error: As in :class:`SchedulerSetup`; baselines know the engines exactly.
    """

    trace_path: Path
    fleet: str
    rates_path: Path | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    limit: int | None = None
    sessions_per_s: float | None = None
    longest_think_s: float | None = None
    options: SimulationOptions = field(default_factory=SimulationOptions)
    model_error: float = 0.0

    def trace(self, scale: float, seed: int) -> Trace:
        """Return the part of the trace that a run sees.

        Raises:
            TraceError: The trace, or the rates, cannot be read.
            ValueError: Nothing is left of it, or it cannot follow rates.
        """
        trace = transform(
            _read_trace_once(self.trace_path),
            scale=scale,
            start_s=self.start_s,
            duration_s=self.duration_s,
            limit=self.limit,
            seed=seed,
            sessions_per_s=self.sessions_per_s,
            longest_think_s=self.longest_think_s,
        )
        return trace if self.rates_path is None else follow_rates(trace, read_rates(self.rates_path))

    def instances(self) -> tuple[SimInstance, ...]:
        """Return the fleet."""
        return read_fleet(self.fleet)


def _read_trace_once(path: Path) -> Trace:
    try:
        stat = path.stat()
    except OSError:
        return read_trace(path)
    return _read_unchanged_trace(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read_unchanged_trace(path: Path, _mtime_ns: int, _size_bytes: int) -> Trace:
    return read_trace(path)


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """What one instance did in a run.

    Attributes:
        busy_share: Part of the run in which its engine ran steps.
        usd_per_hour: Price of the whole instance.
    """

    instance_id: str
    profile: str
    usd_per_hour: float
    request_count: int
    prompt_token_count: int
    output_token_count: int
    cached_token_count: int
    busy_share: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came out of one run.

    Attributes:
        label: Of the contender.
        load_per_s: Requests, or in a closed loop session starts, that were offered per second.
        end_s: When the last request ended, on the run's clock.
        event_count: Events that the controller was told of.
        charts: ``None`` unless they were asked for.
    """

    label: str
    scale: float
    seed: int
    load_per_s: float
    statistics: RunStatistics
    instances: tuple[InstanceFigures, ...]
    end_s: float
    event_count: int
    charts: RunCharts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """One run.

    Attributes:
        event_log_path: Where its events are written; ``None``: nowhere. Baselines have none.
        with_charts: Whether the result carries what charts are drawn from.
    """

    workload: Workload
    contender: Contender
    scale: float = 1.0
    seed: int = 0
    event_log_path: Path | None = None
    with_charts: bool = False

    def execute(self, progress: Progress | None = None) -> RunResult:
        """Run it.

        Args:
            progress: Called with the share done, 0 to 1, every so often.

        Raises:
            ContenderError: There is no such policy or baseline.
            OSError: The event log cannot be written.
        """
        workload = self.workload
        fleet = workload.instances()
        trace = workload.trace(self.scale, self.seed)
        result = self._simulate(fleet, trace, progress)
        rows = result.outcomes.as_arrays()
        # A trace in which everything arrives at once covers no time.
        duration_s = trace.duration_s or result.end_s or 1.0
        statistics = summarise(rows, fleet, duration_s=duration_s)
        load_per_s = statistics.offered_per_s
        if trace.is_closed_loop:
            load_per_s = self.scale * (workload.sessions_per_s or DEFAULT_SESSIONS_PER_S)
        return RunResult(
            label=self.contender.label,
            scale=self.scale,
            seed=self.seed,
            load_per_s=load_per_s,
            statistics=statistics,
            instances=_instance_figures(rows, fleet, result),
            end_s=result.end_s,
            event_count=result.event_count,
            charts=run_charts(rows, fleet) if self.with_charts else None,
        )

    def _simulate(
        self, fleet: tuple[SimInstance, ...], trace: Trace, progress: Progress | None
    ) -> SimulationResult:
        workload, contender = self.workload, self.contender
        options = workload.options
        if self.event_log_path is None or contender.baseline:
            controller = contender.make_controller(workload, trace, self.seed)
            return Simulation(trace, fleet, controller, options, progress=progress).run()
        setup = contender.setup(self.seed, workload.model_error)
        config = SchedulerController(setup, trace.block_token_count).scheduler.config
        about = {"trace": trace.name, "fleet": workload.fleet, "scale": self.scale, "seed": self.seed}
        with EventLogWriter(self.event_log_path, config, about) as log:
            logged = SchedulerController(setup, trace.block_token_count, listener=log)
            return Simulation(trace, fleet, logged, options, progress=progress).run()


def _instance_figures(
    rows: OutcomeArrays, fleet: tuple[SimInstance, ...], result: SimulationResult
) -> tuple[InstanceFigures, ...]:
    found: list[InstanceFigures] = []
    for index, instance in enumerate(fleet):
        chosen = (rows.instance_index == index) & np.isfinite(rows.first_token_s)
        ttft_s = rows.ttft_s[chosen]
        p50_s, p99_s = np.quantile(ttft_s, (0.5, 0.99)) if len(ttft_s) else (np.nan, np.nan)
        found.append(
            InstanceFigures(
                instance.instance_id,
                instance.profile.name,
                instance.usd_per_hour,
                int(chosen.sum()),
                int(rows.prompt_token_count[chosen].sum()),
                int(rows.produced_token_count[chosen].sum()),
                int(rows.cached_token_count[chosen].sum()),
                result.busy_s[index] / result.end_s if result.end_s else 0.0,
                rounded(float(p50_s)),
                rounded(float(p99_s)),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no policy can exceed on a workload. ``None``: not known.

    Attributes:
        scale: Load that the attainment is for.
        seed: Window of the trace, likewise.
        attainment: Largest share of good requests that any policy could reach; loose.
        infinite_hit_share: Prompt tokens that one endless cache for the whole fleet would find.
        belady_hit_share: That a cache of the fleet's size would find if it knew the future.
        pooled_lru_hit_share: That an LRU cache of the fleet's size would find, as engines evict.
        limit_per_s: Requests like these per second that keep every engine busy with the least work that
            the Belady cache leaves. Who serves short requests only may exceed it.
    """

    scale: float
    seed: int
    attainment: float | None
    infinite_hit_share: float | None
    belady_hit_share: float | None
    pooled_lru_hit_share: float | None
    limit_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundsTask:
    """Bounds of a workload at one load."""

    workload: Workload
    scale: float
    seed: int = 0

    def execute(self, progress: Progress | None = None) -> Bounds:
        """Work them out.

        Raises:
            ValueError: The trace is closed-loop: what arrives when depends on the fleet.
        """
        from sagecp.sim.fleet.bounds import cache_bounds, limit_rate_per_s, strict_attainment_bound

        fleet = self.workload.instances()
        trace = self.workload.trace(self.scale, self.seed)
        attainment = strict_attainment_bound(trace, fleet, self.workload.options.objectives)
        if progress is not None:
            progress(0.5)
        cache = cache_bounds(trace, fleet)
        return Bounds(
            self.scale,
            self.seed,
            attainment,
            cache.infinite_hit_share,
            cache.belady_hit_share,
            cache.pooled_lru_hit_share,
            limit_rate_per_s(trace, fleet) if trace.duration_s else None,
        )


Task = RunTask | BoundsTask
TaskResult = RunResult | Bounds
