"""Scheduling settings over the wire: changed while the server works, gone back to, refused as a whole."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from sagecp.cli.exit_codes import ExitCode
from sagecp.client import SageClient
from sagecp.client import convert as client_convert
from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.receipts import run_again
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.core.settings import PARAMETERS
from sagecp.runtime.engines.base import EngineOutcome
from sagecp.v1 import (
    admin_service_pb2,
    fleet_service_pb2,
    inference_service_pb2,
    instance_pb2,
    request_pb2,
    scheduling_pb2,
)
from tests.support.processes import ROOT, SAGECP
from tests.support.rpc_rig import (
    Rig,
    detail_of,
    failure_of,
    fields_of,
    reason_of,
    request_spec,
    running_rig,
)
from tests.support.samples import samples_of
from tests.support.waiting import until

pb = admin_service_pb2
Code = grpc.StatusCode
NAMES = [parameter.name for parameter in PARAMETERS.__iter__()]


def config(parameters: Mapping[str, Any] | None = None, **names: str) -> scheduling_pb2.SchedulingConfig:
    message = scheduling_pb2.SchedulingConfig(**names)  # type: ignore[arg-type]  # names of its fields
    if parameters:
        message.parameters.update(parameters)
    return message


async def update(
    rig: Rig, wanted: scheduling_pb2.SchedulingConfig | None = None, **fields: Any
) -> scheduling_pb2.SchedulingConfig:
    response = await rig.admin.UpdateSchedulingConfig(
        pb.UpdateSchedulingConfigRequest(config=wanted, **fields)
    )
    changed: scheduling_pb2.SchedulingConfig = response.config
    return changed


async def refused(
    rig: Rig, wanted: scheduling_pb2.SchedulingConfig | None = None, **fields: Any
) -> grpc.aio.AioRpcError:
    """Ask for a change that is to be refused, and see that nothing has changed."""
    before = await in_force(rig)
    error = await failure_of(
        rig.admin.UpdateSchedulingConfig(pb.UpdateSchedulingConfigRequest(config=wanted, **fields))
    )
    assert await in_force(rig) == before
    return error


async def in_force(rig: Rig) -> pb.GetSchedulingConfigResponse:
    response: pb.GetSchedulingConfigResponse = await rig.admin.GetSchedulingConfig(
        pb.GetSchedulingConfigRequest()
    )
    return response


async def test_the_first_version_and_what_could_be_changed(rig: Rig) -> None:
    now = await in_force(rig)
    assert (now.config.version, now.config.scheduling_policy) == (1, "adaptive")
    assert now.config.comment
    assert now.policy_in_force not in {"", "adaptive"}
    assert now.policy_reason
    assert not now.history
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    assert now.config.update_time == status.start_time
    assert status.scheduling == now.config
    assert (status.policy_in_force, status.policy_reason) == (now.policy_in_force, now.policy_reason)
    names = [each.name for each in now.parameters]
    assert names == sorted(names)
    assert names == NAMES
    for each in now.parameters:
        assert each.minimum <= each.default_value == each.value <= each.maximum, each
        assert each.description, each


async def test_a_change_is_a_version_and_the_rest_stays_as_it_is(rig: Rig) -> None:
    first = await update(
        rig, config({"priority.boost_high_s": 60}, scheduling_policy="priority", comment="ann: try")
    )
    assert (first.version, first.scheduling_policy, first.comment) == (2, "priority", "ann: try")
    assert first.routing_strategy == "load_balanced"
    assert dict(first.parameters) == {"priority.boost_high_s": 60}
    second = await update(
        rig, config({"dispatch.patience": 0.2}, load_balancer="power_of_two"), expected_version=2
    )
    assert (second.version, second.scheduling_policy, second.load_balancer) == (3, "priority", "power_of_two")
    assert dict(second.parameters) == {"priority.boost_high_s": 60, "dispatch.patience": 0.2}
    now = await in_force(rig)
    assert now.config == second
    assert [each.version for each in now.history] == [2, 1]
    assert now.history[0] == first
    assert {each.name: each.value for each in now.parameters}["priority.boost_high_s"] == 60
    assert now.policy_in_force == "priority"
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    assert status.scheduling == second
    assert (
        second.update_time.ToNanoseconds()
        >= first.update_time.ToNanoseconds()
        >= status.start_time.ToNanoseconds()
    )


async def test_parameters_that_are_not_named_can_go_back_to_their_defaults(rig: Rig) -> None:
    await update(rig, config({"priority.boost_high_s": 60, "dispatch.patience": 0.2}))
    kept = await update(rig, config({"dispatch.patience": 0.3}), reset_parameters=True)
    assert dict(kept.parameters) == {"dispatch.patience": 0.3}
    none = await update(rig, reset_parameters=True)
    assert not none.parameters.fields


async def test_going_back_is_a_version_of_its_own(rig: Rig) -> None:
    await update(rig, config({"dispatch.patience": 0.2}, scheduling_policy="fifo"))
    await update(rig, config(routing_strategy="random"))
    back = await update(rig, revert_to_version=2)
    assert (back.version, back.scheduling_policy, back.routing_strategy) == (4, "fifo", "load_balanced")
    assert dict(back.parameters) == {"dispatch.patience": 0.2}
    assert "version 2" in back.comment
    assert (await update(rig, revert_to_version=1)).scheduling_policy == "adaptive"


async def test_only_validating_changes_nothing(rig: Rig) -> None:
    before = await in_force(rig)
    preview = await update(
        rig, config({"dispatch.patience": 0.2}, scheduling_policy="fifo"), validate_only=True
    )
    assert (preview.version, preview.scheduling_policy) == (2, "fifo")
    assert dict(preview.parameters) == {"dispatch.patience": 0.2}
    assert await in_force(rig) == before
    error = await refused(rig, config(scheduling_policy="nonsense"), validate_only=True)
    assert error.code() is Code.INVALID_ARGUMENT


async def test_everything_wrong_is_named_at_once(rig: Rig) -> None:
    error = await refused(
        rig,
        config(
            {
                "dispatch.patience": 0.2,
                "dispatch.prefill_window_s": -1,
                "priority.boost_hihg_s": 60,
                "priority.boost_low_s": "many",
                "objectives.tpot_s": None,
            },
            scheduling_policy="alphabetical",
            routing_strategy="crow",
            load_balancer="scales",
            comment="x" * 257,
        ),
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert reason_of(error) == "UNKNOWN_POLICY"
    found = {v.field: v.description for v in detail_of(error, error_details_pb2.BadRequest).field_violations}
    assert found.keys() == {
        "config.scheduling_policy",
        "config.routing_strategy",
        "config.load_balancer",
        "config.comment",
        "config.parameters['dispatch.prefill_window_s']",
        "config.parameters['priority.boost_hihg_s']",
        "config.parameters['priority.boost_low_s']",
        "config.parameters['objectives.tpot_s']",
    }
    assert "adaptive, cost_optimized, fifo, priority, slo_aware" in found["config.scheduling_policy"]
    assert "power_of_two" in found["config.load_balancer"]
    assert "priority.boost_high_s" in found["config.parameters['priority.boost_hihg_s']"]
    assert "0 to 3600" in found["config.parameters['dispatch.prefill_window_s']"]
    assert "must be a number" in found["config.parameters['priority.boost_low_s']"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
async def test_a_value_that_is_no_quantity_is_refused(rig: Rig, value: float) -> None:
    error = await refused(rig, config({"dispatch.patience": value}))
    assert error.code() is Code.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_REQUEST"
    assert fields_of(error) == {"config.parameters['dispatch.patience']"}


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({}, {"config"}),
        ({"validate_only": True}, {"config"}),
        ({"config": config(comment="and more"), "revert_to_version": 1}, {"config"}),
        (
            {"config": config(), "revert_to_version": 1, "reset_parameters": True},
            {"config", "reset_parameters"},
        ),
    ],
)
async def test_what_does_not_go_together(rig: Rig, fields: dict[str, Any], bad: set[str]) -> None:
    error = await refused(rig, fields.get("config"), **{n: v for n, v in fields.items() if n != "config"})
    assert error.code() is Code.INVALID_ARGUMENT
    assert fields_of(error) == bad


@pytest.mark.parametrize(
    "fields", [{"expected_version": 1}, {"expected_version": 7}, {"revert_to_version": 9}]
)
async def test_another_version_than_expected_is_a_conflict(rig: Rig, fields: dict[str, int]) -> None:
    await update(rig, config(scheduling_policy="fifo"))
    wanted = None if "revert_to_version" in fields else config(scheduling_policy="priority")
    error = await refused(rig, wanted, **fields)
    assert error.code() is Code.ABORTED
    assert reason_of(error) == "SETTINGS_VERSION_CONFLICT"
    assert detail_of(error, error_details_pb2.ErrorInfo).metadata["version"] == "2"


async def test_of_two_who_change_the_same_version_one_wins(rig: Rig) -> None:
    results = await asyncio.gather(
        *(
            rig.admin.UpdateSchedulingConfig(
                pb.UpdateSchedulingConfigRequest(config=config(scheduling_policy=name), expected_version=1)
            )
            for name in ("fifo", "priority")
        ),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in results) == [
        "AioRpcError",
        "UpdateSchedulingConfigResponse",
    ]
    assert (await in_force(rig)).config.version == 2


async def test_versions_are_kept_within_a_bound(rig: Rig) -> None:
    for number in range(70):
        await update(rig, config({"dispatch.patience": number / 100}))
    now = await in_force(rig)
    assert now.config.version == 71
    assert [each.version for each in now.history] == list(range(70, 7, -1))
    error = await refused(rig, revert_to_version=7)
    assert "those from 8 to 71 are" in (error.details() or "")


async def test_a_change_loses_nothing_that_waits(caplog: pytest.LogCaptureFixture) -> None:
    async with running_rig(
        scheduler=SchedulerConfig(scheduling_policy="fifo", load_balancer="least_connections")
    ) as rig:
        engine = await rig.add_engine("e1", limit=1)
        await rig.submit("running")
        first = await engine.next_call()
        names = [f"r{number:03}" for number in range(100)]
        for number, name in enumerate(names):
            urgent = number >= 90
            priority = (
                request_pb2.REQUEST_PRIORITY_CRITICAL if urgent else request_pb2.REQUEST_PRIORITY_NORMAL
            )
            await rig.submit(name, priority=priority)
        with caplog.at_level(logging.INFO, "sagecp.runtime.control_loop"):
            for policy in ("slo_aware", "cost_optimized", "adaptive", "fifo", "priority"):
                await update(
                    rig, config(scheduling_policy=policy, routing_strategy="locality", comment="ann")
                )
                status = await rig.admin.GetStatus(pb.GetStatusRequest())
                assert dict(status.queued_count_by_model) == {"tiny": 100}
                assert status.active_request_count == 1
        logged = [each for each in caplog.records if each.message == "scheduling settings changed"]
        assert [vars(each)["version"] for each in logged] == [2, 3, 4, 5, 6]
        assert vars(logged[-1])["scheduling_policy"] == "priority"
        assert vars(logged[-1])["comment"] == "ann"
        engine.automatic = lambda call: call.answer("a")
        first.answer("a")
        await until(lambda: rig.manager.scheduler.live_count == 0, "all requests to end")
        states = {name: await rig.state_of(name) for name in ["running", *names]}
        assert set(states.values()) == {"SUCCEEDED"}
        # The urgent ones went first, in the order of the last policy.
        order = [call.request_id for call in engine.calls]
        assert len(order) == 101
        assert {each.partition("#")[0] for each in order[1:11]} == set(names[90:])
        receipt = await explanation(rig, "r000")
        assert (receipt.scheduling_policy, receipt.config_version) == ("priority", 6)


async def explanation(rig: Rig, request_id: str) -> scheduling_pb2.SchedulingDecision:
    response = await rig.inference.ExplainRequest(
        inference_service_pb2.ExplainRequestRequest(request_id=request_id)
    )
    (decision,) = response.decisions
    decided: scheduling_pb2.SchedulingDecision = decision
    return decided


@pytest.mark.parametrize(
    ("strategy", "balancer"),
    [(name, "predicted_latency") for name in ROUTING_STRATEGIES.names]
    + [("load_balanced", name) for name in LOAD_BALANCERS.names],
)
async def test_a_real_receipt_run_again_is_equal_bit_for_bit(strategy: str, balancer: str) -> None:
    """By way of the wire: what a client gets is all that the choice was made from."""
    async with running_rig(
        scheduler=SchedulerConfig(routing_strategy=strategy, load_balancer=balancer)
    ) as rig:
        engines = [await rig.add_engine(f"e{number}", limit=8) for number in range(3)]
        for engine in engines:
            engine.automatic = lambda call: call.answer("a", "b", "c")
        for number in range(6):
            await rig.submit(f"warm{number}", text="some words " * 400, session_id=f"s{number % 2}")
        await until(lambda: rig.manager.scheduler.live_count == 0)
        for engine in engines:
            engine.automatic = None
        ids = [f"r{number}" for number in range(8)]
        for request_id in ids:
            await rig.submit(request_id, text="some words " * 400, session_id="s1")
        for request_id in ids:
            receipt = await explanation(rig, request_id)
            assert receipt.HasField("inputs")
            assert receipt.policy_in_force not in {"", "adaptive"}
            decision = client_convert.decision(receipt)
            assert decision.inputs is not None
            live = rig.manager.requests.get(request_id).record.decisions[0]
            assert decision.inputs == live.inputs
            chosen, scores = run_again(decision)
            assert chosen == decision.instance_id
            assert [(each.instance_id, each.score) for each in scores] == [
                (each.instance_id, each.score) for each in decision.candidates
            ]


async def test_a_receipt_says_what_scores_are_made_of(rig: Rig) -> None:
    await rig.add_engine("e1")
    await rig.add_engine("e2")
    await rig.submit("r1")
    receipt = await explanation(rig, "r1")
    assert len(receipt.candidates) == 2
    for candidate in receipt.candidates:
        assert {"ttft_s", "tpot_s", "work_s"} <= set(candidate.terms)
        assert not candidate.excluded_reason
    async with SageClient(rig.server.address) as client:
        (decision,) = (await client.explain("r1")).decisions
    assert decision.inputs is not None
    assert decision.candidates[0].terms == dict(receipt.candidates[0].terms)


async def test_how_right_predictions_were_is_told(rig: Rig) -> None:
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    assert not status.prediction_accuracy
    engine = await rig.add_engine("e1")
    engine.automatic = lambda call: call.answer("a", "b", "c")
    for number in range(3):
        await rig.submit(f"r{number}")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    status = await rig.admin.GetStatus(pb.GetStatusRequest())
    found = {each.quantity: each for each in status.prediction_accuracy}
    assert {"ttft", "latency", "output_tokens"} <= found.keys()
    assert found["ttft"].sample_count == 3
    assert found["ttft"].bias > 0
    assert 0 < found["ttft"].median_error <= found["ttft"].p90_error
    samples = await samples_of(rig)
    for quantity, each in found.items():
        for stat, value in (("bias", each.bias), ("median", each.median_error), ("p90", each.p90_error)):
            assert samples["sagecp_prediction_error_ratio", ("quantity", quantity), ("stat", stat)] == value
        compared = samples["sagecp_predictions_compared_total", ("quantity", quantity)]
        assert compared == each.sample_count


async def test_what_the_engine_counted_reaches_the_core(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ev.AttemptSucceeded] = []
    handle = rig.manager.scheduler.handle

    def watch(event: ev.Event, now: float) -> list[fx.Effect]:
        if isinstance(event, ev.AttemptSucceeded):
            seen.append(event)
        return handle(event, now)

    monkeypatch.setattr(rig.manager.scheduler, "handle", watch)
    engine = await rig.add_engine("e1")
    await rig.submit("known")
    call = await engine.next_call()
    call.send("a", "b")
    call.complete(EngineOutcome(("stop",), 70, 2, 64))
    await rig.submit("unknown")
    call = await engine.next_call()
    call.send("a")
    call.complete(EngineOutcome(("stop",), None, None, None))
    await until(lambda: len(seen) == 2)
    assert seen == [
        ev.AttemptSucceeded(
            "known", 1, 2, prompt_token_count=70, cached_prompt_token_count=64, finish_reasons=("stop",)
        ),
        ev.AttemptSucceeded("unknown", 1, 1, finish_reasons=("stop",)),
    ]


async def test_a_deadline_out_of_reach_says_what_was_predicted(rig: Rig) -> None:
    """Only where predictions are believed: a known GPU and a known model."""
    await rig.instances.RegisterInstance(
        fleet_service_pb2.RegisterInstanceRequest(
            spec=instance_pb2.InstanceSpec(
                instance_id="e1",
                engine_url=rig.fleet.instance("e1").engine_url,
                model_name="meta-llama/Llama-3.1-8B-Instruct",
                gpu_name="NVIDIA H100 80GB HBM3",
                gpu_count=1,
            )
        )
    )
    await until(lambda: rig.manager.instance("e1").state.name == "READY")
    deadline = request_pb2.Objectives(end_to_end_deadline=Duration(seconds=1))
    spec: dict[str, Any] = {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "sampling": request_pb2.SamplingParameters(max_tokens=2000, ignore_eos=True),
        "objectives": deadline,
    }
    error = await failure_of(
        rig.inference.Submit(inference_service_pb2.SubmitRequest(spec=request_spec("r1", "hello", **spec)))
    )
    assert error.code() is Code.RESOURCE_EXHAUSTED
    info = detail_of(error, error_details_pb2.ErrorInfo)
    assert info.reason == "INFEASIBLE"
    assert float(info.metadata["predicted_finish_s"]) > 1.1
    assert info.metadata["deadline_s"] == "1.000"
    # Operators may take them as best effort instead.
    await update(rig, config({"admission.refuse_infeasible": 0}))
    await rig.submit("r2", **spec)


# -- the command line ---------------------------------------------------------------------


async def sagecp(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command against the rig's server; it never shows a traceback."""
    environment = {**os.environ, "SAGECP_SERVER": rig.server.address, "NO_COLOR": "1", "COLUMNS": "80"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SAGECP, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60
        )

    result = await asyncio.to_thread(run)
    assert "Traceback" not in result.stderr
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("{")), (
        result.stdout
    )
    return result


async def test_the_commands(rig: Rig) -> None:
    shown = await sagecp(rig, "policy")
    assert shown.returncode == 0, shown.stderr
    assert "adaptive" in shown.stdout
    assert "all at their defaults" in shown.stdout
    result = await sagecp(
        rig, "policy", "set", "priority", "--routing", "locality", "--load-balancer", "least_connections",
        "--set", "priority.boost_high_s=60", "--set", "dispatch.patience=.3",
        "--comment", "ann: try", "--if-version", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "version 2 is in force" in result.stdout
    shown = await sagecp(rig, "policy", "get")
    for text in (
        "priority.boost_high_s = 60 (default",
        "locality, least_connections",
        "ann: try",
        "2, since",
    ):
        assert text in shown.stdout, shown.stdout
    parameters = (await sagecp(rig, "policy", "parameters")).stdout.splitlines()
    assert parameters[0].split()[:2] == ["NAME", "VALUE"]
    assert [line.split()[1] for line in parameters if line.startswith("*")] == [
        "dispatch.patience",
        "priority.boost_high_s",
    ]
    dry = await sagecp(rig, "policy", "set", "fifo", "--reset", "--dry-run")
    assert "it would be version 3" in dry.stdout
    assert "all at their defaults" in dry.stdout
    assert (await in_force(rig)).config.version == 2
    assert (await sagecp(rig, "policy", "revert", "1")).returncode == 0
    answer = json.loads((await sagecp(rig, "policy", "get", "-o", "json")).stdout)
    assert answer["config"]["version"] == "3"
    assert answer["config"]["scheduling_policy"] == "adaptive"
    assert [each["version"] for each in answer["history"]] == ["2", "1"]
    lines = (await sagecp(rig, "policy", "parameters", "-o", "json")).stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == NAMES


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["set"], ExitCode.INVALID, "nothing to change"),
        (["set", "alphabetical"], ExitCode.INVALID, "choose one of: adaptive"),
        (["set", "--set", "dispatch.patience"], ExitCode.INVALID, "not NAME=NUMBER"),
        (["set", "--set", "dispatch.patience=much"], ExitCode.INVALID, "not NAME=NUMBER"),
        (["set", "--set", "dispatch.patience=-1"], ExitCode.INVALID, "must be 0 to 10"),
        (["set", "--set", "dispatch.patienec=1"], ExitCode.INVALID, "dispatch.patience"),
        (["set", "fifo", "--if-version", "5"], ExitCode.NOT_FOUND_OR_CONFLICT, "version 1 is in force"),
        (["set", "fifo", "--if-version", "0"], ExitCode.INVALID, "--if-version"),
        (["set", "fifo", "--comment", "x" * 257], ExitCode.INVALID, "at most 256"),
        (["revert", "5"], ExitCode.NOT_FOUND_OR_CONFLICT, "version 5 is not kept"),
        (["revert", "x"], ExitCode.INVALID, "VERSION"),
    ],
)
async def test_commands_that_are_refused(rig: Rig, arguments: list[str], code: ExitCode, says: str) -> None:
    result = await sagecp(rig, "policy", *arguments)
    assert (result.returncode, says in result.stderr) == (code, True), result.stderr
    assert result.stderr.startswith("error: ")
    assert (await in_force(rig)).config.version == 1


async def test_explain_runs_a_receipt_again(rig: Rig) -> None:
    await rig.add_engine("e1")
    await rig.add_engine("e2")
    await rig.submit("r1")
    shown = await sagecp(rig, "explain", "r1", "--rerun")
    assert shown.returncode == 0, shown.stderr
    assert "run again here: the same choice, e1, and the same scores, bit for bit" in shown.stdout
    assert "TTFT_S" in shown.stdout
    _, again = (await sagecp(rig, "explain", "r1", "--rerun", "-o", "json")).stdout.splitlines()
    assert json.loads(again) == {
        "request_id": "r1",
        "epoch": 1,
        "rerun_instance_id": "e1",
        "same_choice": True,
        "same_scores": True,
    }


async def test_status_shows_how_right_predictions_were(rig: Rig) -> None:
    engine = await rig.add_engine("e1")
    engine.automatic = lambda call: call.answer("a", "b")
    await rig.submit("r1")
    await until(lambda: rig.manager.scheduler.live_count == 0)
    shown = await sagecp(rig, "status")
    assert "adaptive (" in shown.stdout
    assert "PREDICTED" in shown.stdout
    assert "output_tokens" in shown.stdout
