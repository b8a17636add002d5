"""Baselines of the fleet simulator: each rule by hand, what they see, and whole runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.errors import UnknownNameError
from sagecp.core.types import EngineGauges
from sagecp.sim.fleet.baselines.base import Arrival, Baseline, BaselineParameters
from sagecp.sim.fleet.baselines.counting import RoundRobin
from sagecp.sim.fleet.baselines.ledger import Backlog, InstanceLedger, token_pairs
from sagecp.sim.fleet.baselines.predicted import LlmdPredictedLatency, MinTtft, Prediction
from sagecp.sim.fleet.baselines.registry import BASELINES, make_baseline
from sagecp.sim.fleet.baselines.views import InstanceState, ReportedView
from sagecp.sim.fleet.controller import Objectives
from sagecp.sim.fleet.fleet_file import read_fleet
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.simulation import Simulation, SimulationOptions, SimulationResult
from sagecp.sim.fleet.traces import Trace, TraceRequest

BLOCK = 16
THREE = read_fleet("3x8b-h100")


def request(
    name: str, arrival_s: float = 0.0, prompt: int = 1000, output: int = 10, **fields
) -> TraceRequest:
    return TraceRequest(
        request_id=name,
        arrival_s=arrival_s,
        prompt_token_count=prompt,
        output_token_count=output,
        **fields,
    )


def trace_of(*requests: TraceRequest, duration_s: float = 60.0) -> Trace:
    return Trace("tiny", BLOCK, requests, duration_s, False)


def run(controller, trace: Trace, fleet=THREE, **options) -> SimulationResult:
    return Simulation(trace, fleet, controller, SimulationOptions(**options)).run()


def placements(result: SimulationResult) -> dict[str, int]:
    rows = result.outcomes.as_arrays()
    return dict(zip(rows.request_ids, map(int, rows.instance_index), strict=True))


def load(count: int, gap_s: float = 0.05, seed: int = 1) -> Trace:
    """Return a load of mixed lengths, of which some share beginnings."""
    draw = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        prompt = int(draw.integers(50, 6000))
        shared = int(draw.integers(0, prompt // BLOCK + 1))
        family, own = int(draw.integers(1, 5)) * 10_000, 10**6 * (number + 1)
        blocks = (*range(family, family + shared), *range(own, own + prompt // BLOCK - shared))
        requests.append(
            request(
                f"r{number}",
                number * gap_s,
                prompt,
                int(draw.integers(1, 150)),
                block_hashes=blocks,
                session_id=f"s{number % 7}",
            )
        )
    return trace_of(*requests, duration_s=count * gap_s)


def state(**fields) -> InstanceState:
    known: dict[str, Any] = {
        "request_count": 0,
        "waiting_count": 0,
        "kv_usage": 0.0,
        "held_token_count": 0.0,
        "decode_count": 0,
        "decode_context_token_count": 0,
        "backlog": Backlog(),
        "is_prefilling": False,
        "slowness": 1.0,
    }
    return InstanceState(**(known | fields))


class GivenView:
    """Says what a test says."""

    def __init__(self, states):
        self.states = states

    def request_count(self, index):
        return self.states[index].request_count

    def queued_prefill_token_count(self, index, now):
        return self.states[index].backlog.token_count

    def state(self, index, now):
        return self.states[index]

    def reported(self, index, gauges):
        pass

    def dispatched(self, index, uncached_token_count):
        pass


class GivenPrefixes:
    def __init__(self, cached):
        self.cached = cached

    def cached_token_count(self, index, request):
        return self.cached[index]

    def dispatched(self, index, request):
        pass

    def finished(self, index, request):
        pass


class StillWorld:
    """A fleet in which nothing happens."""

    def __init__(self, fleet):
        self.instances = fleet
        self.engines = Simulation(trace_of(request("x")), fleet, make_baseline("random")).engines

    def start(self, request_id, instance_index):
        pass

    def abort(self, request_id):
        pass

    def end(self, request_id, state):
        pass


def baseline_of(name: str, fleet, seed: int = 0, **parameters) -> Baseline:
    """Return a baseline in front of a fleet in which nothing happens."""
    baseline = make_baseline(name, seed, **parameters)
    assert isinstance(baseline, Baseline)
    baseline.begin(StillWorld(fleet), 0.0)
    return baseline


def choice(name: str, states, cached=None, **parameters) -> int | None:
    """Return what a baseline chooses in a given situation."""
    baseline = baseline_of(name, read_fleet(f"{len(states)}x8b-h100"), **parameters)
    baseline.view = GivenView(states)
    baseline.prefixes = GivenPrefixes(cached or [0] * len(states))
    return baseline.choose(Arrival(request("new"), Objectives(1.0, 0.1), tuple(range(len(states))), 0.0))


class TestCounting:
    def test_round_robin_takes_turns(self):
        trace = trace_of(*(request(f"r{n}", n * 0.1) for n in range(7)))
        assert list(placements(run(make_baseline("round_robin"), trace)).values()).count(0) == 3
        by_arrival = placements(run(make_baseline("round_robin"), trace))
        assert [by_arrival[f"r{n}"] for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]

    def test_round_robin_skips_those_that_are_too_small(self):
        fleet = read_fleet("8b-h100+8b-l4+8b-h100")
        trace = trace_of(*(request(f"r{n}", n * 10.0, prompt=40_000) for n in range(4)))
        found = placements(run(make_baseline("round_robin"), trace, fleet))
        assert [found[f"r{n}"] for n in range(4)] == [0, 2, 0, 2]

    def test_random_uses_all_and_follows_its_seed(self):
        trace = load(60)
        first, again, other = (placements(run(make_baseline("random", seed), trace)) for seed in (1, 1, 2))
        assert first == again != other
        assert set(first.values()) == {0, 1, 2}

    def test_the_smaller_of_two(self):
        states = [state(request_count=count) for count in (5, 1)]
        assert choice("power_of_two", states) == 1

    def test_power_of_two_never_takes_the_most_loaded(self):
        states = [state(request_count=count) for count in (3, 9, 1, 4)]
        baseline = baseline_of("power_of_two", read_fleet("4x8b-h100"), 3)
        baseline.view = GivenView(states)
        arrival = Arrival(request("new"), Objectives(1.0, 0.1), (0, 1, 2, 3), 0.0)
        chosen = [baseline.choose(arrival) for _ in range(300)]
        assert set(chosen) == {0, 2, 3}
        # Of the 6 pairs, 3 have the least loaded, and 2 more the next.
        assert 120 < chosen.count(2) < 180
        assert 70 < chosen.count(0) < 130

    def test_the_fewest_requests(self):
        assert choice("least_connections", [state(request_count=count) for count in (5, 1, 3)]) == 1

    def test_the_fewest_tokens(self):
        assert choice("least_tokens", [state(backlog=Backlog(count)) for count in (50, 70, 10)]) == 2

    def test_equals_are_all_used(self):
        baseline = baseline_of("least_connections", THREE, 5)
        baseline.view = GivenView([state()] * 3)
        arrival = Arrival(request("new"), Objectives(1.0, 0.1), (0, 1, 2), 0.0)
        assert {baseline.choose(arrival) for _ in range(50)} == {0, 1, 2}

    def test_turns_by_speed_are_smooth(self):
        # The same engine, of which one takes twice as long: weights 2:1.
        fleet = read_fleet("2x8b-h100")
        fleet = (fleet[0], dataclasses.replace(fleet[1], slowness=2.0))
        trace = trace_of(*(request(f"r{n}", n * 5.0) for n in range(9)))
        found = placements(run(make_baseline("weighted_round_robin"), trace, fleet))
        assert [found[f"r{n}"] for n in range(9)] == [0, 1, 0] * 3

    def test_least_response_time_tries_all_then_prefers_the_fast(self):
        fleet = read_fleet("8b-l4+8b-h100")
        trace = trace_of(*(request(f"r{n}", n * 3.0) for n in range(10)))
        found = placements(run(make_baseline("least_response_time", 1), trace, fleet))
        order = [found[f"r{n}"] for n in range(10)]
        assert set(order[:2]) == {0, 1}
        assert order[2:] == [1] * 8


class TestConsistentHash:
    def test_a_session_stays_where_it_is_without_bound(self):
        trace = load(60)
        found = placements(run(make_baseline("consistent_hash", load_bound=0.0), trace))
        for session in range(7):
            assert len({found[f"r{n}"] for n in range(60) if n % 7 == session}) == 1
        assert len(set(found.values())) > 1

    def test_the_bound_moves_what_is_too_much(self):
        same = [request(f"r{n}", 0.0, session_id="one") for n in range(9)]
        free = placements(run(make_baseline("consistent_hash", load_bound=0.0), trace_of(*same)))
        bound = placements(run(make_baseline("consistent_hash", load_bound=1.0), trace_of(*same)))
        assert len(set(free.values())) == 1
        assert sorted(bound.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def test_without_session_the_first_blocks_decide(self):
        pairs = [
            request(f"{kind}{n}", n, block_hashes=(100 + n, 200 + n, 900 + 2 * n + (kind == "b")))
            for n in range(10)
            for kind in "ab"
        ]
        trace = trace_of(*sorted(pairs, key=lambda each: each.arrival_s))
        found = placements(run(make_baseline("consistent_hash", load_bound=0.0, key_block_count=2), trace))
        assert all(found[f"a{n}"] == found[f"b{n}"] for n in range(10))
        found = placements(run(make_baseline("consistent_hash", load_bound=0.0, key_block_count=3), trace))
        assert any(found[f"a{n}"] != found[f"b{n}"] for n in range(10))


class TestScored:
    @pytest.mark.parametrize(
        ("states", "cached", "weights", "chosen"),
        [
            # 2*queue + 2*(1 - kv) + 3*prefix: 0 + 2 + 3*0.9 against 2 + 2 + 0.
            ([state(waiting_count=4), state()], [900, 0], {}, 0),
            ([state(waiting_count=4), state()], [600, 0], {}, 1),
            ([state(kv_usage=0.9), state(kv_usage=0.5)], [0, 0], {}, 1),
            ([state(kv_usage=0.9), state(kv_usage=0.5)], [300, 0], {}, 0),
            ([state(waiting_count=4), state()], [900, 0], {"prefix_weight": 1.0}, 1),
            ([state(waiting_count=1), state(waiting_count=3)], [0, 100], {"queue_weight": 0.1}, 1),
        ],
    )
    def test_llmd_default(self, states, cached, weights, chosen):
        product = {"queue_weight": 2.0, "kv_weight": 2.0, "prefix_weight": 3.0}
        assert choice("llmd_default", states, cached, **(product | weights)) == chosen

    @pytest.mark.parametrize(
        ("states", "cached", "weights", "chosen"),
        [
            # What is cached saves its prefill and its memory: it is worth twice its tokens in use.
            ([state(held_token_count=1000.0), state()], [501, 0], {}, 0),
            ([state(held_token_count=1000.0), state()], [499, 0], {}, 1),
            # What is queued costs its prefill and its memory.
            ([state(backlog=Backlog(600.0)), state(held_token_count=1100.0)], [0, 0], {}, 1),
            ([state(backlog=Backlog(500.0)), state(held_token_count=1100.0)], [0, 0], {}, 0),
            ([state(held_token_count=1000.0), state()], [499, 0], {"overlap_weight": 2.0}, 0),
            ([state(held_token_count=1000.0), state()], [499, 0], {"prefill_weight": 2.0}, 0),
            # More than nothing is not left to prefill.
            ([state(held_token_count=2100.0), state()], [1000, 0], {"overlap_weight": 9.0}, 1),
        ],
    )
    def test_dynamo(self, states, cached, weights, chosen):
        product = {"overlap_weight": 1.0, "prefill_weight": 1.0}
        assert choice("dynamo", states, cached, **(product | weights)) == chosen

    @pytest.mark.parametrize(
        ("counts", "cached", "thresholds", "chosen"),
        [
            ((10, 0), (301, 0), {}, 0),
            ((65, 0), (301, 0), {}, 1),  # Out of balance.
            ((64, 0), (301, 0), {}, 0),
            ((200, 135), (301, 0), {}, 0),  # By 65, but not by half.
            ((200, 132), (301, 0), {}, 1),
            ((10, 0), (301, 0), {"balance_abs": 4}, 1),
            ((10, 0), (301, 400), {}, 1),  # The longer match.
        ],
    )
    def test_cache_aware(self, counts, cached, thresholds, chosen):
        product = {"balance_abs": 64, "balance_rel": 1.5, "match_threshold": 0.3}
        states = [state(request_count=count) for count in counts]
        assert choice("cache_aware", states, list(cached), **(product | thresholds)) == chosen

    def test_cache_aware_without_a_match_fills_the_smallest_tree(self):
        trace = trace_of(*(request(f"r{n}", n * 5.0, prompt) for n, prompt in enumerate((900, 500, 300, 10))))
        found = placements(run(make_baseline("cache_aware"), trace, read_fleet("2x8b-h100")))
        assert found["r0"] != found["r1"] == found["r2"] == found["r3"]

    @pytest.mark.parametrize("name", ["llmd_default", "dynamo", "cache_aware", "llmd_predicted_latency"])
    @pytest.mark.parametrize("source", ["engine", "dispatches"])
    def test_a_prompt_goes_where_its_beginning_is(self, name, source):
        blocks = tuple(range(100, 300))
        first = request("first", 0.0, 3300, block_hashes=blocks)
        others = [request(f"other{n}", 3.0 + n, 3300) for n in range(2)]
        again = request("again", 20.0, 3300, block_hashes=blocks)
        trace = trace_of(first, *others, again)
        found = placements(run(make_baseline(name, 3, prefix_source=source), trace))
        assert found["again"] == found["first"]

    def test_dispatches_tell_of_what_is_queued_and_the_engine_does_not(self):
        blocks = tuple(range(100, 300))
        trace = trace_of(*(request(name, 0.0, 3300, block_hashes=blocks) for name in ("a", "b")))
        thresholds = {"balance_abs": 64, "balance_rel": 1.5, "match_threshold": 0.3}
        for source, together in (("engine", False), ("dispatches", True)):
            found = placements(
                run(make_baseline("cache_aware", 0, prefix_source=source, **thresholds), trace)
            )
            assert (found["a"] == found["b"]) is together


def predicting(trace: Trace, fleet=THREE, name: str = "min_ttft", **options):
    """Run a baseline; return what it predicted of each placement, and the outcomes."""
    baseline = make_baseline(name)
    assert isinstance(baseline, MinTtft)
    predictions: dict[tuple[str, int], Prediction] = {}
    predict = baseline.predict

    def noted(arrival, index):
        found = predictions[arrival.request.request_id, index] = predict(arrival, index)
        return found

    baseline.predict = noted  # type: ignore[method-assign]
    rows = run(baseline, trace, fleet, **options).outcomes.as_arrays()
    chosen = [
        predictions[name, int(index)]
        for name, index in zip(rows.request_ids, rows.instance_index, strict=True)
    ]
    return chosen, rows


class TestPrediction:
    @pytest.mark.parametrize("prompt", [1, 100, 2048, 2049, 30_000])
    @pytest.mark.parametrize("profile", ["8b-h100", "70b-h100-tp4", "8b-l4"])
    def test_is_exact_on_an_idle_engine(self, prompt, profile):
        chosen, rows = predicting(trace_of(request("r", 1.0, prompt)), read_fleet(profile))
        assert chosen[0].ttft_s == pytest.approx(rows.ttft_s[0])

    def test_knows_how_far_a_prefill_is(self):
        # The second arrives while the first, of 30 steps, is somewhere inside.
        for arrival_s in (0.2, 0.9, 1.5):
            trace = trace_of(request("a", 0.0, 60_000), request("b", arrival_s, 5000))
            chosen, rows = predicting(trace, read_fleet("8b-h100"))
            assert rows.ttft_s[0] > arrival_s
            index = rows.request_ids.index("b")
            assert chosen[index].ttft_s == pytest.approx(rows.ttft_s[index], abs=0.08)

    def test_counts_on_what_is_cached(self):
        blocks = tuple(range(625))
        trace = trace_of(*(request(f"r{n}", 20.0 * n, 10_001, block_hashes=blocks) for n in range(2)))
        chosen, rows = predicting(trace, read_fleet("8b-h100"))
        assert [each.cached_token_count for each in chosen] == [0, 10_000]
        assert [each.ttft_s for each in chosen] == pytest.approx(list(rows.ttft_s))

    def test_is_close_under_load(self):
        chosen, rows = predicting(load(300, gap_s=0.06), read_fleet("3x8b-h100"))
        errors = np.log([each.ttft_s for each in chosen] / rows.ttft_s)
        assert abs(float(np.median(errors))) < 0.1
        assert float(np.quantile(abs(errors), 0.9)) < 0.7

    def test_time_per_token_is_exact_on_an_idle_engine(self):
        chosen, rows = predicting(trace_of(request("r", 0.0, 1000, 2)), read_fleet("8b-h100"))
        assert chosen[0].tpot_s == pytest.approx(rows.tpot_s[0], rel=1e-4)

    def test_slowness_is_seen(self):
        fleet = read_fleet("2x8b-h100")
        fleet = (dataclasses.replace(fleet[0], slowness=3.0), fleet[1])
        trace = trace_of(*(request(f"r{n}", 5.0 * n) for n in range(6)))
        assert set(placements(run(make_baseline("min_ttft"), trace, fleet)).values()) == {1}

    def test_the_faster_kind_until_it_is_full(self):
        fleet = read_fleet("8b-l4+8b-h100")
        few = trace_of(*(request(f"r{n}", 5.0 * n) for n in range(5)))
        many = trace_of(*(request(f"r{n}", 0.0, 4000) for n in range(30)))
        assert set(placements(run(make_baseline("min_ttft"), few, fleet)).values()) == {1}
        found = list(placements(run(make_baseline("min_ttft"), many, fleet)).values())
        assert 0 < found.count(0) < 8

    def test_rejects_what_would_miss(self):
        trace = trace_of(*(request(f"r{n}", 0.0, 20_000, ttft_slo_ms=1500.0) for n in range(6)))
        kept = run(make_baseline("min_ttft"), trace, read_fleet("8b-h100")).outcomes.as_arrays()
        rows = run(make_baseline("min_ttft_reject"), trace, read_fleet("8b-h100")).outcomes.as_arrays()
        rejected = rows.state == OutcomeState.REJECTED
        assert 0 < rejected.sum() < 6
        assert rows.good[~rejected].all()
        assert rows.good.sum() == kept.good.sum()
        wider = run(make_baseline("min_ttft_reject", ttft_margin=3.0), trace, read_fleet("8b-h100"))
        assert (wider.outcomes.as_arrays().state == OutcomeState.REJECTED).sum() < rejected.sum()

    def test_rejects_by_time_per_token_if_told_to(self):
        # A decode step takes 8 ms at least.
        trace = trace_of(request("r", 0.0, tpot_slo_ms=5.0))
        for margin, state_ in ((0.0, OutcomeState.SUCCEEDED), (1.0, OutcomeState.REJECTED)):
            rows = run(make_baseline("min_ttft_reject", tpot_margin=margin), trace).outcomes.as_arrays()
            assert rows.state[0] == state_


class GivenPredictions(LlmdPredictedLatency):
    """Takes predictions from a test."""

    given: tuple[Prediction, ...] = ()

    def predict(self, arrival, index):
        return self.given[index]


class TestPredictedLatency:
    @pytest.mark.parametrize(
        ("predictions", "parameters", "chosen"),
        [
            # Objectives: 1 s and 0.1 s.
            ([(0.9, 0.05, 0), (0.2, 0.05, 0)], {}, 1),
            ([(0.9, 0.05, 0), (0.2, 0.05, 0)], {"headroom": "least"}, 0),
            # What misses one objective is not considered while another meets both.
            ([(0.1, 0.11, 0), (0.9, 0.09, 0)], {}, 1),
            ([(1.1, 0.01, 0), (0.9, 0.09, 0)], {"headroom": "least"}, 1),
            # Where all miss, the one that misses by least, whatever the strategy.
            ([(1.5, 0.05, 0), (3.0, 0.05, 0)], {"headroom": "least"}, 0),
            # TTFT 0.8, TPOT 0.2.
            ([(0.5, 0.01, 0), (0.2, 0.09, 0)], {}, 1),
            ([(0.5, 0.01, 0), (0.2, 0.09, 0)], {"ttft_weight": 0.3}, 0),
            # The gates: all but all of the prompt, then most of it, then none.
            ([(0.9, 0.05, 990), (0.5, 0.05, 900), (0.1, 0.05, 0)], {}, 0),
            ([(0.9, 0.05, 980), (0.5, 0.05, 900), (0.1, 0.05, 0)], {}, 1),
            ([(0.9, 0.05, 700), (0.5, 0.05, 600), (0.1, 0.05, 0)], {}, 2),
            ([(0.9, 0.05, 990), (0.5, 0.05, 900), (0.1, 0.05, 0)], {"affinity_gates": ()}, 2),
            # Unless the holders are so much slower.
            ([(9.9, 0.05, 990), (0.5, 0.05, 900), (0.1, 0.05, 0)], {}, 1),
            ([(9.9, 0.05, 990), (0.5, 0.05, 900), (0.1, 0.05, 0)], {"affinity_penalty_s": 0.1}, 2),
        ],
    )
    def test_choice(self, predictions, parameters, chosen):
        baseline = make_baseline(
            "llmd_predicted_latency", **({"affinity_gates": (0.99, 0.80), "ttft_weight": 0.8} | parameters)
        )
        assert isinstance(baseline, LlmdPredictedLatency)
        given_ = GivenPredictions(baseline._settings)
        given_.given = tuple(Prediction(*each) for each in predictions)
        arrival = Arrival(request("new"), Objectives(1.0, 0.1), tuple(range(len(predictions))), 0.0)
        assert given_.choose(arrival) == chosen


class TestLedger:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 2)), max_size=20))
    def test_sums_are_of_what_is_open(self, dispatches):
        ledger = InstanceLedger()
        open_prefills, answers = [], []
        for number, (prompt, cached, stage) in enumerate(dispatches):
            uncached = max(1, prompt - cached)
            ledger.dispatched(f"r{number}", prompt, prompt - uncached, float(number))
            if stage:
                ledger.first_token(f"r{number}", number + 0.5)
            if stage == 2:
                ledger.finished(f"r{number}")
            elif stage == 1:
                answers.append(prompt)
            else:
                open_prefills.append((uncached, prompt))
        assert ledger.prefill_count == len(open_prefills)
        assert ledger.answer_count == len(answers)
        assert ledger.context_token_count == sum(answers)
        assert ledger.request_count == len(answers) + len(open_prefills)
        backlog = ledger.backlog()
        assert backlog.token_count == sum(uncached for uncached, _ in open_prefills)
        pairs = sum(token_pairs(*each) for each in open_prefills)
        assert backlog.token_pairs == pytest.approx(pairs, abs=1e-3)
        whole = ledger.exact_backlog(0, sum(prompt for _, prompt in open_prefills))
        assert whole.token_count == backlog.token_count

    def test_exact_backlog_follows_the_engine(self):
        ledger = InstanceLedger()
        ledger.dispatched("a", 1000, 200, 0.0)
        ledger.dispatched("b", 500, 100, 0.0)
        # Of the first, 300 tokens are left; the second waits.
        assert ledger.exact_backlog(1, 300 + 500) == Backlog(
            300 + 400, token_pairs(300, 1000) + token_pairs(400, 500)
        )
        # And another starts again after a preemption, with 700 tokens.
        assert ledger.exact_backlog(1, 800 + 500 + 700).token_count == 800 + 400 + 700

    def test_duty_follows_the_last_seconds(self):
        ledger = InstanceLedger()
        assert ledger.prefill_duty(10.0) == 0.0
        ledger.dispatched("a", 1000, 0, 10.0)
        assert ledger.prefill_duty(15.0) == pytest.approx(1 - np.exp(-1))
        ledger.first_token("a", 15.0)
        assert ledger.prefill_duty(20.0) == pytest.approx((1 - np.exp(-1)) * np.exp(-1))

    def test_response_time_is_a_moving_mean(self):
        ledger = InstanceLedger()
        assert ledger.ttft_s is None
        for name, duration_s, mean_s in (("a", 2.0, 2.0), ("b", 4.0, 2.2)):
            ledger.dispatched(name, 10, 0, 1.0)
            ledger.first_token(name, 1.0 + duration_s)
            assert ledger.ttft_s == pytest.approx(mean_s)


class TestWhatIsSeen:
    def test_reports_count_with_the_dispatches_since(self):
        world = StillWorld(read_fleet("2x8b-h100"))
        ledgers = [InstanceLedger(), InstanceLedger()]
        view = ReportedView(world, ledgers)
        capacity = world.instances[0].kv_token_capacity
        ledgers[0].dispatched("a", 1000, 0, 0.0)
        view.dispatched(0, 1000)
        assert view.state(0, 0.0).waiting_count == 1
        view.reported(0, EngineGauges(waiting_request_count=3, key_value_cache_usage=0.5))
        assert (view.state(0, 0.0).waiting_count, view.state(0, 0.0).kv_usage) == (3, 0.5)
        ledgers[0].dispatched("b", 4100, 0, 0.0)
        view.dispatched(0, 4100)
        seen = view.state(0, 0.0)
        assert seen.waiting_count == 4
        assert seen.kv_usage == pytest.approx(0.5 + 4100 / capacity)
        assert seen.backlog.token_count == view.queued_prefill_token_count(0, 0.0) == 5100
        assert view.request_count(0) == 2
        assert view.state(1, 0.0) == state()
        view.reported(0, EngineGauges())
        assert view.state(0, 0.0).waiting_count == 2

    def test_looking_changes_nothing(self):
        class Looking(RoundRobin):
            def choose(self, arrival):
                for index in arrival.candidates:
                    self.view.state(index, arrival.now)
                    self.view.queued_prefill_token_count(index, arrival.now)
                    self.prefixes.cached_token_count(index, arrival.request)
                return super().choose(arrival)

        trace = load(150)
        runs = [run(kind(BaselineParameters()), trace) for kind in (RoundRobin, Looking)]
        assert_equal_runs(*runs)

    def test_looking_shows_the_present(self):
        seen = []

        class Looking(RoundRobin):
            def choose(self, arrival):
                seen.append(self.view.state(0, arrival.now))
                return 0

        trace = trace_of(request("a", 0.0, 100_000), *(request(f"b{n}", n, 10) for n in (1, 2, 3)))
        run(Looking(BaselineParameters()), trace, read_fleet("8b-h100"))
        tokens = [each.backlog.token_count for each in seen[1:]]
        assert tokens == sorted(tokens, reverse=True)
        assert tokens[0] > tokens[1] + 10_000 > tokens[2] + 20_000
        usage = [each.kv_usage for each in seen[1:]]
        assert usage == sorted(usage)
        assert usage[0] > 0.0


def assert_equal_runs(first: SimulationResult, second: SimulationResult) -> None:
    assert first.end_s == second.end_s
    one, other = first.outcomes.as_arrays(), second.outcomes.as_arrays()
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, tuple):
            assert a == b
        else:
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name


class TestWholeRuns:
    @pytest.mark.parametrize("name", BASELINES)
    @pytest.mark.parametrize("parameters", [{}, {"prefix_source": "dispatches"}, {"stale": True}])
    def test_every_baseline_serves_all_and_repeats_itself(self, name, parameters):
        trace = load(80)
        fleet = read_fleet("2x8b-h100+1x8b-l4")
        options = {"gauge_interval_s": 0.5, "gauge_delay_s": 0.2, "event_delay_s": 0.01}
        first, again = (run(make_baseline(name, 4, **parameters), trace, fleet, **options) for _ in range(2))
        assert_equal_runs(first, again)
        rows = first.outcomes.as_arrays()
        assert len(rows.request_ids) == 80
        served = rows.state == OutcomeState.SUCCEEDED
        assert served.all() or name == "min_ttft_reject"
        assert served.mean() > 0.5
        if not name.endswith("_late"):
            assert np.array_equal(rows.dispatch_s[served], rows.arrival_s[served])

    def test_under_pressure_of_memory(self):
        fleet = read_fleet("[[instance]]\nprofile = '8b-h100'\ncount = 2\nkv_token_capacity = 9000\n")
        result = run(make_baseline("min_ttft"), load(120, gap_s=0.02), fleet)
        assert result.preemption_count > 0
        assert (result.outcomes.as_arrays().state == OutcomeState.SUCCEEDED).all()

    @pytest.mark.parametrize("fields", [{"prompt": 500_000}, {"model": "another"}])
    def test_what_nobody_can_serve_is_rejected(self, fields):
        rows = run(make_baseline("round_robin"), trace_of(request("r", **fields))).outcomes.as_arrays()
        assert rows.state[0] == OutcomeState.REJECTED

    def test_sessions_go_on_after_a_rejection(self):
        trace = Trace(
            "closed",
            BLOCK,
            (request("a", prompt=500_000), request("b", after="a", think_s=1.0)),
            10.0,
            True,
        )
        rows = run(make_baseline("random"), trace).outcomes.as_arrays()
        assert dict(zip(rows.request_ids, rows.state, strict=True)) == {
            "a": OutcomeState.REJECTED,
            "b": OutcomeState.SUCCEEDED,
        }


class TestRegistry:
    def test_names(self):
        for name in BASELINES:
            assert make_baseline(name).name == name
        assert make_baseline("dynamo", name="mine").name == "mine"

    def test_unknown_names_list_the_known(self):
        with pytest.raises(UnknownNameError, match="round_robin"):
            make_baseline("fastest")

    @pytest.mark.parametrize(
        ("name", "parameters", "message"),
        [
            ("dynamo", {"temperature": 0.0}, "overlap_weight"),
            ("dynamo", {"prefix_source": "gossip"}, "engine, dispatches"),
            ("llmd_predicted_latency", {"headroom": "some"}, "most, least"),
            ("llmd_predicted_latency", {"ttft_weight": 1.5}, "from 0 to 1"),
            ("llmd_predicted_latency", {"prefix_source": "gossip"}, "engine, dispatches"),
            ("consistent_hash", {"load_bound": 0.5}, "at least 1"),
            ("consistent_hash", {"key_block_count": 0}, "at least 1"),
        ],
    )
    def test_wrong_parameters_are_refused(self, name, parameters, message):
        with pytest.raises(ValueError, match=message):
            make_baseline(name, **parameters)
