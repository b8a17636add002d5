"""The control plane as a library, on engines whose every step the test decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from sagecp.config import RuntimeConfig
from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import (
    ErrorReason,
    FleetFullError,
    InstanceNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestFailedError,
    RequestIdConflictError,
    RequestNotFoundError,
    ShuttingDownError,
    StaleIncarnationError,
    TokenIndexOutOfRangeError,
    TooManyStreamsError,
    UnknownNameError,
)
from sagecp.core.events import HeartbeatReceived
from sagecp.core.types import (
    EngineCondition,
    EngineGauges,
    FailoverMode,
    RequestMetadata,
    RequestPriority,
    RequestState,
    SamplingParameters,
)
from sagecp.runtime import manager as manager_module
from sagecp.runtime.engines.base import (
    EngineFailedError,
    EngineOverloadedError,
    EngineRejectedError,
    EngineStreamBrokenError,
    EngineTimeoutError,
)
from sagecp.runtime.manager import ControlPlaneManager
from tests.support.scripted_client import WAIT_S, ScriptedEngine, ScriptedFleet, unreachable
from tests.support.waiting import other_tasks, turns, until


class Bench:
    """A started control plane with scripted engines."""

    def __init__(self, manager: ControlPlaneManager, fleet: ScriptedFleet) -> None:
        self.manager = manager
        self.fleet = fleet

    async def add(
        self, instance_id: str = "a", *, limit: int | None = None, model: str = "tiny"
    ) -> ScriptedEngine:
        """Register an instance without an agent and wait until it takes work."""
        self.manager.register_instance(self.fleet.instance(instance_id, limit=limit, model_name=model))
        await until(lambda: self.manager.instance(instance_id).state.name == "READY")
        return self.fleet[instance_id]

    async def submit(self, request_id: str = "r", **more: object) -> RequestState:
        """Submit a request with a prompt; return its state."""
        more.setdefault("prompt", "hello")
        status = await self.manager.submit_request(RequestMetadata(request_id=request_id, **more))  # type: ignore[arg-type]
        return status.state

    async def state(self, request_id: str = "r") -> RequestState:
        return (await self.manager.get_request_status(request_id)).state

    async def end_of(self, request_id: str = "r") -> RequestState:
        status = await asyncio.wait_for(self.manager.wait_request(request_id), WAIT_S)
        return status.state

    async def read(self, request_id: str = "r", from_token_index: int = 0) -> list[str]:
        """Read a request to its end; return its texts."""
        return [
            delta.text
            async for delta in self.manager.stream_request(request_id, from_token_index)
            if delta.text
        ]


@contextlib.asynccontextmanager
async def started(
    *, scheduler: SchedulerConfig | None = None, runtime: RuntimeConfig | None = None
) -> AsyncIterator[Bench]:
    fleet = ScriptedFleet()
    manager = ControlPlaneManager(scheduler=scheduler, runtime=runtime, client_factory=fleet)
    await manager.start()
    try:
        yield Bench(manager, fleet)
    finally:
        await manager.stop()
        await turns(3)
        # Nothing may outlive the control plane, in any test.
        assert other_tasks() == set()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with started() as running:
        yield running


# -- dispatch ------------------------------------------------------------------------------


async def test_an_idle_fleet_gets_a_request_at_once(bench: Bench) -> None:
    engine = await bench.add()
    # In the same step, not at a tick: the call returns after the decision.
    assert await bench.submit(max_tokens=5) is RequestState.DISPATCHED
    call = await engine.next_call()
    assert call.body["prompt"] == "hello"
    assert call.body["max_tokens"] == 5
    assert call.body["model"] == "tiny"
    assert call.request_id == "r"
    call.send("a", "b")
    assert await bench.state() is RequestState.RUNNING
    call.finish("length")
    assert await bench.end_of() is RequestState.SUCCEEDED
    status = await bench.manager.get_request_status("r")
    assert status.finish_reason == "length"
    assert status.usage.completion_token_count == 2
    assert status.usage.prompt_token_count == 7
    assert status.instance_id == "a"
    assert status.end_time_s is not None
    assert status.first_token_time_s is not None
    assert status.create_time_s <= status.first_token_time_s <= status.end_time_s
    (attempt,) = status.attempts
    assert (attempt.epoch, attempt.instance_id, attempt.failure) == (1, "a", None)
    assert attempt.end_time_s is not None


async def test_a_request_without_an_id_gets_one_that_nobody_else_has(bench: Bench) -> None:
    await bench.add()
    one = await bench.manager.submit_request(RequestMetadata(prompt="x"))
    two = await bench.manager.submit_request(RequestMetadata(prompt="x"))
    assert one.request_id.startswith("req-")
    assert one.request_id != two.request_id
    # It is an id like any other: asking for something else under it is a conflict.
    with pytest.raises(RequestIdConflictError):
        await bench.submit(one.request_id)


async def test_work_waits_in_the_control_plane_while_the_engine_is_full(bench: Bench) -> None:
    engine = await bench.add(limit=2)
    for number in range(5):
        await bench.submit(f"r{number}")
    first, second = await engine.next_call(), await engine.next_call()
    await turns()
    assert [call.request_id for call in engine.calls] == ["r0", "r1"]
    status = await bench.manager.get_request_status("r3")
    assert (status.state, status.queue_position) == (RequestState.QUEUED, 1)
    second.answer("x")
    assert (await engine.next_call()).request_id == "r2"
    assert (await bench.manager.get_request_status("r3")).queue_position == 0
    # A new instance takes what waits as soon as it is ready.
    other = await bench.add("b", limit=2)
    assert {(await other.next_call()).request_id for _ in range(2)} == {"r3", "r4"}
    assert not first.ended.is_set()


async def test_requests_wait_for_an_instance_that_is_not_ready_yet(bench: Bench) -> None:
    engine = bench.fleet["a"]
    engine.healthy = False
    bench.manager.register_instance(bench.fleet.instance("a"))
    assert await bench.submit() is RequestState.QUEUED
    assert await engine.next_probe() is False
    assert engine.calls == []
    engine.healthy = True
    assert (await engine.next_call()).request_id == "r"


async def test_two_models_share_nothing(bench: Bench) -> None:
    full = await bench.add("a", limit=1)
    free = await bench.add("b", limit=1, model="other")
    await bench.submit("r0", model_name="tiny")
    await bench.submit("r1", model_name="tiny")
    await bench.submit("r2", model_name="other")
    assert (await full.next_call()).request_id == "r0"
    call = await free.next_call()
    assert (call.request_id, call.body["model"]) == ("r2", "other")
    assert await bench.state("r1") is RequestState.QUEUED


async def test_a_fleet_full_of_work_is_used_evenly(bench: Bench) -> None:
    engines = [await bench.add(name) for name in ("a", "b", "c")]
    for number in range(30):
        await bench.submit(f"r{number}")
    await turns()
    assert [len(engine.calls) for engine in engines] == [10, 10, 10]


# -- lost attempts -------------------------------------------------------------------------

LOSSES = {
    "unreachable": (unreachable(), ErrorReason.ENGINE_UNREACHABLE),
    "silent": (EngineTimeoutError("silent for 1 s", "first_token"), ErrorReason.ENGINE_TIMEOUT),
    "failed": (EngineFailedError("broken", 500), ErrorReason.ENGINE_FAILED),
    "cut off": (EngineStreamBrokenError("ended without a finish reason"), ErrorReason.ENGINE_FAILED),
    "full": (EngineOverloadedError("come later", 503), ErrorReason.ENGINE_FAILED),
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_request_lost_before_its_first_token_runs_elsewhere(bench: Bench, loss: str) -> None:
    error, reason = LOSSES[loss]
    engines = {name: await bench.add(name) for name in ("a", "b")}
    await bench.submit()
    first = (await bench.manager.get_request_status("r")).instance_id
    second = "b" if first == "a" else "a"
    (await engines[first].next_call()).fail(error)
    call = await engines[second].next_call()
    assert await bench.state() is RequestState.DISPATCHED
    call.answer("x")
    assert await bench.end_of() is RequestState.SUCCEEDED
    status = await bench.manager.get_request_status("r")
    assert [(a.epoch, a.instance_id) for a in status.attempts] == [(1, first), (2, second)]
    assert status.attempts[0].failure is not None
    assert status.attempts[0].failure.reason is reason
    assert status.attempts[1].failure is None
    assert await bench.read() == ["x"]
    handle = bench.manager.requests.get("r")
    assert [decision.instance_id for decision in bench.manager.decisions_of(handle)] == [first, second]


async def test_nothing_is_tried_again_after_the_first_token(bench: Bench) -> None:
    engines = {name: await bench.add(name) for name in ("a", "b")}
    await bench.submit()
    first = (await bench.manager.get_request_status("r")).instance_id
    call = await engines[first].next_call()
    call.send("x")
    call.fail(EngineFailedError("broken", 500))
    assert await bench.end_of() is RequestState.FAILED
    status = await bench.manager.get_request_status("r")
    assert status.failure is not None
    assert status.failure.reason is ErrorReason.ENGINE_FAILED
    assert len(status.attempts) == 1
    assert sum(len(engine.calls) for engine in engines.values()) == 1
    # What came out stays readable, and the end says that it is not all.
    texts: list[str] = []
    with pytest.raises(RequestFailedError, match="broken"):
        texts.extend([delta.text async for delta in bench.manager.stream_request("r")])


async def test_there_is_an_end_to_trying(bench: Bench) -> None:
    for name in ("a", "b", "c", "d"):
        (await bench.add(name)).automatic = lambda call: call.fail(EngineFailedError("broken", 500))
    await bench.submit()
    assert await bench.end_of() is RequestState.FAILED
    status = await bench.manager.get_request_status("r")
    assert len(status.attempts) == 3
    assert len({attempt.instance_id for attempt in status.attempts}) == 3


async def test_who_wants_one_attempt_gets_one(bench: Bench) -> None:
    for name in ("a", "b"):
        (await bench.add(name)).automatic = lambda call: call.fail(unreachable())
    await bench.submit(failover_mode=FailoverMode.FAIL)
    assert await bench.end_of() is RequestState.FAILED
    assert len((await bench.manager.get_request_status("r")).attempts) == 1


async def test_a_request_that_the_engine_refuses_is_not_tried_elsewhere(bench: Bench) -> None:
    for name in ("a", "b"):
        (await bench.add(name)).automatic = lambda call: call.fail(
            EngineRejectedError("the prompt is too long", 400, "prompt")
        )
    await bench.submit()
    assert await bench.end_of() is RequestState.FAILED
    status = await bench.manager.get_request_status("r")
    assert status.failure is not None
    assert status.failure.reason is ErrorReason.ENGINE_REJECTED
    assert "parameter prompt" in status.failure.message
    assert "the prompt is too long" in status.failure.message
    assert len(status.attempts) == 1
    # It is not the fleet's fault: nothing for an operator to look into, nothing held against the engine.
    assert bench.manager.get_status().recent_faults == ()
    assert bench.manager.instance(status.instance_id).failed_attempt_count == 0


async def test_a_defect_of_ours_ends_the_request_and_nothing_else(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await bench.add()
    await bench.submit("r1", prompt="canary")
    await bench.submit("r2")
    (await engine.next_call()).fail(RuntimeError("a defect"))
    assert await bench.end_of("r1") is RequestState.FAILED
    status = await bench.manager.get_request_status("r1")
    assert status.failure is not None
    assert status.failure.reason is ErrorReason.INTERNAL
    assert "a defect" not in status.failure.message
    assert "a defect" in caplog.text
    assert "canary" not in caplog.text
    (await engine.next_call()).answer("x")
    assert await bench.end_of("r2") is RequestState.SUCCEEDED


# -- cancelling ------------------------------------------------------------------------------


async def test_cancel_while_it_waits(bench: Bench) -> None:
    engine = await bench.add(limit=1)
    await bench.submit("r1")
    await bench.submit("r2")
    status, cancelled = await bench.manager.cancel_request("r2", "not needed")
    assert cancelled
    assert status.state is RequestState.CANCELLED
    assert status.failure is not None
    assert "not needed" in status.failure.message
    (await engine.next_call()).answer("x")
    await bench.end_of("r1")
    assert len(engine.calls) == 1


async def test_cancel_before_the_engine_was_called_at_all(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    status, cancelled = await bench.manager.cancel_request("r")
    assert (status.state, cancelled) == (RequestState.CANCELLED, True)
    await turns()
    assert engine.calls == []
    assert bench.manager.coordinator.get_metrics().running_count == 0


@pytest.mark.parametrize("token_count", [0, 2], ids=["dispatched", "running"])
async def test_cancel_stops_the_engines_work_at_once(bench: Bench, token_count: int) -> None:
    engine = await bench.add(limit=1)
    await bench.submit("r")
    await bench.submit("next")
    call = await engine.next_call()
    for _ in range(token_count):
        call.send("x")
    status, cancelled = await bench.manager.cancel_request("r")
    assert (status.state, cancelled) == (RequestState.CANCELLED, True)
    await call.wait_ended()
    assert call.cancelled
    # Output that was on its way changes nothing.
    call.send("late")
    assert (await bench.manager.get_request_status("r")).usage.completion_token_count == token_count
    # Its place is free.
    assert (await engine.next_call()).request_id == "next"
    metrics = bench.manager.coordinator.get_metrics()
    assert (metrics.started_count, metrics.aborted_count, metrics.running_count) == (2, 1, 1)


async def test_cancelling_twice_or_too_late_changes_nothing(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    (await engine.next_call()).answer("x")
    await bench.end_of()
    status, cancelled = await bench.manager.cancel_request("r")
    assert (status.state, cancelled) == (RequestState.SUCCEEDED, False)
    await bench.submit("r2")
    assert (await bench.manager.cancel_request("r2"))[1] is True
    assert (await bench.manager.cancel_request("r2"))[1] is False


# -- time ------------------------------------------------------------------------------------


async def test_a_deadline_passes_while_a_request_waits(bench: Bench) -> None:
    engine = await bench.add(limit=1)
    await bench.submit("r1")
    await bench.submit("r2", slo_deadline_ms=20.0)
    assert await bench.end_of("r2") is RequestState.EXPIRED
    status = await bench.manager.get_request_status("r2")
    assert status.failure is not None
    assert status.failure.reason is ErrorReason.DEADLINE_EXCEEDED
    assert "while it waited" in status.failure.message
    assert len(engine.calls) == 1
    assert await bench.state("r1") is RequestState.DISPATCHED


async def test_a_deadline_passes_while_a_request_runs_and_stops_the_engine(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit(slo_deadline_ms=20.0)
    call = await engine.next_call()
    call.send("x")
    assert await bench.end_of() is RequestState.EXPIRED
    await call.wait_ended()
    assert call.cancelled
    metrics = bench.manager.get_metrics()
    assert metrics.slo_violations == 1
    assert metrics.slo_compliance_rate == 0.0


async def test_nobody_waits_for_ever() -> None:
    async with started(scheduler=SchedulerConfig(queue_timeout_s=0.02)) as bench:
        await bench.add(limit=1)
        await bench.submit("r1")
        await bench.submit("r2")
        assert await bench.end_of("r2") is RequestState.EXPIRED
        # The time is for waiting only.
        assert await bench.state("r1") is RequestState.DISPATCHED


# -- who asks for what -------------------------------------------------------------------------


async def test_the_same_id_with_the_same_content_is_the_same_request(bench: Bench) -> None:
    engine = await bench.add()
    request = RequestMetadata(request_id="r", prompt="x", sampling=SamplingParameters(logit_bias={5: 1.0}))
    handle, created = await bench.manager.accept(request, durable=False)
    again, created_again = await bench.manager.accept(request, durable=False)
    assert (created, created_again) == (True, False)
    assert again is handle
    (await engine.next_call()).answer("x")
    await bench.end_of()
    # After the end as well.
    status = await bench.manager.submit_request(request)
    assert status.state is RequestState.SUCCEEDED
    assert len(engine.calls) == 1
    with pytest.raises(RequestIdConflictError, match="'r' was used before"):
        await bench.submit("r", prompt="y")


async def test_unknown_models_are_told_what_exists(bench: Bench) -> None:
    with pytest.raises(ModelNotFoundError, match="no instance is registered yet"):
        await bench.submit(model_name="tiny")
    await bench.add("a", model="one")
    with pytest.raises(ModelNotFoundError, match="models served now: one"):
        await bench.submit(model_name="two")
    # Nothing was accepted under the id.
    assert await bench.submit(model_name="one") is RequestState.DISPATCHED
    await bench.add("b", model="two")
    with pytest.raises(ModelNotFoundError, match="not exactly one is served"):
        await bench.submit("r2")


async def test_bad_requests_are_refused_before_anything_happens(bench: Bench) -> None:
    engine = await bench.add()
    with pytest.raises(InvalidRequestError) as caught:
        await bench.submit(
            "no id",
            max_tokens=0,
            sampling=SamplingParameters(temperature=9.0, engine_extras={"stream": False}),
        )
    assert {violation.field for violation in caught.value.violations} == {
        "request_id",
        "sampling.max_tokens",
        "sampling.temperature",
        "sampling.engine_extras.stream",
    }
    assert engine.calls == []
    assert len(bench.manager.requests) == 0


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with started(scheduler=SchedulerConfig(max_queued_request_count=1)) as bench:
        await bench.add(limit=1)
        await bench.submit("r1")
        await bench.submit("r2")
        with pytest.raises(QueueFullError, match="holds 1 requests") as caught:
            await bench.submit("r3")
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0
        with pytest.raises(RequestNotFoundError):
            await bench.state("r3")


async def test_unknown_ids(bench: Bench) -> None:
    manager = bench.manager
    with pytest.raises(RequestNotFoundError):
        await manager.get_request_status("x")
    with pytest.raises(RequestNotFoundError):
        await manager.cancel_request("x")
    with pytest.raises(RequestNotFoundError):
        await manager.wait_request("x")
    with pytest.raises(RequestNotFoundError):
        await bench.read("x")
    with pytest.raises(InstanceNotFoundError):
        manager.deregister_instance("x")
    with pytest.raises(InstanceNotFoundError):
        manager.drain_instance("x")
    with pytest.raises(InstanceNotFoundError):
        manager.instance("x")
    with pytest.raises(InstanceNotFoundError):
        await manager.coordinator.health_check("x")


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({"scheduling_policy": "best"}, "adaptive"),
        ({"routing_strategy": "best"}, "load_balanced"),
        ({"load_balancer": "best"}, "predicted_latency"),
    ],
)
def test_unknown_names_are_told_what_exists(arguments: dict[str, str], known: str) -> None:
    with pytest.raises(UnknownNameError, match=f"'best' is unknown.*{known}"):
        ControlPlaneManager(**arguments)  # type: ignore[arg-type]


# -- readers -----------------------------------------------------------------------------------


async def test_readers_start_where_they_like_and_see_the_same(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    call = await engine.next_call()
    early = [asyncio.create_task(bench.read()) for _ in range(2)]
    await turns()
    call.send("a", "b")
    await turns()
    late = asyncio.create_task(bench.read())
    resumed = asyncio.create_task(bench.read(from_token_index=1))
    await turns()
    call.send("c")
    call.finish()
    assert await asyncio.gather(*early, late, resumed) == [
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["b", "c"],
    ]
    assert await bench.read() == ["a", "b", "c"]
    assert bench.manager.requests.get("r").output.reader_count == 0


async def test_a_reader_ahead_of_the_stream_is_told(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    (await engine.next_call()).send("a")
    with pytest.raises(TokenIndexOutOfRangeError):
        await bench.read(from_token_index=2)


async def test_only_so_many_read_at_once() -> None:
    async with started(runtime=RuntimeConfig(max_streams_per_request=2)) as bench:
        engine = await bench.add()
        await bench.submit()
        readers = [asyncio.create_task(bench.read()) for _ in range(2)]
        await turns()
        with pytest.raises(TooManyStreamsError):
            await bench.read()
        (await engine.next_call()).answer("x")
        await asyncio.gather(*readers)
        assert await bench.read() == ["x"]


async def test_a_reader_that_leaves_disturbs_nobody(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    call = await engine.next_call()
    reader = asyncio.create_task(bench.read())
    await turns()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    call.answer("x")
    assert await bench.end_of() is RequestState.SUCCEEDED
    assert bench.manager.requests.get("r").output.reader_count == 0


async def test_reading_a_cancelled_request_ends_with_its_failure(bench: Bench) -> None:
    await bench.add()
    await bench.submit()
    reader = asyncio.create_task(bench.read())
    await turns()
    await bench.manager.cancel_request("r", "enough")
    with pytest.raises(RequestFailedError, match="enough") as caught:
        await reader
    assert caught.value.reason is ErrorReason.REQUEST_CANCELLED


# -- health and leases ---------------------------------------------------------------------------


async def test_an_instance_that_falls_ill_gets_nothing_and_comes_back() -> None:
    async with started(runtime=RuntimeConfig(health_interval_s=0.01)) as bench:
        engine = await bench.add()
        engine.healthy = False
        await until(lambda: bench.manager.instance("a").state.name == "UNHEALTHY")
        assert "the script says so" in bench.manager.instance("a").state_reason
        assert await bench.submit() is RequestState.QUEUED
        engine.healthy = True
        assert (await engine.next_call()).request_id == "r"
        assert bench.manager.instance("a").state.name == "READY"
        faults = bench.manager.get_status().recent_faults
        assert any(fault.instance_id == "a" and "UNHEALTHY" in fault.message for fault in faults)


async def test_an_engine_found_dead_by_a_call_is_probed_before_it_gets_more(bench: Bench) -> None:
    engine = await bench.add("a")
    await bench.submit()
    engine.healthy = False
    (await engine.next_call()).fail(unreachable())
    await until(lambda: bench.manager.instance("a").state.name == "UNHEALTHY")
    assert await bench.state() is RequestState.QUEUED
    assert engine.calls[0].ended.is_set()
    assert len(engine.calls) == 1
    engine.healthy = True
    (await engine.next_call()).answer("x")
    assert await bench.end_of() is RequestState.SUCCEEDED


async def test_an_engine_that_does_not_answer_holds_up_no_other(bench: Bench) -> None:
    frozen = bench.fleet["frozen"]
    frozen.health_gate = asyncio.Event()
    bench.manager.register_instance(bench.fleet.instance("frozen"))
    await until(lambda: frozen.probe_count == 1)
    # Well before the probe of the first one gives up.
    await asyncio.wait_for(bench.add("b"), 2.0)
    assert bench.manager.instance("frozen").state.name == "STARTING"
    frozen.health_gate.set()
    await until(lambda: bench.manager.instance("frozen").state.name == "READY")


async def test_a_probe_that_crashes_holds_up_no_other(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fleet["odd"].health_error = RuntimeError("a defect")
    bench.manager.register_instance(bench.fleet.instance("odd"))
    await until(lambda: bench.fleet["odd"].probe_count == 1)
    await bench.add("b")
    assert "health probe crashed" in caplog.text


async def test_probes_go_only_to_instances_without_an_agent() -> None:
    async with started(runtime=RuntimeConfig(health_interval_s=0.005)) as bench:
        bench.manager.register_instance(bench.fleet.instance("agent"), incarnation=1)
        probed = await bench.add("none")
        await until(lambda: probed.probe_count >= 5)
        assert bench.fleet["agent"].probe_count == 0


def beat(condition: EngineCondition = EngineCondition.HEALTHY, **more: object) -> HeartbeatReceived:
    return HeartbeatReceived("a", 5, condition, **more)  # type: ignore[arg-type]


async def test_a_lease_that_ends_takes_the_instance_out_and_a_beat_brings_it_back() -> None:
    async with started(scheduler=SchedulerConfig(lease_duration_s=0.05)) as bench:
        manager = bench.manager
        manager.register_instance(bench.fleet.instance("a"), incarnation=5)
        assert manager.instance("a").state.name == "STARTING"
        manager.heartbeat(beat())
        assert manager.instance("a").state.name == "READY"
        await bench.submit("running")
        call = await bench.fleet["a"].next_call()
        await until(lambda: manager.instance("a").state.name == "LOST")
        assert "no heartbeat" in manager.instance("a").state_reason
        # Its engine may well be alive: what runs, runs on; what is new waits.
        assert await bench.submit("waiting") is RequestState.QUEUED
        call.answer("x")
        assert await bench.end_of("running") is RequestState.SUCCEEDED
        manager.heartbeat(beat())
        assert manager.instance("a").state.name == "READY"
        assert (await bench.fleet["a"].next_call()).request_id == "waiting"


async def test_a_lease_counts_for_instances_that_registered_before_the_start() -> None:
    fleet = ScriptedFleet()
    manager = ControlPlaneManager(scheduler=SchedulerConfig(lease_duration_s=0.02), client_factory=fleet)
    manager.register_instance(fleet.instance("a"), incarnation=5)
    await manager.start()
    await until(lambda: manager.instance("a").state.name == "LOST")
    await manager.stop()


async def test_beats_of_strangers_and_of_older_agents_are_refused(bench: Bench) -> None:
    manager = bench.manager
    with pytest.raises(InstanceNotFoundError):
        manager.heartbeat(beat())
    manager.register_instance(bench.fleet.instance("a"), incarnation=6)
    with pytest.raises(StaleIncarnationError, match="incarnation 6; 5 is older"):
        manager.heartbeat(beat())
    with pytest.raises(StaleIncarnationError):
        manager.register_instance(bench.fleet.instance("a"), incarnation=5)
    with pytest.raises(StaleIncarnationError):
        manager.deregister_instance("a", 5)


async def test_a_new_incarnation_takes_over_what_runs(bench: Bench) -> None:
    manager = bench.manager
    manager.register_instance(bench.fleet.instance("a", limit=1), incarnation=5)
    manager.heartbeat(beat())
    await bench.submit("r1")
    call = await bench.fleet["a"].next_call()
    manager.register_instance(bench.fleet.instance("a", limit=1), incarnation=6)
    manager.heartbeat(HeartbeatReceived("a", 6, EngineCondition.HEALTHY))
    # Its one place is taken still.
    assert await bench.submit("r2") is RequestState.QUEUED
    call.answer("x")
    assert (await bench.fleet["a"].next_call()).request_id == "r2"
    assert await bench.end_of("r1") is RequestState.SUCCEEDED


async def test_what_the_agent_reports_is_kept(bench: Bench) -> None:
    manager = bench.manager
    manager.register_instance(bench.fleet.instance("a"), incarnation=5)
    gauges = EngineGauges(running_request_count=3, key_value_cache_usage=0.5)
    manager.heartbeat(beat(gauges=gauges, gpu_absent_reason="no driver"))
    record = manager.instance("a")
    assert record.gauges == gauges
    assert record.gpu_absent_reason == "no driver"
    assert record.heartbeat_s is not None


async def test_an_instance_that_left_finishes_its_work_and_its_connections_close(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    call = await engine.next_call()
    assert bench.manager.deregister_instance("a", cause="done") == 1
    assert bench.manager.instances() == []
    (client,) = engine.clients
    await turns()
    assert not client.closed
    call.answer("x")
    assert await bench.end_of() is RequestState.SUCCEEDED
    await until(lambda: client.closed)


async def test_a_request_on_its_way_to_an_instance_that_leaves_brings_nothing_back(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit()
    # Decided, but not sent yet.
    assert engine.calls == []
    bench.manager.deregister_instance("a")
    (await engine.next_call()).answer("x")
    assert await bench.end_of() is RequestState.SUCCEEDED
    await until(lambda: all(client.closed for client in engine.clients))
    metrics = bench.manager.coordinator.get_metrics()
    assert (metrics.instance_count, metrics.running_count) == (0, 0)


async def test_an_instance_that_moves_is_called_at_its_new_address(bench: Bench) -> None:
    old = await bench.add()
    await bench.submit("r1")
    call = await old.next_call()
    moved = bench.fleet.instance("a", host="elsewhere.test")
    bench.manager.register_instance(moved)
    new = bench.fleet.at(moved.engine_url)
    await until(lambda: bench.manager.instance("a").state.name == "READY")
    await bench.submit("r2")
    assert (await new.next_call()).request_id == "r2"
    call.answer("x")
    assert await bench.end_of("r1") is RequestState.SUCCEEDED
    await until(lambda: old.clients[0].closed)
    assert not new.clients[0].closed


async def test_the_fleet_is_bounded() -> None:
    async with started(scheduler=SchedulerConfig(max_instance_count=1)) as bench:
        await bench.add("a")
        with pytest.raises(FleetFullError):
            bench.manager.register_instance(bench.fleet.instance("b"))


# -- draining and stopping -------------------------------------------------------------------------


async def test_a_draining_instance_finishes_and_gets_no_more(bench: Bench) -> None:
    engine = await bench.add()
    await bench.submit("r1")
    call = await engine.next_call()
    bench.manager.drain_instance("a", force=True)
    assert bench.manager.instance("a").state.name == "DRAINING"
    assert await bench.submit("r2") is RequestState.QUEUED
    call.answer("x")
    await bench.end_of("r1")
    assert bench.manager.instance("a").state.name == "DRAINED"
    bench.manager.drain_instance("a", undo=True)
    assert (await engine.next_call()).request_id == "r2"


async def test_drain_waits_for_what_was_accepted_and_takes_nothing_new(bench: Bench) -> None:
    engine = await bench.add(limit=1)
    await bench.submit("r1")
    await bench.submit("r2")
    draining = asyncio.create_task(bench.manager.drain(WAIT_S))
    await turns()
    assert not bench.manager.accepting
    with pytest.raises(ShuttingDownError):
        await bench.submit("r3")
    # A repetition is no new work.
    assert await bench.submit("r1") is RequestState.DISPATCHED
    for _ in range(2):
        (await engine.next_call()).answer("x")
    assert await draining is True


async def test_drain_gives_up_in_time(bench: Bench) -> None:
    await bench.add()
    await bench.submit()
    assert await bench.manager.drain(0.01) is False
    assert await bench.manager.drain(0.0) is False


async def test_draining_an_idle_control_plane_takes_no_time(bench: Bench) -> None:
    assert await bench.manager.drain(0.0) is True


async def test_stop_ends_everything() -> None:
    async with started() as bench:
        engine = await bench.add(limit=1)
        await bench.submit("running")
        await bench.submit("waiting")
        call = await engine.next_call()
        call.send("x")
        readers = [asyncio.create_task(bench.read(name)) for name in ("running", "waiting")]
        waiter = asyncio.create_task(bench.manager.wait_request("waiting"))
        await turns()
        await bench.manager.stop()
        assert call.cancelled
        for outcome in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(outcome, RequestFailedError)
            assert outcome.reason is ErrorReason.SHUTTING_DOWN
        assert (await waiter).state is RequestState.FAILED
        assert all(client.closed for client in engine.clients)
        assert other_tasks() == set()
        with pytest.raises(ShuttingDownError):
            await bench.submit("late")
        await bench.manager.stop()


async def test_stop_ends_probes_in_progress() -> None:
    async with started() as bench:
        frozen = bench.fleet["frozen"]
        frozen.health_gate = asyncio.Event()
        bench.manager.register_instance(bench.fleet.instance("frozen"))
        await until(lambda: frozen.probe_count == 1)
        await asyncio.wait_for(bench.manager.stop(), 1.0)
        assert other_tasks() == set()


async def test_a_control_plane_can_be_started_again() -> None:
    async with started() as bench:
        await bench.add()
        await bench.manager.stop()
        await bench.manager.start()
        await bench.manager.start()
        await bench.submit()
        (await bench.fleet["a"].next_call()).answer("x")
        assert await bench.end_of() is RequestState.SUCCEEDED


async def test_nothing_is_taken_before_the_start() -> None:
    manager = ControlPlaneManager(client_factory=ScriptedFleet())
    with pytest.raises(ShuttingDownError, match="not started"):
        await manager.submit_request(RequestMetadata(prompt="x"))
    await manager.stop()


# -- reports ----------------------------------------------------------------------------------------


async def test_metrics_and_status_follow_the_requests(bench: Bench) -> None:
    engine = await bench.add(limit=2)
    for number in range(4):
        await bench.submit(f"r{number}", priority=RequestPriority.HIGH, slo_deadline_ms=60_000.0)
    metrics = bench.manager.get_metrics()
    assert (metrics.active_requests, metrics.queued_requests, metrics.total_requests) == (2, 2, 4)
    status = bench.manager.get_status()
    assert status.accepting
    assert status.instance_count_by_state == {"READY": 1}
    assert status.queued_count_by_model == {"tiny": 2}
    assert status.queued_count_by_priority == {"HIGH": 2}
    assert (status.active_requests, status.queued_requests) == (2, 2)
    assert status.models == ("tiny",)
    assert (status.scheduling_policy, status.routing_strategy) == ("adaptive", "load_balanced")
    assert status.load_balancer == "predicted_latency"
    (await engine.next_call()).answer("x", "y", "z")
    (await engine.next_call()).fail(EngineRejectedError("no", 400))
    for name in ("r0", "r1"):
        await bench.end_of(name)
    await bench.manager.cancel_request("r2")
    metrics = bench.manager.get_metrics()
    assert (metrics.completed_requests, metrics.failed_requests, metrics.cancelled_requests) == (1, 1, 1)
    assert (metrics.active_requests, metrics.queued_requests, metrics.total_requests) == (1, 0, 4)
    assert metrics.latency.sample_count == metrics.ttft.sample_count == metrics.tpot.sample_count == 1
    assert metrics.avg_latency_ms > 0
    # The failed one had an objective and missed it; the cancelled one counts for neither side.
    assert (metrics.slo_violations, metrics.slo_compliance_rate) == (1, 0.5)


async def test_a_lost_attempt_is_a_fault_to_look_into(bench: Bench) -> None:
    engines = {name: await bench.add(name) for name in ("a", "b")}
    await bench.submit()
    first = (await bench.manager.get_request_status("r")).instance_id
    (await engines.pop(first).next_call()).fail(EngineFailedError("out of memory", 500))
    (other,) = engines.values()
    await other.next_call()
    (fault,) = bench.manager.get_status().recent_faults
    assert "attempt 1 was lost" in fault.message
    assert "out of memory" in fault.message
    # The one that lost it, not the one that has it now.
    assert (fault.instance_id, fault.request_id) == (first, "r")


async def test_without_monitoring_there_are_counts_and_no_samples() -> None:
    fleet = ScriptedFleet()
    manager = ControlPlaneManager(enable_monitoring=False, client_factory=fleet)
    await manager.start()
    bench = Bench(manager, fleet)
    (await bench.add()).automatic = lambda call: call.answer("x")
    await bench.submit()
    await bench.end_of()
    metrics = manager.get_metrics()
    assert (metrics.completed_requests, metrics.latency.sample_count) == (1, 0)
    await manager.stop()


async def test_many_requests_leave_nothing_behind() -> None:
    async with started(runtime=RuntimeConfig(retained_request_count=10)) as bench:
        before = len(other_tasks())
        for name in ("a", "b"):
            (await bench.add(name, limit=16)).automatic = lambda call: call.answer("x", "y")
        statuses = [
            await bench.manager.submit_request(RequestMetadata(prompt="x", slo_deadline_ms=60_000.0))
            for _ in range(500)
        ]
        await until(lambda: bench.manager.scheduler.live_count == 0)
        await until(lambda: len(other_tasks()) <= before, "no task is left")
        assert len(bench.manager.requests) == 10
        assert bench.manager.coordinator.get_metrics().running_count == 0
        assert bench.manager.coordinator.get_metrics().succeeded_count == 500
        assert len(bench.manager.scheduler.queue) == 0
        assert bench.manager.scheduler.queue.size_bytes == 0
        assert all(record.in_flight_count == 0 for record in bench.manager.instances())
        assert all(record.reserved_token_count == 0 for record in bench.manager.instances())
        with pytest.raises(RequestNotFoundError):
            await bench.state(statuses[0].request_id)


async def test_nobody_counts_a_queue_that_is_too_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "POSITION_QUEUE_LIMIT", 2)
    await bench.add(limit=1)
    for number in range(3):
        await bench.submit(f"r{number}")
    assert (await bench.manager.get_request_status("r2")).queue_position == 1
    await bench.submit("r3")
    assert (await bench.manager.get_request_status("r2")).queue_position is None
