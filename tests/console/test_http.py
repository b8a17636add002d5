"""What the console's port answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from sagecp.config import ConfigError, ConsoleConfig, ServerConfig
from sagecp.core.types import InstanceState
from tests.console.conftest import Console, running_console
from tests.support.waiting import until

ACTING = {"X-Sagecp-Console": "1"}
CANARY = "zanzibar-canary-prompt"


async def updates(console: Console) -> AsyncIterator[dict[str, Any]]:
    async with console.http.get(f"{console.url}/api/stream") as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        while True:
            line = await response.content.readuntil(b"\n\n")
            yield json.loads(line.removeprefix(b"data: "))


async def _forever(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def test_the_page_and_all_that_it_needs_are_there(console: Console) -> None:
    async with console.http.get(console.url) as response:
        page = await response.text()
        assert (response.status, response.content_type) == (200, "text/html")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self'")
    for name in ("console.css", "console.js", "charts.js", "icon.svg"):
        assert name == "charts.js" or f"/static/{name}" in page
        async with console.http.get(f"{console.url}/static/{name}") as response:
            assert response.status == 200
            assert len(await response.read()) > 100
    assert "http://" not in page.replace("http://www.w3.org", ""), "the page asks for nothing from elsewhere"


async def test_metrics_are_on_the_same_port(console: Console) -> None:
    async with console.http.get(f"{console.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert await response.text() == "sagecp_nothing 0\n"


async def test_without_a_console_the_port_has_metrics_alone() -> None:
    async with running_console(enabled=False) as console:
        for path, status in (("/metrics", 200), ("/", 404), ("/api/snapshot", 404)):
            async with console.http.get(console.url + path) as response:
                assert response.status == status


async def test_a_viewer_gets_the_whole_and_then_what_changes(console: Console) -> None:
    await console.rig.add_engine("e1")
    async with asyncio.timeout(20):
        stream = updates(console)
        hello = await anext(stream)
        assert (hello["kind"], hello["actions"]) == ("hello", False)
        assert "slo_aware" in hello["policies"]
        whole = await anext(stream)
        assert whole["kind"] == "whole"
        assert [(row["id"], row["state"]) for row in whole["instances"]] == [("e1", "READY")]
        assert whole["status"]["policy"] == "adaptive"
        assert whole["status"]["policy_in_force"] == "slo_aware"
        await console.rig.add_engine("e2")
        seen: dict[str, str] = {}
        told: list[str] = []
        while seen.get("e2") != "READY":
            change = await anext(stream)
            assert change["kind"] == "change"
            seen |= {row["id"]: row["state"] for row in change["instances"]}
            told += [event["kind"] for event in change["events"] if event["instance_id"] == "e2"]
        # What did not change is not sent again.
        assert "e1" not in seen
        assert "INSTANCE_STATE_CHANGED" in told
        console.rig.manager.deregister_instance("e2")
        while "e2" not in (await anext(stream))["removed"]:
            pass
        await stream.aclose()  # type: ignore[attr-defined]


async def test_one_who_joins_takes_nothing_from_the_others(console: Console) -> None:
    async with asyncio.timeout(20):
        first = updates(console)
        while (await anext(first))["kind"] != "change":
            pass
        await console.rig.add_engine("e1")
        for path in ("/api/snapshot", "/api/snapshot"):
            async with console.http.get(console.url + path) as response:
                assert response.status == 200
        second = updates(console)
        while (await anext(second))["kind"] != "whole":
            pass
        told: set[str] = set()
        while "INSTANCE_REGISTERED" not in told:
            told |= {event["kind"] for event in (await anext(first))["events"]}
        for stream in (first, second):
            await stream.aclose()  # type: ignore[attr-defined]


async def test_decisions_are_shown_with_their_receipts_and_nothing_of_the_prompt(console: Console) -> None:
    engine = await console.rig.add_engine("e1")
    await console.rig.submit("r-1", CANARY)
    await until(lambda: bool(engine.calls), "the request runs")
    async with console.http.get(f"{console.url}/api/snapshot") as response:
        text = await response.text()
    (decision,) = json.loads(text)["decisions"]
    assert (decision["request_id"], decision["instance_id"]) == ("r-1", "e1")
    assert decision["candidates"][0]["instance_id"] == "e1"
    assert decision["candidates"][0]["score"] is not None
    async with console.http.get(f"{console.url}/api/requests/r-1") as response:
        explained = await response.text()
    assert json.loads(explained)["request"]["state"] in {"DISPATCHED", "RUNNING"}
    assert json.loads(explained)["decisions"] == [decision]
    assert CANARY not in text + explained


async def test_a_request_that_nobody_knows(console: Console) -> None:
    async with console.http.get(f"{console.url}/api/requests/nobody") as response:
        assert response.status == 404
        problem = json.loads(await response.text())
    assert problem["reason"] == "REQUEST_NOT_FOUND"
    assert "nobody" in problem["detail"]


async def test_it_only_shows_unless_told_otherwise(console: Console) -> None:
    await console.rig.add_engine("e1")
    for path in ("/api/instances/e1/drain", "/api/instances/e1/resume", "/api/policy"):
        async with console.http.post(console.url + path, headers=ACTING) as response:
            assert response.status == 403
            assert "--console-actions" in json.loads(await response.text())["detail"]
    assert console.rig.manager.instance("e1").drain is None


async def test_drain_resume_and_policy(acting_console: Console) -> None:
    console = acting_console
    await console.rig.add_engine("e1")
    await console.rig.add_engine("e2")

    async def post(path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        async with console.http.post(console.url + path, headers=ACTING, json=body) as response:
            return response.status, json.loads(await response.text())

    assert await post("/api/instances/e1/drain") == (200, {})
    assert console.rig.manager.instance("e1").state is InstanceState.DRAINED
    assert await post("/api/instances/e1/resume") == (200, {})
    assert console.rig.manager.instance("e1").drain is None
    assert await post("/api/policy", scheduling_policy="fifo") == (200, {})
    assert console.rig.manager.scheduling_settings().scheduling_policy == "fifo"
    status, problem = await post("/api/policy", scheduling_policy="best")
    assert (status, problem["reason"]) == (400, "UNKNOWN_POLICY")
    status, problem = await post("/api/instances/nobody/drain")
    assert (status, problem["reason"]) == (404, "INSTANCE_NOT_FOUND")


async def test_another_site_cannot_act(acting_console: Console) -> None:
    console = acting_console
    await console.rig.add_engine("e1")
    refused: list[dict[str, str]] = [
        {},  # A form has no header of its own.
        {**ACTING, "Origin": "http://evil.example"},
        {**ACTING, "Host": "evil.example"},
    ]
    for headers in refused:
        async with console.http.post(f"{console.url}/api/instances/e1/drain", headers=headers) as response:
            assert response.status in {403, 421}, headers
    assert console.rig.manager.instance("e1").drain is None
    own = {**ACTING, "Origin": console.url}
    async with console.http.post(
        f"{console.url}/api/instances/e1/drain", headers=own, json={"force": True}
    ) as response:
        assert response.status == 200


async def test_a_name_that_was_made_to_point_here_is_refused(console: Console) -> None:
    async with console.http.get(f"{console.url}/api/snapshot", headers={"Host": "evil.example"}) as response:
        assert response.status == 421
    for host in ("localhost:9464", "127.0.0.1", "[::1]:9464"):
        async with console.http.get(f"{console.url}/api/snapshot", headers={"Host": host}) as response:
            assert response.status == 200


async def test_viewers_are_bounded_and_leave_room_when_they_go() -> None:
    async with running_console(max_viewer_count=1) as console, asyncio.timeout(20):
        first = updates(console)
        await anext(first)
        async with console.http.get(f"{console.url}/api/stream") as response:
            assert response.status == 503
            assert "close one" in json.loads(await response.text())["detail"]
        await first.aclose()  # type: ignore[attr-defined]
        while True:
            async with console.http.get(f"{console.url}/api/stream") as response:
                if response.status == 200:
                    break
                await asyncio.sleep(0.01)


async def test_bad_bodies_are_refused_and_the_server_goes_on(acting_console: Console) -> None:
    console = acting_console
    for data in (b"{", b"[]", b'{"scheduling_policy": 3}', b"x" * 40_000):
        async with console.http.post(f"{console.url}/api/policy", headers=ACTING, data=data) as response:
            assert response.status in {400, 413}
    async with console.http.get(f"{console.url}/api/snapshot") as response:
        assert response.status == 200


async def test_it_ends_with_pages_open() -> None:
    async with running_console() as console:
        stream = updates(console)
        await anext(stream)
        async with asyncio.timeout(10):
            await console.server.stop()
        with pytest.raises((aiohttp.ClientError, asyncio.IncompleteReadError)):
            await _forever(stream)


def test_actions_for_everybody_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(
            metrics_listen="0.0.0.0:9464", insecure_listen=True, console=ConsoleConfig(actions=True)
        ).validate()
    assert [each.field for each in caught.value.violations] == ["console.actions"]
