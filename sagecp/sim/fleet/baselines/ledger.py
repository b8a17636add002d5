"""What a dispatcher knows of an instance from its own dispatches and from the answers to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

_TTFT_SMOOTHING = 0.1
_DUTY_TIME_CONSTANT_S = 5.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """Prefill that comes before a new request's.

    Attributes:
        token_count: Tokens to compute.
        token_pairs: ``sum(u*(L - u/2))`` over its prompts, which attention's time grows with.
    """

    token_count: float = 0.0
    token_pairs: float = 0.0


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A request without a first token, and how much of its prompt was not cached when it was dispatched."""

    uncached_token_count: int
    prompt_token_count: int

    @property
    def token_pairs(self) -> float:
        return token_pairs(self.uncached_token_count, self.prompt_token_count)


def token_pairs(uncached_token_count: float, prompt_token_count: float) -> float:
    """Return the pairs of a computed token and one before it: ``u*(L - u/2)``."""
    return uncached_token_count * (prompt_token_count - 0.5 * uncached_token_count)


class InstanceLedger:
    """The dispatches to one instance that have not ended, in order.

    Attributes:
        ttft_s: Exponentially weighted mean of the times from dispatch to first token
            (weight 0.1); ``None``: there was none yet.
        uncached_token_count: Tokens to prefill, of requests without a first token.
        context_token_count: Prompt tokens of requests that have one.
    """

    __slots__ = (
        "_answers",
        "_dispatched_s",
        "_duty",
        "_duty_s",
        "_prefills",
        "_prompt_token_count",
        "_token_pairs",
        "context_token_count",
        "ttft_s",
        "uncached_token_count",
    )

    def __init__(self) -> None:
        self._prefills: dict[str, _Prefill] = {}
        self._answers: dict[str, int] = {}
        self._dispatched_s: dict[str, float] = {}
        # Sums over the prefills: of prompts, and of pairs.
        self._prompt_token_count = 0
        self._token_pairs = 0.0
        self._duty = 0.0
        self._duty_s = 0.0
        self.uncached_token_count = 0
        self.context_token_count = 0
        self.ttft_s: float | None = None

    @property
    def request_count(self) -> int:
        """Requests that have not ended."""
        return len(self._prefills) + len(self._answers)

    @property
    def prefill_count(self) -> int:
        """Requests without a first token."""
        return len(self._prefills)

    @property
    def answer_count(self) -> int:
        """Requests that have their first token, and not their last."""
        return len(self._answers)

    def dispatched(
        self, request_id: str, prompt_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """Note a dispatch, and how much of its prompt was cached then."""
        self._advance_duty(now)
        prefill = _Prefill(prompt_token_count - cached_token_count, prompt_token_count)
        self._prefills[request_id] = prefill
        self._dispatched_s[request_id] = now
        self.uncached_token_count += prefill.uncached_token_count
        self._prompt_token_count += prompt_token_count
        self._token_pairs += prefill.token_pairs

    def first_token(self, request_id: str, now: float) -> None:
        """Note that a request's prefill is over."""
        self._advance_duty(now)
        prefill = self._prefills.pop(request_id)
        self.uncached_token_count -= prefill.uncached_token_count
        self._prompt_token_count -= prefill.prompt_token_count
        self._token_pairs -= prefill.token_pairs
        self._answers[request_id] = prefill.prompt_token_count
        self.context_token_count += prefill.prompt_token_count
        ttft_s = now - self._dispatched_s.pop(request_id)
        if self.ttft_s is None:
            self.ttft_s = ttft_s
        else:
            self.ttft_s += _TTFT_SMOOTHING * (ttft_s - self.ttft_s)

    def finished(self, request_id: str) -> None:
        """Note a request's end."""
        self.context_token_count -= self._answers.pop(request_id)

    def backlog(self) -> Backlog:
        """Return the prefill of all requests without a first token, none of it done."""
        return Backlog(self.uncached_token_count, self._token_pairs)

    def exact_backlog(self, started_count: int, queued_token_count: int) -> Backlog:
        """Return the prefill that is left, from what the engine says of it.

        Args:
            started_count: Requests whose prefill began: the oldest.
            queued_token_count: Tokens that the engine has to prefill; of requests
                that it has not admitted it counts the whole prompt.
        """
        started = list(islice(self._prefills.values(), started_count))
        uncached = self.uncached_token_count - sum(each.uncached_token_count for each in started)
        pairs = self._token_pairs - sum(each.token_pairs for each in started)
        waiting_token_count = self._prompt_token_count - sum(each.prompt_token_count for each in started)
        rest = max(0, queued_token_count - waiting_token_count)
        # Only the last of those that began can be partly done after the step in progress.
        last = min(rest, started[-1].uncached_token_count) if started else 0
        if started:
            pairs += token_pairs(last, started[-1].prompt_token_count)
        # What is more than that is of requests that lost their blocks and start again.
        again = rest - last
        return Backlog(uncached + last + again, pairs + token_pairs(again, again))

    def prefill_duty(self, now: float) -> float:
        """Return the share of the last seconds in which there was something to prefill (mean age 5 s)."""
        self._advance_duty(now)
        return self._duty

    def _advance_duty(self, now: float) -> None:
        kept = math.exp((self._duty_s - now) / _DUTY_TIME_CONSTANT_S)
        self._duty = kept * self._duty + (1.0 - kept) * bool(self._prefills)
        self._duty_s = now
