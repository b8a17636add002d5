"""The page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.console.conftest import Console, running_console
from tests.support.waiting import until

# A busy machine may take its time.
expect.set_options(timeout=30_000)
WIDE = {"width": 1360, "height": 900}


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("SAGECP_TEST_REQUIRE_ALL"):
            pytest.fail("needs Chromium; install it (Debian package chromium)")
        pytest.skip("needs Chromium; install it (Debian package chromium)")
    return found


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    path = chromium()
    async with async_playwright() as playwright:
        # Containers run as root, where Chromium's sandbox cannot, and have little shared memory.
        running = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield running
        finally:
            await running.close()


async def open_page(browser: Browser, console: Console) -> tuple[Page, list[str]]:
    """Open the console; return the page and what goes wrong in it."""
    page = await browser.new_page(viewport=WIDE)  # type: ignore[arg-type]
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    await page.goto(console.url)
    await expect(page.locator("#connection")).to_have_text("live")
    return page, troubles


async def test_the_fleet_as_it_changes(console: Console, browser: Browser) -> None:
    page, troubles = await open_page(browser, console)
    await expect(page.locator("#map-note")).to_contain_text("No instance is registered yet")
    await console.rig.add_engine("e1")
    await console.rig.add_engine("e2")
    await expect(page.locator(".cell")).to_have_count(2)
    console.rig.manager.drain_instance("e2")
    await expect(page.locator(".cell.s-DRAINED .id")).to_have_text("e2")
    await expect(page.locator("#events")).to_contain_text("e2")
    await page.get_by_role("button", name="1 DRAINED").click()
    await expect(page.locator(".cell")).to_have_count(1)
    await page.get_by_role("button", name="1 DRAINED").click()
    await page.locator("#search").fill("e1")
    await expect(page.locator(".cell .id")).to_have_text("e1")
    await page.locator(".cell").click()
    await expect(page.locator("#drawer-title")).to_have_text("e1")
    await expect(page.locator("#drawer")).to_contain_text("READY")
    # It only shows.
    await expect(page.get_by_label("Order by")).to_be_hidden()
    await expect(page.locator("#drawer .actions")).to_have_count(0)
    assert troubles == []


async def test_a_decision_and_its_receipt(console: Console, browser: Browser) -> None:
    engine = await console.rig.add_engine("e1")
    await console.rig.add_engine("e2")
    page, troubles = await open_page(browser, console)
    # Names are text, whatever they look like.
    await console.rig.submit("r-1", "hello", user_id="<b>ann</b>")
    await until(lambda: bool(engine.calls or console.rig.fleet["e2"].calls), "the request runs")
    row = page.locator("#decision-rows tr").first
    await expect(row).to_contain_text("r-1")
    await row.click()
    drawer = page.locator("#drawer")
    await expect(drawer.locator("tbody tr")).to_have_count(2)
    await expect(drawer).to_contain_text("lower is better")
    await expect(drawer).to_contain_text("<b>ann</b>")
    await page.locator("#drawer-close").click()
    await page.locator("#find-request").fill("nobody")
    await page.locator("#find-request").press("Enter")
    await expect(drawer).to_contain_text("nobody")
    assert [each for each in troubles if "404" not in each] == []


async def test_acting_where_that_is_allowed(browser: Browser) -> None:
    async with running_console(actions=True) as console:
        await console.rig.add_engine("e1")
        await console.rig.add_engine("e2")
        page, troubles = await open_page(browser, console)
        await page.locator(".cell", has_text="e1").click()
        drawer = page.locator("#drawer")
        await drawer.get_by_role("button", name="Drain").click()
        await expect(drawer).to_contain_text("DRAINED")
        assert console.rig.manager.instance("e1").drain is not None
        await drawer.get_by_role("button", name="Resume").click()
        await expect(drawer.get_by_role("button", name="Drain")).to_be_visible()
        assert console.rig.manager.instance("e1").drain is None
        await page.locator("#drawer-close").click()
        await page.get_by_label("Order by").select_option("fifo")
        await expect(page.locator("#policy")).to_contain_text("fifo")
        assert console.rig.manager.scheduling_settings().scheduling_policy == "fifo"
        assert troubles == []


async def test_many_instances_and_a_lost_connection(console: Console, browser: Browser) -> None:
    for number in range(80):
        await console.rig.instances.RegisterInstance(_registration(console, number))
    page, troubles = await open_page(browser, console)
    await expect(page.locator("#map.dense .cell")).to_have_count(80)
    box: Any = await page.locator(".cell").first.bounding_box()
    assert box["width"] < 40
    await console.server.stop()
    await expect(page.locator("#connection")).to_have_text("no connection, trying again")
    assert [each for each in troubles if "ERR_" not in each] == []


def _registration(console: Console, number: int) -> Any:
    from sagecp.v1 import fleet_service_pb2

    return fleet_service_pb2.RegisterInstanceRequest(spec=console.rig.spec(f"e{number:03}"), incarnation=1)
