"""The fleet: every instance, its state, and the work it holds."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sagecp.core.errors import (
    FieldViolation,
    FleetFullError,
    InstanceNotFoundError,
    InvalidRequestError,
    StaleIncarnationError,
)
from sagecp.core.request import RequestRecord
from sagecp.core.states import INSTANCE_TRANSITIONS, StateMachine
from sagecp.core.types import EngineGauges, ExecutionInstance, GpuReading, InstanceState

# Work is held back while the KV cache is this full: the last percents cost preemptions.
KEY_VALUE_USAGE_LIMIT = 0.97
LATENCY_SMOOTHING = 0.1


class InstanceRecord:
    """One instance. Only the scheduler changes it; everything else reads.

    Attributes:
        incarnation: 0: no agent, no lease.
        lease_expire_s: On the core's clock; ``None``: no lease.
        concurrency_limit: Most requests to have there now. Starts at the
            configured limit and follows the engine: a request waiting inside it
            means that the limit is above what it runs at once.
        unreachable: A call found nobody listening. Only a probe over the same
            path clears it: an agent's word about its own engine does not.
        in_flight: Requests on it, by id.
    """

    def __init__(self, spec: ExecutionInstance, incarnation: int, now: float, default_limit: int) -> None:
        self.spec = spec
        self.incarnation = incarnation
        self.register_s = now
        self.heartbeat_s: float | None = None
        self.lease_expire_s: float | None = None
        self.state_reason = "registered"
        self.unreachable = False
        self.gauges: EngineGauges | None = None
        self.gpus: tuple[GpuReading, ...] = ()
        self.gpu_absent_reason = ""
        self.configured_limit = spec.max_concurrent_request_count or default_limit
        self.concurrency_limit = self.configured_limit
        self.in_flight: dict[str, RequestRecord] = {}
        self.reserved_token_count = 0
        self.latency_estimate_s: float | None = None
        self.ttft_estimate_s: float | None = None
        self.last_dispatch_sequence = 0
        self.completed_request_count = 0
        self.failed_attempt_count = 0
        self.machine = StateMachine(
            f"instance {spec.instance_id!r}", InstanceState.STARTING, INSTANCE_TRANSITIONS
        )

    @property
    def instance_id(self) -> str:
        """Name of the instance."""
        return self.spec.instance_id

    @property
    def state(self) -> InstanceState:
        """Where it is in its life."""
        return self.machine.state

    @property
    def in_flight_count(self) -> int:
        """Requests that this control plane has on it."""
        return len(self.in_flight)

    def has_room_for(self, request: RequestRecord) -> bool:
        """Whether the instance can usefully take the request now.

        An instance that holds nothing takes anything: its engine is the judge
        of what fits.
        """
        if self.machine.state is not InstanceState.READY:
            return False
        in_flight = len(self.in_flight)
        if in_flight == 0:
            return True
        if in_flight >= self.concurrency_limit:
            return False
        gauges = self.gauges
        if (
            gauges is not None
            and gauges.key_value_cache_usage is not None
            and gauges.key_value_cache_usage >= KEY_VALUE_USAGE_LIMIT
        ):
            return False
        capacity = self.spec.key_value_token_capacity
        return capacity is None or self.reserved_token_count + request.expected_token_count <= capacity

    def take(self, request: RequestRecord, dispatch_sequence: int) -> None:
        """Count a request as being here."""
        self.in_flight[request.request_id] = request
        self.reserved_token_count += request.expected_token_count
        self.last_dispatch_sequence = dispatch_sequence

    def release(self, request: RequestRecord) -> None:
        """Stop counting a request."""
        if self.in_flight.pop(request.request_id, None) is not None:
            self.reserved_token_count -= request.expected_token_count

    def learn(self, latency_s: float, ttft_s: float | None) -> None:
        """Take one completed request into the estimates (exponentially weighted means)."""
        self.latency_estimate_s = _smooth(self.latency_estimate_s, latency_s)
        if ttft_s is not None:
            self.ttft_estimate_s = _smooth(self.ttft_estimate_s, ttft_s)

    def follow_gauges(self, gauges: EngineGauges | None) -> None:
        """Take the engine's report, and adjust the limit to what it shows.

        Requests waiting inside the engine mean that it runs all it can: the
        limit comes down to that. When none waits and the limit is nearly used
        it goes up by an eighth, to the configured limit at most.
        """
        self.gauges = gauges
        if gauges is None or gauges.waiting_request_count is None or gauges.running_request_count is None:
            return
        if gauges.waiting_request_count > 0:
            if gauges.running_request_count > 0:
                self.concurrency_limit = max(1, min(self.concurrency_limit, gauges.running_request_count))
        elif len(self.in_flight) * 8 >= self.concurrency_limit * 7:
            self.concurrency_limit = min(
                self.configured_limit, self.concurrency_limit + max(1, self.concurrency_limit // 8)
            )


def _smooth(estimate: float | None, sample: float) -> float:
    return sample if estimate is None else estimate + LATENCY_SMOOTHING * (sample - estimate)


class Fleet:
    """All instances, by id and by served model, with their leases.

    Args:
        max_instance_count: Most instances that may be registered.
        default_concurrency_limit: For instances that do not say theirs.
    """

    def __init__(self, max_instance_count: int, default_concurrency_limit: int) -> None:
        self._instances: dict[str, InstanceRecord] = {}
        self._by_model: dict[str, dict[str, InstanceRecord]] = {}
        # (time, instance id, incarnation); an extended lease is found stale when it surfaces.
        self._leases: list[tuple[float, str, int]] = []
        self._max_instance_count = max_instance_count
        self._default_limit = default_concurrency_limit

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[InstanceRecord]:
        return iter(self._instances.values())

    def find(self, instance_id: str) -> InstanceRecord | None:
        """Return an instance, or ``None``."""
        return self._instances.get(instance_id)

    def get(self, instance_id: str, incarnation: int = 0) -> InstanceRecord:
        """Return an instance; ``incarnation`` 0 matches any.

        Raises:
            InstanceNotFoundError: It is not registered, or was not with this newer incarnation.
            StaleIncarnationError: A newer incarnation is registered.
        """
        record = self._instances.get(instance_id)
        if record is None or incarnation > record.incarnation:
            raise InstanceNotFoundError(instance_id)
        if incarnation and incarnation < record.incarnation:
            raise StaleIncarnationError(instance_id, incarnation, record.incarnation)
        return record

    def models(self) -> tuple[str, ...]:
        """Return every served name, sorted."""
        return tuple(sorted(self._by_model))

    def serves(self, model: str) -> bool:
        """Return whether any instance serves the model, whatever its state."""
        return model in self._by_model

    def serving(self, model: str) -> list[InstanceRecord]:
        """Return the instances that serve a model, whatever their state."""
        return list(self._by_model.get(model, {}).values())

    def add(
        self, spec: ExecutionInstance, incarnation: int, now: float
    ) -> tuple[InstanceRecord, InstanceRecord | None]:
        """Register an instance; return its record and the one it replaces, if any.

        Raises:
            StaleIncarnationError: A newer incarnation is registered.
            FleetFullError: The bound on instances is reached.
            InvalidRequestError: The id is empty.
        """
        if not spec.instance_id:
            raise InvalidRequestError([FieldViolation("instance_id", "is empty; name the instance")])
        previous = self._instances.get(spec.instance_id)
        if previous is not None and incarnation < previous.incarnation:
            raise StaleIncarnationError(spec.instance_id, incarnation, previous.incarnation)
        if previous is None and len(self._instances) >= self._max_instance_count:
            raise FleetFullError(
                f"{len(self._instances)} instances are registered, the limit; deregister some, "
                "or raise max_instance_count"
            )
        if previous is not None:
            self._unlink(previous)
        record = InstanceRecord(spec, incarnation, now, self._default_limit)
        self._instances[spec.instance_id] = record
        for model in spec.served_models:
            self._by_model.setdefault(model, {})[spec.instance_id] = record
        return record, previous

    def remove(self, record: InstanceRecord) -> None:
        """Forget an instance."""
        self._unlink(record)
        del self._instances[record.instance_id]

    def _unlink(self, record: InstanceRecord) -> None:
        for model in record.spec.served_models:
            served = self._by_model.get(model)
            if served is not None:
                served.pop(record.instance_id, None)
                if not served:
                    del self._by_model[model]

    def extend_lease(self, record: InstanceRecord, expire_s: float) -> None:
        """Let an instance live until ``expire_s``."""
        first = record.lease_expire_s is None
        record.lease_expire_s = expire_s
        if first:
            heapq.heappush(self._leases, (expire_s, record.instance_id, record.incarnation))

    def next_lease_expiry_s(self) -> float | None:
        """Return a time before which no lease ends, or ``None``."""
        return self._leases[0][0] if self._leases else None

    def pop_expired(self, now: float) -> list[InstanceRecord]:
        """Return the instances whose leases have ended; each is returned once."""
        expired: list[InstanceRecord] = []
        while self._leases and self._leases[0][0] <= now:
            _, instance_id, incarnation = heapq.heappop(self._leases)
            record = self._instances.get(instance_id)
            if record is None or record.incarnation != incarnation or record.lease_expire_s is None:
                continue
            if record.lease_expire_s > now:
                heapq.heappush(self._leases, (record.lease_expire_s, instance_id, incarnation))
            else:
                record.lease_expire_s = None
                expired.append(record)
        return expired

    def count_by_state(self) -> dict[InstanceState, int]:
        """Return how many instances are in each state."""
        counts = dict.fromkeys(InstanceState, 0)
        for record in self._instances.values():
            counts[record.state] += 1
        return counts
