"""The switches of a misbehaving engine: what they take and what they refuse."""

from __future__ import annotations

import random

import pytest

from sagecp.sim.api_fields import ApiError
from sagecp.sim.fault_control import FaultControl
from sagecp.sim.misbehaviour import KNOWN_SWITCHES, STREAM_FAULTS, Misbehaviour, MisbehaviourError


def test_everything_is_off_at_first() -> None:
    assert Misbehaviour().stream_faults() == []
    FaultControl(random.Random(0)).reject()


def test_faults_come_in_order_of_their_tokens() -> None:
    switches = Misbehaviour(cut_after_tokens=9, garbage_after_tokens=3, hang_after_tokens=0)
    assert switches.stream_faults() == [(0, "hang"), (3, "garbage"), (9, "cut")]


def test_changes_add_up_and_null_turns_off() -> None:
    switches = Misbehaviour().changed({"cut_after_tokens": 5, "slow_factor": 10})
    switches = switches.changed({"cut_after_tokens": None, "reject_rate": 0.5})
    assert switches == Misbehaviour(slow_factor=10, reject_rate=0.5)
    assert switches.changed({"slow_factor": None, "reject_rate": None}) == Misbehaviour()


def test_unknown_switches_are_refused_with_the_known_ones() -> None:
    with pytest.raises(MisbehaviourError) as caught:
        Misbehaviour().changed({"explode": True, "hang_after_tokens": 1})
    assert "unknown: explode;" in str(caught.value)
    assert all(name in str(caught.value) for name in KNOWN_SWITCHES)


@pytest.mark.parametrize("name", [*STREAM_FAULTS, "stream_fault_limit", "reject_first"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, 10**12])
def test_token_counts_must_be_sensible(name: str, value: object) -> None:
    with pytest.raises(MisbehaviourError, match=f"{name} must be an integer from 0"):
        Misbehaviour().changed({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reject_status", 200),
        ("reject_status", 600),
        ("reject_rate", 1.1),
        ("reject_rate", float("nan")),
        ("reject_rate", "all"),
        ("slow_factor", 0),
        ("slow_factor", float("inf")),
        ("silent_health", 1),
        ("stalled", 1),
        ("refuse_connections_s", -1),
        ("refuse_connections_s", "long"),
        ("stream_fault_marker", ""),
        ("stream_fault_marker", 5),
    ],
)
def test_other_values_must_be_sensible_too(name: str, value: object) -> None:
    with pytest.raises(MisbehaviourError, match=name):
        Misbehaviour().changed({name: value})


def count_rejections(control: FaultControl, requests: int) -> int:
    statuses = []
    for _ in range(requests):
        try:
            control.reject()
        except ApiError as error:
            statuses.append(error.status)
    assert set(statuses) <= {control.switches.reject_status}
    return len(statuses)


def test_the_first_requests_are_rejected_or_a_share_of_all() -> None:
    control = FaultControl(random.Random(0))
    control.change({"reject_first": 3, "reject_status": 503})
    assert count_rejections(control, 10) == 3
    control.change({"slow_factor": 2})
    assert count_rejections(control, 10) == 0, "another change must not start the count anew"
    control.change({"reject_rate": 0.3, "reject_status": 429})
    assert 220 < count_rejections(control, 1000) < 380


def test_only_so_many_streams_are_hit_each_as_often_as_need_be() -> None:
    control = FaultControl(random.Random(0))
    assert control.claim("any")
    control.change({"stream_fault_limit": 2})
    assert [control.claim(name) for name in "aabcb"] == [True, True, True, False, True]
    control.change({"stream_fault_limit": 1})
    assert [control.claim(name) for name in "ca"] == [True, False]
