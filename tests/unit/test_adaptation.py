"""The adaptive policy: evidence, hysteresis, and what a change of mind does to what waits."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.adaptation import FEWEST_ARRIVALS, INSTANCE_LIMIT
from sagecp.core.policies.adaptive import AdaptivePolicy
from sagecp.core.policies.base import PolicyContext, PolicyVerdict
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.policy_replay import PolicyReplay, PolicyScore
from sagecp.core.receipts import run_again
from sagecp.core.recent_arrivals import ARRIVAL_LIMIT
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import PARAMETERS
from sagecp.core.types import PromptDigest, RequestPriority
from tests.support.core_world import (
    STEP_TIME,
    World,
    arrive,
    configure,
    dispatched,
    fail,
    healthy,
    make_instance,
)

INTERVAL_S = 20.0
FIRST = ("slo_aware", "nothing to judge by yet")


class AdaptiveWorld(World):
    """A fleet whose speed is known, and more requests than it serves at once."""

    def __init__(self, **parameters: float) -> None:
        named = {f"adaptive.{name}": value for name, value in parameters.items()}
        super().__init__(scheduling_policy="adaptive", parameters=named)
        self.number = 0

    def crowd(self, count: int = 100, duration_s: float = INTERVAL_S, **fields: Any) -> list[str]:
        """Let requests arrive, evenly."""
        lines = []
        for _ in range(count):
            self.now += duration_s / count
            self.number += 1
            lines += self.feed(arrive(f"r{self.number}", **fields))
        return lines

    def calm(self, count: int = 100, duration_s: float = INTERVAL_S) -> None:
        """Let requests arrive, evenly, each after the one before it has ended."""
        for _ in range(count):
            [request_id] = dispatched(self.crowd(1, duration_s / count))
            self.feed(ev.AttemptProgressed(request_id, 1), ev.AttemptSucceeded(request_id, 1, 5))

    def asked(self) -> PolicyReplay | None:
        """Tell the scheduler the time, once it is due; return what it wants replayed."""
        due_s = self.scheduler.adaptation.next_timer_s()
        if due_s is not None:
            self.now = max(self.now, due_s)
        effects = self.effects(ev.ClockAdvanced())
        return next((each.replay for each in effects if isinstance(each, fx.EvaluatePolicies)), None)

    def replay(self, **fields: Any) -> PolicyReplay:
        """Let a crowd arrive, and return the replay that is asked for then."""
        self.crowd(**fields)
        replay = self.asked()
        assert replay is not None
        return replay

    def answer(self, replay: PolicyReplay, **attainment: float | tuple[float, float]) -> list[str]:
        """Answer a replay: attainment, or attainment and cost, by policy."""
        self.now += 1.0
        scores = []
        for policy, value in attainment.items():
            share, usd = value if isinstance(value, tuple) else (value, None)
            scores.append(
                PolicyScore(
                    policy=policy, attainment=share, token_weighted_attainment=share, usd_per_good=usd
                )
            )
        return self.feed(ev.PoliciesEvaluated(replay.evaluation_id, tuple(scores)))

    @property
    def in_force(self) -> str:
        return self.scheduler.policy_in_force


def busy(limit: int = 1, **parameters: float) -> AdaptiveWorld:
    world = AdaptiveWorld(**parameters)
    world.feed(healthy("a", limit=limit, step_time=STEP_TIME))
    return world


def switches(lines: list[str]) -> list[str]:
    return [text.removeprefix("switch ") for text in lines if text.startswith("switch")]


# -- when it asks ----------------------------------------------------------------------------


def test_it_asks_every_interval_while_requests_wait() -> None:
    world = busy()
    assert world.scheduler.next_timer_s() is None
    world.crowd(FEWEST_ARRIVALS - 1, 10.0)
    assert world.scheduler.adaptation.next_timer_s() is None
    world.crowd(11, 5.0)
    first_due_s = 10.0 / (FEWEST_ARRIVALS - 1) + INTERVAL_S
    assert world.scheduler.next_timer_s() == pytest.approx(first_due_s)
    assert not world.feed(ev.ClockAdvanced())
    # Of those that arrived so far a part only fills the fleet.
    world.crowd(60, 4.0)
    replay = world.asked()
    assert replay is not None
    assert (replay.evaluation_id, replay.candidates) == (1, ("priority", "slo_aware"))
    assert world.scheduler.next_timer_s() == pytest.approx(first_due_s + INTERVAL_S)
    # When nothing arrives any more there is nothing to ask about, and no timer for it.
    world.feed(*(ev.RequestCancelled(f"r{number}") for number in range(1, world.number + 1)))
    while (timer_s := world.scheduler.next_timer_s()) is not None:
        world.now = timer_s
        world.asked()
    assert world.now < 200.0


def test_where_nobody_waits_the_order_does_not_matter() -> None:
    world = busy(limit=1000)
    world.calm()
    assert world.scheduler.live_count == 0
    assert world.asked() is None


@pytest.mark.parametrize(
    ("registrations", "policy"),
    [
        ([], "adaptive"),
        ([healthy("a", limit=1, step_time=STEP_TIME)], "slo_aware"),
        # Its speed is a guess.
        ([healthy("a", limit=1)], "adaptive"),
        ([ev.InstanceRegistered(make_instance("a", limit=1, step_time=STEP_TIME))], "adaptive"),
    ],
    ids=["no instance", "another policy", "unknown speed", "not ready"],
)
def test_it_asks_nothing_that_could_not_be_answered(registrations: list[ev.Event], policy: str) -> None:
    world = AdaptiveWorld()
    world.feed(configure(policy), *registrations)
    world.crowd(100, 60.0)
    assert world.asked() is None


def test_a_replay_is_what_happened() -> None:
    world = AdaptiveWorld()
    world.feed(healthy("a", limit=1, step_time=STEP_TIME, gpu_count=2, usd_per_gpu_hour=3.0, capacity=9000))
    digest = PromptDigest(2000, (7, 8, 9), 512)
    world.feed(arrive("done", prompt_digest=digest, max_tokens=50, tenant_id="t", session_id="s"))
    world.feed(ev.AttemptProgressed("done", 1), ev.AttemptSucceeded("done", 1, output_token_count=17))
    world.feed(arrive("hopeless", prompt_digest=digest, slo_deadline_ms=1.0))
    assert world.scheduler.find_request("hopeless") is None
    world.feed(arrive("refused"), fail("refused", retryable=False))
    world.feed(arrive("running", prompt_digest=digest), ev.AttemptProgressed("running", 1))
    replay = world.replay(priority=RequestPriority.HIGH, ttft_slo_ms=500.0, prompt_digest=digest)
    done, hopeless, _, *rest = replay.arrivals
    assert (done.arrival_s, done.output_token_count, done.output_known) == (0.0, 17, True)
    assert (done.tenant_id, done.session_id, done.max_tokens, done.model) == ("t", "s", 50, "m")
    assert (done.prompt_token_count, done.block_hashes, replay.block_token_count) == (2000, (7, 8, 9), 512)
    assert hopeless.deadline_s == 0.001
    assert len(rest) == 100
    assert {(each.priority, each.ttft_objective_s, each.output_known) for each in rest} == {
        (RequestPriority.HIGH, 0.5, False)
    }
    assert replay.duration_s == world.now
    assert 0.0 < replay.judged_from_s < replay.duration_s
    assert replay.class_weights[RequestPriority.CRITICAL] > replay.class_weights[RequestPriority.NORMAL]
    [instance] = replay.instances
    assert (instance.usd_per_hour, instance.key_value_token_capacity) == (6.0, 9000)
    assert (instance.slowness, instance.max_request_count) == (1.0, 1)
    # With prices and little prefill, money is worth a look.
    assert "cost_optimized" in replay.candidates


def test_memory_is_bounded_and_ended_requests_are_let_go() -> None:
    world = busy(limit=10_000)
    arrivals = world.scheduler.adaptation.arrivals
    for _ in range(3):
        world.calm(ARRIVAL_LIMIT, 10.0)
    assert len(arrivals) == ARRIVAL_LIMIT
    assert not arrivals._live
    assert all(entry.record is None for entry in arrivals._seen)
    world.now += 1000.0
    world.crowd(1, 0.0)
    assert len(arrivals) == len(arrivals._live) == 1


def test_a_refused_request_is_not_kept_alive() -> None:
    world = busy()
    world.crowd(1, slo_deadline_ms=0.1)
    arrivals = world.scheduler.adaptation.arrivals
    assert [(entry.record, entry.missed) for entry in arrivals._seen] == [(None, True)]
    assert not arrivals._live


def test_of_a_large_fleet_a_part_is_replayed_with_the_same_part_of_the_arrivals() -> None:
    world = AdaptiveWorld()
    count = 3 * INSTANCE_LIMIT
    world.feed(*(healthy(f"a{n:02}", limit=1, step_time=STEP_TIME) for n in range(count)))
    world.feed(healthy("other", limit=1, step_time=STEP_TIME, gpu_name="L4"))
    world.crowd(400)
    # It only now sees how large the fleet is.
    assert world.asked() is None
    replay = world.replay(count=400)
    assert len(replay.arrivals) == 100
    assert len(replay.instances) == count // 4 + 1
    assert {each.kind for each in replay.instances} == {0, 1}


# -- how it judges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([(0.80, 0.90)], []),
        ([(0.80, 0.90), (0.80, 0.90)], [(2, "slo_aware>priority")]),
        ([(0.80, 0.90), (0.90, 0.90), (0.80, 0.90)], []),
        ([(0.80, 0.90), (0.90, 0.80), (0.80, 0.90), (0.80, 0.83)], [(4, "slo_aware>priority")]),
        ([(0.80, 0.82)] * 5, []),
        ([(0.80, 0.90), (0.80, 0.90), (0.90, 0.80)], [(2, "slo_aware>priority")]),
        (
            [(0.80, 0.90), (0.80, 0.90), (0.90, 0.80), (0.95, 0.80)],
            [(2, "slo_aware>priority"), (4, "priority>slo_aware")],
        ),
    ],
    ids=["once", "twice", "interrupted", "late", "too little", "no way back at once", "back"],
)
def test_it_takes_a_clear_gain_twice_in_a_row(
    rounds: list[tuple[float, float]], expected: list[tuple[int, str]]
) -> None:
    world = busy()
    found = []
    for number, (slo_aware, priority) in enumerate(rounds, start=1):
        lines = world.answer(world.replay(), slo_aware=slo_aware, priority=priority)
        found += [(number, text) for text in switches(lines)]
    assert found == expected
    assert world.scheduler.adaptation.switch_count == len(expected)
    assert world.scheduler.adaptation.evaluation_count == len(rounds)


def test_gain_and_confirmations_are_parameters() -> None:
    world = busy(gain=0.2, confirmations=1)
    assert not switches(world.answer(world.replay(), slo_aware=0.7, priority=0.89))
    assert switches(world.answer(world.replay(), slo_aware=0.7, priority=0.91)) == ["slo_aware>priority"]


def test_only_the_answer_that_is_awaited_counts() -> None:
    world = busy(confirmations=1)
    first = world.replay()
    # The interval passes without an answer: nothing more is asked for meanwhile.
    world.crowd()
    assert world.asked() is None
    world.crowd()
    assert world.asked() is None
    second = world.replay()
    assert second.evaluation_id == first.evaluation_id + 1
    assert not switches(world.answer(first, slo_aware=0.1, priority=0.9))
    assert not world.feed(ev.PoliciesEvaluated(99, ()))
    assert switches(world.answer(second, slo_aware=0.1, priority=0.9)) == ["slo_aware>priority"]
    assert not switches(world.answer(second, slo_aware=0.9, priority=0.1))
    assert world.in_force == "priority"


def test_a_replay_that_failed_says_nothing() -> None:
    world = busy()
    assert not switches(world.answer(world.replay(), slo_aware=0.8, priority=0.9))
    assert not world.answer(world.replay())
    assert switches(world.answer(world.replay(), slo_aware=0.8, priority=0.9))


def test_a_calm_between_two_gains_breaks_the_row() -> None:
    world = busy()
    assert not switches(world.answer(world.replay(), slo_aware=0.8, priority=0.9))
    world.feed(*(ev.RequestCancelled(f"r{number}") for number in range(1, world.number + 1)))
    world.now += 100.0
    world.feed(healthy("roomy", limit=1000, step_time=STEP_TIME))
    world.calm()
    assert world.asked() is None
    world.feed(ev.InstanceDeregistered("roomy"))
    assert not switches(world.answer(world.replay(), slo_aware=0.8, priority=0.9))


def test_other_settings_make_an_answer_out_of_date_and_keep_the_verdict() -> None:
    world = busy()
    for _ in range(2):
        world.answer(world.replay(), slo_aware=0.8, priority=0.9)
    pending = world.replay()
    world.feed(configure("fifo"))
    assert world.in_force == "fifo"
    assert world.scheduler.policy_since_s is None
    assert not world.answer(pending, slo_aware=0.9, priority=0.1)
    world.feed(configure("adaptive"))
    assert world.in_force == "priority"
    assert world.scheduler.policy_since_s == world.scheduler.adaptation.verdict.since_s
    # What arrived meanwhile is known.
    assert len(world.replay().arrivals) > 120


@pytest.mark.parametrize(
    ("ruling", "scores", "expected"),
    [
        ("priority", {"priority": (0.9, 1.0), "cost_optimized": (0.9, 0.9)}, "cost_optimized"),
        ("priority", {"priority": (0.9, 1.0), "cost_optimized": (0.88, 0.5)}, "priority"),
        ("priority", {"priority": (0.9, 1.0), "cost_optimized": (0.9, 0.99)}, "priority"),
        ("priority", {"priority": (0.9, 1.0), "slo_aware": (0.9, 0.5)}, "priority"),
        ("priority", {"priority": (0.8, 1.0), "slo_aware": (0.95, 1.0), "cost_optimized": (0.948, 0.9)},
         "cost_optimized"),
        ("cost_optimized", {"priority": (0.9, 0.8), "cost_optimized": (0.9, 1.0)}, "priority"),
        ("cost_optimized", {"priority": (0.97, 2.0), "cost_optimized": (0.9, 1.0)}, "priority"),
        ("cost_optimized", {"priority": (0.9, 2.0), "cost_optimized": (0.9, 1.0)}, "cost_optimized"),
    ],
)  # fmt: skip
def test_money_decides_between_equals(
    ruling: str, scores: dict[str, tuple[float, float]], expected: str
) -> None:
    world = busy(confirmations=1)
    world.scheduler.adaptation.verdict = PolicyVerdict(ruling, "a test", 0.0)
    world.answer(world.replay(), **scores)
    assert world.scheduler.adaptation.verdict.policy == expected


# -- what a change of mind does ----------------------------------------------------------------


def test_it_says_what_is_in_force_and_why() -> None:
    world = busy()
    assert (world.in_force, world.scheduler.why_policy()) == FIRST
    assert world.scheduler.policy_since_s is None
    for _ in range(2):
        replay = world.replay()
        effects = world.scheduler.handle(
            ev.PoliciesEvaluated(
                replay.evaluation_id,
                tuple(
                    PolicyScore(policy=name, attainment=share, token_weighted_attainment=share)
                    for name, share in (("slo_aware", 0.88), ("priority", 0.941))
                ),
            ),
            world.now,
        )
    why = (
        "replaying the last 27 s (133 requests, 99% waited, 95% missed), 94.1% would have met their "
        "objectives against 88.0% under slo_aware, twice in a row"
    )
    assert fx.PolicySwitched("slo_aware", "priority", why) in effects
    assert (world.in_force, world.scheduler.why_policy()) == ("priority", why)
    assert world.scheduler.policy_since_s == world.now
    assert world.scheduler.settings.current.version == 1


def test_a_switch_puts_what_waits_in_another_order_and_loses_nothing() -> None:
    world = busy(confirmations=1)
    assert switches(world.answer(world.replay(), slo_aware=0.1, priority=0.9)) == ["slo_aware>priority"]
    replay = world.replay(prompt_digest=PromptDigest(20_000))
    world.feed(arrive("short", prompt_digest=PromptDigest(10), ttft_slo_ms=1000.0))
    before = {record.request_id for record in world.scheduler.queue}
    last = world.scheduler.queue.position(world.record("short"), world.now)
    assert last == len(before) - 1
    lines = world.answer(replay, priority=0.1, slo_aware=0.9)
    assert switches(lines) == ["priority>slo_aware"]
    started = set(dispatched(lines))
    assert {record.request_id for record in world.scheduler.queue} | started == before
    policy = world.scheduler._dispatcher.policy
    assert isinstance(policy, AdaptivePolicy)
    assert (policy.is_patient, policy.is_paced, policy.demotes) == (True, True, True)
    assert world.scheduler.queue.position(world.record("short"), world.now) < last
    [running] = [record for record in world.scheduler.requests() if not record.queued]
    lines = world.feed(
        ev.AttemptProgressed(running.request_id, 1), ev.AttemptSucceeded(running.request_id, 1, 5)
    )
    [request_id] = dispatched(lines)
    decision = world.record(request_id).decisions[-1]
    assert (decision.scheduling_policy, decision.policy_in_force) == ("adaptive", "slo_aware")
    chosen, scores = run_again(decision)
    assert (chosen, scores) == (decision.instance_id, decision.candidates)


@pytest.mark.parametrize("name", [name for name in SCHEDULING_POLICIES.names if name != "adaptive"])
def test_adaptive_is_the_policy_that_the_verdict_names(name: str) -> None:
    context = PolicyContext(PARAMETERS.resolve({}), ServiceBooks(), PolicyVerdict(name, "because"))
    adaptive, itself = AdaptivePolicy(context), SCHEDULING_POLICIES.get(name)(context)
    assert (adaptive.in_force, adaptive.why()) == (name, "because")
    assert type(adaptive.new_line()) is type(itself.new_line())
    assert (adaptive.is_patient, adaptive.is_paced, adaptive.demotes) == (
        itself.is_patient,
        itself.is_paced,
        itself.demotes,
    )
