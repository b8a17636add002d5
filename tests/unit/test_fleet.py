"""The fleet table: registration, indexes, room, leases, and what a record learns."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.drain_order import DrainOrder
from sagecp.core.errors import (
    FleetFullError,
    InstanceNotFoundError,
    InvalidRequestError,
    StaleIncarnationError,
)
from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import KEY_VALUE_USAGE_LIMIT, REFERENCE_OUTPUT_TOKEN_COUNT, InstanceRecord
from sagecp.core.types import EngineGauges, ExecutionInstance, InstanceState, SamplingParameters
from tests.support.core_world import make_instance, make_instance_record, make_record


def make_fleet(max_instance_count: int = 10) -> Fleet:
    return Fleet(max_instance_count, default_concurrency_limit=4)


def make_ready(fleet: Fleet, spec: ExecutionInstance, incarnation: int = 0) -> InstanceRecord:
    record = fleet.add(spec, incarnation, now=0.0)
    record.machine.to(InstanceState.READY)
    fleet.settle(record)
    return record


def load(record: InstanceRecord, count: int, **fields: Any) -> None:
    for number in range(count):
        request = make_record(f"{record.instance_id}-{number}", **fields)
        request.instance_id = record.instance_id
        record.take(request, number + 1)


# -- registration --------------------------------------------------------------------


def test_registered_instances_are_found_by_id_and_by_every_served_name() -> None:
    fleet = make_fleet()
    a = fleet.add(make_instance("a", "m", model_aliases=("m-latest", "m")), 0, now=0.0)
    b = fleet.add(make_instance("b", "m"), 0, now=0.0)
    assert fleet.models() == ("m", "m-latest")
    assert fleet.serving("m") == [a, b]
    assert fleet.serving("m-latest") == [a]
    assert fleet.serving("n") == []
    assert fleet.serves("m-latest")
    assert not fleet.serves("n")
    assert fleet.find("a") is a
    assert fleet.find("z") is None
    assert list(fleet) == [a, b]
    assert len(fleet) == 2
    fleet.remove(a)
    assert fleet.models() == ("m",)
    assert not fleet.serves("m-latest")
    assert fleet.find("a") is None


def test_the_only_model_is_the_one_that_all_have_first() -> None:
    fleet = make_fleet()
    assert fleet.only_model() is None
    fleet.add(make_instance("a", "m", model_aliases=("x",)), 0, now=0.0)
    b = fleet.add(make_instance("b", "m"), 0, now=0.0)
    assert fleet.only_model() == "m"
    fleet.add(make_instance("b", "n", model_aliases=("m",)), 0, now=0.0)
    assert fleet.only_model() is None
    assert fleet.find("b") is not b
    fleet.remove(fleet.get("a"))
    assert fleet.only_model() == "n"


def test_a_new_registration_replaces_the_names_that_were_served() -> None:
    fleet = make_fleet()
    make_ready(fleet, make_instance("a", "old", model_aliases=("x",)))
    make_ready(fleet, make_instance("a", "new"))
    assert fleet.models() == ("new",)
    assert fleet.with_room_for(make_record(model="old")) == []
    assert [i.instance_id for i in fleet.with_room_for(make_record(model="new"))] == ["a"]


@pytest.mark.parametrize(("registered", "offered"), [(5, 4), (1, 0)])
def test_an_older_incarnation_may_not_take_over(registered: int, offered: int) -> None:
    fleet = make_fleet()
    fleet.add(make_instance("a"), registered, now=0.0)
    with pytest.raises(StaleIncarnationError, match=f"incarnation {registered}; {offered} is older"):
        fleet.add(make_instance("a"), offered, now=1.0)
    assert fleet.get("a").incarnation == registered


@pytest.mark.parametrize("offered", [5, 6])
def test_the_same_or_a_newer_incarnation_takes_over_what_runs(offered: int) -> None:
    fleet = make_fleet()
    old = make_ready(fleet, make_instance("a", capacity=1000), 5)
    load(old, 2, max_tokens=16)
    old.learn(2.0, 0.5, output_token_count=101)
    old.completed_request_count, old.failed_attempt_count, old.drain = 7, 3, DrainOrder(1.0)
    new = fleet.add(make_instance("a", capacity=500), offered, now=9.0)
    assert new is not old
    assert new.state is InstanceState.STARTING
    assert new.register_s == 9.0
    assert set(new.in_flight) == {"a-0", "a-1"}
    assert new.in_flight_count == 2
    assert new.reserved_token_count == old.reserved_token_count > 0
    assert new.spare_token_count == 500 - new.reserved_token_count
    assert new.ttft_estimate_s == 0.5
    assert new.tpot_estimate_s == pytest.approx(0.015)
    assert new.latency_estimate_s == old.latency_estimate_s is not None
    assert (new.completed_request_count, new.failed_attempt_count) == (7, 3)
    assert new.last_dispatch_sequence == 2
    assert new.drain is old.drain


def test_what_runs_on_a_removed_instance_is_counted_until_it_ends() -> None:
    fleet = make_fleet()
    record = make_ready(fleet, make_instance("a"))
    load(record, 2)
    requests = list(record.in_flight.values())
    fleet.remove(record)
    assert fleet.release(requests[0]) is None
    back = fleet.add(make_instance("a"), 0, now=1.0)
    assert set(back.in_flight) == {"a-1"}
    assert fleet.release(requests[1]) is back
    assert back.in_flight_count == back.reserved_token_count == 0
    assert not fleet._departed


def test_a_removed_instance_is_forgotten_when_its_last_request_ends() -> None:
    fleet = make_fleet()
    record = make_ready(fleet, make_instance("a"))
    load(record, 1)
    fleet.remove(record)
    assert fleet.release(make_record("unknown")) is None
    fleet.release(record.in_flight["a-0"])
    assert not fleet._departed


def test_deregistration_ends_a_drain() -> None:
    fleet = make_fleet()
    record = make_ready(fleet, make_instance("a"))
    load(record, 1)
    record.drain = DrainOrder(0.0)
    fleet.remove(record)
    assert fleet.add(make_instance("a"), 0, now=1.0).drain is None


def test_a_full_fleet_says_so_and_still_takes_back_its_own() -> None:
    fleet = make_fleet(max_instance_count=1)
    fleet.add(make_instance("a"), 0, now=0.0)
    with pytest.raises(FleetFullError, match="1 instances are registered, the limit"):
        fleet.add(make_instance("b"), 0, now=0.0)
    fleet.add(make_instance("a"), 1, now=0.0)
    assert fleet.get("a").incarnation == 1


def test_an_instance_needs_a_name() -> None:
    with pytest.raises(InvalidRequestError, match="instance_id: is empty"):
        make_fleet().add(make_instance(""), 0, now=0.0)


def test_get_checks_the_incarnation() -> None:
    fleet = make_fleet()
    record = fleet.add(make_instance("a"), 3, now=0.0)
    assert fleet.get("a") is fleet.get("a", 3) is record
    with pytest.raises(StaleIncarnationError):
        fleet.get("a", 2)
    with pytest.raises(InstanceNotFoundError):
        fleet.get("a", 4)
    with pytest.raises(InstanceNotFoundError, match="instance 'b' is not registered; register it first"):
        fleet.get("b")


def test_count_by_state_names_every_state() -> None:
    fleet = make_fleet()
    make_ready(fleet, make_instance("a"))
    fleet.add(make_instance("b"), 0, now=0.0)
    counts = fleet.count_by_state()
    assert counts.pop(InstanceState.READY) == counts.pop(InstanceState.STARTING) == 1
    assert set(counts) == set(InstanceState) - {InstanceState.READY, InstanceState.STARTING}
    assert set(counts.values()) == {0}


# -- room ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", InstanceState)
def test_only_ready_instances_have_room(state: InstanceState) -> None:
    fleet = make_fleet()
    record = fleet.add(make_instance("a"), 0, now=0.0)
    record.machine.state = state
    fleet.settle(record)
    expected = [record] if state is InstanceState.READY else []
    assert fleet.with_room_for(make_record()) == expected


def test_room_ends_at_the_limit_and_comes_back() -> None:
    fleet = make_fleet()
    record = make_ready(fleet, make_instance("a", limit=2))
    load(record, 2)
    fleet.settle(record)
    assert fleet.with_room_for(make_record()) == []
    assert not fleet._open_by_model
    assert fleet.release(record.in_flight["a-0"]) is record
    assert fleet.with_room_for(make_record()) == [record]


def test_the_default_limit_is_for_those_that_name_none() -> None:
    fleet = make_fleet()
    assert fleet.add(make_instance("a"), 0, now=0.0).concurrency_limit == 4
    assert fleet.add(make_instance("b", limit=9), 0, now=0.0).concurrency_limit == 9


def test_settling_a_record_that_was_replaced_changes_nothing() -> None:
    fleet = make_fleet()
    old = make_ready(fleet, make_instance("a"))
    fleet.add(make_instance("a"), 0, now=0.0)
    fleet.settle(old)
    assert fleet.with_room_for(make_record()) == []


@pytest.mark.parametrize(
    ("usage", "in_flight_count", "is_open"),
    [
        (None, 1, True),
        (0.5, 1, True),
        (KEY_VALUE_USAGE_LIMIT - 0.001, 1, True),
        (KEY_VALUE_USAGE_LIMIT, 1, False),
        (1.0, 1, False),
        (1.0, 0, True),  # Old news: nothing is there now.
    ],
)
def test_a_full_cache_holds_work_back(usage: float | None, in_flight_count: int, is_open: bool) -> None:
    record = make_instance_record()
    record.machine.to(InstanceState.READY)
    load(record, in_flight_count)
    record.follow_gauges(EngineGauges(key_value_cache_usage=usage))
    assert record.is_open == is_open


def test_tokens_are_reserved_and_given_back() -> None:
    record = make_instance_record(capacity=1000)
    request = make_record("r1", prompt="x" * 400, max_tokens=50)
    assert request.expected_token_count == 150
    record.take(request, 1)
    assert (record.reserved_token_count, record.spare_token_count) == (150, 850)
    assert record.fits(make_record("r2", prompt="x" * 3200, max_tokens=50))
    assert not record.fits(make_record("r2", prompt="x" * 3204, max_tokens=50))
    record.release(request)
    record.release(request)
    assert record.reserved_token_count == 0
    assert record.in_flight_count == 0


def test_an_instance_that_holds_nothing_takes_anything() -> None:
    record = make_instance_record(capacity=10)
    huge = make_record("huge", prompt="x" * 10**6)
    assert record.fits(huge)
    record.take(huge, 1)
    assert not record.fits(make_record("tiny", max_tokens=1))
    record.release(huge)
    assert record.fits(huge)


def ids_with_room(fleet: Fleet, token_count: int, **limits: Any) -> list[str]:
    request = make_record(prompt="x" * 4 * token_count, max_tokens=1000)
    return [each.instance_id for each in fleet.with_room_for(request, **limits)]


@pytest.mark.parametrize("bound", ["capacity", "max_context_token_count"])
def test_who_can_never_hold_a_prompt_is_left_out_where_another_can(bound: str) -> None:
    def sized(instance_id: str, token_count: int) -> ExecutionInstance:
        fields: dict[str, Any] = {bound: token_count}
        return make_instance(instance_id, **fields)

    fleet = make_fleet()
    make_ready(fleet, sized("small", 1000))
    assert ids_with_room(fleet, 1000) == ["small"], "its engine is the judge"
    large = make_ready(fleet, sized("large", 2000))
    assert ids_with_room(fleet, 999) == ["small", "large"]
    assert ids_with_room(fleet, 1000) == ["large"], "no room for the first token"
    assert ids_with_room(fleet, 1999) == ["large"]
    assert ids_with_room(fleet, 2000) == ["small", "large"], "nobody can: engines are the judges"
    load(large, 4)
    fleet.settle(large)
    assert ids_with_room(fleet, 1000) == [], "it is busy: the request waits"
    assert ids_with_room(fleet, 999) == ["small"]


def test_an_unknown_capacity_is_not_known_to_be_too_small() -> None:
    fleet = make_fleet()
    make_ready(fleet, make_instance("small", capacity=1000))
    make_ready(fleet, make_instance("unknown"))
    assert ids_with_room(fleet, 10**6) == ["unknown"]


def test_only_instances_that_are_ready_are_worth_waiting_for() -> None:
    fleet = make_fleet()
    make_ready(fleet, make_instance("small", capacity=1000))
    large = fleet.add(make_instance("large", capacity=2000), 0, now=0.0)
    assert ids_with_room(fleet, 1500) == ["small"]
    for state, expected in (
        (InstanceState.READY, ["large"]),
        (InstanceState.UNHEALTHY, ["small"]),
        (InstanceState.READY, ["large"]),
    ):
        large.machine.to(state)
        fleet.settle(large)
        assert ids_with_room(fleet, 1500) == expected
    make_ready(fleet, make_instance("large", capacity=1200))
    assert ids_with_room(fleet, 1500) == ["small", "large"]
    assert ids_with_room(fleet, 1100) == ["large"]
    fleet.remove(fleet.get("large"))
    assert ids_with_room(fleet, 1100) == ["small"]


def test_token_limits_are_kept_for_every_served_name() -> None:
    fleet = make_fleet()
    make_ready(fleet, make_instance("small", "m", capacity=1000))
    make_ready(fleet, make_instance("large", "n", model_aliases=("m", "m"), capacity=2000))
    assert ids_with_room(fleet, 1500) == ["large"]
    make_ready(fleet, make_instance("large", "n", capacity=2000))
    assert ids_with_room(fleet, 1500) == ["small"]


def test_instances_from_a_token_limit_on_can_be_left_out() -> None:
    fleet = make_fleet()
    for instance_id, capacity in (("a", 1000), ("b", 2000), ("c", None)):
        make_ready(fleet, make_instance(instance_id, capacity=capacity))
    assert ids_with_room(fleet, 10, below=2000) == ["a"]
    assert ids_with_room(fleet, 10) == ["a", "b", "c"]
    assert fleet.has_open_below("m", 1001)
    assert not fleet.has_open_below("m", 1000)
    assert not fleet.has_open_below("n", 1001)


def test_without_a_known_capacity_everything_fits() -> None:
    record = make_instance_record()
    load(record, 3, max_tokens=10**6)
    assert record.fits(make_record("huge", prompt="x" * 10**6))


def test_no_request_needs_more_than_the_context() -> None:
    record = make_instance_record(capacity=1000, max_context_token_count=100)
    image = make_record("r1", prompt="x" * 10**6)
    assert record.token_need(image) == 100
    assert record.token_need(make_record("r2", prompt="x" * 10**6, sampling=SamplingParameters(n=3))) == 300
    assert record.token_need(make_record("r3", prompt="x" * 40, max_tokens=5)) == 15
    record.take(image, 1)
    assert record.spare_token_count == 900
    record.release(image)
    assert record.reserved_token_count == 0


# -- gates ---------------------------------------------------------------------------


def closed(fleet: Fleet, instance_id: str, opens_s: float, **fields: Any) -> InstanceRecord:
    """A busy instance whose gate is closed until a time."""
    record = make_ready(fleet, make_instance(instance_id, **fields))
    load(record, 1)
    fleet.close_gate(record, opens_s)
    return record


def test_a_closed_gate_holds_work_back_from_a_busy_instance() -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 3.0)
    assert not record.is_open
    assert not fleet.is_open("m")
    assert fleet.closed_gates("m", 8) == [record]
    assert fleet.next_opening_s() == 3.0
    fleet.open_gate(record)
    assert fleet.with_room_for(make_record()) == [record]
    assert fleet.closed_gates("m", 8) == []
    assert fleet.next_opening_s() is None


def test_an_instance_that_holds_nothing_is_open_whatever_its_gate_says() -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 3.0)
    fleet.release(record.in_flight["a-0"])
    assert fleet.with_room_for(make_record()) == [record]


def test_gates_are_due_once_and_in_order() -> None:
    fleet = make_fleet()
    late, soon = closed(fleet, "late", 3.0), closed(fleet, "soon", 2.0)
    assert fleet.closed_gates("m", 8) == [soon, late]
    assert fleet.closed_gates("m", 1) == [soon]
    assert fleet.pop_openings(1.9) == []
    assert fleet.next_opening_s() == 2.0
    assert fleet.pop_openings(5.0) == [soon, late]
    assert fleet.pop_openings(5.0) == []


def test_the_last_word_on_a_gate_counts() -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 1.0)
    fleet.close_gate(record, 4.0)
    fleet.close_gate(record, 4.0)
    assert fleet.next_opening_s() == 4.0
    assert fleet.pop_openings(3.9) == []
    fleet.close_gate(record, 2.0)
    assert fleet.pop_openings(3.9) == [record]


@pytest.mark.parametrize("state", sorted(set(InstanceState) - {InstanceState.READY}))
def test_only_ready_instances_are_worth_waiting_for(state: InstanceState) -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 3.0)
    record.machine.state = state
    fleet.settle(record)
    assert fleet.closed_gates("m", 8) == []


def test_gates_are_asked_for_by_model() -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 3.0, model="n", model_aliases=("m-latest",))
    assert fleet.closed_gates("m", 8) == []
    assert fleet.closed_gates("n", 8) == fleet.closed_gates("m-latest", 8) == [record]


def test_a_gate_stays_closed_through_a_new_registration_and_opens_in_time() -> None:
    fleet = make_fleet()
    closed(fleet, "a", 3.0)
    new = make_ready(fleet, make_instance("a"))
    assert new.gate_closed
    assert not fleet.is_open("m")
    assert fleet.next_opening_s() == 3.0
    assert fleet.closed_gates("m", 8) == [new]
    assert fleet.pop_openings(3.0) == [new]


def test_a_new_engine_of_another_kind_starts_with_an_open_gate() -> None:
    fleet = make_fleet()
    old = closed(fleet, "a", 3.0)
    new = make_ready(fleet, make_instance("a", gpu_name="NVIDIA H100 80GB HBM3"))
    assert new.load is not old.load
    assert new.is_open
    assert fleet.next_opening_s() is None


def test_gates_of_instances_that_left_are_forgotten() -> None:
    fleet = make_fleet()
    record = closed(fleet, "a", 3.0)
    fleet.remove(record)
    assert fleet.closed_gates("m", 8) == []
    assert fleet.next_opening_s() is None
    assert fleet.pop_openings(9.0) == []


def test_what_ends_while_its_instance_is_away_is_off_its_load() -> None:
    fleet = make_fleet()
    record = make_ready(fleet, make_instance("a"))
    load(record, 2)
    for request in record.in_flight.values():
        record.load.note_dispatch(request.request_id, 100, 0, 0.0)
    fleet.remove(record)
    assert fleet.holder("a") is record
    assert fleet.holder("b") is None
    back = fleet.add(make_instance("a"), 0, now=1.0)
    assert fleet.holder("a") is back
    assert back.load is record.load


def test_prices_are_of_the_whole_instance() -> None:
    assert make_instance_record(usd_per_gpu_hour=2.5, gpu_count=4).usd_per_hour == 10.0
    assert make_instance_record(usd_per_gpu_hour=2.5).usd_per_hour == 2.5
    assert make_instance_record(gpu_count=4).usd_per_hour == 0.0


def test_the_first_that_serves_a_model_and_how_many_are_ready() -> None:
    fleet = make_fleet()
    assert fleet.first_serving("m") is None
    assert fleet.ready_count("m") == 0
    first = fleet.add(make_instance("z"), 0, now=0.0)
    make_ready(fleet, make_instance("a"))
    assert fleet.first_serving("m") is first
    assert fleet.ready_count("m") == 1


def test_the_sample_of_a_large_fleet_is_of_those_with_the_least_to_do() -> None:
    fleet = make_fleet()
    for number, name in enumerate("dcba"):
        load(record := make_ready(fleet, make_instance(name)), number % 3)
        fleet.settle(record)
    assert [i.instance_id for i in fleet.with_room_for(make_record(), 3)] == ["d", "a", "c"]
    assert [i.instance_id for i in fleet.with_room_for(make_record())] == ["d", "a", "c", "b"]


def test_every_change_of_membership_counts() -> None:
    fleet = make_fleet()
    versions = [fleet.membership_version]
    record = fleet.add(make_instance("a"), 0, now=0.0)
    versions.append(fleet.membership_version)
    record = fleet.add(make_instance("a"), 0, now=0.0)
    versions.append(fleet.membership_version)
    fleet.remove(record)
    versions.append(fleet.membership_version)
    assert len(set(versions)) == 4


# -- following the engine --------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "limit", "in_flight_count", "running", "waiting", "expected"),
    [
        (64, 64, 40, 30, 10, 30),  # The engine runs 30 at once.
        (64, 20, 20, 30, 1, 20),  # Never up on requests that wait.
        (64, 64, 1, 0, 5, 64),  # Running nothing yet says nothing.
        (64, 3, 3, 1, 2, 1),
        (64, 32, 28, 28, 0, 36),  # Seven eighths used and none waits: an eighth more.
        (64, 32, 27, 27, 0, 32),
        (64, 1, 1, 1, 0, 2),  # At least one more.
        (64, 60, 60, 60, 0, 64),  # The configured limit stays the limit.
        (64, 64, 64, 64, 0, 64),
        (64, 32, 32, None, 0, 32),  # Unknown is not zero.
        (64, 32, 32, 32, None, 32),
    ],
)
def test_the_limit_follows_the_engine(
    configured: int, limit: int, in_flight_count: int, running: int | None, waiting: int | None, expected: int
) -> None:
    record = make_instance_record(limit=configured)
    record.concurrency_limit = limit
    load(record, in_flight_count)
    record.follow_gauges(EngineGauges(running_request_count=running, waiting_request_count=waiting))
    assert record.concurrency_limit == expected


def test_gauges_that_could_not_be_read_are_unknown() -> None:
    record = make_instance_record()
    record.follow_gauges(EngineGauges(key_value_cache_usage=0.99))
    record.follow_gauges(None)
    assert record.gauges is None
    assert record.concurrency_limit == record.configured_limit


def test_estimates_start_at_the_first_sample_and_move_a_tenth() -> None:
    record = make_instance_record()
    record.learn(2.0, 1.0, output_token_count=11)
    assert record.ttft_estimate_s == 1.0
    assert record.tpot_estimate_s == pytest.approx(0.1)
    record.learn(4.0, 2.0, output_token_count=11)
    assert record.ttft_estimate_s == pytest.approx(1.1)
    assert record.tpot_estimate_s == pytest.approx(0.11)


@pytest.mark.parametrize("output_token_count", [2, 17, 1000])
def test_instances_are_compared_by_speed_not_by_what_they_were_asked(output_token_count: int) -> None:
    record = make_instance_record()
    record.learn(0.5 + (output_token_count - 1) * 0.02, 0.5, output_token_count)
    assert record.latency_estimate_s == pytest.approx(0.5 + (REFERENCE_OUTPUT_TOKEN_COUNT - 1) * 0.02)


def test_without_a_second_token_nothing_is_known_of_the_speed() -> None:
    record = make_instance_record()
    record.learn(0.7, None, output_token_count=0)
    assert (record.ttft_estimate_s, record.tpot_estimate_s, record.latency_estimate_s) == (None, None, None)
    record.learn(0.7, 0.7, output_token_count=1)
    assert (record.ttft_estimate_s, record.tpot_estimate_s, record.latency_estimate_s) == (0.7, None, None)
    record.learn(1.7, 0.7, output_token_count=11)
    assert record.latency_estimate_s == pytest.approx(0.7 + (REFERENCE_OUTPUT_TOKEN_COUNT - 1) * 0.1)


# -- leases ----------------------------------------------------------------------------


def test_a_lease_ends_once() -> None:
    fleet = make_fleet()
    record = fleet.add(make_instance("a"), 1, now=0.0)
    assert fleet.next_lease_expiry_s() is None
    fleet.extend_lease(record, 6.0)
    assert fleet.next_lease_expiry_s() == 6.0
    assert fleet.pop_expired(5.9) == []
    assert fleet.pop_expired(6.0) == [record]
    assert record.lease_expire_s is None
    assert fleet.pop_expired(100.0) == []
    assert fleet.next_lease_expiry_s() is None


def test_a_beat_extends_the_lease_without_growing_the_heap() -> None:
    fleet = make_fleet()
    record = fleet.add(make_instance("a"), 1, now=0.0)
    for second in range(1000):
        fleet.extend_lease(record, second + 6.0)
        assert fleet.pop_expired(float(second)) == []
    assert len(fleet._leases) == 1
    assert fleet.pop_expired(1005.0) == [record]


def test_an_instance_can_be_lost_again() -> None:
    fleet = make_fleet()
    record = fleet.add(make_instance("a"), 1, now=0.0)
    fleet.extend_lease(record, 6.0)
    assert fleet.pop_expired(6.0) == [record]
    fleet.extend_lease(record, 20.0)
    assert fleet.pop_expired(19.0) == []
    assert fleet.pop_expired(20.0) == [record]


def test_leases_of_replaced_and_removed_records_are_forgotten() -> None:
    fleet = make_fleet()
    for registration in range(1000):
        record = fleet.add(make_instance("a"), 1, now=0.0)
        fleet.extend_lease(record, registration / 100 + 6.0)
        assert fleet.pop_expired(registration / 100) == []
    # One entry per registration within a lease, whatever the incarnation.
    assert len(fleet._leases) <= 601
    assert fleet.pop_expired(15.98) == []
    assert fleet.pop_expired(15.99) == [record]
    again = fleet.add(make_instance("a"), 1, now=16.0)
    fleet.extend_lease(again, 22.0)
    fleet.remove(again)
    assert fleet.pop_expired(100.0) == []
    assert fleet.next_lease_expiry_s() is None
