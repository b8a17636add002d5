"""The loop of long-lived processes: what it sets is set while it runs, and only then."""

from __future__ import annotations

import gc

import pytest

from sagecp.runtime.event_loop import run


async def thresholds() -> tuple[int, int, int]:
    return gc.get_threshold()


async def fails() -> None:
    raise ValueError("as told")


def test_the_collector_is_patient_while_the_loop_runs() -> None:
    before = gc.get_threshold()
    within = run(thresholds())
    assert all(more > less for more, less in zip(within, before, strict=True))
    assert gc.get_threshold() == before
    with pytest.raises(ValueError, match="as told"):
        run(fails())
    assert gc.get_threshold() == before
