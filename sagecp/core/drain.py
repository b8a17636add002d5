"""Drains: an operator takes work off an instance, and may want it empty by a time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.drain_order import DrainOrder
from sagecp.core.engine_orders import check_capability
from sagecp.core.engine_state import EngineCapability
from sagecp.core.errors import DrainRefusedError, ErrorReason, Failure
from sagecp.core.failover import ending_of
from sagecp.core.fleet import Fleet
from sagecp.core.instance_lifecycle import InstanceLifecycle
from sagecp.core.instance_record import KEY_VALUE_USAGE_LIMIT, InstanceRecord
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.types import InstanceState

MOST_PREFILL_SHARE = 0.9
"""The rest of a fleet that would spend more of its time with prefill has no room for the next burst."""
RETRY_S = 1.0
"""After the grace time, how often to look at what is left."""
# Speeds of prefill are compared by a prompt of this length.
_REFERENCE_TOKEN_COUNT = 1000


class DrainBook:
    """Carries out the orders to drain instances, and to take that back.

    Args:
        fleet: The instances; each record holds its own order.
        queue: What waits, which the rest of the fleet must carry as well.
        instances: Moves instances between their states.
        max_attempt_count: Attempts that a request may lose.
    """

    def __init__(
        self, fleet: Fleet, queue: RequestQueue, instances: InstanceLifecycle, max_attempt_count: int
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._instances = instances
        self._max_attempt_count = max_attempt_count
        # (time, instance id): when there may be requests to move; stale where the order says otherwise.
        self._timers: list[tuple[float, str]] = []

    def on_drain_requested(self, event: ev.DrainRequested, now: float, effects: list[fx.Effect]) -> None:
        """An operator wants no new work on an instance, or wants that undone.

        Every request states the whole order: a repetition changes nothing, another
        grace time counts from the request, none lets what runs there run to its end.
        Force stays. To undo what was not ordered changes nothing.

        To undo it is to want work done there: what is wrong with its GPUs by then is taken
        note of, and keeps it out no more. An order to sleep is undone only as such, or
        with the drain as a whole.

        Raises:
            InstanceNotFoundError: It is not registered, or was not with this newer incarnation.
            StaleIncarnationError: A newer incarnation is registered.
            IllegalOrderError: Its engine cannot sleep.
            DrainRefusedError: The rest of the fleet could not carry the load.
        """
        record = self._fleet.get(event.instance_id, event.incarnation)
        order = record.drain
        if event.undo:
            if order is not None and order.sleep_level >= event.sleep_level:
                record.drain = None
                record.gpu_watch.accept()
                self._instances.health.judge_gpus(record)
                self._instances.end_drain(record, now, effects)
            return
        if event.sleep_level:
            check_capability(record.spec, record.incarnation, EngineCapability.SLEEP)
        if order is None:
            missing = () if event.force else shortfalls(record, self._fleet, self._queue, now)
            if missing:
                raise DrainRefusedError(event.instance_id, missing)
            order = record.drain = DrainOrder(now)
        order.sleep_level = event.sleep_level
        order.forced = order.forced or event.force
        order.cause = event.cause or order.cause
        if event.grace_s != order.grace_s:
            order.grace_s = event.grace_s
            order.grace_end_s = None if event.grace_s is None else now + event.grace_s
            self._look_again(record, order, order.grace_end_s)
        cause = f": {order.cause}" if order.cause else ""
        what = "sleep" if event.sleep_level else "drain"
        self._instances.start_drain(record, f"{what} requested{cause}", effects)
        self.advance(now, effects)

    def advance(self, now: float, effects: list[fx.Effect]) -> None:
        """Ask for the moves whose time has come."""
        while self._timers and self._timers[0][0] <= now:
            entry = heapq.heappop(self._timers)
            if self._is_due(entry):
                record = self._fleet.get(entry[1])
                assert record.drain is not None  # noqa: S101 - only an order has something due
                self._move(record, record.drain, now, effects)

    def note_requeued(self, instance: InstanceRecord, request: RequestRecord) -> None:
        """A request left an instance to go on elsewhere."""
        order = instance.drain
        if order is not None and request.request_id in order.asked_request_ids:
            order.moved_request_count += 1

    def next_timer_s(self) -> float | None:
        """Return when :meth:`advance` has something to do, or ``None``."""
        while self._timers and not self._is_due(self._timers[0]):
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _is_due(self, entry: tuple[float, str]) -> bool:
        time_s, instance_id = entry
        record = self._fleet.find(instance_id)
        return (
            record is not None
            and record.drain is not None
            and record.drain.next_move_s == time_s
            and bool(record.in_flight)
        )

    def _look_again(self, record: InstanceRecord, order: DrainOrder, time_s: float | None) -> None:
        order.next_move_s = time_s
        if time_s is None:
            return
        heapq.heappush(self._timers, (time_s, record.instance_id))
        if len(self._timers) > 2 * len(self._fleet) + 8:
            # Orders that were changed again and again.
            self._timers = sorted(set(filter(self._is_due, self._timers)))

    def _move(self, record: InstanceRecord, order: DrainOrder, now: float, effects: list[fx.Effect]) -> None:
        """Ask that what runs on an instance goes on elsewhere, if there is an elsewhere.

        And ask again as long as anything is left: there may be a place by then, and a
        request that could not go on for want of something may have it.
        """
        failure = Failure(
            ErrorReason.SHUTTING_DOWN,
            f"instance {record.instance_id!r} is drained, and its grace time is over",
        )
        is_done = True
        for request in record.in_flight.values():
            if self._would_end(request, failure):
                continue
            is_done = False
            # The instance itself is not READY any more.
            if self._fleet.largest_token_limit(request.model) < _certain_token_count(request, record):
                continue
            order.asked_request_ids.add(request.request_id)
            effects.append(
                fx.InterruptAttempt(
                    request.request_id,
                    request.epoch,
                    record.instance_id,
                    failure,
                    must_stop=False,
                    counts=False,
                )
            )
        self._look_again(record, order, None if is_done else now + RETRY_S)

    def _would_end(self, request: RequestRecord, failure: Failure) -> bool:
        """Whether its caller, or its past, wants it rather failed than moved."""
        ending = ending_of(
            request,
            failure,
            retryable=True,
            cannot_continue="",
            max_attempt_count=self._max_attempt_count,
        )
        return ending is not None


# -- whether the rest of the fleet could carry the load ------------------------------------------------


def shortfalls(record: InstanceRecord, fleet: Fleet, queue: RequestQueue, now: float) -> tuple[str, ...]:
    """Return what the rest of a fleet lacks to do without an instance; empty: nothing.

    The rest are the other READY instances: those that drain already are none of
    them. For each group of served names that the same instances serve, they must
    have, beside what they hold,

    * somebody at all who is READY, even if nothing runs now;
    * a free place for each request on the instance and for each that waits;
    * room in their KV caches for the tokens of all of those, and for the longest of
      what runs there in one cache;

    and together the time for its prefill: the share of recent time that it spent so,
    by its speed, must fit into what is left of theirs below ``MOST_PREFILL_SHARE``. No
    more of it counts than the busiest of them spent: work that lasts would not leave
    them idle, and an engine that hangs looks busy.
    An instance that takes no work now hands no load on but what runs there.

    Args:
        record: The instance.
        fleet: All of them.
        queue: What waits.
        now: The time.

    Returns:
        A clause for each shortfall, in figures.
    """
    groups: dict[frozenset[str], list[str]] = {}
    everybody: dict[str, InstanceRecord] = {}
    for model in record.spec.served_models:
        rest = {each.instance_id: each for each in _rest(record, fleet, model)}
        everybody |= rest
        groups.setdefault(frozenset(rest), []).append(model)
    found = [
        _missing_room(record, [everybody[instance_id] for instance_id in rest_ids], models, queue)
        for rest_ids, models in groups.items()
    ]
    if not any(found) and record.state is InstanceState.READY:
        found.append(_missing_prefill_time(record, everybody.values(), now))
    return tuple(filter(None, found))


def _rest(record: InstanceRecord, fleet: Fleet, model: str) -> list[InstanceRecord]:
    return [each for each in fleet.serving(model) if each.state is InstanceState.READY and each is not record]


def _missing_room(
    record: InstanceRecord, rest: Sequence[InstanceRecord], models: Sequence[str], queue: RequestQueue
) -> str:
    """Return what those that serve some names lack to take over from one more, or ``""``."""
    named = " and ".join(repr(model) for model in models)
    if not rest:
        return f"no other READY instance serves {named}"
    running = [request for request in record.in_flight.values() if request.model in models]
    lines = []
    if record.state is InstanceState.READY:
        lines = [line for line in map(queue.line, models) if line is not None]
    waiting_count = sum(map(len, lines))
    place_count = sum(map(_free_place_count, rest))
    if len(running) + waiting_count > place_count:
        return (
            f"of {named} {len(running)} requests run there and {waiting_count} wait, and the rest "
            f"({len(rest)} READY) has {place_count} free places"
        )
    longest = max((_certain_token_count(request, record) for request in running), default=0)
    largest = max(each.token_limit for each in rest)
    if longest > largest:
        return (
            f"a request for {named} there has {longest:.0f} tokens, and none of the rest ({len(rest)} READY) "
            f"can hold more than {largest:.0f}"
        )
    token_count = sum(map(record.token_need, running))
    token_count += sum(request.expected_token_count for line in lines for request in line)
    free_token_count = sum(map(_free_token_count, rest))
    if token_count > free_token_count:
        return (
            f"what runs there and waits of {named} needs {token_count} tokens of KV cache, and the rest "
            f"({len(rest)} READY) has {free_token_count:.0f} free"
        )
    return ""


def _certain_token_count(request: RequestRecord, instance: InstanceRecord) -> float:
    """Return the tokens that a request on an instance certainly has: what ran there did fit."""
    return min(request.prompt_token_count + 1, instance.token_limit)


def _free_place_count(instance: InstanceRecord) -> int:
    usage = instance.gauges.key_value_cache_usage if instance.gauges is not None else None
    if instance.in_flight_count and usage is not None and usage >= KEY_VALUE_USAGE_LIMIT:
        return 0
    return max(0, instance.concurrency_limit - instance.in_flight_count)


def _free_token_count(instance: InstanceRecord) -> float:
    """Tokens that would fit; infinite: it is not known."""
    capacity = instance.spec.key_value_token_capacity
    return math.inf if capacity is None else max(0, capacity - instance.reserved_token_count)


def _missing_prefill_time(record: InstanceRecord, rest: Collection[InstanceRecord], now: float) -> str:
    """Return what the rest lacks to do the prefill of an instance as well, or ``""``."""
    shares = {each.instance_id: each.load.prefill_share(now) for each in rest}
    share = min(record.load.prefill_share(now), max(shares.values()))
    token_s = _prefill_token_s(record, now)
    # In the instance's own time: a faster one has more of it.
    spare = sum(
        max(0.0, MOST_PREFILL_SHARE - shares[each.instance_id]) * token_s / _prefill_token_s(each, now)
        for each in rest
    )
    if share <= spare:
        return ""
    return (
        f"prefill took {share:.0%} of its recent time, and the rest has time for {spare:.0%} until it is "
        f"{MOST_PREFILL_SHARE:.0%} busy with it"
    )


def _prefill_token_s(instance: InstanceRecord, now: float) -> float:
    step = instance.load.kind.model.parameters
    work_s = step.work_s(_REFERENCE_TOKEN_COUNT, _REFERENCE_TOKEN_COUNT)
    return max(1e-9, work_s * instance.load.ttft.factor(now) / _REFERENCE_TOKEN_COUNT)
