"""Control planes that restart, forget, fall silent or refuse; and leaving them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from sagecp.agent import heartbeat
from sagecp.config import ServerConfig
from sagecp.core.types import InstanceState
from sagecp.rpc.server import ControlPlaneServer
from tests.rpc.agent.peers import TIMEOUT_S, ControlPlane, Engine, Log, Start


async def test_a_restarted_control_plane_is_told_everything_again(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    start()
    await control_plane.until(lambda: len(control_plane.beats) >= 2)
    await control_plane.stop()
    beat_count = len(control_plane.beats)
    await control_plane.start()
    await control_plane.until(lambda: len(control_plane.beats) > beat_count)
    first, second = control_plane.registrations[:2]
    assert second == first
    assert control_plane.beats[beat_count].sequence == 1
    assert control_plane.beats[beat_count].HasField("engine")
    lost = [event for event in log if event["event"].startswith("no connection")]
    assert 1 <= len(lost) <= 3, "a line for each kind of trouble, not for each try"


async def test_silence_is_a_failure_whatever_the_connection_looks_like(
    start: Start,
    control_plane: ControlPlane,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "_MIN_ACKNOWLEDGE_S", 0.6)
    start()
    await control_plane.until(lambda: len(control_plane.beats) >= 2)
    control_plane.acknowledges = False
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    assert control_plane.peers[1] != control_plane.peers[0], "over a new connection"
    assert any("acknowledged no heartbeat" in event.get("reason", "") for event in log)
    control_plane.acknowledges = True
    beat_count = len(control_plane.beats)
    await control_plane.until(lambda: len(control_plane.beats) > beat_count + 3)


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION])
async def test_a_control_plane_that_forgot_the_instance_is_told_at_once(
    start: Start, control_plane: ControlPlane, code: grpc.StatusCode
) -> None:
    start()
    await control_plane.until(lambda: len(control_plane.beats) >= 2)
    control_plane.beat_failures = [(code, "instance 'engine-1' is not registered", "INSTANCE_NOT_FOUND")]
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    assert control_plane.peers[1] == control_plane.peers[0]
    beat_count = len(control_plane.beats)
    await control_plane.until(lambda: len(control_plane.beats) > beat_count)


async def test_a_control_plane_that_forgets_at_once_is_not_hammered(
    start: Start, control_plane: ControlPlane
) -> None:
    failure = (grpc.StatusCode.NOT_FOUND, "instance 'engine-1' is not registered", "INSTANCE_NOT_FOUND")
    control_plane.beat_failures = [failure] * 1000
    start()
    await control_plane.until(lambda: len(control_plane.registrations) >= 2)
    await asyncio.sleep(2.0)  # Nothing to await: that too little happens is the point.
    # Two for each connection, whose number grows with the logarithm of time.
    assert len(control_plane.registrations) < 40


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.UNAVAILABLE, "draining", "SHUTTING_DOWN"),
        (grpc.StatusCode.INTERNAL, "a defect"),
        (grpc.StatusCode.CANCELLED, "gone"),
        (grpc.StatusCode.INVALID_ARGUMENT, "a gauge is odd", "INVALID_REQUEST"),
        (grpc.StatusCode.ABORTED, "something else", "POISON_REQUEST"),
    ],
)
async def test_other_failures_of_the_stream_are_tried_again(
    start: Start, control_plane: ControlPlane, failure: tuple[Any, ...]
) -> None:
    start()
    await control_plane.until(lambda: control_plane.beats)
    control_plane.beat_failures = [failure]
    await control_plane.until(lambda: len(control_plane.registrations) > 1)


@pytest.mark.parametrize("reason", ["STALE_INCARNATION", ""])
@pytest.mark.parametrize("while_registering", [True, False])
async def test_a_newer_agent_wins(
    start: Start,
    control_plane: ControlPlane,
    log: Log,
    reason: str,
    while_registering: bool,
) -> None:
    failure = (grpc.StatusCode.ABORTED, "registered with incarnation 9; 8 is older", reason)
    if while_registering:
        control_plane.register_failure = failure
    else:
        control_plane.beat_failures = [failure]
    agent = start()
    assert await agent.exit_code() == 5
    assert "another agent owns the instance id 'engine-1'" in log[-1]["event"]
    assert "--instance-id" in log[-1]["event"]
    assert not control_plane.deregistrations, "the other one's instance is left alone"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
async def test_an_agent_that_is_not_let_in_ends(
    start: Start, control_plane: ControlPlane, log: Log, code: grpc.StatusCode
) -> None:
    control_plane.register_failure = (code, "no certificate", code.name)
    assert await start().exit_code() == 4
    assert "--cert" in log[-1]["event"]


async def test_a_refused_registration_names_the_fields(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    fields = {"spec.labels": "has 17 entries; at most 16", "spec.instance_id": "'a b' is not an id"}
    control_plane.register_failure = (
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 fields",
        "INVALID_REQUEST",
        fields,
    )
    assert await start().exit_code() == 2
    for field, description in fields.items():
        assert f"{field}: {description}" in log[-1]["event"]


async def test_a_control_plane_that_is_not_there_is_given_up_only_if_asked(
    start: Start, control_plane: ControlPlane, log: Log
) -> None:
    await control_plane.stop()
    agent = start(connect_timeout_s=0.6)
    assert await agent.exit_code() == 3
    assert control_plane.address in log[-1]["event"]
    patient = start()
    await asyncio.sleep(1.0)  # Longer than the other one's patience.
    assert not patient.task.done()
    await control_plane.start()
    await control_plane.until(lambda: control_plane.beats)


async def test_it_says_goodbye_and_leaves(start: Start, control_plane: ControlPlane) -> None:
    agent = start()
    await control_plane.until(lambda: len(control_plane.beats) >= 2)
    assert await agent.end() == 0
    assert control_plane.beats[-1].goodbye
    assert [beat.goodbye for beat in control_plane.beats].count(True) == 1
    (request,) = control_plane.deregistrations
    assert request.instance_id == "engine-1"
    assert request.incarnation == control_plane.registrations[0].incarnation
    assert request.cause == "agent stopped"


async def test_once_checks_the_set_up_and_leaves(start: Start, control_plane: ControlPlane) -> None:
    assert await start(once=True).exit_code() == 0
    assert [beat.goodbye for beat in control_plane.beats] == [False, True]
    assert len(control_plane.deregistrations) == 1


async def test_once_does_not_try_again(start: Start, control_plane: ControlPlane) -> None:
    await control_plane.stop()
    assert await start(once=True).exit_code() == 3


async def test_leaving_takes_seconds_at_most_when_nobody_answers(
    start: Start, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = start()
    await control_plane.until(lambda: control_plane.beats)

    async def never(request: Any, context: Any) -> None:
        await asyncio.Event().wait()

    control_plane.acknowledges = False
    monkeypatch.setattr(ControlPlane, "DeregisterInstance", never)
    await control_plane.stop()
    await control_plane.start()  # With handlers that hang.
    await control_plane.until(lambda: len(control_plane.registrations) > 1)
    started_s = time.monotonic()
    assert await agent.end() == 0
    assert time.monotonic() - started_s < 8


async def test_it_shows_its_certificate(start: Start, control_plane: ControlPlane, tmp_path: Path) -> None:
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    own = authority.issue_cert("agent.example")
    await control_plane.stop()
    control_plane.credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    await control_plane.start()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    stranger = start(ca_file=str(tmp_path / "ca.pem"), connect_timeout_s=1.0)
    assert await stranger.exit_code() == 3
    assert not control_plane.registrations
    start(
        ca_file=str(tmp_path / "ca.pem"),
        certificate_file=str(tmp_path / "cert.pem"),
        private_key_file=str(tmp_path / "key.pem"),
    )
    await control_plane.until(lambda: control_plane.beats)


async def test_with_the_real_control_plane(start: Start, engine: Engine) -> None:
    config = ServerConfig(listen="127.0.0.1:0")
    config = dataclasses.replace(
        config, runtime=dataclasses.replace(config.runtime, heartbeat_interval_s=0.1)
    )
    server = ControlPlaneServer(config.validate())
    await server.start()

    async def until(accept: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not accept():  # noqa: ASYNC110 - the control plane has no event to wait for
                await asyncio.sleep(0.02)

    def states() -> dict[str, InstanceState]:
        return {record.instance_id: record.state for record in server.manager.instances()}

    try:
        agent = start(control_plane=server.address)
        await until(lambda: states() == {"engine-1": InstanceState.READY})
        record = server.manager.instance("engine-1")
        assert record.gauges is not None
        assert record.gauges.running_request_count == 6
        assert record.spec.key_value_token_capacity == 9216
        await engine.stop()
        await until(lambda: states() == {"engine-1": InstanceState.UNHEALTHY})
        await engine.start()
        await until(lambda: states() == {"engine-1": InstanceState.READY})
        # A second agent with the same id takes over; the first one notices and ends.
        successor = start(control_plane=server.address)
        assert await agent.exit_code() == 5
        await until(lambda: states() == {"engine-1": InstanceState.READY})
        assert await successor.end() == 0
        assert states() == {}
    finally:
        await server.stop(0.0)
