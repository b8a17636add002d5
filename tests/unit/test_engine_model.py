"""The simulated engine over virtual time: pace, batching, preemption, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineLimits, EngineRequest, RequestState
from sagecp.sim.paced_engine import PacedEngineModel
from sagecp.sim.profiles import PROFILES, StepProfile, get_profile
from sagecp.sim.token_source import TokenSource

H100 = get_profile("8b-h100")
INSTANT = get_profile("instant")
TIMED = sorted(name for name in PROFILES if name not in ("instant", "fixed"))


def make_request(
    name: str, prompt: Sequence[int] | int, max_tokens: int, *, seed: int = 0, **options
) -> EngineRequest:
    """Make a greedy request; a number stands for a prompt of so many tokens of its own."""
    if isinstance(prompt, int):
        start = sum(map(ord, name)) * 10_007
        prompt = range(start, start + prompt)
    tokens = list(prompt)
    return EngineRequest(name, tokens, max_tokens, TokenSource(seed, tokens), **options)


def drain(engine: EngineModel, now: float = 0.0) -> tuple[float, dict[str, list[float]]]:
    """Run until idle; return the time, and when each request got its tokens."""
    times: dict[str, list[float]] = {}
    while (end := engine.begin_step(now)) is not None:
        assert end >= now
        now = end
        for request, _, _ in engine.finish_step(now):
            times.setdefault(request.request_id, []).append(now)
    return now, times


def assert_empty(engine: EngineModel) -> None:
    engine.cache.check()
    assert engine.cache.used_block_count == 0
    assert (engine.running_count, engine.waiting_count, engine.request_count) == (0, 0, 0)


@pytest.mark.parametrize("profile", [PROFILES[name] for name in TIMED], ids=TIMED)
def test_a_single_request_keeps_exactly_to_the_formula(profile: StepProfile) -> None:
    engine = EngineModel(profile, EngineLimits(profile.kv_token_capacity))
    prompt, output = 1500, 20
    engine.add(make_request("only", prompt, output), 1.0)
    _, times = drain(engine, 1.0)
    # Written out, so that the code is held against the formula and not against itself.
    p = profile
    expected = 1.0 + (
        p.overhead_s
        + max(
            p.memory_base_s + p.memory_per_token_s * prompt, p.compute_base_s + p.compute_per_token_s * prompt
        )
        + p.attention_per_token_pair_s * prompt * (prompt / 2)
    )
    assert times["only"][0] == pytest.approx(expected, abs=1e-12)
    for number in range(1, output):
        expected += (
            p.overhead_s
            + max(p.memory_base_s + p.memory_per_token_s, p.compute_base_s + p.compute_per_token_s)
            + p.context_per_token_s * (prompt + number)
        )
        assert times["only"][number] == pytest.approx(expected, abs=1e-9)
    assert_empty(engine)


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine = EngineModel(H100, EngineLimits(100_000, max_batch_tokens=2048))
    engine.add(make_request("long", 5000, 1), 0.0)
    _, times = drain(engine)
    chunks = [(0, 2048), (2048, 2048), (4096, 904)]
    expected = sum(H100.step_s(size, 0, size * (start + size / 2)) for start, size in chunks)
    assert times["long"] == [pytest.approx(expected)]
    assert engine.counters.steps == 3


def test_decodes_go_first_and_prefill_gets_what_is_left_of_the_budget() -> None:
    engine = EngineModel(H100, EngineLimits(100_000, max_batch_tokens=100))
    engine.add(make_request("old", 50, 10), 0.0)
    now = engine.begin_step(0.0)
    assert now is not None
    engine.finish_step(now)
    engine.add(make_request("new", 150, 1), now)
    end = engine.begin_step(now)
    assert end == pytest.approx(now + H100.step_s(100, 51, 99 * 49.5))
    assert end is not None
    assert [request.request_id for request, _, _ in engine.finish_step(end)] == ["old"]
    assert engine.last_step_tokens == 100
    end = engine.begin_step(end)
    assert end is not None
    assert {request.request_id for request, _, _ in engine.finish_step(end)} == {"old", "new"}


def test_no_more_requests_run_at_once_than_allowed_and_the_rest_wait_in_order() -> None:
    engine = EngineModel(H100, EngineLimits(100_000, max_running_requests=2))
    for name in ("a", "b", "c", "d"):
        engine.add(make_request(name, 10, 5), 0.0)
    engine.begin_step(0.0)
    assert (engine.running_count, engine.waiting_count) == (2, 2)
    _, times = drain(engine)
    assert times["a"] == times["b"]
    assert times["c"][0] > times["a"][-1]
    assert times["c"] == times["d"]
    assert_empty(engine)


def test_a_known_prefix_costs_no_prefill() -> None:
    engine = EngineModel(H100, EngineLimits(100_000, block_size=16))
    prompt = list(range(1600))
    engine.add(make_request("first", prompt, 1), 0.0)
    now, _ = drain(engine)
    engine.add(make_request("again", [*prompt, 5, 6, 7], 1), now)
    end, _ = drain(engine, now)
    assert end - now == pytest.approx(H100.step_s(3, 0, 3 * (1600 + 1.5)))
    assert engine.counters.prefix_hits == 1600
    assert engine.counters.prefix_queries == 1600 + 1603
    assert engine.counters.cached_prompt_tokens == 1600


def test_an_answer_becomes_a_prefix_of_the_next_turn() -> None:
    engine = EngineModel(INSTANT, EngineLimits(10_000, block_size=16))
    first = make_request("turn-1", 40, 60)
    engine.add(first, 0.0)
    drain(engine)
    second = make_request("turn-2", [*first.tokens, 1, 2, 3], 1)
    engine.add(second, 0.0)
    drain(engine)
    # The last token's keys and values were never computed.
    assert second.cached_token_count == 99 // 16 * 16


def test_preemption_takes_the_newest_and_it_still_gets_all_its_tokens() -> None:
    crowded = EngineModel(H100, EngineLimits(kv_token_capacity=40 * 16, block_size=16))
    roomy = EngineModel(H100, EngineLimits(kv_token_capacity=10_000))
    answers = []
    for engine in (crowded, roomy):
        requests = [make_request(f"r{number}", 200, 200) for number in range(3)]
        for request in requests:
            engine.add(request, 0.0)
        drain(engine)
        assert_empty(engine)
        answers.append([request.output_token_ids for request in requests])
        if engine is crowded:
            assert [request.preemption_count > 0 for request in requests] == [False, True, True]
            assert engine.counters.preemptions >= 2
    assert roomy.counters.preemptions == 0
    assert answers[0] == answers[1]
    assert all(len(answer) == 200 for answer in answers[0])


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = EngineModel(H100, EngineLimits(kv_token_capacity=160, block_size=16))
    with pytest.raises(ValueError, match="up to 161 tokens does not fit in a KV cache of 160"):
        engine.add(make_request("big", 100, 61), 0.0)
    engine.add(make_request("fits", 100, 60), 0.0)
    with pytest.raises(ValueError, match="in use"):
        engine.add(make_request("fits", 10, 1), 0.0)
    drain(engine)
    assert_empty(engine)


@pytest.mark.parametrize("when", ["waiting", "in a step", "decoding"])
def test_abort_frees_everything_at_once(when: str) -> None:
    engine = EngineModel(H100, EngineLimits(10_000))
    request = make_request("gone", 100, 50)
    engine.add(request, 0.0)
    if when != "waiting":
        end = engine.begin_step(0.0)
        if when == "decoding":
            assert end is not None
            engine.finish_step(end)
            engine.begin_step(end)
    assert engine.abort("gone")
    assert not engine.abort("gone")
    assert request.finish_reason == "abort"
    assert_empty(engine)
    _, times = drain(engine)
    assert times == {}


def test_a_stalled_request_keeps_its_place_and_never_moves() -> None:
    engine = EngineModel(H100, EngineLimits(1000, max_running_requests=1))
    engine.add(make_request("stuck", 100, 50), 0.0)
    end = engine.begin_step(0.0)
    assert end is not None
    assert engine.stall("stuck")
    engine.add(make_request("behind", 100, 5), 0.0)
    now, times = drain(engine)
    assert times == {}
    assert (engine.running_count, engine.waiting_count) == (1, 1)
    assert engine.cache.used_block_count > 0
    engine.abort("stuck")
    _, times = drain(engine, now)
    assert len(times["behind"]) == 5
    assert_empty(engine)


def test_a_request_stalled_in_the_queue_gives_way_to_those_behind_it() -> None:
    engine = EngineModel(H100, EngineLimits(1000))
    engine.add(make_request("stuck", 100, 50), 0.0)
    engine.add(make_request("behind", 100, 5), 0.0)
    assert engine.stall("stuck")
    _, times = drain(engine)
    assert list(times) == ["behind"]


def test_stop_tokens_end_an_answer_unless_it_is_too_short() -> None:
    reference = make_request("reference", 50, 30)
    engine = EngineModel(INSTANT, EngineLimits(10_000))
    engine.add(reference, 0.0)
    drain(engine)
    answer = reference.output_token_ids
    stop = answer[4]
    first = answer.index(stop)
    for least in (0, first + 1):
        request = make_request(
            f"least-{least}", reference.tokens[:50], 30, end_token_ids=frozenset({stop}), min_tokens=least
        )
        engine.add(request, 0.0)
        drain(engine)
        later = [position for position, token in enumerate(answer) if token == stop and position >= least]
        assert request.output_token_count == (later[0] + 1 if later else 30)
        assert request.stop_token_id == (stop if later else None)
        assert request.finish_reason == ("stop" if later else "length")


def test_a_late_caller_does_not_slow_the_engine_down() -> None:
    engine = EngineModel(H100, EngineLimits(10_000))
    engine.add(make_request("paced", 10, 100), 0.0)
    late = 0.004
    end = engine.begin_step(0.0)
    ends = []
    while end is not None:
        ends.append(end)
        engine.finish_step(end + late)
        end = engine.begin_step(end + late)
    assert ends[-1] == pytest.approx(
        H100.step_s(10, 0, 50) + sum(H100.step_s(1, 10 + number) for number in range(1, 100))
    )


def test_an_idle_engine_starts_a_step_when_a_request_comes_not_earlier() -> None:
    engine = EngineModel(H100, EngineLimits(10_000))
    engine.add(make_request("a", 10, 1), 0.0)
    now, _ = drain(engine)
    engine.add(make_request("b", 10, 1), now + 0.01)
    assert engine.begin_step(now + 0.01) == pytest.approx(now + 0.01 + H100.step_s(10, 0, 50))


def test_slowness_stretches_the_steps_that_follow() -> None:
    engine = EngineModel(H100, EngineLimits(10_000))
    engine.slowness = 10.0
    engine.add(make_request("slow", 10, 1), 0.0)
    assert engine.begin_step(0.0) == pytest.approx(10 * H100.step_s(10, 0, 50))


def test_times_of_a_request_are_kept() -> None:
    engine = EngineModel(H100, EngineLimits(10_000, max_running_requests=1))
    engine.add(make_request("a", 10, 3), 0.0)
    second = make_request("b", 10, 3)
    engine.add(second, 0.0)
    now, times = drain(engine)
    assert second.arrival_s == 0.0
    assert second.scheduled_s == pytest.approx(times["a"][-1])
    assert second.first_token_s == times["b"][0]
    assert second.last_token_s == now
    assert second.token_gap_s == pytest.approx(times["b"][2] - times["b"][1])


def run_once(seed: int) -> list[tuple[str, int, float]]:
    engine = EngineModel(H100, EngineLimits(4000, max_running_requests=8))
    generator = random.Random(seed)
    log: list[tuple[str, int, float]] = []
    now, number = 0.0, 0
    while number < 40 or engine.request_count:
        if number < 40 and generator.random() < 0.3:
            prompt = list(range(generator.randrange(5) * 100, 600))
            engine.add(make_request(f"r{number}", prompt, generator.randrange(1, 200), seed=seed), now)
            number += 1
        end = engine.begin_step(now)
        now = now + 0.01 if end is None else end
        log += [(request.request_id, token, now) for request, token, _ in engine.finish_step(now)]
    assert_empty(engine)
    return log


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    assert run_once(1) == run_once(1)
    assert run_once(1) != run_once(2)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(12, 60),
    running=st.integers(1, 8),
    budget=st.sampled_from([1, 7, 64, 2048]),
    prefix_caching=st.booleans(),
    paced=st.booleans(),
)
def test_nothing_leaks_and_every_request_gets_its_tokens(
    seed: int, blocks: int, running: int, budget: int, prefix_caching: bool, paced: bool
) -> None:
    limits = EngineLimits(
        blocks * 16,
        max_running_requests=running,
        max_batch_tokens=budget,
        block_size=16,
        prefix_caching=prefix_caching,
    )
    engine = PacedEngineModel(limits, 0.05, 0.02) if paced else EngineModel(H100, limits)
    generator = random.Random(seed)
    requests: list[EngineRequest] = []
    aborted: set[str] = set()
    now = 0.0
    for _ in range(300):
        if len(requests) < 25 and generator.random() < 0.25:
            size = generator.randrange(1, 100)
            prompt = [generator.randrange(2) * 500 + position for position in range(size)]
            requests.append(make_request(f"r{len(requests)}", prompt, generator.randrange(1, 80)))
            engine.add(requests[-1], now)
        if requests and generator.random() < 0.05:
            victim = generator.choice(requests).request_id
            if engine.abort(victim):
                aborted.add(victim)
        end = engine.begin_step(now)
        if end is not None and generator.random() < 0.9:
            now = max(now, end)
            engine.finish_step(now)
        engine.cache.check()
        assert engine.running_count <= running
    drain(engine, now)
    assert_empty(engine)
    for request in requests:
        assert request.state is RequestState.FINISHED
        if request.request_id not in aborted:
            assert request.finish_reason == "length"
            assert request.output_token_count == request.max_tokens
            fresh = TokenSource(0, request.tokens[: request.prompt_token_count])
            assert request.output_token_ids == [fresh.next_token(True) for _ in request.output_token_ids]


def test_a_paced_engine_keeps_each_request_to_its_own_clock() -> None:
    engine = PacedEngineModel(EngineLimits(10_000), 0.05, 0.02)
    engine.add(make_request("a", 100, 4), 1.0)
    assert engine.begin_step(1.0) == pytest.approx(1.05)
    engine.add(make_request("b", 100, 3), 1.03)
    _, times = drain(engine, 1.03)
    assert times["a"] == pytest.approx([1.05, 1.07, 1.09, 1.11])
    assert times["b"] == pytest.approx([1.08, 1.10, 1.12])
    assert_empty(engine)


def test_a_paced_engine_survives_late_wake_ups_without_drift() -> None:
    engine = PacedEngineModel(EngineLimits(10_000), 0.0, 0.02)
    engine.add(make_request("a", 10, 50), 0.0)
    due, dues = engine.begin_step(0.0), []
    while due is not None:
        dues.append(due)
        engine.finish_step(due + 0.003)
        due = engine.begin_step(due + 0.003)
    assert dues == pytest.approx([0.02 * number for number in range(50)])


def test_a_paced_engine_preempts_too() -> None:
    engine = PacedEngineModel(EngineLimits(30 * 16, block_size=16), 0.05, 0.02)
    for number in range(3):
        engine.add(make_request(f"r{number}", 100, 100), 0.0)
    _, times = drain(engine)
    assert engine.counters.preemptions > 0
    assert {name: len(moments) for name, moments in times.items()} == {"r0": 100, "r1": 100, "r2": 100}
    assert_empty(engine)


def test_unknown_profiles_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown profile 'h200'; choose one of: .*8b-h100"):
        get_profile("h200")


@pytest.mark.parametrize(
    "field", ["kv_token_capacity", "max_running_requests", "max_batch_tokens", "block_size"]
)
def test_limits_below_one_are_refused(field: str) -> None:
    values: dict[str, Any] = {"kv_token_capacity": 1000, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        EngineLimits(**values)
