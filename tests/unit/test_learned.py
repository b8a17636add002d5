"""How fast an instance is by what was seen of it."""

from __future__ import annotations

import pytest

from sagecp.core.instance_load import InstanceLoad
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prediction.learned import learned_performance
from tests.support.core_world import STEP_TIME, make_instance, make_load


def test_of_a_kind_that_nobody_has_seen_nothing_is_said() -> None:
    kind = PredictionBook().kind_of(make_instance(model="unheard-of", gpu_name="unheard-of"))
    assert not kind.trusted
    assert learned_performance(InstanceLoad(kind, 0.0), 0.0) is None


def test_an_idle_instance_is_as_fast_as_its_kind() -> None:
    kind = PredictionBook().kind_of(
        make_instance(step_time=STEP_TIME, gpu_name="H100", tensor_parallel_size=4)
    )
    learned = learned_performance(InstanceLoad(kind, 0.0), 0.0)
    assert learned is not None
    assert learned.kind == "m on H100 x4"
    assert (learned.observation_count, learned.slowdown) == (0, 1.0)
    assert learned.single_step_s == learned.step_s == pytest.approx(STEP_TIME.decode_step_s(1, 1000))
    assert learned.prefill_tokens_per_second == pytest.approx(4000 / STEP_TIME.prefill_s(4000, 4000))
    assert learned.ttft_s == pytest.approx(STEP_TIME.prefill_s(1000, 1000))
    assert learned.prefill_request_count == 0


def test_work_and_slowness_show() -> None:
    load = make_load()
    idle = learned_performance(load, 0.0)
    for number in range(3):
        load.note_dispatch(f"r{number}", 10_000, 0, 0.0)
    busy = learned_performance(load, 0.0)
    for _ in range(10):
        load.tpot.observe(1.0, 4.0, 0.0)
        load.ttft.observe(1.0, 4.0, 0.0)
    slow = learned_performance(load, 0.0)
    assert idle is not None
    assert busy is not None
    assert slow is not None
    assert busy.prefill_request_count == 3
    assert busy.ttft_s > 1.0 > idle.ttft_s
    assert slow.slowdown == pytest.approx(4.0, rel=0.01)
    assert slow.single_step_s == pytest.approx(4 * idle.single_step_s, rel=0.01)
    assert slow.prefill_tokens_per_second == pytest.approx(idle.prefill_tokens_per_second / 4, rel=0.01)
