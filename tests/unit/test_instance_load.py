"""What an instance has to do, by estimate: against arithmetic, and against a simulated engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest

from sagecp.core.instance_load import PREFILL_SHARE_TIME_S
from sagecp.sim.profiles import get_profile
from tests.support.core_world import STEP_TIME, make_load
from tests.support.load_rig import Job, LoadRig, Seen, known, poisson

BATCH = 2048
MIXED_PROMPTS = [200, 800, 1500, 3000, 6000]
SHORT_PROMPTS = [20, 50, 100]
OUTPUTS = [20, 100, 200, 300]
CONSTANTS = (
    "overhead_s",
    "memory_base_s",
    "memory_per_token_s",
    "compute_base_s",
    "compute_per_token_s",
    "context_per_token_s",
    "attention_per_token_pair_s",
)


def prefill_s(tokens: int, decodes: int = 0, context: float = 0.0) -> float:
    return STEP_TIME.prefill_s(tokens, tokens, decodes, context, BATCH)


# -- backlog -----------------------------------------------------------------------------


def test_an_idle_instance_has_nothing_to_do() -> None:
    load = make_load()
    assert load.backlog_s(5.0) == 0.0
    assert load.context_token_count(5.0) == load.produced_token_count(5.0) == 0.0
    assert load.prefill_share(5.0) == 0.0
    assert (load.decode_count, load.prefill_count) == (0, 0)


def test_the_backlog_is_the_prefill_work_before_it_and_shrinks_with_time() -> None:
    load = make_load()
    load.note_dispatch("a", 4000, 0, 1.0)
    assert load.backlog_s(1.0) == pytest.approx(prefill_s(4000))
    assert load.backlog_s(1.05) == pytest.approx(prefill_s(4000) - 0.05)
    load.note_dispatch("b", 2000, 0, 1.05)
    assert load.backlog_s(1.05) == pytest.approx(prefill_s(4000) - 0.05 + prefill_s(2000))
    assert load.prefill_count == 2


def test_what_is_cached_is_no_work() -> None:
    load = make_load()
    load.note_dispatch("a", 4000, 3000, 0.0)
    assert load.backlog_s(0.0) == pytest.approx(STEP_TIME.prefill_s(1000, 4000, 0, 0.0, BATCH))
    load.note_dispatch("b", 4000, 4000, 0.0)
    # The last token is always computed.
    extra_s = STEP_TIME.prefill_s(1, 4000, 0, 0.0, BATCH)
    assert load.backlog_s(0.0) == pytest.approx(STEP_TIME.prefill_s(1000, 4000, 0, 0.0, BATCH) + extra_s)


@pytest.mark.parametrize("late_s", [-0.05, 0.0, 0.1])
def test_a_first_token_corrects_what_was_expected(late_s: float) -> None:
    load = make_load()
    load.note_dispatch("a", 4000, 0, 0.0)
    load.note_dispatch("b", 2000, 0, 0.0)
    now = prefill_s(4000) + late_s
    load.note_first_token("a", now)
    assert load.backlog_s(now) == pytest.approx(prefill_s(2000))
    assert (load.decode_count, load.prefill_count) == (1, 1)


def test_overdue_work_is_expected_to_take_as_long_again() -> None:
    load = make_load()
    load.note_dispatch("a", 4000, 0, 0.0)
    due_s = prefill_s(4000)
    assert load.backlog_s(due_s) == pytest.approx(0.0)
    assert load.backlog_s(due_s + 3.0) == pytest.approx(3.0)
    load.note_dispatch("b", 2000, 0, due_s + 3.0)
    assert load.backlog_s(due_s + 3.0) == pytest.approx(3.0 + prefill_s(2000))
    load.note_first_token("a", due_s + 4.0)
    assert load.backlog_s(due_s + 4.0) == pytest.approx(prefill_s(2000))


@pytest.mark.parametrize("end", ["first token", "end"])
def test_nothing_is_left_when_all_prefills_are_done_or_given_up(end: str) -> None:
    load = make_load()
    load.note_dispatch("a", 4000, 0, 0.0)
    if end == "end":
        load.note_end("a", 0.0, 0.1, learn=False)
        assert load.decode_count == 0
    else:
        load.note_first_token("a", 0.1)
    assert load.backlog_s(0.1) == load.backlog_s(100.0) == 0.0
    assert load.prefill_count == 0


def test_a_prefill_that_is_given_up_makes_room_for_the_next() -> None:
    load = make_load()
    load.note_dispatch("a", 60_000, 0, 0.0)
    load.note_dispatch("b", 2000, 0, 0.0)
    load.note_end("a", 0.0, 0.5, learn=False)
    assert load.backlog_s(0.5) == pytest.approx(prefill_s(2000))


def test_decodes_slow_prefills_down() -> None:
    load = make_load()
    now = 0.0
    for number in range(32):
        load.note_dispatch(f"d{number}", 1000, 0, now)
        # Exactly as predicted.
        now += load.backlog_s(now)
        load.note_first_token(f"d{number}", now)
    context = load.context_token_count(now)
    load.note_dispatch("a", 4000, 0, now)
    half_step_s = STEP_TIME.decode_step_s(32, context) / 2
    assert load.backlog_s(now) == pytest.approx(half_step_s + prefill_s(4000, 32, context), rel=0.02)
    assert load.backlog_s(now) > 1.03 * prefill_s(4000)


def test_news_of_strangers_is_no_news() -> None:
    load = make_load()
    load.note_first_token("nobody", 1.0)
    load.note_end("nobody", 5.0, 2.0, learn=True)
    assert (load.decode_count, load.prefill_count) == (0, 0)
    assert load.kind.model.observation_count == 0


# -- what decodes hold -------------------------------------------------------------------


def test_context_grows_by_a_token_per_step_and_request() -> None:
    load = make_load()
    load.note_dispatch("a", 1000, 0, 0.0)
    load.note_first_token("a", 1.0)
    assert load.context_token_count(1.0) == pytest.approx(1000.0)
    step_s = STEP_TIME.decode_step_s(1, 1000.0)
    assert load.context_token_count(3.0) == pytest.approx(1000.0 + 2.0 / step_s, rel=0.02)
    assert load.produced_token_count(3.0) == pytest.approx(2.0 / step_s, rel=0.02)


def test_what_ends_is_held_no_more() -> None:
    load = make_load()
    for name in "ab":
        load.note_dispatch(name, 1000, 0, 0.0)
        load.note_first_token(name, 1.0)
    produced = load.produced_token_count(2.0) / 2
    load.note_end("a", produced, 2.0, learn=False)
    assert load.context_token_count(2.0) == pytest.approx(1000.0 + produced)
    load.note_end("b", produced, 2.0, learn=False)
    # Estimates do not pile up.
    assert load.context_token_count(2.0) == 0.0


def test_what_is_left_is_what_the_others_hold_whatever_was_said_of_one() -> None:
    load = make_load()
    for name in "ab":
        load.note_dispatch(name, 10, 0, 0.0)
        load.note_first_token(name, 0.1)
    held = load.context_token_count(0.2)
    load.note_end("a", 1e6, 0.2, learn=False)
    assert load.context_token_count(0.2) == pytest.approx(held / 2)


# -- the share of prefill ------------------------------------------------------------------


def test_the_share_of_prefill_rises_while_there_is_some_and_falls_without() -> None:
    load = make_load()
    load.note_dispatch("a", 100_000, 0, 0.0)
    shares = [load.prefill_share(time_s) for time_s in (0.0, 1.0, 3.0, 5.0)]
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < 0.1
    assert shares[-1] == pytest.approx(1.0 - 2.718281828**-1.0, rel=0.01)
    load.note_first_token("a", 5.0)
    assert load.prefill_share(5.0 + PREFILL_SHARE_TIME_S) == pytest.approx(shares[-1] / 2.718281828, rel=0.01)
    assert load.prefill_share(1000.0) == pytest.approx(0.0, abs=1e-9)


def test_reading_changes_nothing() -> None:
    load, same = make_load(), make_load()
    for each in (load, same):
        each.note_dispatch("a", 4000, 0, 0.0)
        each.note_first_token("a", 0.3)
        each.note_dispatch("b", 4000, 0, 0.5)
    for time_s in (0.5, 0.6, 3.0):
        load.backlog_s(time_s)
        load.prefill_share(time_s)
        load.context_token_count(time_s)
    assert load.prefill_share(0.7) == same.prefill_share(0.7)
    assert load.context_token_count(0.7) == same.context_token_count(0.7)
    assert load.backlog_s(0.7) == same.backlog_s(0.7)


# -- restarts ----------------------------------------------------------------------------


def test_an_engine_that_restarted_holds_nothing_and_is_like_its_kind_again() -> None:
    rig = LoadRig("8b-h100", slowness=3.0)
    rig.run(poisson(2.0, 60, MIXED_PROMPTS, OUTPUTS))
    load = rig.load
    assert load.ttft.factor(rig.now) > 2.0
    load.note_dispatch("a", 4000, 0, rig.now)
    load.note_dispatch("b", 4000, 0, rig.now)
    load.note_first_token("a", rig.now + 0.5)
    load.forget(rig.now + 0.6)
    assert (load.decode_count, load.prefill_count) == (0, 0)
    assert load.backlog_s(rig.now + 0.6) == load.context_token_count(rig.now + 0.6) == 0.0
    assert load.ttft.factor(rig.now + 0.6) == load.tpot.factor(rig.now + 0.6) == 1.0
    # Late news of what it held is of nothing.
    load.note_first_token("b", rig.now + 0.7)
    load.note_end("a", 5.0, rig.now + 0.8, learn=True)
    assert load.decode_count == 0


# -- against an engine -------------------------------------------------------------------


def settled(seen: Sequence[Seen], skip: int = 50) -> list[Seen]:
    """Those after the beginning."""
    return [each for each in seen[skip:] if each.true_ttft_s > 0.0]


def bias(seen: Sequence[Seen], predicted: Callable[[Seen], float], true: Callable[[Seen], float]) -> float:
    """Predicted over observed, of the sums."""
    return sum(map(predicted, seen)) / sum(map(true, seen))


def ttft_bias(seen: Sequence[Seen]) -> float:
    return bias(seen, lambda each: each.ttft_s, lambda each: each.true_ttft_s)


def tpot_bias(seen: Sequence[Seen]) -> float:
    ended = [each for each in seen if each.true_tpot_s > 0.0]
    return bias(ended, lambda each: each.tpot_s, lambda each: each.true_tpot_s)


@pytest.mark.parametrize("profile", ["8b-h100", "70b-h100-tp4", "8b-l4"])
@pytest.mark.parametrize("prompt", [10, 500, 5000, 60_000])
def test_alone_on_an_idle_engine_the_prediction_is_the_formula(profile: str, prompt: int) -> None:
    rig = LoadRig(profile)
    [seen] = rig.run([Job(1.0, prompt, 50)])
    assert seen.ttft_s == pytest.approx(seen.true_ttft_s, rel=0.02)
    assert seen.tpot_s == pytest.approx(seen.true_tpot_s, rel=0.02)


@pytest.mark.parametrize(
    ("profile", "rate_per_s", "prompts"),
    [
        ("8b-h100", 6.0, MIXED_PROMPTS),
        ("8b-h100", 12.0, MIXED_PROMPTS),
        ("8b-h100", 10.0, SHORT_PROMPTS),
        ("70b-h100-tp4", 2.0, MIXED_PROMPTS),
        ("70b-h100-tp4", 4.0, MIXED_PROMPTS),
        ("70b-h100-tp4", 5.0, SHORT_PROMPTS),
        ("8b-a100", 4.0, MIXED_PROMPTS),
        ("8b-l4", 0.8, MIXED_PROMPTS),
        ("8b-l4", 2.0, SHORT_PROMPTS),
    ],
)
def test_in_steady_state_predictions_are_close(profile: str, rate_per_s: float, prompts: list[int]) -> None:
    seen = settled(LoadRig(profile).run(poisson(rate_per_s, 300, prompts, OUTPUTS)))
    assert ttft_bias(seen) == pytest.approx(1.0, abs=0.15)
    assert statistics.median(each.ttft_s / each.true_ttft_s for each in seen) == pytest.approx(1.0, abs=0.15)
    assert tpot_bias(seen) == pytest.approx(1.0, abs=0.2)
    assert bias(
        seen, lambda each: each.context_tokens, lambda each: each.true_context_tokens
    ) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5, 2.0])
def test_what_was_believed_wrongly_is_learned(factor: float) -> None:
    profile = get_profile("8b-h100")
    rig = LoadRig("8b-h100", believed=known(profile, **dict.fromkeys(CONSTANTS, factor)))
    seen = settled(rig.run(poisson(8.0, 300, MIXED_PROMPTS, OUTPUTS)), 150)
    assert ttft_bias(seen) == pytest.approx(1.0, abs=0.15)
    assert tpot_bias(seen) == pytest.approx(1.0, abs=0.2)
    # By the kind, for all its instances, not only by this one.
    assert rig.kind.model.observation_count > 100
    true_s, learned_s = known(profile), rig.kind.model.parameters
    for tokens in (1500, 6000):
        assert learned_s.prefill_s(tokens, tokens) == pytest.approx(true_s.prefill_s(tokens, tokens), rel=0.2)
    assert learned_s.decode_step_s(8, 8000) == pytest.approx(true_s.decode_step_s(8, 8000), rel=0.15)


@pytest.mark.parametrize("slowness", [0.6, 1.6])
def test_an_instance_unlike_its_kind_is_told_apart(slowness: float) -> None:
    rig = LoadRig("8b-h100", slowness=slowness)
    seen = settled(rig.run(poisson(4.0, 300, MIXED_PROMPTS, OUTPUTS)), 150)
    assert ttft_bias(seen) == pytest.approx(1.0, abs=0.15)
    assert tpot_bias(seen) == pytest.approx(1.0, abs=0.15)


def test_a_kind_learns_nothing_from_an_instance_that_is_a_case_of_its_own() -> None:
    profile = get_profile("8b-h100")
    rig = LoadRig("8b-h100", slowness=5.0)
    rig.run(poisson(1.0, 200, MIXED_PROMPTS, OUTPUTS))
    true_s, learned_s = known(profile), rig.kind.model.parameters
    assert learned_s.prefill_s(3000, 3000) < 2.0 * true_s.prefill_s(3000, 3000)
    assert rig.load.ttft.factor(rig.now) > 2.5


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_a_guess_learns_from_whatever_there_is_until_it_can_be_trusted(factor: float) -> None:
    believed = known(get_profile("8b-h100"), **dict.fromkeys(CONSTANTS, factor))
    rig = LoadRig("8b-h100", believed=believed, trusted=False)
    assert not rig.kind.trusted
    seen = settled(rig.run(poisson(6.0, 300, MIXED_PROMPTS, OUTPUTS)), 150)
    assert rig.kind.trusted
    assert ttft_bias(seen) == pytest.approx(1.0, abs=0.15)
    assert tpot_bias(seen) == pytest.approx(1.0, abs=0.15)


def test_an_engine_that_becomes_slow_is_noticed_within_a_few_requests() -> None:
    rig = LoadRig("8b-h100")
    rig.run(poisson(3.0, 100, [3000], [50]))
    rig.engine.slowness = 6.0
    seen = settled(rig.run(poisson(0.8, 30, [3000], [20], start_s=rig.now)), 110)
    assert ttft_bias(seen) == pytest.approx(1.0, abs=0.25)


def test_a_frozen_engine_has_ever_more_to_do() -> None:
    load = make_load()
    load.note_dispatch("a", 1000, 0, 0.0)
    waits_s = [load.backlog_s(time_s) for time_s in (1.0, 10.0, 100.0)]
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] > 90.0
