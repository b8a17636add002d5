"""A request inside the core: what was asked, and where it is in its life."""

from __future__ import annotations

from sagecp.core.states import REQUEST_TRANSITIONS, StateMachine
from sagecp.core.types import RequestMetadata, RequestState, SchedulingDecision

# Without a tokenizer: four bytes of text make about one token in English prose
# and code with current vocabularies.
BYTES_PER_TOKEN = 4
DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT = 256


def estimate_prompt_token_count(metadata: RequestMetadata) -> int:
    """Return how many tokens the prompt probably has, at least 1; exact for token ids."""
    if metadata.prompt_token_ids:
        return len(metadata.prompt_token_ids)
    return max(1, payload_size_bytes(metadata) // BYTES_PER_TOKEN)


def payload_size_bytes(metadata: RequestMetadata) -> int:
    """Return roughly how many bytes the prompt holds in memory, for queue bounds."""
    size = len(metadata.openai_body) + 8 * len(metadata.prompt_token_ids)
    if metadata.prompt is not None:
        size += len(metadata.prompt)
    for message in metadata.messages:
        content = message.get("content")
        # Parts may hold images as data URLs; their text form is close to their size.
        size += len(content) if isinstance(content, str) else len(str(content))
    if metadata.tools:
        # Chat templates write them into the prompt.
        size += len(str(metadata.tools))
    return size


class RequestRecord:
    """One live request. Only the scheduler changes it; everything else reads.

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
        dispatch_s: Start of the present or last attempt.
        first_token_s: When the first output came.
        decisions: One receipt per dispatch.
    """

    __slots__ = (
        "arrival_s",
        "deadline_s",
        "decisions",
        "delivered",
        "dispatch_s",
        "epoch",
        "excluded_instance_ids",
        "expected_output_token_count",
        "expire_s",
        "first_token_s",
        "instance_id",
        "machine",
        "metadata",
        "model",
        "prompt_token_count",
        "queue_ticket",
        "sequence",
        "size_bytes",
    )

    def __init__(self, metadata: RequestMetadata, model: str, sequence: int, arrival_s: float) -> None:
        self.metadata = metadata
        self.model = model
        self.sequence = sequence
        self.arrival_s = arrival_s
        self.deadline_s = (
            arrival_s + metadata.slo_deadline_ms / 1000.0 if metadata.slo_deadline_ms is not None else None
        )
        self.expire_s = self.deadline_s
        self.size_bytes = payload_size_bytes(metadata)
        self.prompt_token_count = estimate_prompt_token_count(metadata)
        per_choice = metadata.max_tokens or DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT
        self.expected_output_token_count = metadata.choice_count * min(
            per_choice, DEFAULT_EXPECTED_OUTPUT_TOKEN_COUNT
        )
        self.epoch = 0
        self.instance_id = ""
        self.excluded_instance_ids: set[str] = set()
        self.delivered = False
        self.dispatch_s: float | None = None
        self.first_token_s: float | None = None
        self.decisions: list[SchedulingDecision] = []
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

    @property
    def expected_token_count(self) -> int:
        """Tokens that the request is expected to hold in a KV cache at its end."""
        return self.prompt_token_count + self.expected_output_token_count
