"""What a request that ran to its end teaches."""

from __future__ import annotations

from sagecp.core.events import AttemptSucceeded
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.request import RequestRecord


def learn_output(book: PredictionBook, record: RequestRecord, event: AttemptSucceeded, now: float) -> None:
    """Learn how long answers are, and how right the predictions were.

    Of a request that went on after another attempt's output, times are of the last attempt alone.
    """
    metadata = record.metadata
    choices = metadata.choice_count
    earlier = record.output_token_count
    expected = (record.expected_output_token_count + earlier) / choices
    accuracy = book.accuracy
    accuracy.record("output_tokens", expected, event.output_token_count / choices)
    book.output_lengths.observe(
        metadata.tenant_id,
        metadata.max_tokens,
        record.prompt_token_count - earlier,
        round(event.output_token_count / choices),
    )
    if record.dispatch_s is None or record.attempt_first_token_s is None:
        return
    tokens = (event.output_token_count - earlier) / choices
    if tokens > 1:
        tpot_s = (now - record.attempt_first_token_s) / (tokens - 1)
        accuracy.record("tpot", record.predicted_tpot_s, tpot_s)
    predicted_s = record.predicted_ttft_s + record.predicted_tpot_s * max(
        0.0, record.expected_output_token_count / choices - 1
    )
    accuracy.record("latency", predicted_s, now - record.dispatch_s)
