"""Who is refused first when the queue fills: the least important class, and within it who holds most."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagecp.core.errors import FieldViolation, QueueFullError
from sagecp.core.types import RequestPriority

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
# Departures that the rate is taken from: enough to level out bursts, few enough to follow a change.
_DEPARTURE_COUNT = 32
# Before anything has left the queue.
_FIRST_INTERVAL_S = 1.0
# Of departures all at one time.
_MIN_INTERVAL_S = 1e-6
# Classes are numbered from 1.
_CLASS_COUNT = max(RequestPriority) + 1
# Tenants are told apart only beyond this part of a class's share: a queue that is not full is nobody's loss.
_FAIR_FROM = 0.5
# How long a tenant that was refused counts among those that share: places that come free are kept for it.
_ASKING_S = 10.0
_MAX_ASKING_COUNT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassShares:
    """How much of the queue each class may fill, as shares in (0, 1].

    What one class leaves is for the more important ones. A class counts what
    waits of every class, so the least important one is refused first.
    """

    critical: float = 1.0
    high: float = 0.9
    normal: float = 0.8
    low: float = 0.65
    background: float = 0.5

    def by_priority(self) -> Mapping[RequestPriority, float]:
        """Return the shares by class, the most important first."""
        return {priority: getattr(self, priority.name.lower()) for priority in RequestPriority}

    def violations(self) -> list[FieldViolation]:
        """Return what is wrong with them: out of range, or larger for a less important class."""
        found = []
        above_name, above = "", 1.0
        for priority, share in self.by_priority().items():
            name = priority.name.lower()
            if not 0.0 < share <= 1.0:
                found.append(FieldViolation(name, f"is {share:g}; must be above 0 and at most 1"))
            elif share > above:
                found.append(
                    FieldViolation(
                        name,
                        f"is {share:g}, more than the {above:g} of {above_name}, which is more important; "
                        f"give it at most {above:g}",
                    )
                )
            else:
                above_name, above = name, share
        return found


class _Held:
    """What a tenant has in the queue: numbers of requests and bytes, indexed by the number of the class."""

    __slots__ = ("bytes", "counts")

    def __init__(self) -> None:
        self.counts = [0] * _CLASS_COUNT
        self.bytes = [0] * _CLASS_COUNT


class QueueShares:
    """The bounds of the queue, shared by class and by tenant. Every operation is O(1).

    A class may fill the queue up to its share. Beyond half of that, a tenant
    may hold no more than the share divided by the tenants that wait or were
    refused within the last seconds, of what is as important or more: what else
    it has does not stand in the way of its important requests. One request
    each is always allowed, as far as the class has room. Nothing that was
    accepted is ever dropped.

    Refusals say when to come back: the time until the queue has fallen to the
    class's share at the pace of the last departures. Each refusal of a class
    is given the place after the one before it, so that those who come back
    when they were told arrive one after the other, not together; that is the
    spread which other systems draw at random, and it needs no dice. When a class
    finds the queue half empty, promises made before are forgotten.

    Args:
        max_request_count: Most requests that may wait.
        max_size_bytes: Most prompt bytes that may wait.
        shares: Of the classes.

    Attributes:
        request_count: Requests that wait.
        counts: Likewise, indexed by the number of the class.
        size_bytes: Prompt bytes that wait.
    """

    def __init__(self, max_request_count: int, max_size_bytes: int, shares: ClassShares) -> None:
        by_priority = shares.by_priority()
        # Even the smallest queue has a place for every class. Indexed by the number of the class.
        self._max_counts = _limits(max_request_count, by_priority)
        self._max_bytes = _limits(max_size_bytes, by_priority)
        self._fair_counts = [int(_FAIR_FROM * limit) for limit in self._max_counts]
        self._fair_bytes = [int(_FAIR_FROM * limit) for limit in self._max_bytes]
        self._held: dict[str, _Held] = {}
        # Refused tenants that have nothing waiting, the latest last, and until when they count.
        self._asking: dict[str, float] = {}
        self._departures: deque[float] = deque(maxlen=_DEPARTURE_COUNT + 1)
        self._departure_count = 0
        # The departure that frees the place promised last, by class: it stays the same when the pace changes.
        self._promised = [0] * _CLASS_COUNT
        self.request_count = 0
        self.counts = [0] * _CLASS_COUNT
        self.size_bytes = 0

    def enter(self, priority: RequestPriority, tenant: str, size_bytes: int) -> None:
        """Count a request that begins to wait."""
        held = self._held.get(tenant)
        if held is None:
            held = self._held[tenant] = _Held()
            self._asking.pop(tenant, None)
        held.counts[priority] += 1
        held.bytes[priority] += size_bytes
        self.counts[priority] += 1
        self.request_count += 1
        self.size_bytes += size_bytes

    def leave(self, priority: RequestPriority, tenant: str, size_bytes: int) -> None:
        """Count a request out that waits no longer."""
        held = self._held[tenant]
        held.counts[priority] -= 1
        held.bytes[priority] -= size_bytes
        if not any(held.counts):
            del self._held[tenant]
        self.counts[priority] -= 1
        self.request_count -= 1
        self.size_bytes -= size_bytes

    def note_departure(self, now: float) -> None:
        """Note that a place came free, for the pace."""
        self._departures.append(now)
        self._departure_count += 1

    def check_count(self, priority: RequestPriority, tenant: str, now: float) -> None:
        """Make sure that one more request of a class and a tenant may wait.

        Raises:
            QueueFullError: It may not; says which bound, and when to come back.
        """
        count, limit = self.request_count, self._max_counts[priority]
        if count >= limit:
            retry_after_s = self._promise(priority, count - limit + 1, now)
            self._note_asking(tenant, now)
            raise QueueFullError(
                f"the queue holds {count} requests, and {limit} is the limit for {priority.name}; "
                f"try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
                bound="requests",
            )
        if count < self._fair_counts[priority]:
            # Those who were promised a place did not come for it.
            self._promised[priority] = 0
            return
        held = self._held.get(tenant)
        if held is None:
            return
        sharing = self._sharing_count(now)
        fair = max(1, limit // sharing)
        own = sum(held.counts[: priority + 1])
        if own >= fair:
            retry_after_s = self._wait_s((own - fair + 1) * sharing, now)
            raise QueueFullError(
                f"{own} requests of this tenant wait that are {priority.name} or more important, and "
                f"{fair} is its share among {sharing} tenants; try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
                bound="tenant_requests",
            )

    def check_bytes(self, priority: RequestPriority, tenant: str, size_bytes: int, now: float) -> None:
        """Make sure that a prompt of a size may wait. Errors: as :meth:`check_count`."""
        after, limit = self.size_bytes + size_bytes, self._max_bytes[priority]
        if after > limit:
            if size_bytes > limit:
                raise QueueFullError(
                    f"the prompt has {size_bytes} bytes, and prompts of {priority.name} requests may hold "
                    f"{limit} bytes of the queue; send a shorter one",
                    bound="bytes",
                )
            retry_after_s = self._promise(priority, self._places(after - limit), now)
            self._note_asking(tenant, now)
            raise QueueFullError(
                f"the queue holds {self.size_bytes} bytes of prompts, and {limit} is the limit for "
                f"{priority.name}; {size_bytes} more do not fit; "
                f"try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
                bound="bytes",
            )
        if after < self._fair_bytes[priority]:
            return
        held = self._held.get(tenant)
        if held is None:
            return
        sharing = self._sharing_count(now)
        fair = limit // sharing
        own = sum(held.bytes[: priority + 1])
        if own and own + size_bytes > fair:
            places = self._places(own + size_bytes - fair)
            retry_after_s = self._wait_s(places * sharing, now)
            raise QueueFullError(
                f"{own} bytes of this tenant's prompts wait that are {priority.name} or more important, and "
                f"{fair} is its share among {sharing} tenants; {size_bytes} more do not fit; "
                f"try again in about {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
                bound="tenant_bytes",
            )

    def _places(self, size_bytes: int) -> int:
        """Return how many requests of the mean size hold so many bytes, rounded up."""
        mean_bytes = max(1, self.size_bytes // max(1, self.request_count))
        return -(-size_bytes // mean_bytes)

    def _sharing_count(self, now: float) -> int:
        """Return how many tenants wait or would like to."""
        asking = self._asking
        while asking:
            tenant, until_s = next(iter(asking.items()))
            if until_s > now and len(asking) <= _MAX_ASKING_COUNT:
                break
            del asking[tenant]
        return max(1, len(self._held) + len(asking))

    def _note_asking(self, tenant: str, now: float) -> None:
        if tenant in self._held:
            return
        # At the end: the first is the one to forget first.
        self._asking.pop(tenant, None)
        self._asking[tenant] = now + _ASKING_S
        if len(self._asking) > _MAX_ASKING_COUNT:
            del self._asking[next(iter(self._asking))]

    def _interval_s(self, now: float) -> float:
        """Return the mean time between departures. It grows while nothing leaves."""
        departures = self._departures
        if not departures:
            return _FIRST_INTERVAL_S
        span_s = max(now, departures[-1]) - departures[0]
        if len(departures) == 1:
            return max(_FIRST_INTERVAL_S, span_s)
        return max(_MIN_INTERVAL_S, span_s / (len(departures) - 1))

    def _wait_s(self, places: int, now: float) -> float:
        return min(MAX_RETRY_S, max(MIN_RETRY_S, places * self._interval_s(now)))

    def _promise(self, priority: RequestPriority, places: int, now: float) -> float:
        """Return the time to the next place of a class that was promised to nobody yet."""
        interval_s, gone = self._interval_s(now), self._departure_count
        # Those who would have to come back later than that are all told the longest time.
        last = gone + 1 + int(MAX_RETRY_S / interval_s)
        promised = min(last, max(gone + places, self._promised[priority] + 1))
        self._promised[priority] = promised
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (promised - gone) * interval_s))


def _limits(whole: int, shares: Mapping[RequestPriority, float]) -> Sequence[int]:
    limits = [whole] * _CLASS_COUNT
    for priority, share in shares.items():
        # Without the error of the product: 0.7 of 10 is 7.
        limits[priority] = max(1, int(share * whole + 1e-9))
    return limits
