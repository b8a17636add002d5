"""The fast engine model: the same times as the token-by-token one, at a fraction of the work."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineLimits, EngineRequest, RequestState
from sagecp.sim.fleet.engine import EngineJob, FleetEngine, News, NewsKind
from sagecp.sim.profiles import PROFILES, StepProfile, get_profile

H100 = get_profile("8b-h100")
L4 = get_profile("8b-l4")
TIMED = sorted(name for name in PROFILES if name not in ("instant", "fixed"))


def close_to(value: float) -> Any:
    """Return what equals a value but for the rounding of sums."""
    return pytest.approx(value, rel=1e-9, abs=1e-9)


class FreshTokens:
    """Chooses tokens that occur nowhere else, so that only prompts are shared."""

    last = 10**9

    def next_token(self, may_end: bool) -> int:
        FreshTokens.last += 1
        return FreshTokens.last


class ReferenceModel(EngineModel):
    """The token-by-token engine, keeping the contents of prompts only, as the fast one does.

    It shows the fast one's gauges, in the same terms.
    """

    def _commit(self, request: EngineRequest) -> None:
        assert request.table is not None
        self.cache.commit(request.table, request.tokens, min(request.computed, request.prompt_token_count))
        request.next_commit = request.computed + 1

    def _begin(self, now: float) -> bool:
        self.just_admitted: set[str] = set()
        return super()._begin(now)

    def _admit(self, now: float, budget: int) -> EngineRequest | None:
        request = super()._admit(now, budget)
        if request is not None:
            self.just_admitted.add(request.request_id)
        return request

    def is_decode(self, request: EngineRequest) -> bool:
        """Return whether the step in progress runs it as a decode, not as a chunk of prefill."""
        return (
            request.state is RequestState.RUNNING
            and len(request.tokens) - request.computed == 1
            and request.computed >= request.prompt_token_count
            and request.request_id not in self.just_admitted
        )

    def gauges(self) -> dict[str, float]:
        alive = self._requests.values()
        return {
            "running": self.running_count,
            "waiting": self.waiting_count,
            "requests": self.request_count,
            "kv_usage": self.cache.usage,
            "known": self.cache.cached_block_count,
            "queued": sum(len(r.tokens) - r.computed for r in alive if not self.is_decode(r)),
            "context": sum(r.computed for r in alive if self.is_decode(r)),
            "steps": self.counters.steps,
            "preemptions": self.counters.preemptions,
            "prefix_queries": self.counters.prefix_queries,
            "prefix_hits": self.counters.prefix_hits,
            "prompt_tokens": self.counters.prompt_tokens,
            "generation_tokens": self.counters.generation_tokens,
        }


def gauges(engine: FleetEngine) -> dict[str, float]:
    engine.next_event_s()  # A step that is due begins, as in the other engine.
    return {
        "running": engine.running_count,
        "waiting": engine.waiting_count,
        "requests": engine.request_count,
        "kv_usage": engine.kv_usage,
        "known": engine._batch.cache.known_block_count,
        "queued": engine.queued_prefill_token_count,
        "context": engine.decode_context_token_count,
        "steps": engine.counters.steps,
        "preemptions": engine.counters.preemptions,
        "prefix_queries": engine.counters.prefix_query_tokens,
        "prefix_hits": engine.counters.prefix_hit_tokens,
        "prompt_tokens": engine.counters.prompt_tokens,
        "generation_tokens": engine.counters.generation_tokens,
    }


@dataclass(frozen=True, slots=True)
class Action:
    """What a workload does at a time: add a prompt, abort a request, or change the pace."""

    time_s: float
    request_id: str = ""
    prompt: tuple[int, ...] = ()
    output_token_count: int = 0
    slowness: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    profile: StepProfile
    limits: EngineLimits
    actions: tuple[Action, ...]


def random_workload(seed: int) -> Workload:
    """Make a small workload that visits the corners: sharing, aborts, one-token outputs, full caches."""
    draw = random.Random(seed)
    block_size = draw.choice([1, 2, 4, 16, 16, 64])
    max_running = draw.choice([1, 2, 5, 20, 64])
    budget = max(max_running, draw.choice([1, 8, 33, 64, 200, 512]))
    longest = draw.choice([40, 150, 600])
    outputs = draw.choice([3, 30, 120])
    capacity = (longest + outputs + block_size) * draw.choice([1, 1, 2, 3, 6, 30])
    limits = EngineLimits(capacity, max_running, budget, block_size, draw.random() < 0.85)
    profile = draw.choice([H100, L4, get_profile("70b-h100-tp4")])
    count = draw.randrange(1, 40)
    mean_gap_s = draw.choice([0.002, 0.03, 0.3])
    families = [[draw.randrange(1000) for _ in range(longest)] for _ in range(draw.choice([1, 3, 8]))]
    actions, now = [], 0.0
    for number in range(count):
        if draw.random() < 0.7:  # Else at the same time.
            now += draw.expovariate(1 / mean_gap_s)
        family = draw.choice(families)
        shared = draw.randrange(longest) if draw.random() < 0.7 else 0
        length = draw.randrange(max(1, shared), longest + 1)
        if draw.random() < 0.2:
            length = max(1, length // block_size * block_size)
        prompt = tuple(family[:shared] + [draw.randrange(1000) for _ in range(longest)])[:length]
        output = 1 if draw.random() < 0.15 else draw.randrange(1, outputs + 1)
        actions.append(Action(now, f"r{number}", prompt, output))
        if draw.random() < 0.15:
            victim = f"r{draw.randrange(number + 1)}"
            actions.append(Action(now + draw.expovariate(1 / (5 * mean_gap_s)), victim))
        if draw.random() < 0.05:
            actions.append(Action(now + draw.random() * mean_gap_s, slowness=draw.choice([0.5, 1.0, 3.0])))
    actions.sort(key=lambda action: action.time_s)
    return Workload(profile, limits, tuple(actions))


Trail = list[dict[str, float]]


def run_reference(workload: Workload, engine: EngineModel) -> tuple[dict[str, EngineRequest], Trail]:
    """Run the token-by-token engine; return its requests, and its gauges after each moment of action."""
    requests: dict[str, EngineRequest] = {}
    trail: Trail = []
    pending = list(reversed(workload.actions))
    now = 0.0
    while True:
        end = engine.begin_step(now)
        next_s = pending[-1].time_s if pending else math.inf
        if end is not None and end <= next_s:
            now = end
            engine.finish_step(now)
            continue
        if not pending:
            return requests, trail
        now = next_s
        while pending and pending[-1].time_s == now:
            action = pending.pop()
            if action.slowness:
                engine.slowness = action.slowness
            elif action.output_token_count:
                request = EngineRequest(
                    action.request_id, action.prompt, action.output_token_count, FreshTokens()
                )
                requests[action.request_id] = request
                engine.add(request, now)
            else:
                engine.abort(action.request_id)
        engine.begin_step(now)
        if isinstance(engine, ReferenceModel):
            trail.append(engine.gauges())


def contents_of(prompt: tuple[int, ...], block_size: int, ids: dict[tuple[int, ...], int]) -> tuple[int, ...]:
    """Number the full blocks of a prompt by all tokens up to their ends."""
    ends = range(block_size, len(prompt) + 1, block_size)
    return tuple(ids.setdefault(prompt[:end], len(ids)) for end in ends)


def run_fast(
    workload: Workload, engine: FleetEngine, *, by_events: bool = True, observe: bool = True
) -> tuple[dict[str, EngineJob], Trail, list[News]]:
    jobs: dict[str, EngineJob] = {}
    trail: Trail = []
    news: list[News] = []
    ids: dict[tuple[int, ...], int] = {}
    pending = list(reversed(workload.actions))
    while pending:
        now = pending[-1].time_s
        while by_events and (event_s := engine.next_event_s()) <= now:
            news += engine.advance(event_s)
        news += engine.advance(now)
        while pending and pending[-1].time_s == now:
            action = pending.pop()
            if action.slowness:
                engine.slowness = action.slowness
            elif action.output_token_count:
                contents = contents_of(action.prompt, workload.limits.block_size, ids)
                job = EngineJob(action.request_id, len(action.prompt), action.output_token_count, contents)
                jobs[action.request_id] = job
                engine.add(job, now)
            else:
                engine.abort(action.request_id, now)
        if observe:
            trail.append(gauges(engine))
            engine._batch.cache.check()
    return jobs, trail, news + drain(engine)


def drain(engine: FleetEngine) -> list[News]:
    news: list[News] = []
    while (event_s := engine.next_event_s()) < math.inf:
        news += engine.advance(event_s)
    return news


def assert_empty(engine: FleetEngine) -> None:
    engine._batch.cache.check()
    cache = engine._batch.cache
    assert cache.used_block_count == 0
    assert cache.blank_block_count + cache.known_block_count == cache.block_count
    assert (engine.running_count, engine.waiting_count, engine.request_count) == (0, 0, 0)
    assert engine.queued_prefill_token_count == engine.decode_context_token_count == 0
    assert engine.kv_usage == 0.0
    assert engine.next_event_s() == math.inf


def assert_same(requests: dict[str, EngineRequest], jobs: dict[str, EngineJob]) -> None:
    assert requests.keys() == jobs.keys()
    for name, request in requests.items():
        job = jobs[name]
        finish_s = request.last_token_s if request.finish_reason == "length" else -1.0
        assert job.added_s == request.arrival_s
        assert job.scheduled_s == close_to(request.scheduled_s), name
        assert job.first_token_s == close_to(request.first_token_s), name
        assert job.finish_s == close_to(finish_s), name
        assert job.cached_token_count == request.cached_token_count, name
        assert job.preemption_count == request.preemption_count, name


def assert_same_run(workload: Workload) -> None:
    """Run both engines, and compare times, counts, and the gauges at each moment of action."""
    reference = ReferenceModel(workload.profile, workload.limits)
    requests, expected = run_reference(workload, reference)
    engine = FleetEngine(workload.profile, workload.limits)
    jobs, trail, news = run_fast(workload, engine)
    assert_same(requests, jobs)
    assert len(trail) == len(expected)
    for seen, wanted in zip(trail, expected, strict=True):
        assert seen == pytest.approx(wanted, rel=1e-12)
    assert engine._batch.cache.known_block_count == reference.cache.cached_block_count
    assert_empty(engine)
    assert [item.time_s for item in news] == sorted(item.time_s for item in news)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**9))
def test_it_gives_the_same_times_as_the_token_by_token_model(seed: int) -> None:
    assert_same_run(random_workload(seed))


@pytest.mark.parametrize("seed", range(10))
def test_with_room_for_all_it_equals_the_model_that_keeps_outputs_too(seed: int) -> None:
    workload = random_workload(seed)
    limits = replace(workload.limits, kv_token_capacity=100_000)
    workload = replace(workload, limits=limits)
    requests, _ = run_reference(workload, EngineModel(workload.profile, limits))
    jobs, _, _ = run_fast(workload, FleetEngine(workload.profile, limits))
    assert_same(requests, jobs)


def actions_around_a_broken_chain(chain: int, holder_output: int) -> list[Action]:
    """Let a decode, from when it holds 16 blocks, evict the start of a known prefix before its end.

    Two prompts compute the first block at once. Its known copy is freed first, and
    the rest of the chain later: so the start of the chain is evicted before its end.
    """
    prompt = tuple(range(100, 100 + 4 * chain + 1))
    holder = tuple(range(1000, 1000 + 4 * 16 - 3))
    return [
        Action(0.0, "first", prompt[:5], 1),
        Action(0.0, "second", prompt, 1),
        Action(0.0, "holder", holder, holder_output),
    ]


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
@pytest.mark.parametrize("chain", [3, 4, 6, 8])
@pytest.mark.parametrize("head_s", [0.051, 0.1, 0.13, 0.16, 0.2])
def test_the_head_of_the_queue_is_admitted_when_losing_its_prefix_lets_it_fit(
    chain: int, spare: int, head_s: float
) -> None:
    actions = actions_around_a_broken_chain(chain, 4 * (chain + spare) - 1)
    head = (*range(100, 100 + 4 * chain), *range(5000, 5012))
    actions.append(Action(head_s, "head", head, 1))
    # Look often.
    actions += [Action(0.05 + number * 0.00317, "nobody") for number in range(150)]
    actions.sort(key=lambda action: action.time_s)
    limits = EngineLimits(4 * (16 + chain + spare), 9, 9, 4)
    assert_same_run(Workload(H100, limits, tuple(actions)))


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
@pytest.mark.parametrize("chain", [6, 9, 12, 15])
def test_a_prefill_makes_known_again_what_it_evicted_before(chain: int, spare: int) -> None:
    actions = actions_around_a_broken_chain(chain, 4 * spare + 6)
    prompt = tuple(range(100, 100 + 4 * chain + 12))
    actions += [Action(1.0, "again", prompt, 1), Action(2.0, "probe", prompt, 1)]
    limits = EngineLimits(4 * (16 + chain + spare), 9, 9, 4)
    assert_same_run(Workload(H100, limits, tuple(actions)))


@pytest.mark.parametrize("seed", range(8))
def test_neither_looking_nor_the_way_of_advancing_changes_anything(seed: int) -> None:
    workload = random_workload(seed)
    results = []
    for by_events, observe in ((True, True), (True, True), (False, True), (False, False)):
        engine = FleetEngine(workload.profile, workload.limits)
        jobs, _, news = run_fast(workload, engine, by_events=by_events, observe=observe)
        lines = [(item.time_s, item.kind, item.job.request_id) for item in news]
        times = [(job.scheduled_s, job.first_token_s, job.finish_s) for job in jobs.values()]
        results.append((lines, times, engine.counters))
    assert all(result == results[0] for result in results)


def run_one(profile: StepProfile, job: EngineJob, limits: EngineLimits, slowness: float = 1.0) -> list[News]:
    engine = FleetEngine(profile, limits, slowness=slowness)
    engine.add(job, 1.0)
    news = drain(engine)
    assert_empty(engine)
    assert engine.counters.busy_s == close_to(job.finish_s - job.added_s)
    return news


@pytest.mark.parametrize("profile", [PROFILES[name] for name in TIMED], ids=TIMED)
def test_a_single_job_keeps_exactly_to_the_formula(profile: StepProfile) -> None:
    prompt, output = 5000, 200
    job = EngineJob("only", prompt, output)
    news = run_one(profile, job, EngineLimits(profile.kv_token_capacity))
    p = profile
    prefill_s = sum(
        p.overhead_s
        + max(p.memory_base_s + p.memory_per_token_s * size, p.compute_base_s + p.compute_per_token_s * size)
        + p.attention_per_token_pair_s * size * (start + size / 2)
        for start, size in ((0, 2048), (2048, 2048), (4096, 904))
    )
    decode_s = sum(
        p.overhead_s
        + max(p.memory_base_s + p.memory_per_token_s, p.compute_base_s + p.compute_per_token_s)
        + p.context_per_token_s * (prompt + number)
        for number in range(1, output)
    )
    assert (job.added_s, job.scheduled_s, job.cached_token_count) == (1.0, 1.0, 0)
    assert job.first_token_s == close_to(1.0 + prefill_s)
    assert job.finish_s == close_to(1.0 + prefill_s + decode_s)
    assert news == [
        News(job.first_token_s, NewsKind.FIRST_TOKEN, job),
        News(job.finish_s, NewsKind.FINISHED, job),
    ]


def test_the_first_token_may_be_the_last() -> None:
    job = EngineJob("short", 100, 1)
    news = run_one(H100, job, EngineLimits(1000))
    assert [item.kind for item in news] == [NewsKind.FIRST_TOKEN, NewsKind.FINISHED]
    assert job.first_token_s == job.finish_s == 1.0 + H100.step_s(100, 0, 100 * 50.0)


def test_slowness_applies_from_the_next_step_on() -> None:
    limits = EngineLimits(10_000)
    normal, slow = EngineJob("normal", 100, 50), EngineJob("slow", 100, 50)
    run_one(H100, normal, limits)
    run_one(H100, slow, limits, slowness=3.0)
    assert slow.finish_s - 1.0 == pytest.approx(3 * (normal.finish_s - 1.0))

    engine = FleetEngine(H100, limits)
    job = EngineJob("job", 100, 50)
    engine.add(job, 1.0)
    steps_s = [H100.step_s(100, 0, 5000.0)] + [H100.step_s(1, 100 + number) for number in range(1, 50)]
    engine.advance(1.0 + sum(steps_s[:20]) + steps_s[20] / 2)
    assert engine.counters.steps == 20
    engine.slowness = 10.0
    assert engine.slowness == 10.0
    drain(engine)
    assert job.finish_s == close_to(1.0 + sum(steps_s[:21]) + 10 * sum(steps_s[21:]))
    with pytest.raises(ValueError, match="slowness"):
        engine.slowness = 0.0


def test_what_is_added_when_a_step_ends_joins_the_next_one() -> None:
    def second_start_s(*, ask_first: bool) -> tuple[float, float]:
        engine = FleetEngine(H100, EngineLimits(10_000))
        engine.add(EngineJob("first", 100, 10), 0.0)
        end_s = engine.next_event_s()
        engine.advance(end_s)
        if ask_first:
            engine.next_event_s()
        job = EngineJob("second", 100, 1)
        engine.add(job, end_s)
        drain(engine)
        return job.scheduled_s, end_s

    start_s, end_s = second_start_s(ask_first=False)
    assert start_s == end_s
    start_s, end_s = second_start_s(ask_first=True)
    assert start_s == pytest.approx(end_s + H100.step_s(1, 101))


def test_news_of_steps_that_an_addition_passes_is_kept() -> None:
    engine = FleetEngine(H100, EngineLimits(10_000))
    engine.add(EngineJob("first", 100, 2), 0.0)
    engine.add(EngineJob("second", 100, 1), 5.0)
    assert engine.next_event_s() < 1.0
    assert [item.job.request_id for item in engine.advance(5.0)] == ["first", "first"]
    assert engine.advance(4.0) == []
    assert [item.kind for item in drain(engine)] == [NewsKind.FIRST_TOKEN, NewsKind.FINISHED]


def test_a_known_prefix_costs_no_prefill_and_is_held_once() -> None:
    engine = FleetEngine(H100, EngineLimits(100_000, block_size=100))
    blocks = tuple(range(9))
    engine.add(EngineJob("first", 950, 500, blocks), 0.0)
    engine.advance(1.0)
    second = EngineJob("second", 950, 500, (*blocks[:6], 77))
    engine.add(second, 1.0)
    engine.advance(2.0)
    assert second.cached_token_count == 600
    assert engine.counters.prefix_hit_tokens == 600
    assert engine.counters.prefix_query_tokens == 1900
    context = engine.decode_context_token_count
    assert engine.decode_count == engine.running_count == 2
    assert context - 600 <= engine.kv_token_count <= context - 600 + 2 * 101
    assert engine.kv_usage == engine.kv_token_count / engine.kv_token_capacity
    drain(engine)
    assert_empty(engine)


@pytest.mark.parametrize(
    ("blocks", "cached"),
    [
        ((1, 2, 3, 4), 192),  # One token has to be computed.
        ((1, 2, 3, 4, 5, 6), 192),  # Only the prompt's own full blocks count.
        ((1, 2, 9, 4), 128),
        ((9, 2, 3), 0),
        ((1, 2, 1, 4), 128),  # Ids after a repetition are ignored.
        ((), 0),
    ],
)
def test_prefixes_match_up_to_the_first_difference(blocks: tuple[int, ...], cached: int) -> None:
    engine = FleetEngine(H100, EngineLimits(100_000, block_size=64))
    engine.add(EngineJob("first", 256, 3, (1, 2, 3, 4)), 0.0)
    drain(engine)
    job = EngineJob("second", 256, 3, blocks)
    engine.add(job, 10.0)
    drain(engine)
    assert job.cached_token_count == cached
    assert_empty(engine)


def test_without_prefix_caching_nothing_is_known() -> None:
    engine = FleetEngine(H100, EngineLimits(100_000, block_size=64, prefix_caching=False))
    for number in range(2):
        job = EngineJob("job", 256, 3, (1, 2, 3))
        engine.add(job, 10.0 * number)
        drain(engine)
        assert job.cached_token_count == 0
    assert engine._batch.cache.known_block_count == 0


def test_bad_jobs_and_limits_are_refused() -> None:
    engine = FleetEngine(H100, EngineLimits(1000, block_size=16))
    engine.add(EngineJob("job", 10, 10), 0.0)
    for job, message in (
        (EngineJob("job", 10, 10), "in use"),
        (EngineJob("none", 0, 10), "at least one"),
        (EngineJob("mute", 10, 0), "at least one"),
        (EngineJob("big", 900, 93), "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(job, 0.0)
    engine.add(EngineJob("largest", 900, 92), 0.0)
    assert not engine.abort("nobody", 0.0)
    drain(engine)
    assert_empty(engine)
    with pytest.raises(ValueError, match="raise max_batch_tokens"):
        FleetEngine(H100, EngineLimits(1000, max_running_requests=9, max_batch_tokens=8))


def test_time_passes_on_an_engine_that_costs_nothing() -> None:
    engine = FleetEngine(get_profile("instant"), EngineLimits(10_000))
    job = EngineJob("job", 5000, 100)
    engine.add(job, 3.0)
    assert [item.time_s for item in drain(engine)] == [3.0, 3.0]
    assert_empty(engine)
