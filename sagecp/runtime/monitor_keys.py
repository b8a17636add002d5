"""What metrics are kept by: combinations of model, instance, tenant and class, each with a number."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sagecp.core.types import RequestPriority, RequestState

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Columns of what is counted since the start.
COMPLETED, FAILED, CANCELLED, VIOLATIONS = range(4)
# A sweep looks at every combination; where all of them are in use, it finds nothing.
_SWEEP_INTERVAL_S = 60.0
_UNKNOWN = -1


class MetricsDimension(enum.IntEnum):
    """What metrics can be grouped by; the numbers are places in a key."""

    MODEL = 0
    INSTANCE = 1
    TENANT = 2
    PRIORITY = 3


# A tuple and not a dataclass: one is made and looked up for every request that ends.
class MetricsKey(NamedTuple):
    """What metrics can be filtered and grouped by. As a filter, empty and ``None`` match everything."""

    model: str = ""
    instance_id: str = ""
    tenant_id: str = ""
    priority: RequestPriority | None = None

    def value_of(self, dimension: MetricsDimension) -> str:
        """Return what it has in a dimension, as a group is called; ``""``: nothing."""
        if dimension is MetricsDimension.PRIORITY:
            return self.priority.name if self.priority is not None else ""
        return str(self[dimension])


EVERYTHING = MetricsKey()


class KeyTable:
    """Numbers the combinations that were seen, and counts how their requests ended.

    Bounded: when there are ``max_count`` combinations, those of which no
    request ended for ``idle_s`` make room. What there is no room for is
    counted without its tenant, of which there can be most, and without any
    name when there are too many of those as well: sums stay right, and groups
    by model and instance do so for longest.

    Args:
        max_count: Most combinations told apart, and as many again without their tenants.
        idle_s: From when on nothing else refers to the number of an idle combination.

    Attributes:
        counts: Ended requests since the start, numbers x (completed, failed, cancelled, missed an
            objective); of what was let go of, too.
    """

    def __init__(self, max_count: int, idle_s: float) -> None:
        self._max_count = max_count
        self._idle_s = idle_s
        self._numbers: dict[MetricsKey, int] = {}
        # By number, also of those that are free.
        self._last_use_s: list[float] = []
        self._free: list[int] = []
        # Those that stand for combinations that there was no room for.
        self._coarse: set[MetricsKey] = set()
        self._swept_s = -_SWEEP_INTERVAL_S
        # Values by dimension, and which of them each number has: filters compare numbers, not texts.
        self._value_ids: tuple[dict[str, int], ...] = ({}, {}, {}, {})
        self._ids = np.full((64, len(MetricsDimension)), _UNKNOWN, np.int32)
        self.counts = np.zeros((64, 4), np.int64)

    def number_of(self, key: MetricsKey, now: float) -> int:
        """Return the number that a combination is counted under, and note that it is in use."""
        number = self._numbers.get(key)
        if number is None:
            number = self._find_room(key, now)
        self._last_use_s[number] = now
        return number

    def _find_room(self, key: MetricsKey, now: float) -> int:
        if self._exact_count >= self._max_count and now >= self._swept_s + _SWEEP_INTERVAL_S:
            self._swept_s = now
            self._sweep(now)
        if self._exact_count < self._max_count:
            return self._add(key, now)
        return self._coarse_number(key, now)

    @property
    def _exact_count(self) -> int:
        return len(self._numbers) - len(self._coarse) - (EVERYTHING in self._numbers)

    def _coarse_number(self, key: MetricsKey, now: float) -> int:
        """Return the number that a combination is counted under when there is no room for it."""
        coarse = key._replace(tenant_id="")
        if coarse not in self._numbers and len(self._coarse) >= self._max_count:
            coarse = EVERYTHING
        number = self._numbers.get(coarse)
        if number is not None:
            return number
        if coarse != EVERYTHING:
            self._coarse.add(coarse)
        return self._add(coarse, now)

    def _add(self, key: MetricsKey, now: float) -> int:
        if self._free:
            number = self._free.pop()
            self._last_use_s[number] = now
        else:
            number = len(self._last_use_s)
            self._last_use_s.append(now)
            if number == len(self._ids):
                self._ids = np.concatenate((self._ids, np.full_like(self._ids, _UNKNOWN)))
                self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
        self._numbers[key] = number
        self._intern(key, number)
        return number

    def _intern(self, key: MetricsKey, number: int) -> None:
        for dimension in MetricsDimension:
            ids = self._value_ids[dimension]
            self._ids[number, dimension] = ids.setdefault(key.value_of(dimension), len(ids))

    def _sweep(self, now: float) -> None:
        """Let go of idle combinations; what they counted goes on without a tenant, or without a name."""
        limit_s = now - self._idle_s
        idle = [(number, key) for key, number in self._numbers.items() if self._last_use_s[number] <= limit_s]
        # Those without a tenant first, so that there is room for what the others leave.
        for number, key in sorted(idle, key=lambda each: bool(each[1].tenant_id)):
            if key == EVERYTHING:
                continue
            del self._numbers[key]
            self._coarse.discard(key)
            last_use_s = self._last_use_s[number]
            heir = self._coarse_number(key if key.tenant_id else EVERYTHING, last_use_s)
            self.counts[heir] += self.counts[number]
            self.counts[number] = 0
            self._ids[number] = _UNKNOWN
            self._free.append(number)
        # Values that nothing has any more would pile up.
        for ids in self._value_ids:
            ids.clear()
        for key, number in self._numbers.items():
            self._intern(key, number)

    def count(self, numbers: Numbers, states: Values, missed: Mask) -> None:
        """Count requests that ended.

        Args:
            numbers: Of their combinations.
            states: Numbers of the states they ended in.
            missed: Which of them missed an objective.
        """
        columns = np.full(len(numbers), FAILED)
        columns[states == RequestState.SUCCEEDED] = COMPLETED
        columns[states == RequestState.CANCELLED] = CANCELLED
        np.add.at(self.counts, (numbers, columns), 1)
        np.add.at(self.counts[:, VIOLATIONS], numbers[missed], 1)

    def sums_of_counts(self, groups: Numbers, group_count: int) -> Numbers:
        """Return what the counts of groups add up to: groups x (completed, failed, cancelled, missed).

        Args:
            groups: The group of each number; -1: none.
            group_count: Groups.
        """
        sums = np.zeros((group_count, self.counts.shape[1]), np.int64)
        grouped = groups >= 0
        np.add.at(sums, groups[grouped], self.counts[: len(groups)][grouped])
        return sums

    def passing(self, match: MetricsKey) -> Mask:
        """Return which numbers pass a filter."""
        ids = self._ids[: len(self._last_use_s)]
        passing: Mask = ids[:, 0] != _UNKNOWN
        for dimension in MetricsDimension:
            wanted = match.value_of(dimension)
            if wanted:
                passing &= ids[:, dimension] == self._value_ids[dimension].get(wanted, _UNKNOWN - 1)
        return passing

    def values(self, dimension: MetricsDimension, passing: Mask) -> set[str]:
        """Return the values that numbers have in a dimension, but for none at all."""
        present = set(np.unique(self._ids[: len(self._last_use_s), dimension][passing]).tolist())
        return {value for value, number in self._value_ids[dimension].items() if value and number in present}

    def groups(self, dimension: MetricsDimension, passing: Mask, values: Iterable[str]) -> Numbers:
        """Return the place of each number's value among ``values``; -1: not there, or it does not pass."""
        ids = self._value_ids[dimension]
        place_of_id = np.full(len(ids) + 1, -1, np.int64)
        for place, value in enumerate(values):
            number = ids.get(value)
            if number is not None:
                place_of_id[number] = place
        own = self._ids[: len(self._last_use_s), dimension]
        found: Numbers = np.where(passing, place_of_id[own], -1)
        return found
