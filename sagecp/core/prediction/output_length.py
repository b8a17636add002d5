"""How long answers get: streaming quantiles per tenant and shape of request, with back-off."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sagecp.core.prediction.histogram import LogHistogram

# Buckets of 12 %, up to about 1.8 million tokens.
_RATIO = 1.12
_BUCKET_COUNT = 127
_EDGES = tuple(_RATIO**index for index in range(_BUCKET_COUNT + 1))
_WIDTHS = tuple(upper - lower for lower, upper in pairwise(_EDGES))
_MIDDLES = np.array([0.5 * (lower + upper) for lower, upper in pairwise(_EDGES)])

# Before anything was seen: a log-normal around this many tokens, or around
# max_tokens where that is less, with this spread of the logarithm.
_PRIOR_MEDIAN_TOKENS = 256.0
_PRIOR_SIGMA = 1.0

_FORGETTING = 0.998
# Observations that the next coarser level counts as.
_PSEUDO_COUNT = 8.0
_LARGEST_SIZE_BITS = 24
# An estimate is renewed after so many more observations of its own group, of
# its tenant, and of all; sooner while there are few.
_OWN_STEP, _TENANT_STEP, _TOTAL_STEP = 16, 64, 1024
# An estimate takes about 8 kB.
_MAX_ESTIMATE_COUNT = 1024

_Shares = npt.NDArray[np.float64]
_Key = tuple[str | None, int | None, int | None]


class OutputLengthModel:
    """Predicts the number of tokens a request will generate.

    Requests are grouped by tenant, ``max_tokens`` in powers of two and prompt
    length in powers of four. Each group is a forgetting histogram, smoothed by the
    next coarser one: (tenant, ``max_tokens``, prompt), tenant, (``max_tokens``,
    prompt), all, prior. Each level counts as some pseudo-observations of the next
    finer (hierarchical Dirichlet smoothing: MacKay and Peto, 1995), so that a
    group takes over as it fills. Conditioning on the tokens already produced
    follows Past-Future (ASPLOS'25).

    Memory is bounded: the groups least recently seen are dropped.

    Args:
        max_group_count: Groups kept at most, of about 1 kB each.
    """

    def __init__(self, *, max_group_count: int = 4096) -> None:
        if max_group_count < 1:
            raise ValueError(f"max_group_count is {max_group_count}; it must be at least 1")
        self._max_group_count = max_group_count
        self._all = _new_group()
        self._groups: OrderedDict[_Key, LogHistogram] = OrderedDict()
        self._estimates: OrderedDict[_Key, LengthEstimate] = OrderedDict()
        self._priors: dict[int, _Shares] = {}

    @property
    def observation_count(self) -> int:
        """Observations taken in; those that made no sense are not counted."""
        return self._all.observation_count

    @property
    def group_count(self) -> int:
        """Groups kept now."""
        return len(self._groups)

    def observe(
        self, tenant_id: str, max_tokens: int | None, prompt_token_count: int, output_token_count: int
    ) -> None:
        """Learn from a request that came to its own end."""
        if not 0 <= output_token_count < math.inf:
            return
        output_token_count = min(output_token_count, 1 << _LARGEST_SIZE_BITS)
        limit, prompt = _limit_bucket(max_tokens), _prompt_bucket(prompt_token_count)
        self._all.add(output_token_count)
        for key in ((tenant_id, limit, prompt), (tenant_id, None, None), (None, limit, prompt)):
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _new_group()
                # What was prepared from the absence of the group is out of date.
                self._estimates.pop(key, None)
                if len(self._groups) > self._max_group_count:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(key)
            group.add(output_token_count)

    def quantile(
        self,
        tenant_id: str,
        max_tokens: int | None,
        prompt_token_count: int,
        q: float,
        produced: int = 0,
    ) -> float:
        """Return the length that a share ``q`` of such requests stays below.

        Args:
            tenant_id: Who asks.
            max_tokens: The request's own limit, never exceeded; ``None``: none.
            prompt_token_count: Length of its prompt.
            q: In [0, 1].
            produced: Tokens it has generated; the answer is of those that got
                further, and counts these tokens too.
        """
        estimate = self._estimate(tenant_id, max_tokens, prompt_token_count)
        return estimate.quantile(q, produced, length_limit(max_tokens))

    def expected(
        self, tenant_id: str, max_tokens: int | None, prompt_token_count: int, produced: int = 0
    ) -> float:
        """Return the mean length of such requests; arguments as for ``quantile``."""
        estimate = self._estimate(tenant_id, max_tokens, prompt_token_count)
        return estimate.mean(produced, length_limit(max_tokens))

    def log_spread(
        self, tenant_id: str, max_tokens: int | None, prompt_token_count: int, produced: int = 0
    ) -> float:
        """Return how uncertain the length is: half of ``ln(q84 / q16)``, one sigma of a log-normal."""
        estimate = self._estimate(tenant_id, max_tokens, prompt_token_count)
        limit = length_limit(max_tokens)
        low = estimate.quantile(0.16, produced, limit)
        return 0.5 * math.log(estimate.quantile(0.84, produced, limit) / low)

    def distribution(self, tenant_id: str, max_tokens: int | None, prompt_token_count: int) -> LengthEstimate:
        """Return what is known now of how long such requests get; later observations do not change it."""
        return self._estimate(tenant_id, max_tokens, prompt_token_count)

    def _estimate(self, tenant_id: str, max_tokens: int | None, prompt_token_count: int) -> LengthEstimate:
        limit, prompt = _limit_bucket(max_tokens), _prompt_bucket(prompt_token_count)
        key = (tenant_id, limit, prompt)
        estimate = self._estimates.get(key)
        if estimate is not None and not estimate.is_stale:
            self._estimates.move_to_end(key)
            return estimate
        empty = _EMPTY_GROUP
        own = self._groups.get(key, empty)
        tenant = self._groups.get((tenant_id, None, None), empty)
        alike = self._groups.get((None, limit, prompt), empty)
        shares = _smoothed((own, tenant, alike, self._all), self._prior(limit))
        estimate = self._estimates[key] = LengthEstimate(shares, own, tenant, self._all)
        self._estimates.move_to_end(key)
        if len(self._estimates) > _MAX_ESTIMATE_COUNT:
            self._estimates.popitem(last=False)
        return estimate

    def _prior(self, limit_bucket: int) -> _Shares:
        shares = self._priors.get(limit_bucket)
        if shares is None:
            shares = self._priors[limit_bucket] = _prior_shares(limit_bucket)
        return shares


class LengthEstimate:
    """A smoothed distribution, prepared for questions, and until when it may be used.

    A length lies evenly within its bucket.
    """

    __slots__ = (
        "_all",
        "_all_until",
        "_below",
        "_moments",
        "_own",
        "_own_until",
        "_tenant",
        "_tenant_until",
    )

    def __init__(
        self, shares: _Shares, own: LogHistogram, tenant: LogHistogram, all_groups: LogHistogram
    ) -> None:
        # Plain floats: numpy is for whole distributions, not for single questions.
        # Shares, and shares times length, of everything below each edge.
        self._below: list[float] = [0.0, *np.cumsum(shares).tolist()]
        self._moments: list[float] = [0.0, *np.cumsum(shares * _MIDDLES).tolist()]
        self._own, self._own_until = own, _until(own, _OWN_STEP)
        self._tenant, self._tenant_until = tenant, _until(tenant, _TENANT_STEP)
        self._all, self._all_until = all_groups, _until(all_groups, _TOTAL_STEP)

    def __repr__(self) -> str:
        # By its contents: records that hold it are compared as text.
        return f"LengthEstimate(mean {self.mean(0, math.inf)!r} tokens)"

    @property
    def is_stale(self) -> bool:
        """Whether enough was observed since to prepare it anew."""
        return (
            self._own.observation_count >= self._own_until
            or self._all.observation_count >= self._all_until
            or self._tenant.observation_count >= self._tenant_until
        )

    def quantile(self, q: float, produced: float, limit: float) -> float:
        """Return the length that a share ``q`` stays below.

        Args:
            q: In [0, 1].
            produced: Tokens that there are already; the answer is of those that got further.
            limit: Never exceeded.
        """
        if produced >= limit:
            return limit
        below = self._below
        passed = self._share_below(produced) if produced else 0.0
        target = passed + q * (below[-1] - passed)
        bucket = min(bisect_right(below, target), _BUCKET_COUNT) - 1
        share = below[bucket + 1] - below[bucket]
        within = (target - below[bucket]) / share if share > 0.0 else 1.0
        length = _EDGES[bucket] + min(1.0, within) * _WIDTHS[bucket]
        return min(limit, max(length, produced + 1.0))

    def mean(self, produced: float, limit: float) -> float:
        """Return the mean length; arguments as for ``quantile``."""
        if produced >= limit:
            return limit
        passed = self._share_below(produced) if produced else 0.0
        ahead = self._below[-1] - passed
        if ahead <= 0.0:
            return min(limit, produced + 1.0)
        moment = self._moment_below(produced) if produced else 0.0
        if limit < _EDGES[-1]:
            whole = self._moment_below(limit) + (self._below[-1] - self._share_below(limit)) * limit
        else:
            whole = self._moments[-1]
        return min(limit, max((whole - moment) / ahead, produced + 1.0))

    def _share_below(self, length: float) -> float:
        bucket = bisect_right(_EDGES, length) - 1
        if bucket < 0:
            return 0.0
        if bucket >= _BUCKET_COUNT:
            return self._below[-1]
        lower, upper = self._below[bucket], self._below[bucket + 1]
        return lower + (upper - lower) * (length - _EDGES[bucket]) / _WIDTHS[bucket]

    def _moment_below(self, length: float) -> float:
        bucket = bisect_right(_EDGES, length) - 1
        if bucket < 0:
            return 0.0
        if bucket >= _BUCKET_COUNT:
            return self._moments[-1]
        lower = _EDGES[bucket]
        share = self._below[bucket + 1] - self._below[bucket]
        part = share * (length - lower) / _WIDTHS[bucket]
        return self._moments[bucket] + part * 0.5 * (length + lower)


def _new_group() -> LogHistogram:
    return LogHistogram(_BUCKET_COUNT, least=1.0, ratio=_RATIO, forgetting=_FORGETTING)


_EMPTY_GROUP = _new_group()


def _until(group: LogHistogram, step: int) -> int:
    """Count of observations at which an estimate made now is out of date."""
    return group.observation_count + max(1, min(step, group.observation_count // 4))


def _smoothed(groups: tuple[LogHistogram, ...], prior: _Shares) -> _Shares:
    """Return the first group's shares, where each coarser level counts as pseudo-observations."""
    shares = np.zeros(_BUCKET_COUNT)
    left = 1.0
    for group in groups:
        if count := group.effective_count:
            share = left * count / (count + _PSEUDO_COUNT)
            shares += np.frombuffer(group.counts) * (share / (count * group.unit))
            left -= share
    return shares + prior * left


def _prior_shares(limit_bucket: int) -> _Shares:
    limit = float(1 << limit_bucket) if limit_bucket >= 0 else math.inf
    median = min(limit, _PRIOR_MEDIAN_TOKENS)
    scale = 1.0 / (_PRIOR_SIGMA * math.sqrt(2.0))
    below = [0.5 * math.erfc(-math.log(edge / median) * scale) for edge in _EDGES]
    below[0], below[-1] = 0.0, 1.0
    return np.diff(below)


def length_limit(max_tokens: int | None) -> float:
    """Return the most tokens of an answer; infinite: nothing limits it."""
    return math.inf if max_tokens is None else float(max(1, max_tokens))


def _limit_bucket(max_tokens: int | None) -> int:
    """Return ``n`` for limits above ``2**(n-1)`` up to ``2**n``; -1 for none."""
    return -1 if max_tokens is None else _size_bucket(max_tokens - 1)


def _size_bucket(token_count: int) -> int:
    return min(max(0, token_count).bit_length(), _LARGEST_SIZE_BITS)


def _prompt_bucket(token_count: int) -> int:
    # Coarser: prompts say less of the answer's length than the limit does.
    return _size_bucket(token_count) >> 1
