"""The production scheduler in a simulation: the same events, the same effects, another clock."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import EngineCondition, EngineGauges, PromptDigest, RequestMetadata, RequestState
from sagecp.sim.fleet.controller import Objectives, World
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.traces import TraceRequest
from sagecp.sim.profiles import StepProfile

# No lease: there is no agent to lose. Waiting has no end of its own, or it would hide late answers.
_FOREVER_S = 1e9
# How long a replay for the adaptive policy takes: about as long as in the process of a server.
_EVALUATION_S = 1.0
_STATES = {
    RequestState.SUCCEEDED: OutcomeState.SUCCEEDED,
    RequestState.FAILED: OutcomeState.FAILED,
    RequestState.CANCELLED: OutcomeState.CANCELLED,
    RequestState.EXPIRED: OutcomeState.EXPIRED,
}

Listener = Callable[[float, ev.Event, list[fx.Effect]], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSetup:
    """Which settings the scheduler runs with, and how well it knows the engines.

    Attributes:
        name: How reports call it.
        model_error: Standard deviation of the logarithm of the error of each constant of
            each kind of instance that the scheduler starts from; it learns from there.
        seed: Of the scheduler's generator, and of the model's error.
    """

    scheduling_policy: str = "slo_aware"
    routing_strategy: str = "load_balanced"
    load_balancer: str = "predicted_latency"
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    name: str = ""
    model_error: float = 0.0
    seed: int = 0


class SchedulerController:
    """Feeds the production :class:`Scheduler`, unchanged, and does what it decides.

    Args:
        setup: Which settings it runs with.
        block_token_count: Tokens in a block of the trace's prompts.
        listener: Told every event with its effects, for logs.
    """

    def __init__(
        self, setup: SchedulerSetup, block_token_count: int, *, listener: Listener | None = None
    ) -> None:
        self._setup = setup
        self._block_token_count = block_token_count
        self._listener = listener
        self._world: World
        self._index_of: dict[str, int] = {}
        # Scores that are on their way, and when they arrive.
        self._evaluated: tuple[float, ev.PoliciesEvaluated] | None = None
        self.scheduler = Scheduler(
            SchedulerConfig(
                scheduling_policy=setup.scheduling_policy,
                routing_strategy=setup.routing_strategy,
                load_balancer=setup.load_balancer,
                parameters=setup.parameters,
                max_queued_request_count=10_000_000,
                max_queued_bytes=1 << 40,
                queue_timeout_s=_FOREVER_S,
                seed=setup.seed,
            )
        )

    @property
    def name(self) -> str:
        """How reports call it."""
        return self._setup.name or self._setup.scheduling_policy

    def begin(self, world: World, now: float) -> None:
        """Register the fleet."""
        self._world = world
        priors: dict[str, StepTimeParameters] = {}
        for index, instance in enumerate(world.instances):
            self._index_of[instance.instance_id] = index
            prior = priors.get(instance.profile.name)
            if prior is None:
                prior = priors[instance.profile.name] = step_time_prior(
                    instance.profile, self._setup.model_error, self._setup.seed
                )
            spec = dataclasses.replace(instance.execution_instance(), step_time=prior)
            self._feed(ev.InstanceRegistered(spec, condition=EngineCondition.HEALTHY), now)

    def on_arrival(self, request: TraceRequest, objectives: Objectives, now: float) -> None:
        """Submit a request."""
        self._feed(
            ev.RequestArrived(
                RequestMetadata(
                    request_id=request.request_id,
                    model_name=request.model,
                    max_tokens=request.max_tokens,
                    priority=request.priority,
                    slo_deadline_ms=request.deadline_ms,
                    ttft_slo_ms=objectives.ttft_s * 1000.0,
                    tpot_slo_ms=objectives.tpot_s * 1000.0,
                    cost_budget=request.cost_budget_usd,
                    user_id=request.user_id,
                    session_id=request.session_id,
                    tenant_id=request.tenant_id,
                    prompt_digest=PromptDigest(
                        request.prompt_token_count, request.block_hashes, self._block_token_count
                    ),
                )
            ),
            now,
        )

    def on_first_token(self, request_id: str, now: float) -> None:
        """Pass it on."""
        self._feed(ev.AttemptProgressed(request_id, 1), now)

    def on_finished(
        self, request_id: str, output_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """Pass it on."""
        self._feed(
            ev.AttemptSucceeded(
                request_id, 1, output_token_count, cached_prompt_token_count=cached_token_count
            ),
            now,
        )

    def on_refused(self, request_id: str, now: float) -> None:
        """Pass it on as an engine's answer of status 400."""
        failure = Failure(ErrorReason.ENGINE_REJECTED, "the engine refused the request: it is too long")
        self._feed(
            ev.AttemptFailed(request_id, 1, failure, retryable=False, counts_against_engine=False), now
        )

    def on_timer(self, now: float) -> None:
        """Let the scheduler look at the clock, or tell it what a replay came to."""
        if self._evaluated is not None and self._evaluated[0] <= now:
            event, self._evaluated = self._evaluated[1], None
            self._feed(event, now)
        else:
            self._feed(ev.ClockAdvanced(), now)

    def next_timer_s(self) -> float | None:
        """Return when the scheduler wants to look at the clock."""
        timer_s = self.scheduler.next_timer_s()
        if timer_s is not None and timer_s >= _FOREVER_S / 2:
            timer_s = None
        if self._evaluated is not None:
            return self._evaluated[0] if timer_s is None else min(timer_s, self._evaluated[0])
        return timer_s

    def on_gauges(self, instance_index: int, gauges: object, now: float) -> None:
        """Pass an engine's metrics on, as a heartbeat would."""
        assert isinstance(gauges, EngineGauges)  # noqa: S101 - reports carry nothing else
        instance_id = self._world.instances[instance_index].instance_id
        self._feed(ev.HeartbeatReceived(instance_id, 0, EngineCondition.HEALTHY, gauges=gauges), now)

    def _feed(self, event: ev.Event, now: float) -> None:
        effects = self.scheduler.handle(event, now)
        if self._listener is not None:
            self._listener(now, event, effects)
        world = self._world
        for effect in effects:
            if isinstance(effect, fx.DispatchAttempt):
                world.start(effect.record.request_id, self._index_of[effect.instance_id])
            elif isinstance(effect, fx.AbortAttempt):
                world.abort(effect.request_id)
            elif isinstance(effect, fx.RequestRejected):
                world.end(effect.request_id, OutcomeState.REJECTED)
            elif isinstance(effect, fx.RequestEnded) and effect.state is not RequestState.SUCCEEDED:
                world.end(effect.record.request_id, _STATES[effect.state])
            elif isinstance(effect, fx.EvaluatePolicies):
                # It replays with controllers of this class.
                from sagecp.sim.fleet.policy_evaluation import score_policies

                event = ev.PoliciesEvaluated(effect.replay.evaluation_id, score_policies(effect.replay))
                self._evaluated = (now + _EVALUATION_S, event)


def step_time_prior(profile: StepProfile, error: float, seed: int) -> StepTimeParameters:
    """Return what the scheduler believes of a profile: each constant off by a log-normal factor."""
    generator = random.Random(f"{seed} {profile.name}")

    def believed(value: float) -> float:
        return value * math.exp(generator.gauss(0.0, error)) if error else value

    return StepTimeParameters(
        **{
            field.name: believed(getattr(profile, field.name))
            for field in dataclasses.fields(StepTimeParameters)
        }
    )
