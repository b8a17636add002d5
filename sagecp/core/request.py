"""A request inside the core: what was asked, and where it is in its life."""

from __future__ import annotations

import math

from sagecp.core.prediction.cost import CostBasis, CostQuantiles
from sagecp.core.prompt_digest import digest_prompt
from sagecp.core.prompt_size import payload_size_bytes
from sagecp.core.states import REQUEST_TRANSITIONS, StateMachine
from sagecp.core.types import RequestMetadata, RequestState, SchedulingDecision

DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT = 256
_NOTHING: frozenset[str] = frozenset()


class RequestRecord:
    """One live request. Only the scheduler changes it; everything else reads.

    Args:
        metadata: As below.
        model: As below.
        sequence: As below.
        arrival_s: As below.
        size_bytes: As below, where it is known already; ``None``: it is looked up.

    Attributes:
        metadata: What was asked.
        model: The served name it waits for (filled in when the caller named none).
        sequence: Order of arrival, unique.
        arrival_s: When it arrived, on the core's clock.
        deadline_s: When it expires wherever it is, on the core's clock; ``None``: never.
        expire_s: When it expires if nothing changes: its deadline, or else the
            end of its longest wait while it is queued; ``None``: never.
        size_bytes: What it counts in the queue's byte bound.
        prompt_token_count: Estimate, exact for token ids.
        expected_output_token_count: Estimate over all choices.
        epoch: Number of the present or last attempt; 0 before the first.
        instance_id: Where the present or last attempt runs; ``""`` before.
        excluded_instance_ids: Instances that lost an attempt of this request.
        delivered: Whether any output came from the present attempt.
        output_token_count: Tokens that lost attempts produced and the next one goes on after.
        has_output: Whether any attempt produced any output.
        lost_attempt_count: Attempts lost, but for those that were moved on purpose.
        engine_kill_count: Engines that died while they began to work on it.
        dispatch_s: Start of the present or last attempt.
        first_token_s: When the first output came.
        attempt_first_token_s: Likewise, of the present attempt; ``None``: none yet.
        decisions: One receipt per dispatch.
        digest: Length and content of the prompt.
        work_s: Predicted engine seconds of the prompt.
        ttft_objective_s: From arrival to the first token; the default where none is stated.
        tpot_objective_s: Likewise, between tokens.
        demoted: Its objective is out of reach: it runs when there is time to spare.
        waits_for: The busy instance that it waits for; ``""``: any.
        wait_until_s: Until when.
        cost_s: Engine seconds that its running attempt will probably cost; 0 while none runs.
        pinned_block_count: Leading blocks of its digest that its running attempt holds in the prefix index.
        prefix_generation: Of the cache that it holds them in.
        predicted_ttft_s: At the present or last dispatch, from then on.
        predicted_tpot_s: Likewise.
        cost_basis: What its cost was predicted from at the present or last dispatch; ``None``: no
            price was known.
        predicted_cost: What was predicted from that, once it has ended and somebody asked.
        spent_usd: What attempts that are over cost; ``None``: no price is known.
    """

    __slots__ = (
        "arrival_s",
        "attempt_first_token_s",
        "cost_basis",
        "cost_s",
        "deadline_s",
        "decisions",
        "delivered",
        "demoted",
        "digest",
        "dispatch_s",
        "engine_kill_count",
        "epoch",
        "excluded_instance_ids",
        "expected_output_token_count",
        "expire_s",
        "first_token_s",
        "has_output",
        "instance_id",
        "lost_attempt_count",
        "machine",
        "metadata",
        "model",
        "output_token_count",
        "pinned_block_count",
        "predicted_cost",
        "predicted_tpot_s",
        "predicted_ttft_s",
        "prefix_generation",
        "prompt_token_count",
        "queue_ticket",
        "sequence",
        "size_bytes",
        "spent_usd",
        "tpot_objective_s",
        "ttft_objective_s",
        "wait_until_s",
        "waits_for",
        "work_s",
    )

    def __init__(
        self,
        metadata: RequestMetadata,
        model: str,
        sequence: int,
        arrival_s: float,
        size_bytes: int | None = None,
    ) -> None:
        self.metadata = metadata
        self.model = model
        self.sequence = sequence
        self.arrival_s = arrival_s
        self.deadline_s = (
            arrival_s + metadata.slo_deadline_ms / 1000.0 if metadata.slo_deadline_ms is not None else None
        )
        self.expire_s = self.deadline_s
        self.size_bytes = payload_size_bytes(metadata) if size_bytes is None else size_bytes
        self.digest = metadata.prompt_digest or digest_prompt(metadata, model)
        self.prompt_token_count = self.digest.token_count
        per_choice = metadata.max_tokens or DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT
        self.expected_output_token_count = metadata.choice_count * min(
            per_choice, DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT
        )
        self.epoch = 0
        self.instance_id = ""
        # Replaced rather than changed: few requests ever need one of their own.
        self.excluded_instance_ids = _NOTHING
        self.delivered = False
        self.output_token_count = 0
        self.has_output = False
        self.lost_attempt_count = 0
        self.engine_kill_count = 0
        self.dispatch_s: float | None = None
        self.first_token_s: float | None = None
        self.attempt_first_token_s: float | None = None
        self.decisions: list[SchedulingDecision] = []
        self.work_s = 0.0
        self.ttft_objective_s = math.inf
        self.tpot_objective_s = math.inf
        self.demoted = False
        self.waits_for = ""
        self.wait_until_s = -math.inf
        self.cost_s = 0.0
        self.pinned_block_count = 0
        self.prefix_generation = 0
        self.predicted_ttft_s = 0.0
        self.predicted_tpot_s = 0.0
        self.cost_basis: CostBasis | None = None
        self.predicted_cost: CostQuantiles | None = None
        self.spent_usd: float | None = None
        # Set by the queue, 0 outside of it; lets it delete lazily.
        self.queue_ticket = 0
        self.machine = StateMachine(
            f"request {metadata.request_id!r}", RequestState.QUEUED, REQUEST_TRANSITIONS
        )

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.metadata.request_id

    @property
    def state(self) -> RequestState:
        """Where it is in its life."""
        return self.machine.state

    @property
    def queued(self) -> bool:
        """Whether it waits in the queue."""
        return self.queue_ticket != 0

    def go_on_after(self, output_token_count: int, now: float) -> None:
        """Expect the next attempt to be given the output there is, as part of its prompt.

        The reader waits for the next token as it did for the first.
        """
        new = output_token_count - self.output_token_count
        self.output_token_count = output_token_count
        self.prompt_token_count += new
        self.expected_output_token_count = max(1, self.expected_output_token_count - new)
        self.ttft_objective_s += max(0.0, now - self.arrival_s)
        self.demoted = False

    @property
    def expected_token_count(self) -> int:
        """Tokens that the request is expected to hold in a KV cache at its end."""
        return self.prompt_token_count + self.expected_output_token_count
