"""The life cycles, row by row, and the machine that walks them."""

from __future__ import annotations

import pytest

from sagecp.core.errors import ErrorReason, IllegalTransitionError
from sagecp.core.states import INSTANCE_TRANSITIONS, REQUEST_TRANSITIONS, StateMachine
from sagecp.core.types import InstanceState, RequestState

R, I = RequestState, InstanceState  # noqa: E741 - a table reads better narrow

REQUEST_STEPS = {
    R.QUEUED: {R.DISPATCHED, R.FAILED, R.CANCELLED, R.EXPIRED},
    R.DISPATCHED: {R.RUNNING, R.QUEUED, R.SUCCEEDED, R.FAILED, R.CANCELLED, R.EXPIRED},
    R.RUNNING: {R.QUEUED, R.SUCCEEDED, R.FAILED, R.CANCELLED, R.EXPIRED},
    R.SUCCEEDED: set(),
    R.FAILED: set(),
    R.CANCELLED: set(),
    R.EXPIRED: set(),
}
INSTANCE_STEPS = {
    I.STARTING: {I.READY, I.UNHEALTHY, I.DRAINING, I.LOST},
    I.READY: {I.UNHEALTHY, I.DRAINING, I.LOST},
    I.DRAINING: {I.DRAINED, I.STARTING, I.READY, I.UNHEALTHY, I.LOST},
    I.DRAINED: {I.STARTING, I.READY, I.UNHEALTHY, I.LOST},
    I.UNHEALTHY: {I.STARTING, I.READY, I.DRAINING, I.LOST},
    I.LOST: {I.STARTING, I.READY, I.UNHEALTHY, I.DRAINING},
}


@pytest.mark.parametrize("source", RequestState)
@pytest.mark.parametrize("target", RequestState)
def test_request_steps(source: RequestState, target: RequestState) -> None:
    machine = StateMachine("request 'r'", source, REQUEST_TRANSITIONS)
    if target in REQUEST_STEPS[source]:
        machine.to(target)
        assert machine.state is target
        assert machine.history == [source, target]
    else:
        with pytest.raises(IllegalTransitionError):
            machine.to(target)
        assert machine.state is source
        assert machine.history == [source]


@pytest.mark.parametrize("source", InstanceState)
@pytest.mark.parametrize("target", InstanceState)
def test_instance_steps(source: InstanceState, target: InstanceState) -> None:
    machine = StateMachine("instance 'a'", source, INSTANCE_TRANSITIONS)
    if target in INSTANCE_STEPS[source]:
        machine.to(target)
        assert machine.state is target
    else:
        with pytest.raises(IllegalTransitionError):
            machine.to(target)
        assert machine.state is source


def test_every_state_has_a_row() -> None:
    assert set(REQUEST_TRANSITIONS) == set(RequestState)
    assert set(INSTANCE_TRANSITIONS) == set(InstanceState)


def test_terminal_states_are_those_that_nothing_follows() -> None:
    for state in RequestState:
        assert state.is_terminal == (not REQUEST_TRANSITIONS[state])


def test_every_request_can_end_from_wherever_it_is() -> None:
    for state in RequestState:
        if not state.is_terminal:
            assert {R.FAILED, R.CANCELLED, R.EXPIRED} <= REQUEST_TRANSITIONS[state]


def test_an_illegal_step_tells_the_whole_story() -> None:
    machine = StateMachine("request 'r-7'", R.QUEUED, REQUEST_TRANSITIONS)
    for state in (R.DISPATCHED, R.RUNNING, R.SUCCEEDED):
        machine.to(state)
    with pytest.raises(IllegalTransitionError) as caught:
        machine.to(R.RUNNING)
    error = caught.value
    assert error.reason is ErrorReason.ILLEGAL_STATE
    assert error.history == (R.QUEUED, R.DISPATCHED, R.RUNNING, R.SUCCEEDED)
    assert error.target is R.RUNNING
    assert str(error) == (
        "request 'r-7' cannot become RUNNING; its states so far: QUEUED -> DISPATCHED -> RUNNING -> SUCCEEDED"
    )


def test_history_is_bounded_and_keeps_the_first_state() -> None:
    machine = StateMachine("instance 'a'", I.STARTING, INSTANCE_TRANSITIONS)
    for _ in range(100):
        machine.to(I.READY)
        machine.to(I.UNHEALTHY)
    assert len(machine.history) == 32
    assert machine.history[0] is I.STARTING
    assert machine.history[-2:] == [I.READY, I.UNHEALTHY]
