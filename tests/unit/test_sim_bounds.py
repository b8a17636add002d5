"""Bounds of the fleet simulator: ideal caches against exhaustive search, and no run above its bound."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.sim.fleet.baselines.registry import make_baseline
from sagecp.sim.fleet.belady import (
    belady_cached_token_counts,
    lru_cached_token_counts,
    unlimited_cached_token_counts,
)
from sagecp.sim.fleet.bounds import (
    cache_bounds,
    limit_rate_per_s,
    pooled_block_count,
    share_of_limit,
    strict_attainment_bound,
    work_utilisation,
)
from sagecp.sim.fleet.controller import ObjectiveRule
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationOptions
from sagecp.sim.fleet.statistics import summarise
from sagecp.sim.fleet.traces import Trace, TraceRequest, transform

BLOCK = 16
ONE_H100 = read_fleet("1x8b-h100")


def request(number: int, arrival_s: float, prompt: int, output: int = 1, blocks=(), **fields) -> TraceRequest:
    return TraceRequest(
        request_id=f"r{number}",
        arrival_s=arrival_s,
        prompt_token_count=prompt,
        output_token_count=output,
        block_hashes=tuple(blocks),
        **fields,
    )


def trace_of(requests, duration_s: float = 10.0, block: int = BLOCK) -> Trace:
    return Trace("tiny", block, tuple(requests), duration_s, False)


def trace_of_blocks(*prompts, tail: int = 1) -> Trace:
    """Return prompts of full blocks, with some tokens more so that all blocks can be hit."""
    return trace_of(
        request(number, number, len(blocks) * BLOCK + tail, blocks=blocks)
        for number, blocks in enumerate(prompts)
    )


def chains(depth: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Return prompts as paths in a tree: a block's id says all that is before it."""
    return st.lists(st.integers(0, 1), min_size=0, max_size=depth).map(
        lambda path: tuple(int("1" + "".join(map(str, path[: end + 1])), 2) for end in range(len(path)))
    )


def most_hits(prompts: list[tuple[int, ...]], block_count: int) -> int:
    """Return the most leading blocks found, over every way to keep blocks after each prompt."""

    @functools.cache
    def best(number: int, kept: frozenset[int]) -> int:
        if number == len(prompts):
            return 0
        hits = 0
        for block in prompts[number]:
            if block not in kept:
                break
            hits += 1
        at_hand = kept | set(prompts[number])
        return hits + max(
            best(number + 1, frozenset(choice))
            for choice in _subsets(sorted(at_hand), min(block_count, len(at_hand)))
        )

    return best(0, frozenset())


def _subsets(blocks: list[int], size: int):
    if size == 0:
        yield ()
        return
    for index in range(len(blocks) - size + 1):
        for rest in _subsets(blocks[index + 1 :], size - 1):
            yield (blocks[index], *rest)


class TestCaches:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(chains(), min_size=1, max_size=6), st.integers(1, 4))
    def test_belady_has_the_most_hits_that_any_choice_has(self, prompts, block_count):
        trace = trace_of_blocks(*prompts)
        found = belady_cached_token_counts(trace, block_count)
        assert found.sum() == BLOCK * most_hits(prompts, block_count)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(chains(5), min_size=1, max_size=30), st.integers(1, 40))
    def test_belady_is_between_lru_and_unlimited(self, prompts, block_count):
        trace = trace_of_blocks(*prompts)
        unlimited = unlimited_cached_token_counts(trace)
        belady = belady_cached_token_counts(trace, block_count)
        assert lru_cached_token_counts(trace, block_count).sum() <= belady.sum() <= unlimited.sum()
        assert (belady <= unlimited).all()
        everything = len({block for blocks in prompts for block in blocks}) or 1
        for limited in (lru_cached_token_counts, belady_cached_token_counts):
            assert (limited(trace, everything) == unlimited).all()

    def test_lru_drops_the_end_of_the_oldest_prompt_first(self):
        a, b = (1, 2, 3), (11, 12)
        trace = trace_of_blocks(a, b, a, b)
        assert list(lru_cached_token_counts(trace, 4)) == [0, 0, 2 * BLOCK, BLOCK]

    def test_belady_keeps_what_comes_back_soonest(self):
        a, b, c = (1, 2), (11, 12), (21, 22)
        trace = trace_of_blocks(a, b, c, b, a)
        assert list(belady_cached_token_counts(trace, 2)) == [0, 0, 0, 2 * BLOCK, 0]
        assert lru_cached_token_counts(trace, 2).sum() == 0

    def test_one_token_is_always_left_to_compute(self):
        trace = trace_of_blocks((1, 2), (1, 2), tail=0)
        assert list(unlimited_cached_token_counts(trace)) == [0, BLOCK]

    def test_blocks_beyond_the_prompt_or_after_a_repetition_do_not_count(self):
        repeated = (1, 2, 1, 3)
        trace = trace_of(
            [
                request(0, 0, 4 * BLOCK + 1, blocks=repeated),
                request(1, 1, 4 * BLOCK + 1, blocks=repeated),
                request(2, 2, BLOCK + 1, blocks=(1, 2)),
            ]
        )
        for counts in (
            unlimited_cached_token_counts(trace),
            lru_cached_token_counts(trace, 9),
            belady_cached_token_counts(trace, 9),
        ):
            assert list(counts) == [0, 2 * BLOCK, BLOCK]

    def test_shares_are_of_all_prompt_tokens(self):
        fleet = read_fleet("[[instance]]\nprofile = '8b-h100'\ncount = 2\nkv_token_capacity = 32\n")
        a, b, c = (1, 2), (11, 12), (21, 22)
        trace = trace_of_blocks(a, b, c, a)
        assert pooled_block_count(trace, fleet) == 4
        bounds = cache_bounds(trace, fleet)
        share = 2 * BLOCK / (4 * (2 * BLOCK + 1))
        assert bounds.infinite_hit_share == bounds.belady_hit_share == pytest.approx(share)
        assert bounds.pooled_lru_hit_share == 0.0
        assert cache_bounds(trace, fleet, held_share=0.75).belady_hit_share == pytest.approx(share / 2)

    def test_an_instance_without_prefix_caching_adds_nothing(self):
        fleet = read_fleet("[[instance]]\nprofile = '8b-h100'\nprefix_caching = false\n")
        assert cache_bounds(trace_of_blocks((1, 2), (1, 2)), fleet).belady_hit_share == 0.0


class TestWork:
    def test_of_one_request_by_the_formula(self):
        profile = ONE_H100[0].profile
        trace = trace_of([request(0, 0.0, 1000, 11)])
        uncached = 1000 - 160
        per_token_s = profile.compute_per_token_s + (profile.overhead_s + profile.compute_base_s) / 2048
        prefill_s = per_token_s * uncached + profile.attention_per_token_pair_s * uncached * (
            1000 - uncached / 2
        )
        decode_s = 10 * per_token_s + profile.context_per_token_s * sum(1000 + k for k in range(1, 11))
        cached = np.array([160])
        assert work_utilisation(trace, ONE_H100, cached, with_decode=False) == pytest.approx(prefill_s / 10)
        assert work_utilisation(trace, ONE_H100, cached) == pytest.approx((prefill_s + decode_s) / 10)
        assert work_utilisation(trace, read_fleet("4x8b-h100"), cached) == pytest.approx(
            (prefill_s + decode_s) / 40
        )

    def test_unlike_instances_take_what_weighs_least(self):
        trace = trace_of([request(0, 0.0, 1000, 1)])
        none = np.array([0])
        alone = [work_utilisation(trace, read_fleet(name), none) for name in ("8b-h100", "8b-l4")]
        together = work_utilisation(trace, read_fleet("8b-h100+8b-l4"), none)
        assert 1 / together == pytest.approx(1 / alone[0] + 1 / alone[1])

    def test_what_fits_nowhere_is_no_work(self):
        trace = trace_of([request(0, 0.0, 50_000, 1)])
        assert work_utilisation(trace, read_fleet("8b-l4"), np.array([0])) == 0.0

    def test_the_limit_does_not_depend_on_the_speed_of_arrivals(self):
        trace = trace_of([request(n, n * 0.1, 800 + 37 * n, 20, blocks=(1, 2, 100 + n)) for n in range(90)])
        limit = limit_rate_per_s(trace, ONE_H100)
        assert limit_rate_per_s(transform(trace, scale=3.0), ONE_H100) == pytest.approx(limit)
        assert share_of_limit(limit / 2, trace, ONE_H100) == pytest.approx(0.5)
        at_limit = transform(trace, scale=limit / 9.0)
        cached = belady_cached_token_counts(at_limit, pooled_block_count(at_limit, ONE_H100))
        assert work_utilisation(at_limit, ONE_H100, cached) == pytest.approx(1.0)


class TestStrictBound:
    def test_nothing_is_lost_without_load(self):
        trace = trace_of([request(n, 5.0 * n, 1000, 50) for n in range(10)], 50.0)
        assert strict_attainment_bound(trace, ONE_H100) == 1.0

    @pytest.mark.parametrize(
        ("prompt", "fields"),
        [
            (4000, {"ttft_slo_ms": 1.0}),
            (4000, {"tpot_slo_ms": 1.0}),
            (4000, {"deadline_ms": 100.0}),
            (500_000, {}),
            (4000, {"model": "another"}),
        ],
    )
    def test_what_misses_on_an_idle_instance_is_out(self, prompt, fields):
        trace = trace_of([request(0, 0.0, 100, 50), request(1, 1.0, prompt, 50, **fields)])
        assert strict_attainment_bound(trace, ONE_H100) == 0.5

    def test_a_burst_is_bound_by_its_objective(self):
        # 8,000 tokens take 0.21 s at least; all arrive at once and may take a second.
        profile = ONE_H100[0].profile
        trace = trace_of([request(n, 3.0, 8000, 1, ttft_slo_ms=1000.0) for n in range(50)], 3600.0)
        per_token_s = profile.compute_per_token_s + (profile.overhead_s + profile.compute_base_s) / 2048
        work_s = 8000 * (per_token_s + profile.attention_per_token_pair_s * 4000)
        assert strict_attainment_bound(trace, ONE_H100) == int(1.0 / work_s) / 50

    def test_bursts_add_up(self):
        bursts = [
            request(20 * burst + n, 100.0 * burst, 8000, 1, ttft_slo_ms=1000.0)
            for burst in range(5)
            for n in range(20)
        ]
        one = strict_attainment_bound(trace_of(bursts[:20]), ONE_H100)
        assert strict_attainment_bound(trace_of(bursts, 500.0), ONE_H100) == pytest.approx(one)
        assert one < 0.5

    def test_long_answers_are_bound_by_decoding(self):
        # Prefill is nothing, and each answer takes engine time for its context.
        requests = [request(n, 0.0, 30_000, 2000, blocks=range(1875), tpot_slo_ms=20.0) for n in range(400)]
        bound = strict_attainment_bound(trace_of(requests), ONE_H100)
        assert 0.0 < bound < 0.2

    def test_shared_prompts_are_computed_once(self):
        alone = trace_of([request(n, 0.0, 8001, blocks=range(n * 500, n * 500 + 500)) for n in range(50)])
        shared = trace_of([request(n, 0.0, 8001, blocks=range(500)) for n in range(50)])
        assert strict_attainment_bound(alone, ONE_H100) < strict_attainment_bound(shared, ONE_H100) == 1.0

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 1000),
        scale=st.sampled_from((0.5, 4.0, 20.0)),
        fleet_text=st.sampled_from(("1x8b-h100", "2x8b-h100+1x8b-l4", "1x8b-a100+1x8b-l4")),
        controller=st.sampled_from(
            (
                "min_ttft",
                "min_ttft_reject",
                "sjf_late",
                *(f"own {name}" for name in SCHEDULING_POLICIES.names),
            )
        ),
        slowness=st.sampled_from((0.5, 1.0, 2.0)),
    )
    def test_no_run_is_above_it(self, seed, scale, fleet_text, controller, slowness):
        draw = np.random.default_rng(seed)
        arrivals = np.sort(draw.uniform(0.0, 20.0, 60))
        requests = []
        for number, arrival_s in enumerate(arrivals):
            prompt = int(draw.lognormal(7.0, 1.2)) % 20_000 + 1
            shared = int(draw.integers(0, prompt // BLOCK + 1))
            family = int(draw.integers(1, 4)) * 10_000
            own = 10**6 * (number + 1)
            blocks = [*range(family, family + shared), *range(own, own + prompt // BLOCK - shared)]
            requests.append(request(number, float(arrival_s), prompt, int(draw.integers(1, 200)), blocks))
        trace = transform(trace_of(requests, 20.0), scale=scale)
        fleet = [dataclasses.replace(each, slowness=slowness) for each in read_fleet(fleet_text)]
        rule = ObjectiveRule(ttft_base_s=0.3, tpot_s=0.08)
        own = controller.removeprefix("own ")
        decides = (
            make_baseline(controller, seed)
            if own == controller
            else SchedulerController(SchedulerSetup(scheduling_policy=own, seed=seed), BLOCK)
        )
        result = Simulation(trace, fleet, decides, SimulationOptions(objectives=rule)).run()
        attainment = summarise(result.outcomes, fleet, duration_s=trace.duration_s).attainment
        assert attainment is not None
        assert attainment <= strict_attainment_bound(trace, fleet, rule) <= 1.0


def test_traces_without_an_order_of_arrival_are_refused():
    closed = dataclasses.replace(trace_of_blocks((1,)), is_closed_loop=True)
    for ask in (cache_bounds, limit_rate_per_s, strict_attainment_bound):
        with pytest.raises(ValueError, match="closed-loop"):
            ask(closed, ONE_H100)


def test_empty_traces_are_refused():
    for ask in (cache_bounds, strict_attainment_bound):
        with pytest.raises(ValueError, match="no requests"):
            ask(trace_of([]), ONE_H100)
