"""What load there was, in buckets of five minutes: what a forecast is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKET_S = 300.0
"""Length of a bucket, seconds. Buckets begin at multiples of it since 1970."""
MAX_BUCKET_COUNT = 15 * 288
"""Buckets that are kept: two weeks and a day."""
MAX_SERIES_COUNT = 128
"""Pairs of model and tenant that are told apart."""
OTHER = "(other)"
"""The tenant that the load of all further pairs is booked under."""
QUANTITIES = ("requests", "prompt_tokens", "output_tokens", "cost_usd")
"""What is counted."""

Series = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoadBucket:
    """The load of one model and tenant within one bucket.

    Attributes:
        number: Of the bucket: its start divided by its length.
        model: Served model name.
        tenant_id: ``""``: none.
        values: In the order of ``QUANTITIES``.
    """

    number: int
    model: str
    tenant_id: str
    values: tuple[float, float, float, float]


class LoadHistory:
    """Requests, tokens and cost by model and tenant over the last two weeks.

    Arrivals count in the bucket in which they come, output and cost in that in
    which the request ends. Buckets without load are zeros, not gaps: the time
    before the first bucket is unknown.

    Args:
        now_s: Unix seconds; the history begins here.
    """

    def __init__(self, now_s: float) -> None:
        self._first = self._current = bucket_number(now_s)
        # By model and tenant: values by bucket number.
        self._series: dict[tuple[str, str], dict[int, list[float]]] = {}
        self._changed: set[tuple[int, str, str]] = set()

    @property
    def models(self) -> tuple[str, ...]:
        """Models that had load."""
        return tuple(sorted({model for model, _ in self._series}))

    @property
    def tenant_ids(self) -> tuple[str, ...]:
        """Tenants that had load and are told apart."""
        return tuple(sorted({tenant for _, tenant in self._series if tenant not in {"", OTHER}}))

    def add(
        self,
        now_s: float,
        model: str,
        tenant_id: str,
        *,
        requests: float = 0.0,
        prompt_tokens: float = 0.0,
        output_tokens: float = 0.0,
        cost_usd: float = 0.0,
    ) -> None:
        """Count load.

        Args:
            now_s: When, Unix seconds. A time before the current bucket counts in that.
            model: Served model name.
            tenant_id: ``""``: none.
            requests: Requests that arrived.
            prompt_tokens: Tokens of their prompts.
            output_tokens: Tokens of answers that ended.
            cost_usd: What those cost.
        """
        self.advance(now_s)
        key = self._key(model, tenant_id)
        bucket = self._series[key].setdefault(self._current, [0.0, 0.0, 0.0, 0.0])
        bucket[0] += requests
        bucket[1] += prompt_tokens
        bucket[2] += output_tokens
        bucket[3] += cost_usd
        self._changed.add((self._current, *key))

    def advance(self, now_s: float) -> None:
        """Let time pass: finish the bucket, and forget what is too old."""
        number = bucket_number(now_s)
        if number <= self._current:
            return
        self._current = number
        oldest = number - MAX_BUCKET_COUNT
        if self._first >= oldest:
            return
        self._first = oldest
        for key, series in list(self._series.items()):
            # In the order of time: the oldest stand first.
            while series and (first := next(iter(series))) < oldest:
                del series[first]
            if not series:
                del self._series[key]

    def finished(self, model: str = "", tenant_id: str = "") -> Mapping[str, Series]:
        """Return what the finished buckets hold, oldest first, by quantity.

        Args:
            model: Only this one; ``""``: all.
            tenant_id: Only this one; ``""``: all.
        """
        count = self._current - self._first
        total = np.zeros((len(QUANTITIES), count))
        for (its_model, its_tenant), series in self._series.items():
            if (model and its_model != model) or (tenant_id and its_tenant != tenant_id):
                continue
            for number, values in series.items():
                if self._first <= number < self._current:
                    total[:, number - self._first] += values
        return dict(zip(QUANTITIES, total, strict=True))

    def recent(self, model: str, bucket_count: int) -> Mapping[str, float]:
        """Return what the last finished buckets hold of a model together, by quantity."""
        total = [0.0] * len(QUANTITIES)
        for (its_model, _), series in self._series.items():
            if its_model != model:
                continue
            for number in range(self._current - bucket_count, self._current):
                for index, value in enumerate(series.get(number, ())):
                    total[index] += value
        return dict(zip(QUANTITIES, total, strict=True))

    @property
    def end_s(self) -> float:
        """Where the finished buckets end, Unix seconds."""
        return self._current * BUCKET_S

    @property
    def finished_s(self) -> float:
        """How much time they cover, seconds."""
        return (self._current - self._first) * BUCKET_S

    def take_changed(self, *, everything: bool = False) -> Iterator[LoadBucket]:
        """Return finished buckets that changed since the last call, to be written down.

        Args:
            everything: The one in progress, too.
        """
        end = self._current + (1 if everything else 0)
        ready = sorted(each for each in self._changed if each[0] < end)
        self._changed.difference_update(ready)
        for number, model, tenant_id in ready:
            values = self._series.get((model, tenant_id), {}).get(number)
            if values is not None:
                yield LoadBucket(number, model, tenant_id, (values[0], values[1], values[2], values[3]))

    def restore(self, buckets: Iterable[LoadBucket]) -> None:
        """Take in what was written down before; the history then begins with its oldest bucket.

        Buckets from the future, and values that make no sense, are left out.
        """
        oldest = self._current - MAX_BUCKET_COUNT
        for bucket in sorted(buckets, key=lambda each: each.number):
            if not oldest <= bucket.number <= self._current:
                continue
            if not all(math.isfinite(value) and value >= 0.0 for value in bucket.values):
                continue
            series = self._series[self._key(bucket.model, bucket.tenant_id)]
            known = series.setdefault(bucket.number, [0.0, 0.0, 0.0, 0.0])
            for index, value in enumerate(bucket.values):
                known[index] += value
            self._first = min(self._first, bucket.number)

    def _key(self, model: str, tenant_id: str) -> tuple[str, str]:
        key = (model, tenant_id)
        if key not in self._series:
            if len(self._series) >= MAX_SERIES_COUNT:
                # Models are few: the tenants of one are put together first.
                key = (model, OTHER)
                if key not in self._series and len(self._series) >= 2 * MAX_SERIES_COUNT:
                    key = (OTHER, OTHER)
            self._series.setdefault(key, {})
        return key


def bucket_number(time_s: float) -> int:
    """Return the number of the bucket that a time lies in."""
    return math.floor(time_s / BUCKET_S)
