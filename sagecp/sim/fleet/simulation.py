"""A virtual clock, a fleet of simulated engines, and a controller that decides."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sagecp.core.types import EngineGauges
from sagecp.sim.fleet.controller import Controller, ObjectiveRule, Objectives
from sagecp.sim.fleet.engine import FleetEngine
from sagecp.sim.fleet.engine_job import EngineJob, NewsKind
from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import Outcomes, OutcomeState
from sagecp.sim.fleet.traces import Trace, TraceRequest

# At one time: first what engines finished, then what was waited for, then what arrives.
_SLOWDOWN, _NEWS, _GAUGES, _DELAYED, _ARRIVAL = range(5)


@dataclass(frozen=True, slots=True)
class Slowdown:
    """From a time on, an engine's steps take so many times as long as profiled."""

    time_s: float
    instance_index: int
    slowness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """How a run differs from a perfect world.

    Attributes:
        objectives: Of requests that state none.
        gauge_interval_s: Time between reports of an engine's metrics; 0: none are sent.
        gauge_delay_s: Age of a report when it arrives.
        event_delay_s: Time until the controller hears of a token or an end.
        slowdowns: Engines that change their speed.
        drain_limit_s: How long after the last arrival the run may go on.
    """

    objectives: ObjectiveRule = field(default_factory=ObjectiveRule)
    gauge_interval_s: float = 0.0
    gauge_delay_s: float = 0.0
    event_delay_s: float = 0.0
    slowdowns: tuple[Slowdown, ...] = ()
    drain_limit_s: float = 3600.0


@dataclass(slots=True)
class _Live:
    """A request that has arrived and not ended."""

    request: TraceRequest
    objectives: Objectives
    arrival_s: float
    job: EngineJob | None = None
    dispatch_s: float | None = None
    instance_index: int = -1


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came out of a run.

    Attributes:
        outcomes: One row per request.
        end_s: When the last of it happened.
        event_count: Events that the controller was told of.
        busy_s: Time that each engine spent in steps.
        preemption_count: Over all engines.
        prefix_hit_token_count: Prompt tokens that engines had cached.
        prefix_query_token_count: Prompt tokens that they looked for.
    """

    outcomes: Outcomes
    end_s: float
    event_count: int
    busy_s: tuple[float, ...]
    preemption_count: int
    prefix_hit_token_count: int
    prefix_query_token_count: int


class Simulation:
    """One run. Equal arguments give equal runs, event by event.

    Args:
        trace: What arrives.
        fleet: The instances.
        controller: Who decides.
        options: How the run differs from a perfect world.
        progress: Called with the share done, 0 to 1, every so often.
    """

    def __init__(
        self,
        trace: Trace,
        fleet: Sequence[SimInstance],
        controller: Controller,
        options: SimulationOptions | None = None,
        *,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.instances = fleet
        self.engines = [
            FleetEngine(each.profile, each.engine_limits(trace.block_token_count), slowness=each.slowness)
            for each in fleet
        ]
        self._trace = trace
        self._controller = controller
        self._options = options or SimulationOptions()
        self._progress = progress
        self._now = 0.0
        self._events: list[tuple[float, int, int, object]] = []
        self._sequence = 0
        # Time of the one entry of each engine that counts.
        self._engine_due_s = [math.inf] * len(fleet)
        # Engines that something happened to since their next events were planned.
        self._touched: set[int] = set()
        self._live: dict[str, _Live] = {}
        self._followers: dict[str, list[TraceRequest]] = {}
        self._outcomes = Outcomes()
        self._event_count = 0

    def run(self) -> SimulationResult:
        """Run to the end: until everything ended, or the drain limit passed."""
        options, controller = self._options, self._controller
        arrival_count = 0
        for request in self._trace.requests:
            if request.after:
                self._followers.setdefault(request.after, []).append(request)
            else:
                self._push(request.arrival_s, _ARRIVAL, request)
                arrival_count += 1
        for slowdown in options.slowdowns:
            self._push(slowdown.time_s, _SLOWDOWN, slowdown)
        if options.gauge_interval_s:
            for index in range(len(self.engines)):
                self._push(options.gauge_interval_s, _GAUGES, index)
        last_arrival_s = self._trace.requests[-1].arrival_s if self._trace.requests else 0.0
        controller.begin(self, 0.0)
        end_limit_s = max(last_arrival_s, self._trace.duration_s) + options.drain_limit_s
        events = self._events
        waiting_count = len(self._trace.requests)
        report_every = max(1, waiting_count // 100)
        next_report = report_every
        while events or self._live:
            timer_s = controller.next_timer_s()
            if timer_s is not None and (not events or timer_s < events[0][0]):
                self._now = max(self._now, timer_s)
                if self._now > end_limit_s or (not self._live and not self._expects_more()):
                    break
                controller.on_timer(self._now)
                self._event_count += 1
                self._note_due()
                continue
            if not events:
                break
            time_s, kind, _, payload = heapq.heappop(events)
            if kind == _NEWS:
                assert isinstance(payload, int)  # noqa: S101 - pushed so
                if time_s != self._engine_due_s[payload]:
                    continue
                self._now = time_s
                self._run_engine(payload)
            else:
                if kind == _GAUGES and not self._live and not self._expects_more():
                    continue
                self._now = time_s
                self._handle(kind, payload)
            if self._now > end_limit_s:
                break
            self._note_due()
            if self._progress is not None and len(self._outcomes) >= next_report:
                next_report += report_every
                self._progress(len(self._outcomes) / waiting_count)
        for request_id in list(self._live):
            self.end(request_id, OutcomeState.UNFINISHED)
        return self._result()

    # -- what a controller may do ------------------------------------------------

    def start(self, request_id: str, instance_index: int) -> None:
        """Give a request to an engine, now, which refuses what it could never hold."""
        live = self._live[request_id]
        request = live.request
        live.dispatch_s = self._now
        live.instance_index = instance_index
        length = request.prompt_token_count + request.output_token_count
        if length > self.engines[instance_index].kv_token_capacity:
            self._push(self._now + self._options.event_delay_s, _DELAYED, request_id)
            return
        live.job = EngineJob(
            request_id, request.prompt_token_count, request.output_token_count, request.block_hashes
        )
        self.engines[instance_index].add(live.job, self._now)
        self._touched.add(instance_index)

    def abort(self, request_id: str) -> None:
        """Take a request from its engine, now."""
        live = self._live[request_id]
        if live.job is None:
            return
        self.engines[live.instance_index].abort(request_id, self._now)
        self._touched.add(live.instance_index)

    def end(self, request_id: str, state: OutcomeState) -> None:
        """Record what became of a request, and let those follow that waited for its end."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        request, job, objectives = live.request, live.job, live.objectives
        self._outcomes.add(
            request_id=request_id,
            arrival_s=live.arrival_s,
            state=state,
            prompt_token_count=request.prompt_token_count,
            output_token_count=request.output_token_count,
            cached_token_count=0 if job is None else max(0, job.cached_token_count),
            dispatch_s=live.dispatch_s,
            scheduled_s=_known(None if job is None else job.scheduled_s),
            first_token_s=_known(None if job is None else job.first_token_s),
            finish_s=_known(None if job is None else job.finish_s)
            if state is OutcomeState.SUCCEEDED
            else self._now,
            tenant_id=request.tenant_id,
            priority=request.priority,
            instance_index=live.instance_index,
            ttft_slo_s=objectives.ttft_s,
            tpot_slo_s=objectives.tpot_s,
            deadline_s=objectives.deadline_s,
            preemption_count=0 if job is None else job.preemption_count,
        )
        for follower in self._followers.pop(request_id, ()):
            self._push(self._now + follower.think_s, _ARRIVAL, follower)

    # -- inside ------------------------------------------------------------------

    def _expects_more(self) -> bool:
        return any(entry[1] == _ARRIVAL for entry in self._events)

    def _push(self, time_s: float, kind: int, payload: object) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time_s, kind, self._sequence, payload))

    def _note_due(self) -> None:
        """Plan the next event of every engine that was touched."""
        # In order, or what happens first of what happens at one time would depend on chance.
        for index in sorted(self._touched):
            next_s = self.engines[index].next_event_s()
            self._engine_due_s[index] = next_s
            if next_s != math.inf:
                self._push(next_s, _NEWS, index)
        self._touched.clear()

    def _run_engine(self, index: int) -> None:
        self._touched.add(index)
        delay_s = self._options.event_delay_s
        for news in self.engines[index].advance(self._now):
            if delay_s:
                self._push(self._now + delay_s, _DELAYED, news)
            else:
                self._tell(news.kind, news.job)

    def _tell(self, kind: NewsKind, job: EngineJob) -> None:
        self._event_count += 1
        if job.request_id not in self._live:
            return
        if kind is NewsKind.FIRST_TOKEN:
            self._controller.on_first_token(job.request_id, self._now)
        else:
            self._controller.on_finished(
                job.request_id, job.output_token_count, max(0, job.cached_token_count), self._now
            )
            self.end(job.request_id, OutcomeState.SUCCEEDED)

    def _handle(self, kind: int, payload: object) -> None:
        if kind == _ARRIVAL:
            assert isinstance(payload, TraceRequest)  # noqa: S101 - pushed so
            objectives = self._options.objectives.of(payload)
            self._live[payload.request_id] = _Live(payload, objectives, self._now)
            self._event_count += 1
            self._controller.on_arrival(payload, objectives, self._now)
        elif kind == _DELAYED and isinstance(payload, str):
            if payload in self._live:
                self._event_count += 1
                self._controller.on_refused(payload, self._now)
        elif kind == _DELAYED:
            self._tell(payload.kind, payload.job)  # type: ignore[attr-defined]
        elif kind == _SLOWDOWN:
            assert isinstance(payload, Slowdown)  # noqa: S101 - pushed so
            engine = self.engines[payload.instance_index]
            engine.advance(self._now)
            engine.slowness = payload.slowness
            self._touched.add(payload.instance_index)
        elif isinstance(payload, int):
            self._report(payload)
        else:
            assert isinstance(payload, tuple)  # noqa: S101 - pushed so
            index, gauges = payload
            self._event_count += 1
            self._controller.on_gauges(index, gauges, self._now)

    def _report(self, index: int) -> None:
        """Read an engine's gauges now, and deliver them later."""
        options = self._options
        engine = self.engines[index]
        self._run_engine(index)
        gauges = EngineGauges(
            running_request_count=engine.running_count,
            waiting_request_count=engine.waiting_count,
            key_value_cache_usage=engine.kv_usage,
            prefix_cache_query_token_count=engine.counters.prefix_query_tokens,
            prefix_cache_hit_token_count=engine.counters.prefix_hit_tokens,
            prompt_token_count=engine.counters.prompt_tokens,
            generation_token_count=engine.counters.generation_tokens,
            preemption_count=engine.counters.preemptions,
        )
        self._push(self._now + options.gauge_delay_s, _GAUGES, (index, gauges))
        self._push(self._now + options.gauge_interval_s, _GAUGES, index)

    def _result(self) -> SimulationResult:
        counters = [engine.counters for engine in self.engines]
        return SimulationResult(
            outcomes=self._outcomes,
            end_s=self._now,
            event_count=self._event_count,
            busy_s=tuple(each.busy_s for each in counters),
            preemption_count=sum(each.preemptions for each in counters),
            prefix_hit_token_count=sum(each.prefix_hit_tokens for each in counters),
            prefix_query_token_count=sum(each.prefix_query_tokens for each in counters),
        )


def _known(time_s: float | None) -> float | None:
    return None if time_s is None or time_s < 0.0 else time_s
