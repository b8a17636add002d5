"""Row 4: the control plane is replaced by another, and no caller has to know."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2

from sagecp.client import SageClient
from tests.faults.harness.programs import SimEngine
from tests.faults.harness.site import running_site
from tests.faults.harness.waiting import becomes


async def test_row_04_a_rolling_deploy_fails_nobody() -> None:
    """SIGTERM: health says so first, streams are told and go on with the next one, nothing fails."""
    engines = [SimEngine("e0", inter_token_ms=50)]
    async with (
        running_site(engines, settings={"runtime": {"drain_timeout_s": 1.0}}, limit=6) as site,
        SageClient(site.control_plane.address) as client,
    ):
        ledger, control_plane = site.ledger, site.control_plane
        # The first ends within the drain; others run on over it; the rest waits.
        short = await ledger.submit("short", token_count=3)
        entries = [await ledger.submit(f"r{number}", token_count=60) for number in range(10)]
        reading = [asyncio.create_task(ledger.read(entry)) for entry in [short, *entries]]

        async def use_the_client() -> list[int]:
            submitted = await client.submit("a story", max_tokens=60, ignore_eos=True)
            return [token async for chunk in client.stream(submitted.request_id) for token in chunk.token_ids]

        library = asyncio.create_task(use_the_client())

        async def begun() -> int:
            return len(entries[0].token_ids)

        await becomes(begun, lambda count: count > 0, "streams flow")
        control_plane.terminate()
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        await becomes(control_plane.health, lambda status: status == not_serving, "health says so")
        assert control_plane.running
        late = asyncio.create_task(ledger.submit("late", insist_s=60, token_count=5))
        assert await control_plane.ended() == 0
        control_plane.spawn()
        await control_plane.serving()
        await late
        await asyncio.gather(*reading)
        assert len(await library) == 60
        await ledger.settle(site.engines)
        assert ledger.states() == {"SUCCEEDED": 12}
        assert entries[0].draining, "a stream that ran was told"
        assert entries[0].connection_count >= 2
