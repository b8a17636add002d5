"""A core to play with: short ways to make values, and one line of text per effect."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.instance_load import InstanceLoad
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.policy_replay import PolicyReplay, PolicyScore
from sagecp.core.prediction.book import InstanceKind, PredictionBook
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.request import RequestRecord
from sagecp.core.scheduler import Scheduler
from sagecp.core.settings import SettingsChange
from sagecp.core.types import EngineCondition, EngineGauges, ExecutionInstance, RequestMetadata, RequestState

LOST_CONNECTION = Failure(ErrorReason.ENGINE_UNREACHABLE, "nobody listens")
ENGINE_FAILED = Failure(ErrorReason.ENGINE_FAILED, "the engine failed")
REJECTED = Failure(ErrorReason.ENGINE_REJECTED, "the engine refused it")

# A small fast engine: 11 ms per decode step, about 50 us per prompt token.
STEP_TIME = StepTimeParameters(
    overhead_s=0.002,
    memory_base_s=0.009,
    memory_per_token_s=20e-6,
    compute_base_s=0.004,
    compute_per_token_s=50e-6,
    context_per_token_s=1e-7,
    attention_per_token_pair_s=1e-9,
)


def make_instance(instance_id: str = "a", model: str = "m", **fields: Any) -> ExecutionInstance:
    """An instance; ``limit`` and ``capacity`` are short for its two bounds."""
    fields.setdefault("max_concurrent_request_count", fields.pop("limit", None))
    fields.setdefault("key_value_token_capacity", fields.pop("capacity", None))
    return ExecutionInstance(instance_id=instance_id, host="127.0.0.1", port=8000, model_name=model, **fields)


def make_metadata(request_id: str = "r1", model: str = "m", **fields: Any) -> RequestMetadata:
    return RequestMetadata(request_id=request_id, model_name=model, **fields)


def make_record(
    request_id: str = "r1", model: str = "m", sequence: int = 1, arrival_s: float = 0.0, **fields: Any
) -> RequestRecord:
    return RequestRecord(make_metadata(request_id, model, **fields), model, sequence, arrival_s)


def make_load(step_time: StepTimeParameters = STEP_TIME, now: float = 0.0) -> InstanceLoad:
    """The load of an idle instance whose kind is known."""
    return InstanceLoad(InstanceKind(step_time, trusted=True, source="a test"), now)


def make_instance_record(
    instance_id: str = "a", model: str = "m", incarnation: int = 0, default_limit: int = 4, **fields: Any
) -> InstanceRecord:
    spec = make_instance(instance_id, model, **fields)
    load = InstanceLoad(PredictionBook().kind_of(spec), 0.0)
    return InstanceRecord(spec, incarnation, 0.0, default_limit, load)


def arrive(request_id: str, model: str = "m", **fields: Any) -> ev.RequestArrived:
    return ev.RequestArrived(make_metadata(request_id, model, **fields))


def healthy(
    instance_id: str = "a", model: str = "m", incarnation: int = 0, **fields: Any
) -> ev.InstanceRegistered:
    """A registration that makes the instance READY at once."""
    return ev.InstanceRegistered(
        make_instance(instance_id, model, **fields), incarnation, EngineCondition.HEALTHY
    )


def beat(
    instance_id: str,
    incarnation: int,
    condition: EngineCondition = EngineCondition.HEALTHY,
    **gauges: Any,
) -> ev.HeartbeatReceived:
    return ev.HeartbeatReceived(
        instance_id, incarnation, condition, gauges=EngineGauges(**gauges) if gauges else None
    )


def probe(instance_id: str, condition: EngineCondition = EngineCondition.HEALTHY) -> ev.HealthProbed:
    return ev.HealthProbed(instance_id, condition)


def fail(
    request_id: str,
    epoch: int = 1,
    failure: Failure = ENGINE_FAILED,
    retryable: bool = True,
    engine_down: bool = False,
    counts_against_engine: bool = True,
    **more: Any,
) -> ev.AttemptFailed:
    return ev.AttemptFailed(request_id, epoch, failure, retryable, engine_down, counts_against_engine, **more)


def configure(
    scheduling_policy: str = "", routing_strategy: str = "", load_balancer: str = "", **fields: Any
) -> ev.SchedulingConfigured:
    """A change of the settings; what is not named stays as it is."""
    return ev.SchedulingConfigured(
        SettingsChange(
            scheduling_policy=scheduling_policy,
            routing_strategy=routing_strategy,
            load_balancer=load_balancer,
            **fields,
        )
    )


def line(effect: fx.Effect) -> str:
    """An effect in a few words: ``dispatch r1#1 a``."""
    match effect:
        case fx.RequestAccepted(record):
            return f"accept {record.request_id}"
        case fx.RequestRejected(request_id, error):
            return f"reject {request_id} {error.reason.name}"
        case fx.DispatchAttempt(record, epoch, instance_id):
            return f"dispatch {record.request_id}#{epoch} {instance_id}"
        case fx.AbortAttempt(request_id, epoch, instance_id):
            return f"abort {request_id}#{epoch} {instance_id}"
        case fx.InterruptAttempt(request_id, epoch, instance_id):
            return f"interrupt {request_id}#{epoch} {instance_id}"
        case fx.RequestRequeued(record):
            return f"requeue {record.request_id}"
        case fx.RequestEnded(record, state):
            return f"end {record.request_id} {state.name}"
        case fx.InstanceChanged(instance_id, state, previous):
            return f"{instance_id} {previous.name if previous else '-'}>{state.name}"
        case fx.InstanceRemoved(instance_id):
            return f"remove {instance_id}"
        case fx.GpuFaultBegan(instance_id, fault, outcome):
            return f"{instance_id} {fault.kind.name} {outcome or '-'}"
        case fx.GpuFaultCleared(instance_id, fault):
            return f"{instance_id} {fault.kind.name} over"
        case fx.EngineProcessChanged(instance_id, _, process):
            return f"{instance_id} process {process.state.name}"
        case fx.ClockSkewChanged(instance_id, _, skewed):
            return f"{instance_id} clocks {'apart' if skewed else 'together'}"
        case fx.OrderTroubled(instance_id, trouble):
            return f"{instance_id} trouble {trouble}"
        case fx.ProbeEngine(instance_id):
            return f"probe {instance_id}"
        case fx.FailStaticChanged(active):
            return f"fail static {'on' if active else 'off'}"
        case fx.SettingsChanged(settings):
            return f"settings {settings.version}"
        case fx.EvaluatePolicies(replay):
            return f"evaluate {replay.evaluation_id}"
        case fx.PolicySwitched(previous, policy):
            return f"switch {previous}>{policy}"


def full_text(effect: fx.Effect) -> str:
    """Everything an effect says, records included, for comparing two runs."""
    parts = []
    for field in dataclasses.fields(effect):
        value = getattr(effect, field.name)
        if isinstance(value, RequestRecord):
            value = {
                name: getattr(value, name)
                for name in sorted(value.__slots__)
                if name not in {"machine", "excluded_instance_ids"}
            } | {"history": value.machine.history, "excluded": sorted(value.excluded_instance_ids)}
        elif isinstance(value, Exception):
            value = (type(value).__name__, str(value), getattr(value, "retry_after_s", None))
        parts.append(f"{field.name}={value!r}")
    if isinstance(effect, fx.DispatchAttempt) and effect.decision.inputs is not None:
        # Left out of the receipt's own text.
        parts.append(f"request={effect.decision.inputs.request!r}")
        parts.append(f"candidates={effect.decision.inputs.candidates!r}")
    return f"{type(effect).__name__}({', '.join(parts)})"


class World:
    """A scheduler with a clock that only tests move."""

    def __init__(self, **config: Any) -> None:
        config.setdefault("default_concurrency_limit", 4)
        self.scheduler = Scheduler(SchedulerConfig(**config))
        self.now = 0.0

    def feed(self, *events: ev.Event) -> list[str]:
        """Feed events; return the lines of all their effects."""
        return [line(effect) for event in events for effect in self.scheduler.handle(event, self.now)]

    def effects(self, event: ev.Event) -> list[fx.Effect]:
        return self.scheduler.handle(event, self.now)

    def wait(self, duration_s: float) -> list[str]:
        """Let time pass, and tell the scheduler."""
        self.now += duration_s
        return self.feed(ev.ClockAdvanced())

    def record(self, request_id: str) -> RequestRecord:
        record = self.scheduler.find_request(request_id)
        assert record is not None, f"{request_id} is not live"
        return record

    def instance(self, instance_id: str) -> InstanceRecord:
        return self.scheduler.fleet.get(instance_id)


class Dispatch(NamedTuple):
    """A dispatch as it was when it happened.

    Attributes:
        cost_s: Engine seconds that it will probably cost.
    """

    time_s: float
    record: RequestRecord
    instance_id: str
    cost_s: float


class Traffic:
    """Arrivals and simple engines for a world: they prefill one prompt at a time, and decode without limit.

    Args:
        world: The instances are registered in it already.
        token_s: Between output tokens.

    Attributes:
        dispatches: In order.
        end_states: How requests ended, by id.
        favourite: The policy that replays find the best; ``""``: they are not made.
        log: Every event that the world was told, and when.
    """

    def __init__(self, world: World, token_s: float = 0.011) -> None:
        self.world = world
        self.dispatches: list[Dispatch] = []
        self.end_states: dict[str, RequestState] = {}
        self.favourite = ""
        self.log: list[tuple[ev.Event, float]] = []
        self._token_s = token_s
        self._free_s: dict[str, float] = {}
        self._events: list[tuple[float, int, ev.Event]] = []
        self._number = 0

    def add(self, time_s: float, event: ev.Event) -> None:
        """Let something happen at a time."""
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, event))

    def run(self, until_s: float = math.inf) -> None:
        """Let everything happen up to a time, or until nothing is left to happen."""
        world = self.world
        while self._events:
            next_s, timer_s = self._events[0][0], world.scheduler.next_timer_s()
            if timer_s is not None and timer_s < next_s:
                event: ev.Event = ev.ClockAdvanced()
                next_s = max(world.now, timer_s)
                if next_s > until_s:
                    return
            elif next_s > until_s:
                return
            else:
                event = heapq.heappop(self._events)[2]
            world.now = next_s
            self.log.append((event, next_s))
            for effect in world.effects(event):
                if isinstance(effect, fx.DispatchAttempt):
                    self._begin(effect.record, effect.epoch, effect.instance_id)
                elif isinstance(effect, fx.RequestEnded):
                    self.end_states[effect.record.request_id] = effect.state
                elif isinstance(effect, fx.EvaluatePolicies) and self.favourite:
                    self._evaluate(effect.replay)

    def _evaluate(self, replay: PolicyReplay) -> None:
        scores = tuple(
            PolicyScore(
                policy=policy,
                attainment=0.9 if policy == self.favourite else 0.5,
                token_weighted_attainment=0.5,
            )
            for policy in replay.candidates
        )
        self.add(self.world.now + 1.0, ev.PoliciesEvaluated(replay.evaluation_id, scores))

    def _begin(self, record: RequestRecord, epoch: int, instance_id: str) -> None:
        now, output_tokens = self.world.now, record.metadata.max_tokens or 1
        self.dispatches.append(Dispatch(now, record, instance_id, record.cost_s))
        start_s = max(now, self._free_s.get(instance_id, 0.0))
        prompt = record.prompt_token_count
        first_token_s = start_s + STEP_TIME.prefill_s(prompt, prompt, batch_tokens=2048)
        self._free_s[instance_id] = first_token_s
        self.add(first_token_s, ev.AttemptProgressed(record.request_id, epoch))
        end_s = first_token_s + (output_tokens - 1) * self._token_s
        self.add(end_s, ev.AttemptSucceeded(record.request_id, epoch, output_tokens))


def dispatched_to(lines: Iterable[str]) -> list[str]:
    """The instances of the dispatches among some lines, in order."""
    return [text.split()[2] for text in lines if text.startswith("dispatch")]


def dispatched(lines: Iterable[str]) -> list[str]:
    """The requests of the dispatches among some lines, in order."""
    return [text.split()[1].split("#")[0] for text in lines if text.startswith("dispatch")]
