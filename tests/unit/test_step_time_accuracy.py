"""Planned against observed step times: how far engines are off, when that is told, and when it is over."""

from __future__ import annotations

import pytest

from sagecp.core.fleet_event import EventKind, EventSeverity
from sagecp.core.parallelism.model_knowledge import ModelKnowledge
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.prediction.priors import prior_for
from sagecp.core.prediction.step_time_accuracy import (
    LEAST_OBSERVATION_COUNT,
    PlannedStepTime,
    RunningRatio,
    StepTimeAccuracy,
    lone_deviant,
)
from sagecp.core.prediction.step_time_report import StepTimeReport
from sagecp.runtime.event_log import EventFilter, EventLog
from sagecp.runtime.event_reporter import EventReporter
from tests.support.core_world import make_instance
from tests.support.load_rig import LoadRig, poisson
from tests.unit.test_instance_load import MIXED_PROMPTS, OUTPUTS

STEP = prior_for("NVIDIA H100 80GB HBM3", "llama-3-8b").parameters


def accuracy(lane_count: int = 1, *, reliable: bool = True) -> StepTimeAccuracy:
    planned = PlannedStepTime(step_times=STEP, source="test", lane_count=lane_count, reliable=reliable)
    return StepTimeAccuracy(planned)


def observe(seen: StepTimeAccuracy, factor: float, count: int = LEAST_OBSERVATION_COUNT) -> RunningRatio:
    own = RunningRatio()
    for _ in range(count):
        seen.observe_decode(factor * STEP.decode_step_s(8, 8000), 8, 8000, own)
    return own


@pytest.mark.parametrize(
    ("factor", "drifts"), [(0.7, True), (0.85, False), (1.0, False), (1.15, False), (1.3, True)]
)
def test_more_than_a_fifth_off_is_a_drift(factor: float, drifts: bool) -> None:
    seen = accuracy()
    observe(seen, factor)
    assert seen.total.value == pytest.approx(factor)
    assert seen.judge(0.2) is drifts
    assert seen.drifting is drifts


def test_few_observations_and_guesses_are_no_drift() -> None:
    few, guess = accuracy(), accuracy(reliable=False)
    observe(few, 2.0, LEAST_OBSERVATION_COUNT - 1)
    observe(guess, 2.0)
    assert not few.judge(0.2)
    assert not guess.judge(0.2)
    assert guess.total.value == pytest.approx(2.0)


def test_a_drift_ends_below_three_quarters_of_what_began_it() -> None:
    seen = accuracy()
    observe(seen, 1.5)
    assert seen.judge(0.2)
    observe(seen, 1.17, 2000)
    assert not seen.judge(0.2)
    assert seen.drifting
    observe(seen, 1.05, 2000)
    assert seen.judge(0.2)
    assert not seen.drifting


def test_one_pause_moves_little_and_nonsense_nothing() -> None:
    seen = accuracy()
    own = observe(seen, 1.0, 50)
    seen.observe_decode(1000.0, 8, 8000, own)
    assert seen.total.value == pytest.approx(1.0, abs=0.03)
    for odd in (0.0, -1.0, float("nan"), float("inf")):
        seen.observe_decode(odd, 8, 8000, own)
    assert seen.total.count == 51


def test_lanes_share_the_requests() -> None:
    seen = accuracy(lane_count=4)
    own = RunningRatio()
    seen.observe_decode(STEP.decode_step_s(2, 2000), 8, 8000, own)
    assert seen.total.value == pytest.approx(1.0)
    seen.observe_prefill(1.0, 2, 1000, 0.0, 0.0, own)
    assert seen.prefills.value is None


def test_one_instance_that_alone_is_off_is_named() -> None:
    ratios = {"a": RunningRatio(), "b": RunningRatio(), "new": RunningRatio()}
    for _ in range(20):
        ratios["a"].add(0.0)
        ratios["b"].add(0.7)
    ratios["new"].add(3.0)
    assert lone_deviant(ratios, 0.2) == "b"
    assert lone_deviant({"b": ratios["b"]}, 0.2) == ""


@pytest.mark.parametrize(("slowness", "drifts"), [(1.0, False), (2.0, True), (0.6, True)])
def test_engines_slower_or_faster_than_planned_are_found_by_what_they_do(
    slowness: float, drifts: bool
) -> None:
    rig = LoadRig("8b-h100", slowness=slowness)
    rig.run(poisson(4.0, 150, MIXED_PROMPTS, OUTPUTS))
    seen = rig.kind.accuracy
    assert seen.total.count > 50
    assert seen.total.value == pytest.approx(slowness, rel=0.15)
    assert seen.judge(0.2) is drifts


def test_what_is_planned_comes_from_the_planner_where_model_and_gpu_are_known() -> None:
    knowledge = ModelKnowledge()
    known = make_instance(model="llama-3.1-8b", gpu_name="NVIDIA H100 80GB HBM3", tensor_parallel_size=2)
    planned = knowledge.planned_for(known)
    assert planned is not None
    assert planned.reliable
    assert "TP2 on H100" in planned.source
    assert 0.002 < planned.step_times.step_s(1, 1000) < 0.01
    assert knowledge.planned_for(make_instance(model="nobody-knows", gpu_name="NVIDIA L4")) is None
    assert knowledge.planned_for(make_instance(model="llama-3.1-8b")) is None


def test_operators_are_told_what_to_do() -> None:
    log = EventLog(lambda: 0.0)
    reporter = EventReporter(log)
    report = StepTimeReport(
        model="m",
        gpu_name="NVIDIA L4",
        config=ParallelismConfig(tensor_parallel_size=2),
        source="planned",
        observation_count=50,
        ratio=1.6,
        decode_ratio=1.6,
        prefill_ratio=None,
        drifting=True,
    )
    reporter.step_time_drifted(report)
    event = next(iter(log.newest_first(EventFilter())))
    assert (event.kind, event.severity) == (EventKind.PREDICTION_DRIFT, EventSeverity.WARNING)
    assert "m on NVIDIA L4, TP2: steps take 1.60 times as long as planned" in event.message
    assert "sagecp plan" in event.message
    assert event.attributes["ratio"] == "1.600"
