"""Losing and leaving. These tests break what the others use, and therefore run last."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from sagecp.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    request_pb2,
)
from tests.e2e.conftest import MODEL, Engine, instance_states, start_engine
from tests.e2e.reading import Output, generate, read, read_rest, refusal
from tests.support.processes import Program, eventually

Inference = inference_service_pb2_grpc.InferenceServiceStub
Fleet = fleet_service_pb2_grpc.FleetServiceStub


@pytest.fixture(autouse=True, scope="module")
def by_turns(admin: admin_service_pb2_grpc.AdminServiceStub) -> None:
    """Give every engine work: what predictions prefer depends on how busy the machine was a moment ago."""
    change = admin_service_pb2.UpdateSchedulingConfigRequest()
    change.config.routing_strategy = "round_robin"
    admin.UpdateSchedulingConfig(change, timeout=10)


def spec_of(max_tokens: int, prompt: str = "Go on") -> request_pb2.RequestSpec:
    return request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text=prompt),
        sampling=request_pb2.SamplingParameters(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )


def instance_of(inference: Inference, request_id: str) -> str:
    """Return where a request runs."""
    request = inference.GetRequest(
        inference_service_pb2.GetRequestRequest(request_id=request_id), timeout=10
    ).request
    return request.instance_id


def test_streams_of_a_killed_engine_go_on_elsewhere_as_if_nothing_had_happened(
    inference: Inference, fleet: Fleet, engines: dict[str, Engine]
) -> None:
    """kill -9 mid-stream: what comes out in all is what one engine would have given."""
    token_count = 2500
    prompts = [f"Once upon a time, {number}" for number in range(4)]
    unbroken = {prompt: generate(inference, spec_of(token_count, prompt)) for prompt in prompts}
    # Long requests, until each engine runs at least one; and one that cannot be continued on each.
    calls: dict[str, tuple[str, Any]] = {}
    where: dict[str, str] = {}
    bound: dict[str, Any] = {}
    for prompt in [*prompts, *prompts]:
        if set(where.values()) == {"engine-a", "engine-b"}:
            break
        call = inference.Generate(
            inference_service_pb2.GenerateRequest(spec=spec_of(token_count, prompt)), timeout=120
        )
        request_id = next(call).opened.request_id
        calls[request_id] = (prompt, call)
        where[request_id] = instance_of(inference, request_id)
    assert set(where.values()) == {"engine-a", "engine-b"}
    spec = spec_of(4000)
    spec.failover_mode = request_pb2.FAILOVER_MODE_FAIL
    while "engine-b" not in bound:
        assert len(bound) < 20, "no request went to engine-b"
        call = inference.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=120)
        request_id = next(call).opened.request_id
        while not next(call).HasField("chunk"):
            pass
        bound[instance_of(inference, request_id)] = call

    engines["engine-b"].program.signal_group(signal.SIGKILL)

    for request_id, (prompt, call) in calls.items():
        output = read(call, output=Output(request_id=request_id))
        whole = unbroken[prompt]
        assert output.end.state == request_pb2.REQUEST_STATE_SUCCEEDED, output.end.failure.message
        assert output.token_ids == whole.token_ids
        assert output.text == whole.text
        assert output.end.usage == whole.end.usage or where[request_id] == "engine-a"
        assert output.end.usage.completion_token_count == token_count
        if where[request_id] == "engine-b":
            assert output.end.instance_id == "engine-a"
            (notice,) = output.notices
            assert notice.failover.epoch == 2
            assert [attempt.instance_id for attempt in output.end.request.attempts] == [
                "engine-b",
                "engine-a",
            ]
    output = Output(request_id="bound to its engine")
    with pytest.raises(grpc.RpcError) as caught:
        read_rest(bound.pop("engine-b"), output)
    found = refusal(caught.value)
    assert found.code is grpc.StatusCode.UNAVAILABLE
    assert found.reason in {"ENGINE_FAILED", "ENGINE_UNREACHABLE"}
    assert "engine-b" in found.message
    assert output.end.state == request_pb2.REQUEST_STATE_FAILED
    for call in bound.values():
        call.cancel()

    state = eventually(
        lambda: instance_states(fleet)["engine-b"],
        lambda state: state in {"UNHEALTHY", "LOST"},
        timeout_s=15,
    )
    instance = fleet.GetInstance(
        fleet_service_pb2.GetInstanceRequest(instance_id="engine-b"), timeout=10
    ).instance
    assert instance.state_reason, f"{state} comes with a reason"
    for _ in range(6):
        assert generate(inference, spec_of(4)).end.instance_id == "engine-a"


def test_a_restarted_engine_returns(
    inference: Inference, fleet: Fleet, engines: dict[str, Engine], logs: Path
) -> None:
    dead = engines["engine-b"]
    dead.program.stop()
    engines["engine-b"] = start_engine("engine-b", dead.port, logs)
    engines["engine-b"].wait_until_healthy()
    eventually(lambda: instance_states(fleet)["engine-b"], lambda state: state == "READY", timeout_s=30)
    calls = [
        inference.Generate(inference_service_pb2.GenerateRequest(spec=spec_of(50)), timeout=60)
        for _ in range(8)
    ]
    assert "engine-b" in {read(call).end.instance_id for call in calls}


def test_an_agent_that_stops_takes_its_instance_along(
    inference: Inference, fleet: Fleet, agents: dict[str, Program]
) -> None:
    agents["engine-b"].process.terminate()
    assert agents["engine-b"].wait(10) == 0
    eventually(lambda: instance_states(fleet), lambda states: set(states) == {"engine-a"}, timeout_s=5)
    assert generate(inference, spec_of(4)).end.instance_id == "engine-a"


def test_a_killed_agent_loses_its_lease_and_nothing_else(
    inference: Inference, fleet: Fleet, agents: dict[str, Program]
) -> None:
    call = inference.Generate(inference_service_pb2.GenerateRequest(spec=spec_of(8000)), timeout=60)
    next(call)
    agents["engine-a"].process.kill()
    eventually(lambda: instance_states(fleet)["engine-a"], lambda state: state == "LOST", timeout_s=15)
    call.cancel()


def test_the_control_plane_finishes_what_runs_and_exits(
    inference: Inference, fleet: Fleet, engines: dict[str, Engine], control_plane: Program
) -> None:
    # The agents are gone: an operator registers the engine by hand.
    request = fleet_service_pb2.RegisterInstanceRequest()
    request.spec.instance_id = "by-hand"
    request.spec.engine_url = engines["engine-a"].url
    request.spec.model_name = MODEL
    fleet.RegisterInstance(request, timeout=10)
    eventually(lambda: instance_states(fleet)["by-hand"], lambda state: state == "READY", timeout_s=30)

    call = inference.Generate(inference_service_pb2.GenerateRequest(spec=spec_of(600)), timeout=60)
    assert next(call).HasField("opened")
    control_plane.process.terminate()
    output = Output(request_id="running at shutdown")
    read_rest(call, output)
    assert output.end.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert output.end.token_count == 600
    assert control_plane.wait(40) == 0
    assert "Traceback" not in control_plane.output
    assert "Go on" not in control_plane.output, "prompt text must not reach the log"
