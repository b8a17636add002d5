"""Predictions for a placement are those of the step-time formulas, to the last bit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT, Prediction, predict
from sagecp.core.prediction.step_time import StepTimeParameters
from tests.support.placement_rows import candidate_row, request_row

_seconds = st.floats(0.0, 1e-2)
_step_times = st.builds(
    StepTimeParameters,
    overhead_s=st.floats(1e-6, 1e-2),
    memory_base_s=_seconds,
    memory_per_token_s=st.floats(0.0, 1e-4),
    compute_base_s=_seconds,
    compute_per_token_s=st.floats(0.0, 1e-3),
    context_per_token_s=st.floats(0.0, 1e-6),
    attention_per_token_pair_s=st.floats(0.0, 1e-8),
)


@given(
    step=_step_times,
    prompt=st.integers(1, 200_000),
    cached=st.integers(0, 200_000),
    decodes=st.one_of(st.integers(0, 300), st.integers(2040, 2060)),
    context=st.floats(0.0, 1e6),
    backlog_s=st.floats(0.0, 100.0),
    share=st.floats(0.0, 1.0),
    factors=st.tuples(st.floats(0.02, 50.0), st.floats(0.02, 50.0)),
)
def test_what_is_written_out_equals_the_formulas(
    step: StepTimeParameters,
    prompt: int,
    cached: int,
    decodes: int,
    context: float,
    backlog_s: float,
    share: float,
    factors: tuple[float, float],
) -> None:
    row = candidate_row(
        step_time=step,
        cached_token_count=cached,
        decode_count=decodes,
        context_token_count=context,
        backlog_s=backlog_s,
        prefill_share=share,
        ttft_factor=factors[0],
        tpot_factor=factors[1],
    )
    uncached = max(1, prompt - cached)
    decode_step_s = step.decode_step_s(decodes + 1, context + prompt)
    own_s = step.prefill_s(uncached, prompt, decodes, context, BATCH_TOKEN_COUNT)
    ttft_s = backlog_s + ((decode_step_s / 2 if decodes else 0.0) + own_s) * factors[0]
    tpot_s = decode_step_s
    if share > 0.0:
        tpot_s = 1.0 / (share / step.step_s(BATCH_TOKEN_COUNT, context) + (1.0 - share) / decode_step_s)
    work_s = step.work_s(uncached, prompt, BATCH_TOKEN_COUNT) * factors[0]
    expected = Prediction(ttft_s, tpot_s * factors[1], work_s)
    assert predict(request_row(prompt_token_count=prompt), row) == expected
