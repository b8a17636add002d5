"""What the tests of the gRPC server share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.rpc_rig import Rig, running_rig
from tests.support.waiting import other_tasks, until


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A server in this process, with scripted engines behind it; after the test nothing of it is left."""
    async with running_rig() as running:
        yield running
    assert running.manager.scheduler.live_count == 0
    assert all(not engine.running for engine in running.fleet.engines.values())
    # What grpc keeps for itself ends with the loop; nothing of ours may go on.
    await until(lambda: not [task for task in other_tasks() if "sagecp" in repr(task)], "no task is left")
