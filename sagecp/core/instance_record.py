"""One instance: its state, and the work it holds."""

from __future__ import annotations

import math

from sagecp.core.agent_clock import AgentClock
from sagecp.core.drain_order import DrainOrder
from sagecp.core.engine_state import EngineProcess, LoraAdapter
from sagecp.core.engine_time import EngineTimeMeter
from sagecp.core.gpu import GpuFault
from sagecp.core.gpu_faults import GpuWatch
from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_health import InstanceHealth
from sagecp.core.instance_load import InstanceLoad
from sagecp.core.least_value import LeastValue
from sagecp.core.parallelism.parallelism_config import config_of
from sagecp.core.prediction.residual import Residual
from sagecp.core.prices import GpuPrice, GpuPrices
from sagecp.core.request import RequestRecord
from sagecp.core.request_counts import RequestCounts
from sagecp.core.states import INSTANCE_TRANSITIONS, StateMachine
from sagecp.core.types import EngineCondition, EngineGauges, ExecutionInstance, GpuReading, InstanceState

# Work is held back while the KV cache is this full: the last percents cost preemptions.
KEY_VALUE_USAGE_LIMIT = 0.97
LATENCY_SMOOTHING = 0.1
# Instances are compared by a request of this length: what they happened to be
# asked says nothing about their speed.
REFERENCE_OUTPUT_TOKEN_COUNT = 100


class InstanceRecord:
    """One instance. Only the scheduler changes it; everything else reads.

    Attributes:
        plan: Its parallel sizes.
        incarnation: 0: no agent, no lease.
        lease_expire_s: On the core's clock; ``None``: no lease.
        concurrency_limit: Most requests to have there now. Starts at the
            configured limit and follows the engine: a request waiting inside it
            means that the limit is above what it runs at once.
        unreachable: A call found nobody listening. Only a probe over the same
            path clears it: an agent's word about its own engine does not.
        condition: What was last said of its engine.
        health: Whether it may work although its engine says that it is well.
        keeps_state: Its lease ended together with most others, and it stays where it is:
            the control plane probes its engine itself.
        drain: The order that it takes no new work; ``None``: there is none.
        in_flight: Requests on it, by id.
        in_flight_count: Their number.
        in_flight_kinds: Them, counted by kind.
        reserved_token_count: Tokens that they are expected to hold at their ends.
        spare_token_count: What one more may hold; infinite where nothing limits it.
        token_limit: Most tokens that one request can ever have here, prompt and output, as far as
            is known; infinite: unknown.
        lost_s: When it was last LOST; ``None``: never.
        forget_s: When it is no longer listed, while it is LOST.
        load: Its work and its speed, by estimate.
        price: What one of its GPUs costs.
        usd_per_hour: What all of them cost; 0: unknown.
        meter: Whose its time was, and what that cost.
        cost_residual: How many times the predicted part of its time requests are charged for.
        cost_observe_s: From when on the next request is compared with what was predicted.
        gate_closed: It has as much prefill work as it can usefully hold: what more there
            is waits here, where it can still be ordered and placed.
        gate_opens_s: When that should be over, on the core's clock.
        sleeping: Its engine said last that it sleeps.
        gpu_watch: What is remembered of its GPUs.
        gpu_faults: What is wrong with them; ``quarantines``: and keeps it out.
        engine_process: Its engine's process, where its agent supervises it.
        order_trouble: What an order came to that its agent could not carry out.
        desired_lora_adapters: What it was told to have loaded; ``None``: nothing.
        clock: Its agent's.
        refused_heartbeat_count: Reports that were refused, in part or as a whole.
        heartbeat_refusal: Why the last one was.
        agent_version: ``""``: unknown, or there is no agent.
        kv_cache_sequence: Of the last update of what its engine has cached; 0: there was none.
    """

    def __init__(
        self,
        spec: ExecutionInstance,
        incarnation: int,
        now: float,
        default_limit: int,
        load: InstanceLoad,
        health: InstanceHealth | None = None,
        health_limits: HealthLimits | None = None,
        price: GpuPrice | None = None,
    ) -> None:
        self.spec = spec
        self.plan = config_of(spec)
        self.instance_id = spec.instance_id
        self.incarnation = incarnation
        self.register_s = now
        self.heartbeat_s: float | None = None
        self.lease_expire_s: float | None = None
        self.state_reason = "registered"
        self.unreachable = False
        self.condition = EngineCondition.UNKNOWN
        self.health = health or InstanceHealth()
        self.keeps_state = False
        self.drain: DrainOrder | None = None
        self.lost_s: float | None = None
        self.forget_s: float | None = None
        self.gauges: EngineGauges | None = None
        self.gpus: tuple[GpuReading, ...] = ()
        self.gpu_absent_reason = ""
        self.sleeping = False
        self.gpu_watch = GpuWatch(health_limits or HealthLimits())
        self.gpu_faults: tuple[GpuFault, ...] = ()
        self.engine_process: EngineProcess | None = None
        self.order_trouble = ""
        self.desired_lora_adapters: tuple[LoraAdapter, ...] | None = None
        self.clock = AgentClock()
        self.refused_heartbeat_count = 0
        self.heartbeat_refusal = ""
        self.agent_version = ""
        self.kv_cache_sequence = 0
        self.configured_limit = spec.max_concurrent_request_count or default_limit
        self.concurrency_limit = self.configured_limit
        self.in_flight: dict[str, RequestRecord] = {}
        # Kept, not computed: placement reads them of every open instance.
        self.in_flight_count = 0
        self.in_flight_kinds = RequestCounts()
        self.reserved_token_count = 0
        self.spare_token_count = math.inf
        bounds = (spec.key_value_token_capacity, spec.max_context_token_count)
        self.token_limit = min((float(bound) for bound in bounds if bound is not None), default=math.inf)
        self._tpot_objectives_s = LeastValue()
        self.load = load
        self.gate_closed = False
        self.gate_opens_s = -math.inf
        self.price = price or GpuPrices().price_of(spec)
        self.usd_per_hour = (self.price.usd_per_gpu_hour or 0.0) * max(1, spec.gpu_count)
        self.meter = EngineTimeMeter(self.usd_per_hour, now)
        self.cost_residual = Residual()
        self.cost_observe_s = -math.inf
        self.latency_estimate_s: float | None = None
        self.ttft_estimate_s: float | None = None
        self.tpot_estimate_s: float | None = None
        self.last_dispatch_sequence = 0
        self.completed_request_count = 0
        self.failed_attempt_count = 0
        self.machine = StateMachine(
            f"instance {spec.instance_id!r}", InstanceState.STARTING, INSTANCE_TRANSITIONS
        )

    @property
    def state(self) -> InstanceState:
        """Where it is in its life."""
        return self.machine.state

    @property
    def is_probed(self) -> bool:
        """Whether the control plane asks its engine for its health itself."""
        return self.incarnation == 0 or self.unreachable or self.keeps_state

    @property
    def least_tpot_objective_s(self) -> float:
        """The strictest objective for the time between tokens of what is on it; infinite: nothing is."""
        return self._tpot_objectives_s.least(math.inf)

    @property
    def is_open(self) -> bool:
        """Whether the instance can usefully take more work, as far as that depends on it alone.

        An instance that holds nothing is open, whatever was said of it before.
        """
        if self.machine.state is not InstanceState.READY:
            return False
        if self.in_flight_count == 0:
            return True
        if self.gate_closed or self.in_flight_count >= self.concurrency_limit:
            return False
        gauges = self.gauges
        return (
            gauges is None
            or gauges.key_value_cache_usage is None
            or gauges.key_value_cache_usage < KEY_VALUE_USAGE_LIMIT
        )

    def fits(self, request: RequestRecord) -> bool:
        """Whether the request fits beside what an open instance holds already.

        Beside nothing anything does: :meth:`Fleet.least_token_limit` says what is too small.
        """
        return self.spare_token_count >= self.token_need(request)

    def token_need(self, request: RequestRecord) -> int:
        """Return the tokens that the request is expected to hold here at its end.

        Estimates from bytes can be far too high (images, for example); what the
        model's context allows is a bound.
        """
        context = self.spec.max_context_token_count
        if context is None:
            return request.expected_token_count
        return min(request.expected_token_count, context * request.metadata.choice_count)

    def take(self, request: RequestRecord, dispatch_sequence: int) -> None:
        """Count a request as being here."""
        self.in_flight[request.request_id] = request
        self.in_flight_kinds.add(request)
        self._tpot_objectives_s.add(request.tpot_objective_s)
        self._reserve(self.token_need(request))
        self.last_dispatch_sequence = dispatch_sequence

    def release(self, request: RequestRecord) -> None:
        """Stop counting a request."""
        if self.in_flight.pop(request.request_id, None) is not None:
            self.in_flight_kinds.discard(request)
            self._tpot_objectives_s.discard(request.tpot_objective_s)
            self._reserve(-self.token_need(request))

    def _reserve(self, token_count: int) -> None:
        self.in_flight_count = len(self.in_flight)
        self.reserved_token_count += token_count
        capacity = self.spec.key_value_token_capacity
        if capacity is None or not self.in_flight:
            self.spare_token_count = math.inf
        else:
            self.spare_token_count = capacity - self.reserved_token_count

    def inherit(self, previous: InstanceRecord) -> None:
        """Take over what an earlier registration holds and has learned."""
        self.in_flight = previous.in_flight
        self.in_flight_kinds = previous.in_flight_kinds
        self._tpot_objectives_s = previous._tpot_objectives_s
        self._reserve(sum(map(self.token_need, self.in_flight.values())))
        self.drain = previous.drain
        self.desired_lora_adapters = previous.desired_lora_adapters
        self.health = previous.health
        self.gpu_watch = previous.gpu_watch
        self.gpu_faults = previous.gpu_faults
        if self.incarnation > previous.incarnation:
            self.gpu_watch.note_agent_restart()
        self.refused_heartbeat_count = previous.refused_heartbeat_count
        self.heartbeat_refusal = previous.heartbeat_refusal
        if self.load.kind is previous.load.kind:
            self.load = previous.load
            self.gate_closed, self.gate_opens_s = previous.gate_closed, previous.gate_opens_s
        self.meter = previous.meter
        self.meter.set_price(self.usd_per_hour, self.register_s)
        self.cost_residual = previous.cost_residual
        self.latency_estimate_s = previous.latency_estimate_s
        self.ttft_estimate_s = previous.ttft_estimate_s
        self.tpot_estimate_s = previous.tpot_estimate_s
        self.last_dispatch_sequence = previous.last_dispatch_sequence
        self.completed_request_count = previous.completed_request_count
        self.failed_attempt_count = previous.failed_attempt_count

    def learn(self, latency_s: float, ttft_s: float | None, output_token_count: float) -> None:
        """Take one completed request into the estimates (exponentially weighted means).

        Args:
            latency_s: From dispatch to the end.
            ttft_s: From dispatch to the first token; ``None``: there was none.
            output_token_count: Per choice, where there were several.
        """
        if ttft_s is None:
            return
        self.ttft_estimate_s = _smooth(self.ttft_estimate_s, ttft_s)
        if output_token_count > 1:
            tpot_s = (latency_s - ttft_s) / (output_token_count - 1)
            self.tpot_estimate_s = _smooth(self.tpot_estimate_s, tpot_s)
        if self.tpot_estimate_s is not None:
            rest_s = (REFERENCE_OUTPUT_TOKEN_COUNT - 1) * self.tpot_estimate_s
            self.latency_estimate_s = self.ttft_estimate_s + rest_s

    def follow_gauges(self, gauges: EngineGauges | None) -> None:
        """Take the engine's report, and adjust the limit to what it shows.

        Requests waiting inside the engine mean that it runs all it can: the
        limit comes down to that. When none waits and the limit is nearly used
        it goes up by an eighth, to the configured limit at most.
        """
        self.gauges = gauges
        if gauges is not None and gauges.sleeping is not None:
            self.sleeping = gauges.sleeping
        if gauges is None or gauges.waiting_request_count is None or gauges.running_request_count is None:
            return
        if gauges.waiting_request_count > 0:
            if gauges.running_request_count > 0:
                self.concurrency_limit = max(1, min(self.concurrency_limit, gauges.running_request_count))
        elif self.in_flight_count * 8 >= self.concurrency_limit * 7:
            self.concurrency_limit = min(
                self.configured_limit, self.concurrency_limit + max(1, self.concurrency_limit // 8)
            )


def _smooth(estimate: float | None, sample: float) -> float:
    return sample if estimate is None else estimate + LATENCY_SMOOTHING * (sample - estimate)
