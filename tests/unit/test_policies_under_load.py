"""What policies promise, with arrivals, engines and time: order, shares, no starvation, placement."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.request import RequestRecord
from sagecp.core.types import PromptDigest, RequestPriority, RequestState
from tests.support.core_world import STEP_TIME, Traffic, World, arrive, configure, healthy

P = RequestPriority
# Longer than any backlog here: nothing expires.
QUEUE_TIMEOUT_S = 1e6


def busy_world(policy: str, *instances: str, limit: int = 4, **config: Any) -> Traffic:
    """Equal instances whose speed is known."""
    world = World(scheduling_policy=policy, queue_timeout_s=QUEUE_TIMEOUT_S, **config)
    for instance_id in instances:
        world.feed(healthy(instance_id, step_time=STEP_TIME, limit=limit, usd_per_gpu_hour=2.0))
    return Traffic(world)


def add(
    traffic: Traffic, request_id: str, time_s: float, token_count: int = 2000, model: str = "m", **fields: Any
) -> None:
    digest = PromptDigest(token_count, (), 256)
    fields.setdefault("max_tokens", 4)
    traffic.add(time_s, arrive(request_id, model, prompt_digest=digest, **fields))


def work_s(token_count: int = 2000) -> float:
    """Engine time of a prompt: an instance with one place serves about one in this time."""
    return STEP_TIME.work_s(token_count, token_count, 2048)


def sent(traffic: Traffic, prefix: str = "") -> list[RequestRecord]:
    """The requests of a kind in the order in which they were sent out."""
    return [each.record for each in traffic.dispatches if each.record.request_id.startswith(prefix)]


def cost_s(traffic: Traffic, prefix: str) -> float:
    """Engine time that the requests of a kind were given."""
    return sum(each.cost_s for each in traffic.dispatches if each.record.request_id.startswith(prefix))


# -- fifo ----------------------------------------------------------------------------------


def test_fifo_sends_each_models_requests_strictly_by_arrival() -> None:
    traffic = busy_world("fifo")
    for instance_id, model in (("a", "m1"), ("b", "m2"), ("c", "m1")):
        traffic.world.feed(healthy(instance_id, model, step_time=STEP_TIME, limit=2))
    for number in range(400):
        add(
            traffic,
            f"r{number}",
            0.02 * number,
            # Of all sizes, classes, tenants and objectives.
            token_count=100 + 997 * number % 5000,
            model=("m1", "m2")[number % 3 == 0],
            priority=list(P)[number % 5],
            tenant_id=f"t{number % 4}",
            ttft_slo_ms=(None, 100.0, 60_000.0)[number % 3],
        )
    traffic.run()
    assert len(traffic.dispatches) == 400
    for model in ("m1", "m2"):
        sequences = [record.sequence for record in sent(traffic) if record.model == model]
        assert sequences == sorted(sequences)


# -- priority ------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [P.HIGH, P.NORMAL, P.LOW, P.BACKGROUND])
def test_a_flood_of_critical_requests_starves_nobody(priority: RequestPriority) -> None:
    """Twice what the instance can serve: only those that came within the head start go first."""
    boosts_s = {P.CRITICAL: 10.0, P.HIGH: 3.0, P.NORMAL: 0.0, P.LOW: -6.0, P.BACKGROUND: -15.0}
    parameters = {f"priority.boost_{each.name.lower()}_s": boost_s for each, boost_s in boosts_s.items()}
    traffic = busy_world("priority", "a", limit=1, parameters=parameters)
    interval_s = work_s() / 2
    for number in range(int(90.0 / interval_s)):
        add(traffic, f"flood{number}", interval_s * number, priority=P.CRITICAL)
    add(traffic, "patient", 5.0, priority=priority)
    traffic.run()
    order = sent(traffic)
    [place] = [number for number, record in enumerate(order) if record.request_id == "patient"]
    head_start_s = boosts_s[P.CRITICAL] - boosts_s[priority]
    before = {record.arrival_s for record in order[:place]}
    assert max(before) < 5.0 + head_start_s
    assert all(record.arrival_s >= 5.0 + head_start_s - interval_s for record in order[place + 1 :])
    # The flood went on: it was not served because there was nothing else.
    assert place < len(order) // 2 + 1


def test_tenants_of_a_class_share_an_overloaded_fleet_by_weight() -> None:
    """The lag between tenants that always wait is two of the largest costs per weight at most."""
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    parameters = {f"priority.weight.{tenant}": weight for tenant, weight in weights.items()}
    traffic = busy_world("priority", "a", "b", limit=2, parameters=parameters)
    sizes = {"one": 500, "two": 2000, "four": 6000}
    for tenant, size in sizes.items():
        for number in range(2000):
            add(traffic, f"{tenant}{number}", 0.01 * number, size, tenant_id=tenant)
    traffic.run(until_s=30.0)
    assert {record.metadata.tenant_id for record in traffic.world.scheduler.queue} == weights.keys()
    served_s = dict.fromkeys(weights, 0.0)
    largest_s = 0.0
    for dispatch in traffic.dispatches:
        tenant = dispatch.record.metadata.tenant_id
        charged_s = dispatch.cost_s / weights[tenant]
        largest_s = max(largest_s, charged_s)
        served_s[tenant] += charged_s
        assert max(served_s.values()) - min(served_s.values()) <= 2.0 * largest_s
    assert min(served_s.values()) > 10.0 * largest_s


def test_a_tenant_that_was_idle_gets_its_share_from_then_on_and_no_more() -> None:
    traffic = busy_world("priority", "a", limit=1)
    interval_s = work_s() / 3
    for number in range(900):
        add(traffic, f"steady{number}", interval_s * number, tenant_id="steady")
        if number >= 300:
            add(traffic, f"late{number}", interval_s * number, tenant_id="late")
    traffic.run(until_s=interval_s * 900)
    order = [record.metadata.tenant_id for record in sent(traffic)]
    since = order.index("late")
    assert since > 50
    turns = Counter(order[since:])
    assert abs(turns["late"] - turns["steady"]) <= 2


# -- slo_aware -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["slo_aware", "cost_optimized"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_under_permanent_overload_the_hopeless_get_their_share(policy: str, share: float) -> None:
    """CRITICAL requests, which are never demoted, come twice as fast as they can be served."""
    parameters = {f"{policy}.best_effort_share": share, "dispatch.prefill_window_s": 0.05}
    traffic = busy_world(policy, "a", limit=1, parameters=parameters)
    interval_s = work_s() / 2
    for number in range(1600):
        add(traffic, f"critical{number}", interval_s * number, priority=P.CRITICAL)
    for number in range(400):
        add(traffic, f"hopeless{number}", 0.01 * number, 5000, ttft_slo_ms=1.0)
    traffic.run(until_s=interval_s * 1600)
    waiting = Counter(record.metadata.priority for record in traffic.world.scheduler.queue)
    assert waiting[P.CRITICAL] > 100, "the overload is over"
    assert waiting[P.NORMAL] > 10
    critical, hopeless = sent(traffic, "critical"), sent(traffic, "hopeless")
    assert not any(record.demoted for record in critical)
    assert all(record.demoted for record in hopeless)
    # The oldest first, so that each has its turn.
    assert [record.request_id for record in hopeless] == [f"hopeless{n}" for n in range(len(hopeless))]
    used_s = cost_s(traffic, "hopeless")
    assert used_s / (used_s + cost_s(traffic, "critical")) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("policy", ["slo_aware", "cost_optimized", "priority", "adaptive", "fifo"])
def test_after_an_overload_everybody_was_served(policy: str) -> None:
    """Short and long, hopeless and not: nothing waits for ever, and nothing waits for nothing."""
    traffic = busy_world(policy, "a", "b", limit=8)
    interval_s = work_s() / 6
    for number in range(600):
        add(
            traffic,
            f"r{number}",
            interval_s * number,
            token_count=(500, 2000, 500, 12_000)[number % 4],
            priority=list(P)[number % 5],
            ttft_slo_ms=(None, 50.0, 1000.0)[number % 3],
            max_tokens=(4, 40)[number % 2],
        )
    traffic.run()
    assert Counter(traffic.end_states.values()) == {RequestState.SUCCEEDED: 600}
    assert traffic.world.scheduler.live_count == 0


def test_slo_aware_meets_more_objectives_in_an_overload_than_fifo() -> None:
    met = {}
    for policy in ("fifo", "slo_aware"):
        traffic = busy_world(policy, "a", "b", limit=64)
        interval_s = work_s(2000) / 2 / 1.5
        for number in range(600):
            add(traffic, f"r{number}", interval_s * number, (500, 500, 500, 6500)[number % 4])
        traffic.run()
        met[policy] = sum(
            record.first_token_s is not None
            and record.first_token_s - record.arrival_s <= record.ttft_objective_s
            for record in sent(traffic)
        )
    assert met["slo_aware"] > 1.3 * met["fifo"]


# -- cost_optimized ------------------------------------------------------------------------


def shares_of(traffic: Traffic) -> list[float]:
    """Shares of the dispatches by instance, the largest first."""
    counts = Counter(each.instance_id for each in traffic.dispatches)
    return sorted((count / len(traffic.dispatches) for count in counts.values()), reverse=True)


@pytest.mark.parametrize("fill_weight", [0.05, 0.0])
@pytest.mark.parametrize("gap", [10.0, 40.0])
def test_cost_optimized_fills_one_of_equal_instances_while_there_is_little_to_do(
    gap: float, fill_weight: float
) -> None:
    """The others run empty, and can be released. Without the gradient they take turns.

    Answers are over before the next request comes: all are idle whenever one is chosen.
    """
    traffic = busy_world(
        "cost_optimized", *"abcd", limit=16, parameters={"cost_optimized.fill_weight": fill_weight}
    )
    for number in range(200):
        add(traffic, f"r{number}", gap * work_s() * number)
    traffic.run()
    assert shares_of(traffic)[0] == (1.0 if fill_weight else 0.25)


def test_cost_optimized_adds_to_the_fullest_instance_while_answers_overlap() -> None:
    traffic = busy_world("cost_optimized", *"abcd", limit=16)
    for number in range(200):
        add(traffic, f"r{number}", 3.0 * work_s() * number, max_tokens=200)
    traffic.run()
    assert shares_of(traffic)[0] == 1.0


def test_cost_optimized_uses_every_instance_when_there_is_much_to_do() -> None:
    traffic = busy_world("cost_optimized", *"abcd", limit=16)
    for number in range(600):
        add(traffic, f"r{number}", work_s() / 3.6 * number, max_tokens=20)
    traffic.run()
    assert shares_of(traffic)[-1] >= 0.15
    assert len(shares_of(traffic)) == 4


# -- changes while requests wait -----------------------------------------------------------


def order_after_change(before: str, after: str, change_s: float = 3.0) -> list[str]:
    """What waits behind a long prompt, all alone on its instance, and is sent when that is done."""
    traffic = busy_world(before, "a", limit=1)
    add(traffic, "blocker", 0.0, 60_000, tenant_id="blocker")
    for number in range(80):
        add(
            traffic,
            f"r{number}",
            0.01 + 0.02 * (37 * number % 80),
            token_count=(300, 2000, 800)[number % 3],
            priority=list(P)[number % 5],
            tenant_id=f"t{number % 4}",
            # All within reach, though some are nearer.
            ttft_slo_ms=(120_000.0, 200_000.0, 150_000.0)[number % 3],
        )
    traffic.add(change_s, configure(after))
    traffic.run(until_s=change_s)
    assert len(traffic.world.scheduler.queue) == 80
    traffic.run()
    assert Counter(traffic.end_states.values()) == {RequestState.SUCCEEDED: 81}
    return [record.request_id for record in sent(traffic, "r")]


@pytest.mark.parametrize("after", SCHEDULING_POLICIES.names)
@pytest.mark.parametrize("before", SCHEDULING_POLICIES.names)
def test_a_change_of_policy_orders_what_waits_as_if_it_had_always_been_in_force(
    before: str, after: str
) -> None:
    assert order_after_change(before, after) == order_after_change(after, after)


def test_the_policies_that_are_changed_between_differ_in_their_orders() -> None:
    orders = {policy: order_after_change(policy, policy) for policy in SCHEDULING_POLICIES.names}
    assert orders.pop("adaptive") == orders["slo_aware"], "it begins with this one"
    assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_adaptive_may_change_its_mind_while_requests_wait() -> None:
    parameters = {"adaptive.interval_s": 5.0, "adaptive.confirmations": 1.0}
    traffic = busy_world("adaptive", "a", limit=4, parameters=parameters)
    traffic.favourite = "priority"
    for number in range(300):
        add(traffic, f"r{number}", 0.05 * number, (500, 2000, 6000)[number % 3], priority=list(P)[number % 5])
    traffic.run(until_s=3.0)
    assert traffic.world.scheduler.policy_in_force == "slo_aware"
    traffic.run(until_s=14.0)
    assert traffic.world.scheduler.policy_in_force == "priority"
    assert len(traffic.world.scheduler.queue) > 20
    traffic.run()
    assert Counter(traffic.end_states.values()) == {RequestState.SUCCEEDED: 300}
