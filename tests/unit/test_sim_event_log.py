"""Event logs: what is written comes back equal, and what is no log is refused with its line."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.engine_state import EngineCapability, EngineProcess, EngineProcessState, LoraAdapter
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.gpu import GpuDevice, GpuLink, GpuLinkKind, XidError
from sagecp.core.policy_replay import PolicyScore
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.prompt_digest import digest_prompt
from sagecp.core.prompt_size import payload_size_bytes
from sagecp.core.settings import SettingsChange
from sagecp.core.types import (
    EngineCondition,
    EngineGauges,
    ExecutionInstance,
    GpuReading,
    PromptDigest,
    RequestMetadata,
    RequestPriority,
)
from sagecp.sim.fleet.event_codec import EVENT_TYPES, decode_event, encode_event
from sagecp.sim.fleet.event_log import EventLogError, EventLogWriter, read_config, replay, replay_differences
from sagecp.sim.fleet.experiment import Contender
from tests.support.sim_traces import logged_run, mixed_requests

FAILURE = Failure(ErrorReason.ENGINE_FAILED, "it broke – twice")  # noqa: RUF001 - not ASCII, on purpose
INSTANCE = ExecutionInstance(
    instance_id="a",
    host="::1",
    port=8000,
    model_name="m",
    model_aliases=("n", "o"),
    step_time=StepTimeParameters(
        overhead_s=0.1 + 0.2,
        memory_base_s=0.01,
        memory_per_token_s=1e-300,
        compute_base_s=1 / 3,
        compute_per_token_s=0.0,
        context_per_token_s=5e-8,
        attention_per_token_pair_s=1e-9,
    ),
    usd_per_gpu_hour=1 / 3,
)
EVENTS: list[ev.Event] = [
    ev.RequestArrived(
        RequestMetadata(
            request_id="r1",
            model_name="m",
            priority=RequestPriority.HIGH,
            cost_budget=0.1 + 0.2,
            tenant_id="t",
            prompt_digest=PromptDigest(100, (1, (1 << 63) - 1), 16),
        )
    ),
    ev.RequestsRestored(
        (
            ev.RestoredRequest(
                RequestMetadata(request_id="r1", prompt_digest=PromptDigest(100, (1, 2), 16)),
                "m",
                arrival_s=-3.5,
                size_bytes=40,
                epoch=2,
                lost_instance_ids=("a",),
                output_token_count=7,
            ),
        )
    ),
    ev.RequestCancelled("r1", "the caller left"),
    ev.RequestAborted("r1", FAILURE),
    ev.AttemptProgressed("r1", 1),
    ev.AttemptSucceeded("r1", 2, 7, prompt_token_count=9, cached_prompt_token_count=0),
    ev.AttemptFailed("r1", 1, FAILURE, retryable=True, engine_down=True),
    ev.InstanceRegistered(
        dataclasses.replace(
            INSTANCE,
            gpu_devices=(GpuDevice(index=0, uuid="g", links=(GpuLink("h", GpuLinkKind.NVLINK, 4),)),),
            engine_capabilities=frozenset({EngineCapability.LORA, EngineCapability.SLEEP}),
        ),
        5,
        EngineCondition.HEALTHY,
        "1.0",
    ),
    ev.InstanceRestored(INSTANCE, 5, draining=True, sleep_level=2, lora_adapters=(LoraAdapter("l", "/l"),)),
    ev.InstanceDeregistered("a", 5, "gone"),
    ev.HeartbeatReceived(
        "a",
        5,
        EngineCondition.HEALTHY,
        gauges=EngineGauges(running_request_count=3, key_value_cache_usage=0.1),
        gpus=(GpuReading(index=0, xid_errors=(XidError(79, 1.5),)),),
        process=EngineProcess(state=EngineProcessState.RUNNING, restart_count=2),
        agent_time_s=100.25,
        clock_offset_s=-0.25,
        refusals=("engine.key_value_cache_usage is nan",),
    ),
    ev.HeartbeatRefused("a", "another lease token"),
    ev.HealthProbed("a", EngineCondition.UNHEALTHY, "500"),
    ev.EngineSilent("a", 11.5),
    ev.EngineProbed("a", answered=False, detail="no token in 5 s"),
    ev.DrainRequested(
        "a", undo=False, incarnation=3, grace_s=30.0, force=True, cause="upgrade", sleep_level=1
    ),
    ev.LoraAdaptersRequested("a", (LoraAdapter("l", "/l"),)),
    ev.SchedulingConfigured(SettingsChange(scheduling_policy="fifo", parameters={"adaptive.gain": 0.1})),
    ev.PoliciesEvaluated(3, (PolicyScore(policy="fifo", attainment=1 / 3, token_weighted_attainment=1.0),)),
    ev.ClockSkipped(30.25),
    ev.ClockAdvanced(),
]


def test_every_event_has_an_example() -> None:
    assert [type(event).__name__ for event in EVENTS] == list(EVENT_TYPES)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_equal(event: ev.Event) -> None:
    fields = json.loads(json.dumps(encode_event(event), allow_nan=False))
    assert decode_event(type(event).__name__, fields) == event


def test_of_a_prompt_only_its_digest_and_size_are_kept() -> None:
    secret = "nobody may read this, " * 20
    metadata = RequestMetadata(
        request_id="r", model_name="m", messages=({"role": "user", "content": secret},)
    )
    fields = encode_event(ev.RequestArrived(metadata))
    assert "nobody" not in json.dumps(fields)
    event = decode_event("RequestArrived", fields)
    assert isinstance(event, ev.RequestArrived)
    assert event.metadata.prompt_digest == digest_prompt(metadata)
    assert payload_size_bytes(event.metadata) == payload_size_bytes(metadata)


def test_keys_of_engines_are_not_kept() -> None:
    keyed = dataclasses.replace(INSTANCE, api_key="sesame")
    assert "sesame" not in json.dumps(encode_event(ev.InstanceRegistered(keyed)))
    assert "sesame" not in json.dumps(encode_event(ev.InstanceRestored(keyed)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Nothing", {}, "unknown event 'Nothing'; known are RequestArrived"),
        ("AttemptProgressed", {"request_id": "r", "epok": 1}, "has no field 'epok'"),
        ("AttemptProgressed", {"request_id": "r"}, "epoch"),
    ],
)
def test_what_is_no_event_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_event(name, fields)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_log_is_the_same_bytes_every_time(tmp_path: Path, suffix: str) -> None:
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        contender = Contender(label="own", scheduling_policy="slo_aware", load_balancer="power_of_two")
        logs.append(logged_run(folder, mixed_requests(60), contender, seed=seed, suffix=suffix).read_bytes())
    assert logs[0] == logs[1] != logs[2]
    assert logs[0].startswith(b"\x1f\x8b") == suffix.endswith(".gz")


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    times = [0.1 + 0.2, 1e-300, math.pi]
    with EventLogWriter(log, SchedulerConfig(seed=3, queue_timeout_s=1 / 3)) as writer:
        for now in times:
            writer(now, ev.ClockAdvanced(), [])
    assert [step.now for step in replay(log)] == times
    assert read_config(log) == SchedulerConfig(seed=3, queue_timeout_s=1 / 3)


def test_an_empty_log_has_no_differences(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    EventLogWriter(log, SchedulerConfig()).close()
    assert not list(replay(log))
    assert not list(replay_differences(log))


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    good = logged_run(tmp_path, mixed_requests(10)).read_bytes()
    lines = gzip.decompress(good).splitlines(keepends=True)
    for content, message in (
        (b"", "is not JSON"),
        (b"{}\n", "is no event log of version 1"),
        (lines[0].replace(b'"version":1', b'"version":2'), "is no event log of version 1"),
        (lines[0].replace(b'"seed"', b'"sead"'), ":1: config: SchedulerConfig has no field 'sead'"),
        (lines[0] + b"[]\n", ":2: is no JSON object"),
        (lines[0] + b"{}\n", ":2: KeyError"),
        (lines[0] + lines[1] + b'{"now":', ":3: is not JSON"),
        (good[:-40], "ends early"),
    ):
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(EventLogError) as raised:
            list(replay(path))
        assert message in str(raised.value)
    with pytest.raises(EventLogError, match="cannot be read"):
        read_config(tmp_path / "absent")
