"""Row 40: the wall clock jumps; leases and deadlines are counted on another one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from sagecp.v1 import request_pb2
from tests.faults.harness.programs import SimEngine
from tests.faults.harness.site import merged, running_site

_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
)
_HOUR = "3600"


def fake_clock(setting: Path) -> dict[str, str]:
    """Return the variables that let a program read its wall clock with an offset, from a file."""
    found = [library for library in _LIBRARIES if Path(library).exists()]
    if not found:
        message = "libfaketime is not installed: it sets the clock of one program"
        if os.environ.get("SAGECP_TEST_REQUIRE_ALL"):
            pytest.fail(message)
        pytest.skip(message)
    return {
        "LD_PRELOAD": found[0],
        "FAKETIME_TIMESTAMP_FILE": str(setting),
        "FAKETIME_NO_CACHE": "1",
        # No step of the wall clock moves this one.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("jump", [f"+{_HOUR}", f"-{_HOUR}"])
async def test_row_40_the_wall_clock_jumps_by_an_hour(jump: str, tmp_path: Path) -> None:
    """No lease ends and no deadline passes because of that, and none of them stays for an hour."""
    setting = tmp_path / "offset"
    setting.write_text("+0")
    engines = [SimEngine("e0", inter_token_ms=20)]
    # What has ended is kept by the wall clock: nothing else goes on while no control plane runs.
    kept = {"journal": {"output_retention_s": 14_400.0}}
    # Longer than grpc's threads may stand still after a jump: the lease shall end by its own clock alone.
    leases = {"scheduler": {"lease_duration_s": 20.0}}
    async with running_site(
        engines, agents=True, settings=merged(kept, leases), environment=fake_clock(setting)
    ) as site:
        ledger = site.ledger

        def within(seconds: int) -> request_pb2.Objectives:
            objectives = request_pb2.Objectives()
            objectives.end_to_end_deadline.FromSeconds(seconds)
            return objectives

        entries = [
            await ledger.submit(f"r{number}", insist_s=60, token_count=100, objectives=within(600))
            for number in range(5)
        ]
        reading = [asyncio.create_task(ledger.read(entry)) for entry in entries]
        setting.write_text(jump)
        # A call may be cut short by the jump: grpc's own timers are its own affair. Callers repeat it.
        late = await ledger.submit("late", insist_s=60, token_count=100, objectives=within(600))
        short = await ledger.submit("short", insist_s=60, token_count=2_000, objectives=within(2))
        await asyncio.gather(*reading)
        await ledger.read(late)
        await ledger.read(short)
        assert short.state == "EXPIRED", "a deadline does pass"
        await site.reaches("e0", "READY")
        changes = site.control_plane.events("instance changed")
        assert not [event for event in changes if event["state"] in {"LOST", "UNHEALTHY"}]
        # A restart finds the clock where it is.
        waiting = await ledger.submit("waiting", insist_s=60, token_count=200, objectives=within(600))
        site.control_plane.kill()
        setting.write_text("+0")
        site.control_plane.spawn(fake_clock(setting))
        await site.control_plane.serving()
        await ledger.read(waiting)
        assert waiting.state == "SUCCEEDED", "the time of the first clock meant nothing to the second"
        site.agents[0].kill()
        await site.reaches("e0", "LOST")
        await ledger.settle(engines)
