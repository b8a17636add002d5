"""The fleet: every instance, by what it serves, with its lease."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from sagecp.core.errors import (
    FieldViolation,
    FleetFullError,
    InstanceNotFoundError,
    InvalidRequestError,
    StaleIncarnationError,
)
from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_health import InstanceHealth
from sagecp.core.instance_load import InstanceLoad
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prices import GpuPrices
from sagecp.core.request import RequestRecord
from sagecp.core.token_limits import TokenLimits
from sagecp.core.types import ExecutionInstance, InstanceState


class OpenInstances:
    """Instances that are open for one model, the fewest requests first.

    Buckets by the number of requests, so that a change costs O(1) and the first
    few can be had without looking at the rest.
    """

    __slots__ = ("_buckets", "_count_of")

    def __init__(self) -> None:
        self._buckets: dict[int, dict[str, InstanceRecord]] = {}
        self._count_of: dict[str, int] = {}

    def put(self, record: InstanceRecord) -> None:
        """Add a record, or move it to where its present number of requests belongs."""
        instance_id = record.instance_id
        before = self._count_of.get(instance_id)
        count = record.in_flight_count
        if before == count:
            self._buckets[count][instance_id] = record
            return
        if before is not None:
            self._leave(instance_id, before)
        self._count_of[instance_id] = count
        self._buckets.setdefault(count, {})[instance_id] = record

    def discard(self, record: InstanceRecord) -> None:
        """Take a record out, if it is here."""
        count = self._count_of.pop(record.instance_id, None)
        if count is not None:
            self._leave(record.instance_id, count)

    def _leave(self, instance_id: str, count: int) -> None:
        bucket = self._buckets[count]
        del bucket[instance_id]
        if not bucket:
            del self._buckets[count]

    def __len__(self) -> int:
        return len(self._count_of)

    def __iter__(self) -> Iterator[InstanceRecord]:
        for count in sorted(self._buckets):
            yield from self._buckets[count].values()


class Fleet:
    """All instances, by id and by served model, with their leases.

    Keeps an index of the open instances of each model, so that a full fleet
    costs a decision nothing: whoever changes a record calls :meth:`settle`.

    Args:
        max_instance_count: Most instances that may be registered.
        default_concurrency_limit: For instances that do not say theirs.
        book: What is known of instances of their kinds.
        health_limits: When they are kept out of the rotation.
        prices: Of GPUs whose instances state none.
    """

    def __init__(
        self,
        max_instance_count: int,
        default_concurrency_limit: int,
        book: PredictionBook | None = None,
        health_limits: HealthLimits | None = None,
        prices: GpuPrices | None = None,
    ) -> None:
        self._prices = prices or GpuPrices()
        self._book = book or PredictionBook()
        self._health_limits = health_limits or HealthLimits()
        self._instances: dict[str, InstanceRecord] = {}
        self._by_model: dict[str, dict[str, InstanceRecord]] = {}
        self._open_by_model: dict[str, OpenInstances] = {}
        self._token_limits = TokenLimits()
        # (time, unique number, record): when closed gates should open.
        self._openings: list[tuple[float, int, InstanceRecord]] = []
        self._opening_number = 0
        # Counts changes of which instances exist.
        self.membership_version = 0
        # How many instances have a name as their first one.
        self._primary_counts: dict[str, int] = {}
        # Instances that left while requests ran on them, until those have ended.
        self._departed: dict[str, InstanceRecord] = {}
        # (time, unique number, record); an extended lease is found stale when it surfaces.
        self._leases: list[tuple[float, int, InstanceRecord]] = []
        self._lease_number = 0
        self._max_instance_count = max_instance_count
        self._default_limit = default_concurrency_limit

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[InstanceRecord]:
        return iter(self._instances.values())

    def holders(self) -> Iterator[InstanceRecord]:
        """Return the records that count what runs on instances, be they registered or not."""
        yield from self._instances.values()
        yield from self._departed.values()

    def find(self, instance_id: str) -> InstanceRecord | None:
        """Return an instance, or ``None``."""
        return self._instances.get(instance_id)

    def holder(self, instance_id: str) -> InstanceRecord | None:
        """Return the record that counts what runs on an instance, be it registered or not; or ``None``."""
        return self._instances.get(instance_id) or self._departed.get(instance_id)

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

    def first_serving(self, model: str) -> InstanceRecord | None:
        """Return the instance that has served a model longest, whatever its state; ``None``: none."""
        served = self._by_model.get(model)
        return next(iter(served.values())) if served else None

    def ready_count(self, model: str) -> int:
        """Return how many READY instances serve a model. O(n) of them."""
        return sum(1 for each in self._by_model.get(model, {}).values() if each.state is InstanceState.READY)

    def is_open(self, model: str) -> bool:
        """Return whether any instance that serves the model is open."""
        return model in self._open_by_model

    def least_token_limit(self, request: RequestRecord) -> int:
        """Return the token limit below which an instance is none for a request.

        A prompt and one token are certain: where a READY instance can hold them,
        those that never can are left out, even if the request must wait. Where
        none can, 0: engines are the judges, and their errors tell the caller.
        """
        certain = request.prompt_token_count + 1
        return certain if certain <= self._token_limits.largest(request.model) else 0

    def largest_token_limit(self, model: str) -> float:
        """Return the most tokens that one request can have on a READY instance; 0: none is READY."""
        return self._token_limits.largest(model)

    def has_open_below(self, model: str, token_limit: float) -> bool:
        """Return whether an instance with a smaller token limit is open. O(n) of the open ones."""
        return any(each.token_limit < token_limit for each in self._open_by_model.get(model, ()))

    def with_room_for(
        self, request: RequestRecord, limit: int | None = None, below: float = math.inf
    ) -> list[InstanceRecord]:
        """Return the instances that can usefully take a request now, in a reproducible order.

        Args:
            request: The request.
            limit: Most to return: those with the fewest requests; ``None``: all.
            below: Leave out those with a token limit from here on; infinite: none.
        """
        instances = self._open_by_model.get(request.model)
        if instances is None:
            return []
        # The estimate is never below what an instance makes of it: most need no closer look.
        expected = request.expected_token_count
        least = self.least_token_limit(request)
        found = []
        for instance in instances:
            if (
                (instance.spare_token_count >= expected or instance.fits(request))
                and instance.token_limit >= least
                and (instance.token_limit < below or below == math.inf)
            ):
                found.append(instance)
                if len(found) == limit:
                    break
        return found

    def closed_gates(self, model: str, limit: int) -> list[InstanceRecord]:
        """Return instances that only wait for prefill work to be done, the next to open first."""
        found: list[InstanceRecord] = []
        # A heap is nearly sorted at its front, which is all that matters here.
        for _, _, record in self._openings[: 4 * limit]:
            if (
                record.gate_closed
                and record.state is InstanceState.READY
                and model in record.spec.served_models
                and record not in found
                and self._instances.get(record.instance_id) is record
            ):
                found.append(record)
                if len(found) == limit:
                    break
        return found

    def close_gate(self, record: InstanceRecord, opens_s: float) -> None:
        """Hold work back from an instance until a time."""
        if not record.gate_closed or opens_s != record.gate_opens_s:
            record.gate_closed = True
            record.gate_opens_s = opens_s
            self._opening_number += 1
            heapq.heappush(self._openings, (opens_s, self._opening_number, record))
            self.settle(record)

    def open_gate(self, record: InstanceRecord) -> None:
        """Let an instance have work again."""
        if record.gate_closed:
            record.gate_closed = False
            self.settle(record)

    def next_opening_s(self) -> float | None:
        """Return when the next closed gate should open, or ``None``."""
        self.drop_stale_openings()
        return self._openings[0][0] if self._openings else None

    def drop_stale_openings(self) -> None:
        """Forget the times before the next opening at which no gate opens any more.

        At the end of every event, or a mere look at the next opening would
        change which closed gates are found: what a log of events leads to would
        depend on who looked when.
        """
        openings = self._openings
        while openings and not self._opens(openings[0]):
            heapq.heappop(openings)

    def pop_openings(self, now: float) -> list[InstanceRecord]:
        """Return the instances whose gates should open by now."""
        due = []
        openings = self._openings
        while openings and openings[0][0] <= now:
            entry = heapq.heappop(openings)
            if self._opens(entry):
                due.append(entry[2])
        return due

    def _opens(self, entry: tuple[float, int, InstanceRecord]) -> bool:
        """Whether an entry still says when a gate opens: it may have been moved, or its instance gone."""
        time_s, _, record = entry
        return (
            record.gate_closed
            and record.gate_opens_s == time_s
            and self._instances.get(record.instance_id) is record
        )

    def only_model(self) -> str | None:
        """Return the one model that every instance has as its first; ``None``: none, or several."""
        return next(iter(self._primary_counts)) if len(self._primary_counts) == 1 else None

    def settle(self, record: InstanceRecord) -> None:
        """Bring the index up to date with a record whose state, load, limit or gauges changed."""
        if self._instances.get(record.instance_id) is not record:
            return
        if record.state is InstanceState.READY:
            self._token_limits.add(record.instance_id, record.spec.served_models, record.token_limit)
        else:
            self._token_limits.discard(record.instance_id)
        is_open = record.is_open
        for model in record.spec.served_models:
            if is_open:
                opened = self._open_by_model.get(model)
                if opened is None:
                    opened = self._open_by_model[model] = OpenInstances()
                opened.put(record)
            else:
                self._close(model, record)

    def _close(self, model: str, record: InstanceRecord) -> None:
        opened = self._open_by_model.get(model)
        if opened is not None:
            opened.discard(record)
            if not opened:
                del self._open_by_model[model]

    def release(self, request: RequestRecord) -> InstanceRecord | None:
        """Stop counting a request where it runs; return that instance, if it is registered."""
        record = self._instances.get(request.instance_id)
        if record is not None:
            record.release(request)
            self.settle(record)
            return record
        departed = self._departed.get(request.instance_id)
        if departed is not None:
            departed.release(request)
            if not departed.in_flight:
                del self._departed[request.instance_id]
        return None

    def add(self, spec: ExecutionInstance, incarnation: int, now: float) -> InstanceRecord:
        """Register an instance, in place of an earlier registration of its id if there is one.

        It takes over what an earlier registration of its id left running, even
        one that was removed meanwhile: as far as open connections go it is the
        same engine.

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
        load = InstanceLoad(self._book.kind_of(spec), now)
        health = InstanceHealth(self._health_limits)
        record = InstanceRecord(
            spec,
            incarnation,
            now,
            self._default_limit,
            load,
            health,
            self._health_limits,
            self._prices.price_of(spec),
        )
        self.membership_version += 1
        earlier = previous or self._departed.pop(spec.instance_id, None)
        if earlier is not None:
            record.inherit(earlier)
        self._instances[spec.instance_id] = record
        for model in spec.served_models:
            self._by_model.setdefault(model, {})[spec.instance_id] = record
        self._primary_counts[spec.model_name] = self._primary_counts.get(spec.model_name, 0) + 1
        if record.gate_closed:
            # Taken over with the load; its time is noted with the record it was closed for.
            record.gate_closed = False
            self.close_gate(record, record.gate_opens_s)
        return record

    def remove(self, record: InstanceRecord) -> None:
        """Forget an instance. Requests on it run on."""
        self._unlink(record)
        self.membership_version += 1
        del self._instances[record.instance_id]
        if record.in_flight:
            record.drain = None
            self._departed[record.instance_id] = record

    def _unlink(self, record: InstanceRecord) -> None:
        self._token_limits.discard(record.instance_id)
        primary_count = self._primary_counts[record.spec.model_name] - 1
        if primary_count:
            self._primary_counts[record.spec.model_name] = primary_count
        else:
            del self._primary_counts[record.spec.model_name]
        for model in record.spec.served_models:
            self._close(model, record)
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
            self._lease_number += 1
            heapq.heappush(self._leases, (expire_s, self._lease_number, record))

    def next_lease_expiry_s(self) -> float | None:
        """Return a time before which no lease ends, or ``None``."""
        return self._leases[0][0] if self._leases else None

    def pop_expired(self, now: float) -> list[InstanceRecord]:
        """Return the instances whose leases have ended; each is returned once."""
        expired: list[InstanceRecord] = []
        while self._leases and self._leases[0][0] <= now:
            _, number, record = heapq.heappop(self._leases)
            if self._instances.get(record.instance_id) is not record or record.lease_expire_s is None:
                continue
            if record.lease_expire_s > now:
                heapq.heappush(self._leases, (record.lease_expire_s, number, record))
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
