"""Waiting requests in classes of priority that age, and in fair shares of the tenants within a class."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping

from sagecp.core.request import RequestRecord
from sagecp.core.service_books import Account, LaneKey, ServiceBooks, lane_key, tenant_of
from sagecp.core.types import RequestPriority
from sagecp.core.waiting_line import LazyHeap, WaitingLine

_MEAN_COST_GAIN = 0.05
_SAME_TURN = 1e-6

# Stamps of backlogs that have no valid entry in their lane's order.
_NOTHING_TO_GIVE = 0
_NEWCOMER = -1


class _Backlog:
    """The waiting requests of one tenant in one lane, oldest first.

    Attributes:
        stamp: Names its one valid entry in the lane's order, if it has one.
        provisional_s: What the requests that are stepped over would have cost, on the lane's scale.
    """

    __slots__ = ("account", "provisional_s", "stamp", "tenant", "waiting")

    def __init__(self, tenant: str, account: Account) -> None:
        self.tenant = tenant
        self.account = account
        self.waiting = LazyHeap()
        self.stamp = _NEWCOMER
        self.provisional_s = 0.0

    def standing_s(self) -> float:
        return self.account.standing_s + self.provisional_s


class _Lane:
    """The waiting requests of one class: by age over all tenants, and tenants by standing.

    A standing that rises leaves its entry where it is, to be corrected when it
    surfaces; one that falls gets a new entry and a new stamp.

    Attributes:
        newcomers: Tenants that began to wait and were not lifted yet.
    """

    __slots__ = (
        "_order",
        "_stamp",
        "_stepped_backlogs",
        "_stepped_tickets",
        "backlogs",
        "boost_s",
        "by_age",
        "newcomers",
    )

    def __init__(self, boost_s: float) -> None:
        self.boost_s = boost_s
        self.by_age = LazyHeap()
        self.backlogs: dict[str, _Backlog] = {}
        self.newcomers: list[_Backlog] = []
        self._order: list[tuple[float, str, int]] = []
        self._stamp = 0
        self._stepped_tickets: set[int] = set()
        self._stepped_backlogs: dict[str, _Backlog] = {}

    def rank(self) -> tuple[float, int] | None:
        """Return the aged arrival of the oldest request that is not stepped over, and its sequence."""
        while (entry := self.by_age.head()) is not None and entry[2] in self._stepped_tickets:
            self.by_age.step_over()
        return (entry[0] - self.boost_s, entry[1]) if entry is not None else None

    def enter(self, backlog: _Backlog) -> None:
        """Give a backlog its valid entry in the order, at its present standing."""
        self._stamp += 1
        backlog.stamp = self._stamp
        heapq.heappush(self._order, (backlog.standing_s(), backlog.tenant, backlog.stamp))
        if len(self._order) > 64 and len(self._order) > 2 * len(self.backlogs):
            self._order = [
                (each.standing_s(), each.tenant, each.stamp)
                for each in self.backlogs.values()
                if each.stamp > _NOTHING_TO_GIVE
            ]
            heapq.heapify(self._order)

    def first(self) -> _Backlog | None:
        """Return the backlog with the smallest standing that has a request to give."""
        order = self._order
        while order:
            standing_s, tenant, stamp = order[0]
            backlog = self.backlogs.get(tenant)
            if backlog is None or backlog.stamp != stamp:
                heapq.heappop(order)
            elif backlog.waiting.head() is None:
                backlog.stamp = _NOTHING_TO_GIVE
                heapq.heappop(order)
            elif backlog.standing_s() != standing_s:
                heapq.heapreplace(order, (backlog.standing_s(), tenant, stamp))
            else:
                return backlog
        return None

    def step_over(self, backlog: _Backlog, ticket: int, cost_s: float) -> None:
        self._stepped_tickets.add(ticket)
        self._stepped_backlogs[backlog.tenant] = backlog
        backlog.waiting.step_over()
        backlog.provisional_s += cost_s

    def step_back(self) -> None:
        if not self._stepped_tickets:
            return
        self._stepped_tickets.clear()
        self.by_age.step_back()
        for backlog in self._stepped_backlogs.values():
            backlog.provisional_s = 0.0
            backlog.waiting.step_back()
            if self.backlogs.get(backlog.tenant) is backlog:
                self.enter(backlog)
        self._stepped_backlogs.clear()


class FairLine(WaitingLine):
    """Classes of priority that age, and weighted fair service between the tenants of a class.

    Between classes, the one whose oldest request has the smallest arrival time
    less the class's boost goes first: whatever waits long enough is served.

    Within a class the tenant that has had least goes first: a Virtual Token
    Counter (Sheng et al., "Fairness in Serving Large Language Models",
    OSDI'24) over engine seconds per weight instead of tokens. A tenant that
    begins to wait is lifted to the smallest standing of those that wait, or
    to that of the last to leave an empty lane, so that idle time is not saved
    up. Predicted cost is charged at dispatch and corrected at the end. Between
    tenants that always wait the service per weight differs by at most twice
    the largest cost per weight. A tenant is a ``tenant_id``, or where there is
    none a ``user_id``; its own requests go in order of arrival.

    A request that is stepped over counts as though dispatched at the mean
    cost, so that the next heads come from other tenants too.

    Every operation costs O(log n), amortised, except :meth:`position`.

    Args:
        boosts_s: Head start of each class, seconds; 0 for a class that is absent.
        weight_of: Gives a tenant its weight, greater than 0.
        books: Accounts, shared by all lines of a policy. At any time one line
            that holds requests may exist per model.
    """

    def __init__(
        self,
        boosts_s: Mapping[RequestPriority, float],
        weight_of: Callable[[str], float],
        books: ServiceBooks,
    ) -> None:
        self._lanes = {priority: _Lane(boosts_s.get(priority, 0.0)) for priority in RequestPriority}
        self._weight_of = weight_of
        self._books = books
        self._count = 0
        # Known from the first request on.
        self._model = ""

    def push(self, record: RequestRecord) -> None:
        """Add a request."""
        tenant, lane = tenant_of(record), self._lanes[record.metadata.priority]
        backlog = lane.backlogs.get(tenant)
        if backlog is None:
            account = self._books.account(lane_key(record), tenant)
            backlog = lane.backlogs[tenant] = _Backlog(tenant, account)
            lane.newcomers.append(backlog)
        backlog.waiting.push(record.arrival_s, record)
        lane.by_age.push(record.arrival_s, record)
        self._count += 1
        self._model = record.model
        if backlog.stamp == _NOTHING_TO_GIVE:
            lane.enter(backlog)

    def discard(self, record: RequestRecord) -> None:
        """Take a request out, wherever it is."""
        tenant, lane = tenant_of(record), self._lanes[record.metadata.priority]
        backlog = lane.backlogs[tenant]
        backlog.waiting.discard()
        lane.by_age.discard()
        self._count -= 1
        if not backlog.waiting.live_count:
            del lane.backlogs[tenant]
            self._books.keep(lane_key(record), tenant, backlog.account)
            if not lane.by_age.live_count:
                self._books.ledger(lane_key(record)).last_to_leave = backlog.account

    def head(self, now: float) -> RequestRecord | None:
        """Return the oldest request of the tenant that has had least, in the class that goes first."""
        first = self._first()
        return first[2] if first is not None else None

    def rank(self, now: float) -> tuple[float, int]:
        """Return the aged arrival of the first class's oldest request, and that request's sequence."""
        return min(self._class_ranks(), default=(math.inf, 0, RequestPriority.NORMAL))[:2]

    def step_over(self) -> None:
        """Let the next request be the head until :meth:`step_back`."""
        first = self._first()
        if first is not None:
            lane, backlog, record = first
            mean_cost_s = self._books.ledger(lane_key(record)).mean_cost_s
            lane.step_over(backlog, record.queue_ticket, mean_cost_s / self._weight_of(backlog.tenant))

    def step_back(self) -> None:
        """Put the requests that were stepped over back in front."""
        for lane in self._lanes.values():
            lane.step_back()

    def note_dispatch(self, record: RequestRecord, cost_s: float) -> None:
        """Charge what a request will probably cost.

        Args:
            record: The request, taken out already or about to be.
            cost_s: Predicted engine seconds: uncached prefill and its share of decode steps.
        """
        tenant, key = tenant_of(record), lane_key(record)
        backlog = self._lanes[record.metadata.priority].backlogs.get(tenant)
        account = backlog.account if backlog is not None else self._books.account(key, tenant)
        self._books.charge(record, account, self._weight_of(tenant), cost_s)
        ledger = self._books.ledger(key)
        ledger.mean_cost_s += _MEAN_COST_GAIN * (cost_s - ledger.mean_cost_s)

    def note_settled(self, record: RequestRecord) -> None:
        """Let the tenant go first if it now has had least."""
        lane = self._lanes[record.metadata.priority]
        backlog = lane.backlogs.get(tenant_of(record))
        if backlog is not None and backlog.stamp > _NOTHING_TO_GIVE:
            lane.enter(backlog)

    def position(self, record: RequestRecord, now: float) -> int:
        """Return how many requests go before it if each costs the mean and no more arrive. O(n log n)."""
        forecasts = {
            priority: _Forecast(
                lane,
                self._scale_s(lane, priority),
                self._books.ledger(LaneKey(self._model, priority)).mean_cost_s,
                self._weight_of,
            )
            for priority, lane in self._lanes.items()
            if lane.backlogs
        }
        count, rank = forecasts.pop(record.metadata.priority).place(record)
        return count + sum(forecast.count_until(rank) for forecast in forecasts.values())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[RequestRecord]:
        return (entry[3] for lane in self._lanes.values() for entry in lane.by_age)

    def _class_ranks(self) -> Iterator[tuple[float, int, RequestPriority]]:
        for priority, lane in self._lanes.items():
            if lane.backlogs and (rank := lane.rank()) is not None:
                yield *rank, priority

    def _first(self) -> tuple[_Lane, _Backlog, RequestRecord] | None:
        self._lift_newcomers()
        best = min(self._class_ranks(), default=None)
        if best is None:
            return None
        lane = self._lanes[best[2]]
        backlog = lane.first()
        entry = backlog.waiting.head() if backlog is not None else None
        return (lane, backlog, entry[3]) if backlog is not None and entry is not None else None

    def _lift_newcomers(self) -> None:
        """Lift who began to wait since the last look, together.

        Not one by one as they come: a line that is filled anew (another policy
        was in force) would lift each to those before it, and forget what they
        had had.
        """
        for priority, lane in self._lanes.items():
            if lane.newcomers:
                scale_s = self._scale_s(lane, priority)
                for backlog in lane.newcomers:
                    # It may have left again.
                    if lane.backlogs.get(backlog.tenant) is backlog:
                        backlog.account.floor_s = scale_s
                        backlog.account.standing_s = max(backlog.account.standing_s, scale_s)
                        lane.enter(backlog)
                lane.newcomers.clear()

    def _scale_s(self, lane: _Lane, priority: RequestPriority) -> float:
        """Return the standing that a newcomer to a lane is lifted to."""
        first = lane.first()
        least = (
            first.account
            if first is not None
            else self._books.ledger(LaneKey(self._model, priority)).last_to_leave
        )
        return least.standing_s if least is not None else 0.0


class _Forecast:
    """Where a request stands if each request costs the mean of its lane and no more arrive.

    Within a lane, a tenant's i-th request then goes when its standing has
    grown i times, so turns can be counted without playing the future through.
    """

    def __init__(
        self, lane: _Lane, scale_s: float, mean_cost_s: float, weight_of: Callable[[str], float]
    ) -> None:
        self._lane = lane
        self._scale_s = scale_s
        self._mean_cost_s = mean_cost_s
        self._weight_of = weight_of

    def turn(self, backlog: _Backlog, index: int) -> tuple[float, str]:
        """Return the turn of a tenant's i-th request; the smallest goes first."""
        return (self._standing_s(backlog) + index * self._turn_cost_s(backlog), backlog.tenant)

    def count_before(self, turn: tuple[float, str], backlog: _Backlog) -> int:
        """Return how many requests of a tenant have an earlier turn."""
        cost_s = self._turn_cost_s(backlog)
        if cost_s <= 0.0:
            return backlog.waiting.live_count if self.turn(backlog, 0) < turn else 0
        turns = (turn[0] - self._standing_s(backlog)) / cost_s
        # Standings are sums: a turn that is the same but for rounding is the same.
        if abs(turns - round(turns)) < _SAME_TURN:
            turns = round(turns)
        count = math.floor(turns) + 1 if backlog.tenant < turn[1] else math.ceil(turns)
        return max(0, min(backlog.waiting.live_count, count))

    def place(self, record: RequestRecord) -> tuple[int, tuple[float, int]]:
        """Return how many of its class go before a request, and the rank of the class at its turn."""
        boost_s = self._lane.boost_s
        own = self._lane.backlogs[tenant_of(record)]
        age = (record.arrival_s, record.sequence)
        index = sum(1 for entry in own.waiting if entry[:2] < age)
        turn, count, oldest = self.turn(own, index), 0, age
        for backlog in self._lane.backlogs.values():
            count_before = index if backlog is own else self.count_before(turn, backlog)
            count += count_before
            head = backlog.waiting.head()
            if count_before < backlog.waiting.live_count and head is not None and head[:2] < oldest:
                oldest = min(oldest, sorted(backlog.waiting)[count_before][:2])
        return count, (oldest[0] - boost_s, oldest[1])

    def count_until(self, rank: tuple[float, int]) -> int:
        """Return how many of its requests a class gives before its rank is greater than another's."""
        own_rank = self._lane.rank()
        if own_rank is None or own_rank > rank:
            return 0
        last_turn: tuple[float, str] | None = None
        for backlog in self._lane.backlogs.values():
            older_count = sum(1 for e in backlog.waiting if (e[0] - self._lane.boost_s, e[1]) < rank)
            if older_count:
                turn = self.turn(backlog, older_count - 1)
                last_turn = turn if last_turn is None else max(last_turn, turn)
        if last_turn is None:
            return 0
        before = sum(self.count_before(last_turn, backlog) for backlog in self._lane.backlogs.values())
        return min(self._lane.by_age.live_count, 1 + before)

    def _standing_s(self, backlog: _Backlog) -> float:
        # Reading must change nothing, so newcomers are not lifted here but taken as lifted.
        standing_s = backlog.account.standing_s
        return max(standing_s, self._scale_s) if backlog.stamp == _NEWCOMER else standing_s

    def _turn_cost_s(self, backlog: _Backlog) -> float:
        return self._mean_cost_s / self._weight_of(backlog.tenant)
