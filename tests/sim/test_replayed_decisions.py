"""One scheduler, wherever it runs: equal events give equal decisions in the simulator and in a server."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sagecp.config import RuntimeConfig
from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import SageError
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.scheduler import Scheduler
from sagecp.runtime.control_loop import ControlLoop
from sagecp.runtime.engines.base import EngineUnreachableError
from sagecp.runtime.executor import ExecutionCoordinator
from sagecp.runtime.monitor import Monitor
from sagecp.sim.fleet.event_log import (
    EventLogWriter,
    describe_effects,
    read_config,
    replay,
    replay_differences,
)
from sagecp.sim.fleet.experiment import Contender
from sagecp.v1 import admin_service_pb2, fleet_service_pb2, inference_service_pb2, request_pb2, scheduling_pb2
from tests.support.rpc_rig import WAIT_S, Rig, failure_of, read_all, reason_of, running_rig
from tests.support.scripted_client import ScriptedCall, ScriptedFleet
from tests.support.sim_traces import logged_run, mixed_requests
from tests.support.waiting import until

Effects = list[dict[str, Any]]
_REQUEST_COUNT = 90
# Prompt of those that only a cancellation ends.
_LEFT_RUNNING = b"to be cancelled"


def decisions_in(log: Path) -> collections.Counter[str]:
    """Count the effects of a log by their names."""
    return collections.Counter(effect["effect"] for step in replay(log) for effect in step.effects)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES.names)
@pytest.mark.parametrize(
    ("routing", "balancer"),
    [
        ("load_balanced", "predicted_latency"),
        ("load_balanced", "power_of_two"),
        ("locality", "predicted_latency"),
    ],
)
def test_a_fresh_scheduler_decides_as_the_simulated_one_did(
    tmp_path: Path, policy: str, routing: str, balancer: str
) -> None:
    contender = Contender(
        label="own", scheduling_policy=policy, routing_strategy=routing, load_balancer=balancer
    )
    log = logged_run(tmp_path, mixed_requests(120), contender, seed=3)
    assert decisions_in(log)["DispatchAttempt"] > 100
    assert not list(replay_differences(log))


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES.names)
async def test_a_servers_control_loop_decides_as_the_simulated_scheduler_did(
    tmp_path: Path, policy: str
) -> None:
    log = logged_run(tmp_path, mixed_requests(120), Contender(label="own", scheduling_policy=policy))
    steps = list(replay(log))
    assert decisions_in(log)["DispatchAttempt"] > 100
    assert await effects_of_control_loop(read_config(log), steps) == [list(step.effects) for step in steps]


async def effects_of_control_loop(config: SchedulerConfig, steps: Any) -> list[Effects]:
    """Feed events to the loop of a server, whose engines never answer, and return what its core wanted."""
    now = 0.0
    answers: list[Effects] = []

    def note(_now: float, _event: ev.Event, effects: list[fx.Effect]) -> None:
        answers.append(describe_effects(effects))

    coordinator = ExecutionCoordinator(client_factory=ScriptedFleet())
    loop = ControlLoop(Scheduler(config), coordinator, Monitor(), RuntimeConfig(), lambda: now, on_event=note)
    for step in steps:
        now = step.now
        # A refusal is raised for whoever submitted.
        with contextlib.suppress(SageError):
            if isinstance(step.event, ev.RequestArrived):
                loop.submit(step.event.metadata, b"", durable=False)
            else:
                loop.feed(step.event)
    await loop.stop()
    await coordinator.close()
    return answers[: len(steps)]


async def test_the_simulators_replay_decides_as_a_live_server_did(tmp_path: Path) -> None:
    log = tmp_path / "live.jsonl.gz"
    config = SchedulerConfig(scheduling_policy="slo_aware", default_concurrency_limit=3, seed=5)
    with EventLogWriter(log, config) as recorder:
        async with running_rig(scheduler=config, on_event=recorder) as rig:
            await live_traffic(rig)
    seen = decisions_in(log)
    assert seen["DispatchAttempt"] > 60
    for name in ("RequestRequeued", "AbortAttempt", "RequestRejected", "SettingsChanged", "InstanceRemoved"):
        assert seen[name], f"the traffic was to cause {name}; it caused {seen}"
    assert not list(replay_differences(log))


async def live_traffic(rig: Rig) -> None:
    """Do to a server what happens to servers, over its own API."""
    turns = itertools.count()

    def answer(call: ScriptedCall) -> None:
        number = next(turns)
        if _LEFT_RUNNING in call.call.body:
            return
        if number % 13 == 5:
            call.fail(EngineUnreachableError("connection refused"))
        elif number % 9 == 4:
            call.send("held")
        else:
            call.answer(*["word"] * (number % 4 + 1))

    for name in ("a", "b", "c"):
        (await rig.add_engine(name)).automatic = answer
    config = scheduling_pb2.SchedulingConfig(scheduling_policy="priority", routing_strategy="locality")
    config.parameters.update({"priority.boost_high_s": 60.0})
    requests: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:
        for number in range(_REQUEST_COUNT):
            requests.append(group.create_task(one_request(rig, number)))
            if number == 20:
                await rig.admin.UpdateSchedulingConfig(
                    admin_service_pb2.UpdateSchedulingConfigRequest(config=config), timeout=WAIT_S
                )
            if number == 40:
                await rig.instances.DeregisterInstance(
                    fleet_service_pb2.DeregisterInstanceRequest(instance_id="c"), timeout=WAIT_S
                )
        await until(lambda: finish_held_calls(rig, requests), "every request ended")


def finish_held_calls(rig: Rig, requests: Sequence[asyncio.Task[None]]) -> bool:
    """Let the answers end that have begun; return whether all requests have ended."""
    for engine in rig.fleet.engines.values():
        for call in engine.running:
            if _LEFT_RUNNING not in call.call.body:
                call.finish()
    return all(request.done() for request in requests)


def is_running(rig: Rig, request_id: str) -> bool:
    """Return whether an engine has a request."""
    record = rig.manager.scheduler.find_request(request_id)
    return record is not None and not record.queued


async def one_request(rig: Rig, number: int) -> None:
    """Make one request and read its answer, or leave, or make one that is refused."""
    request_id = f"r{number}"
    if number % 17 == 3:
        await rig.submit(request_id, f"{_LEFT_RUNNING.decode()} {number}")
        await until(lambda: is_running(rig, request_id), "an engine has it")
        await rig.inference.CancelRequest(
            inference_service_pb2.CancelRequestRequest(request_id=request_id), timeout=WAIT_S
        )
        return
    if number % 17 == 7:
        error = await failure_of(rig.generate(request_id, model="unknown"))
        assert reason_of(error) == "MODEL_NOT_FOUND"
        return
    await read_all(
        rig.generate(
            request_id,
            f"words that many share {number % 4} " * 40,
            priority=request_pb2.REQUEST_PRIORITY_HIGH if number % 3 == 0 else 0,
            session_id=f"s{number % 5}",
        )
    )


def test_a_changed_decision_is_found(tmp_path: Path) -> None:
    log = logged_run(tmp_path, mixed_requests(30))
    lines = gzip.decompress(log.read_bytes()).decode().splitlines()
    number = next(index for index, line in enumerate(lines) if "DispatchAttempt" in line)
    step = json.loads(lines[number])
    receipt = next(each for each in step["effects"] if each["effect"] == "DispatchAttempt")["receipt"]
    receipt["candidates"][0][1] += 1e-15
    lines[number] = json.dumps(step)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [each.line_number for each in replay_differences(changed)] == [number + 1]


def test_another_seed_or_parameter_is_another_run(tmp_path: Path) -> None:
    contender = Contender(label="own", scheduling_policy="fifo", load_balancer="power_of_two")
    log = logged_run(tmp_path, mixed_requests(120), contender)
    other = Scheduler(dataclasses.replace(read_config(log), seed=99))
    assert next(iter(replay_differences(log, other)), None) is not None
