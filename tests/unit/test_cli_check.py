"""What `sagecp check` takes for a reason to alert, and what it says. No server."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.cli.check_rules import RULES, Facts, Finding, Status, find
from sagecp.cli.main import main
from sagecp.v1 import admin_service_pb2, instance_pb2, metrics_pb2


def instance(name: str, state: str = "READY", model: str = "m", **fields: Any) -> instance_pb2.Instance:
    return instance_pb2.Instance(
        spec=instance_pb2.InstanceSpec(instance_id=name, model_name=model),
        state=instance_pb2.InstanceState.Value(f"INSTANCE_STATE_{state}"),
        **fields,
    )


def facts(*instances: instance_pb2.Instance, **fields: Any) -> Facts:
    status = fields.pop("status", admin_service_pb2.GetStatusResponse(queue_capacity=100, accepting=True))
    metrics = fields.pop("metrics", metrics_pb2.PerformanceMetrics())
    return Facts(status=status, instances=instances, metrics=metrics, **fields)


def findings(found: Facts, warn: dict[str, str] | None = None, crit: dict[str, str] | None = None) -> Any:
    return {each.rule.name: each for each in find(found, warn or {}, crit or {})}


def queue(count: int) -> admin_service_pb2.GetStatusResponse:
    return admin_service_pb2.GetStatusResponse(queue_capacity=100, queued_count_by_model={"m": count})


def lag(seconds: float) -> admin_service_pb2.GetStatusResponse:
    status = admin_service_pb2.GetStatusResponse()
    status.event_loop_lag.FromMicroseconds(round(seconds * 1e6))
    return status


def accuracy(count: int, bias: float) -> admin_service_pb2.GetStatusResponse:
    entry = admin_service_pb2.PredictionAccuracy(quantity="ttft", sample_count=count, bias=bias)
    return admin_service_pb2.GetStatusResponse(prediction_accuracy=[entry])


FAULT = instance_pb2.GpuFault(gpu_index=2, kind=instance_pb2.GPU_FAULT_KIND_XID, message="XID 79")
TWO_MODELS = (instance("a"), instance("b"), instance("c", "LOST", model="n"))


@pytest.mark.parametrize(
    ("name", "found", "value", "status", "says"),
    [
        ("ready", facts(), 0, Status.CRITICAL, "no instance is registered"),
        ("ready", facts(instance("a"), instance("b", "LOST")), 1, Status.OK, "1 of 2 instances READY"),
        ("ready", facts(instance("a", "DRAINED")), 0, Status.CRITICAL, "0 of 1 instance READY"),
        ("ready", facts(*TWO_MODELS), 0, Status.CRITICAL, "0 READY for n"),
        ("ready", facts(instance("a"), expected_models=["other"]), 0, Status.CRITICAL, "0 READY for other"),
        ("unhealthy", facts(instance("a", "UNHEALTHY")), 1, Status.WARNING, "1 UNHEALTHY (a)"),
        ("lost", facts(*TWO_MODELS), 1, Status.WARNING, "1 LOST (c)"),
        ("gpu_faults", facts(instance("a", gpu_faults=[FAULT])), 1, Status.WARNING, "a GPU 2: XID 79"),
        ("queue", facts(status=queue(50)), 50, Status.OK, "50 queued of at most 100"),
        ("queue", facts(status=queue(51)), 51, Status.WARNING, ""),
        ("queue", facts(status=queue(91)), 91, Status.CRITICAL, ""),
        ("loop_lag", facts(status=lag(0.25)), 0.25, Status.OK, "250 ms"),
        ("loop_lag", facts(status=lag(0.3)), 0.3, Status.WARNING, ""),
        ("loop_lag", facts(status=lag(2)), 2, Status.CRITICAL, "2.00 s"),
        ("slo", facts(), None, Status.OK, "no objectives"),
        ("drift", facts(status=accuracy(99, 9)), None, Status.OK, "too few"),
        ("drift", facts(status=accuracy(100, 1.9)), 1.9, Status.OK, "1.90 times"),
        ("drift", facts(status=accuracy(100, 0.25)), 4, Status.WARNING, "0.25 times"),
        ("refused", facts(), 0, Status.OK, "no heartbeat"),
        ("refused", facts(refusals=1), 1, Status.WARNING, "refused"),
    ],
)
def test_defaults(name: str, found: Facts, value: float | None, status: Status, says: str) -> None:
    finding = findings(found)[name]
    assert finding.value == (None if value is None else pytest.approx(value))
    assert finding.status is status
    assert says in finding.text


@pytest.mark.parametrize(
    ("rate", "status"), [(1.0, Status.OK), (0.95, Status.OK), (0.94, Status.WARNING), (0.89, Status.CRITICAL)]
)
def test_objectives(rate: float, status: Status) -> None:
    metrics = metrics_pb2.PerformanceMetrics(slo_compliance_rate=rate)
    assert findings(facts(metrics=metrics))["slo"].status is status


def test_thresholds_replace_the_defaults_and_empty_ones_switch_them_off() -> None:
    found = facts(instance("a"), instance("b", "LOST"))
    assert findings(found, crit={"ready": "2:"})["ready"].status is Status.CRITICAL
    assert findings(found, crit={"ready": ""})["ready"].status is Status.OK
    assert findings(found, warn={"lost": ""})["lost"].status is Status.OK
    assert findings(found, warn={"lost": "1"}, crit={"lost": "@1:1"})["lost"].status is Status.CRITICAL


def test_performance_data_is_as_the_guidelines_want_it() -> None:
    rule = next(each for each in RULES if each.name == "queue")
    whole = findings(facts(status=queue(12)))["queue"]
    assert whole.performance_data == "queue=12%;50;90"
    assert findings(facts())["ready"].performance_data == "ready=0;;1:"
    assert Finding(rule, None, "", None, None).performance_data == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frob"], "No such option"),
        (["extra"], "unexpected extra argument"),
        (["--warn", "queue"], "KEY=VALUE"),
        (["--warn", "queu=1"], "did you mean queue?"),
        (["--crit", "frob=1"], "there are ready, unhealthy"),
        (["--crit", "queue=many"], "queue: 'many' is no range"),
        (["--timeout", "soon"], "not a duration"),
        (["--ca-cert", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_wrong_usage_is_unknown(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes 1 and 2 would be taken for a sick fleet."""
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    assert caught.value.code == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("SAGECP UNKNOWN: ")
    assert len(shown.out.splitlines()) == 1
    assert says in shown.out
    assert "|" not in shown.out


def test_a_server_that_cannot_be_reached_is_critical(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "--server", "127.0.0.1:1"])
    assert caught.value.code == 2
    assert capsys.readouterr().out.startswith(
        "SAGECP CRITICAL: cannot reach the control plane at 127.0.0.1:1"
    )


def test_the_help_names_every_rule_and_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for rule in RULES:
        line = lines[rule.name]
        assert rule.what in line
        assert (f"warn {rule.warn} " in line) is bool(rule.warn)
        assert (f"crit {rule.crit} " in line) is bool(rule.crit)
