"""Engine time is shared completely, by what each request causes, and never more than there was."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.engine_time import EngineTimeMeter
from sagecp.core.prediction.step_time import StepTimeParameters
from tests.support.core_world import STEP_TIME

FREE = StepTimeParameters(**dict.fromkeys((f.name for f in dataclasses.fields(STEP_TIME)), 0.0))


def begin(
    meter: EngineTimeMeter,
    request_id: str,
    now: float,
    *,
    prompt: int = 1000,
    cached: int = 0,
    output: float = 100.0,
    choices: int = 1,
    step: StepTimeParameters = STEP_TIME,
) -> None:
    uncached = max(1, prompt - cached)
    meter.begin(request_id, prompt, cached, output, choices, step.work_s(uncached, prompt), step, now)


def decoded(meter: EngineTimeMeter, *requests: tuple[str, int], seconds: float = 10.0) -> dict[str, float]:
    """Let requests with these prompts decode side by side; return what the decodes cost each."""
    for request_id, prompt in requests:
        begin(meter, request_id, 0.0, prompt=prompt)
    for request_id, _ in requests:
        meter.note_first_token(request_id, 0.0)
    return {request_id: meter.end(request_id, seconds) for request_id, _ in requests}


def test_who_is_alone_pays_for_everything() -> None:
    meter = EngineTimeMeter(3600.0, 5.0)
    begin(meter, "a", 10.0)
    meter.note_first_token("a", 10.5)
    assert meter.spent_s("a", 11.0) == pytest.approx(1.0)
    assert meter.end("a", 12.0) == pytest.approx(2.0)
    assert (meter.busy_s(20.0), meter.idle_s(20.0)) == (2.0, 13.0)
    assert (meter.busy_usd(20.0), meter.idle_usd(20.0)) == (2.0, 13.0)
    assert meter.end("a", 20.0) == 0.0, "it is over"


def test_equal_requests_pay_equal_parts() -> None:
    spent = decoded(EngineTimeMeter(1.0, 0.0), ("a", 1000), ("b", 1000))
    assert spent["a"] == pytest.approx(5.0)
    assert spent["b"] == pytest.approx(5.0)


def test_a_longer_context_costs_what_reading_it_takes() -> None:
    spent = decoded(EngineTimeMeter(1.0, 0.0), ("short", 1000), ("long", 50_000))
    assert sum(spent.values()) == pytest.approx(10.0)
    linear_s = STEP_TIME.overhead_s + STEP_TIME.memory_base_s + 2 * STEP_TIME.memory_per_token_s
    reading_s = {name: STEP_TIME.context_per_token_s * (prompt + 50) for name, prompt in
                 (("short", 1000), ("long", 50_000))}  # fmt: skip
    whole_s = linear_s + sum(reading_s.values())
    for name, own_s in reading_s.items():
        assert spent[name] == pytest.approx(10.0 * (linear_s / 2 + own_s) / whole_s)


def test_several_choices_are_several_decodes() -> None:
    meter = EngineTimeMeter(1.0, 0.0)
    begin(meter, "one", 0.0)
    begin(meter, "three", 0.0, choices=3)
    for request_id in ("one", "three"):
        meter.note_first_token(request_id, 0.0)
    three_s = meter.end("three", 8.0)
    assert three_s == pytest.approx(6.0)
    assert meter.end("one", 8.0) == pytest.approx(2.0)


def test_prompts_that_are_done_together_pay_by_their_work_and_cached_tokens_are_none() -> None:
    meter = EngineTimeMeter(1.0, 0.0)
    begin(meter, "new", 0.0, prompt=2000)
    begin(meter, "cached", 0.0, prompt=2000, cached=1900)
    for request_id in ("new", "cached"):
        meter.note_first_token(request_id, 1.0)
    new_s, cached_s = meter.end("new", 1.0), meter.end("cached", 1.0)
    assert new_s + cached_s == pytest.approx(1.0)
    assert new_s / cached_s == pytest.approx(STEP_TIME.work_s(2000, 2000) / STEP_TIME.work_s(100, 2000))


def test_a_prompt_does_not_pay_for_those_behind_it() -> None:
    meter = EngineTimeMeter(1.0, 0.0)
    work_s = STEP_TIME.work_s(10_000, 10_000)
    for request_id in ("first", "second"):
        begin(meter, request_id, 0.0, prompt=10_000)
    meter.note_first_token("first", work_s)
    assert meter.end("first", work_s) == pytest.approx(work_s)
    meter.note_first_token("second", 2 * work_s)
    assert meter.end("second", 2 * work_s) == pytest.approx(work_s)


def test_decodes_beside_a_prompt_pay_for_their_tokens_only() -> None:
    meter = EngineTimeMeter(1.0, 0.0)
    begin(meter, "decode", 0.0)
    meter.note_first_token("decode", 0.0)
    begin(meter, "prompt", 0.0, prompt=20_000)
    meter.note_first_token("prompt", 1.0)
    prompt_s, decode_s = meter.end("prompt", 1.0), meter.end("decode", 1.0)
    assert prompt_s + decode_s == pytest.approx(1.0)
    assert 0.0 < decode_s < 0.01


def test_a_lost_attempt_costs_what_was_done_for_it() -> None:
    meter = EngineTimeMeter(1.0, 0.0)
    work_s = STEP_TIME.work_s(10_000, 10_000)
    for request_id in ("first", "second"):
        begin(meter, request_id, 0.0, prompt=10_000)
    assert meter.end("second", work_s / 2) == 0.0, "its turn had not come"
    assert meter.end("first", work_s / 2) == pytest.approx(work_s / 2)
    begin(meter, "third", 1.0)
    meter.note_first_token("third", 1.25)
    assert meter.end("third", 1.5) == pytest.approx(0.5)


def test_a_price_counts_from_when_it_is_in_force() -> None:
    meter = EngineTimeMeter(3600.0, 0.0)
    begin(meter, "a", 1.0)
    meter.set_price(7200.0, 2.0)
    meter.end("a", 3.0)
    meter.set_price(0.0, 4.0)
    assert meter.busy_usd(9.0) == pytest.approx(1.0 + 2.0)
    assert meter.idle_usd(9.0) == pytest.approx(1.0 + 2.0)


def test_reading_changes_nothing() -> None:
    meters = [EngineTimeMeter(1.0, 0.0) for _ in range(2)]
    spent = []
    for meter in meters:
        begin(meter, "a", 0.0)
        meter.note_first_token("a", 0.3)
        begin(meter, "b", 0.5)
        if meter is meters[0]:
            for now in (0.6, 0.7):
                meter.spent_s("a", now)
                meter.busy_usd(now)
        meter.note_first_token("b", 0.9)
        spent.append((meter.end("a", 1.0), meter.end("b", 1.1)))
    assert spent[0] == spent[1]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("begin", "first", "end")),
        st.integers(0, 5),
        st.floats(0.0, 3.0),
        st.integers(1, 60_000),
        st.floats(0.0, 1.0),
        st.integers(1, 3),
    ),
    max_size=60,
)


@given(steps=STEPS, parameters=st.sampled_from((STEP_TIME, FREE)))
def test_the_shares_are_the_busy_time(
    steps: list[tuple[str, int, float, int, float, int]], parameters: StepTimeParameters
) -> None:
    """Whatever happens: no share is negative, none shrinks, and together they are no more than there was."""
    meter = EngineTimeMeter(2.0, 0.0)
    now, spent_s, unused = 0.0, 0.0, False
    shown: dict[str, float] = {}
    has_token: set[str] = set()
    for what, number, pause_s, prompt, cached_share, choices in steps:
        now += pause_s
        name = f"r{number}"
        for each, before_s in shown.items():
            shown[each] = meter.spent_s(each, now)
            assert shown[each] >= before_s - 1e-9
        if what == "begin" and name not in shown:
            begin(
                meter, name, now, prompt=prompt, cached=int(cached_share * prompt), choices=choices,
                step=parameters,
            )  # fmt: skip
            shown[name] = 0.0
        elif what == "first" and name in shown:
            meter.note_first_token(name, now)
            has_token.add(name)
        elif what == "end" and name in shown:
            own_s = meter.end(name, now)
            assert own_s >= shown.pop(name) - 1e-9
            unused = unused or name not in has_token
            has_token.discard(name)
            spent_s += own_s
            assert spent_s <= meter.busy_s(now) + 1e-6
    for name in list(shown):
        meter.note_first_token(name, now)
        spent_s += meter.end(name, now)
    assert meter.busy_s(now) + meter.idle_s(now) == pytest.approx(now)
    assert spent_s <= meter.busy_s(now) + 1e-6
    if not unused:
        # Nothing ended before its first token: all of it was somebody's.
        assert spent_s == pytest.approx(meter.busy_s(now), abs=1e-6)


@given(
    prompts=st.tuples(st.integers(1, 50_000), st.integers(1, 50_000)),
    durations_s=st.tuples(st.floats(0.1, 100.0), st.floats(0.1, 100.0)),
)
def test_more_tokens_never_cost_less(prompts: tuple[int, int], durations_s: tuple[float, float]) -> None:
    """Of two that began together, the longer prompt and the longer answer pay more."""
    (short_prompt, long_prompt), (short_s, long_s) = sorted(prompts), sorted(durations_s)
    meter = EngineTimeMeter(1.0, 0.0)
    begin(meter, "less", 0.0, prompt=short_prompt)
    begin(meter, "more", 0.0, prompt=long_prompt)
    for request_id in ("less", "more"):
        meter.note_first_token(request_id, 0.5)
    less_s = meter.end("less", 0.5 + short_s)
    assert meter.end("more", 0.5 + long_s) >= less_s - 1e-9
