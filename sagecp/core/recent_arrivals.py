"""The last arrivals and what became of them, in bounded memory and without their prompts."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from sagecp.core.policy_replay import ReplayArrival
from sagecp.core.request import RequestRecord
from sagecp.core.types import RequestState

ARRIVAL_LIMIT = 2048
"""Most arrivals that are remembered: the bound on memory, and on what a replay costs."""
# Blocks of a prompt that are remembered: 131,072 tokens in blocks of the core's own digests.
_BLOCK_LIMIT = 512
_WAIT_S = 0.1


class _Seen:
    """One arrival; its record while it is live, and what became of it afterwards."""

    __slots__ = (
        "arrival_s",
        "block_hashes",
        "block_token_count",
        "failed",
        "metadata_names",
        "missed",
        "model",
        "output_token_count",
        "priority",
        "prompt_token_count",
        "record",
        "request_id",
        "stated",
        "tpot_objective_s",
        "ttft_objective_s",
        "waited",
    )

    def __init__(self, record: RequestRecord, now: float) -> None:
        metadata = record.metadata
        # Not the metadata: they hold the prompt.
        self.record: RequestRecord | None = record
        self.request_id = metadata.request_id
        self.arrival_s = now
        self.model = record.model
        self.priority = metadata.priority
        self.metadata_names = (metadata.tenant_id, metadata.session_id, metadata.user_id)
        self.stated = (metadata.max_tokens, metadata.slo_deadline_ms, metadata.cost_budget)
        self.prompt_token_count = record.prompt_token_count
        self.block_hashes = record.digest.block_hashes[:_BLOCK_LIMIT]
        self.block_token_count = record.digest.block_token_count
        self.ttft_objective_s = record.ttft_objective_s
        self.tpot_objective_s = record.tpot_objective_s
        # Per choice; negative: expected, not known.
        self.output_token_count = -record.expected_output_token_count / metadata.choice_count
        self.waited = False
        self.missed = False
        self.failed = False

    def look(self, now: float) -> None:
        """Take in how a live request does."""
        record = self.record
        if record is None:
            return
        started_s = now if record.queued or record.dispatch_s is None else record.dispatch_s
        if started_s - self.arrival_s > _WAIT_S:
            self.waited = True
        first_s = now if record.first_token_s is None else record.first_token_s
        if first_s - self.arrival_s > self.ttft_objective_s:
            self.missed = True

    def end(self, state: RequestState, now: float, output_token_count: int | None) -> None:
        """Take in how a request ended, and let go of it."""
        record = self.record
        if record is None:
            return
        if state is RequestState.FAILED:
            # An engine refused or lost it: no order of the queue would have served it.
            self.failed = True
        elif state is not RequestState.CANCELLED:
            self.look(now)
            self.missed = self.missed or state is not RequestState.SUCCEEDED
        if output_token_count is not None:
            self.output_token_count = output_token_count / record.metadata.choice_count
            if record.first_token_s is not None and self.output_token_count > 1:
                tpot_s = (now - record.first_token_s) / (self.output_token_count - 1)
                self.missed = self.missed or tpot_s > self.tpot_objective_s
        self.record = None

    def as_arrival(self, begin_s: float, block_token_count: int) -> ReplayArrival:
        """Return it for a replay; without its blocks where they have another size."""
        tenant_id, session_id, user_id = self.metadata_names
        max_tokens, deadline_ms, budget_usd = self.stated
        return ReplayArrival(
            arrival_s=self.arrival_s - begin_s,
            model=self.model,
            tenant_id=tenant_id,
            session_id=session_id,
            user_id=user_id,
            priority=self.priority,
            prompt_token_count=self.prompt_token_count,
            block_hashes=self.block_hashes if self.block_token_count == block_token_count else (),
            output_token_count=max(1, math.ceil(abs(self.output_token_count))),
            output_known=self.output_token_count >= 0,
            max_tokens=max_tokens,
            ttft_objective_s=self.ttft_objective_s,
            tpot_objective_s=self.tpot_objective_s,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000.0,
            cost_budget_usd=budget_usd,
        )


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """How the requests of a window did so far.

    Attributes:
        waited_share: Those that did not start within a tenth of a second.
        missed_share: Those that missed an objective, or will.
        has_classes: There are several classes among them.
    """

    request_count: int
    waited_share: float
    missed_share: float
    has_classes: bool


class RecentArrivals:
    """A bounded memory of arrivals.

    Args:
        kept_s: How long they are remembered.

    Attributes:
        stride: One in so many arrivals is remembered.
    """

    def __init__(self, kept_s: float) -> None:
        self.stride = 1
        self._kept_s = kept_s
        self._count = 0
        self._seen: deque[_Seen] = deque()
        self._live: dict[str, _Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def begin_s(self) -> float:
        """When the oldest that is remembered arrived, on the core's clock; there must be one."""
        return self._seen[0].arrival_s

    @property
    def block_token_count(self) -> int:
        """Tokens in a block of the newest one's prompt; there must be one."""
        return self._seen[-1].block_token_count

    def note_arrival(self, record: RequestRecord, now: float) -> None:
        """A request arrived, with its objectives and its expected output."""
        self._count += 1
        if self._count % self.stride:
            return
        self.forget_old(now)
        if len(self._seen) >= ARRIVAL_LIMIT:
            self._forget_oldest()
        entry = _Seen(record, now)
        self._seen.append(entry)
        self._live[entry.request_id] = entry

    def note_refused(self, request_id: str) -> None:
        """A request was refused, perhaps after it was noted: then it missed its objectives."""
        entry = self._live.pop(request_id, None)
        if entry is not None:
            entry.missed, entry.record = True, None

    def note_end(
        self, record: RequestRecord, state: RequestState, now: float, output_token_count: int | None
    ) -> None:
        """A request ended. ``output_token_count``: over all choices, if it ran to its end."""
        entry = self._live.get(record.request_id)
        if entry is not None and entry.record is record:
            del self._live[record.request_id]
            entry.end(state, now, output_token_count)

    def forget_old(self, now: float) -> None:
        """Let go of those that are too old."""
        oldest_s = now - self._kept_s
        while self._seen and self._seen[0].arrival_s < oldest_s:
            self._forget_oldest()

    def sample(self, stride: int) -> None:
        """Remember one in so many arrivals from now on, and nothing of before.

        A window of two densities would be a load that never was.
        """
        self.stride = stride
        self._seen.clear()
        self._live.clear()

    def figures(self, from_s: float, now: float) -> WindowFigures:
        """Return how those did that arrived since a time."""
        window = [entry for entry in self._seen if entry.arrival_s >= from_s and not entry.failed]
        for entry in window:
            entry.look(now)
        count = len(window)
        return WindowFigures(
            request_count=count,
            waited_share=sum(entry.waited for entry in window) / max(1, count),
            missed_share=sum(entry.missed for entry in window) / max(1, count),
            has_classes=len({entry.priority for entry in window}) > 1,
        )

    def for_replay(self) -> tuple[ReplayArrival, ...]:
        """Return all that did not fail, the first at time 0.

        Prompts whose blocks have another size than the newest one's are without content.
        """
        begin_s, size = self.begin_s, self.block_token_count
        return tuple(entry.as_arrival(begin_s, size) for entry in self._seen if not entry.failed)

    def _forget_oldest(self) -> None:
        entry = self._seen.popleft()
        if self._live.get(entry.request_id) is entry:
            del self._live[entry.request_id]
