"""What many requests each have one of: whether it was accepted, and whether it has ended."""

from __future__ import annotations

import asyncio

import pytest

from sagecp.runtime.requests import Acceptance, OneTimeEvent
from sagecp.runtime.store.base import StoreError


async def waiting(*awaitables: object) -> list[asyncio.Task[None]]:
    """Return tasks that wait already."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]  # type: ignore[call-overload]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("error", [None, StoreError("the disk is full")])
async def test_everybody_hears_whether_a_request_was_accepted(error: StoreError | None) -> None:
    acceptance = Acceptance()
    tasks = await waiting(acceptance.wait(), acceptance.wait())
    assert not any(task.done() for task in tasks)
    acceptance.settle(error)
    late = await waiting(acceptance.wait())
    assert await asyncio.gather(*tasks, *late, return_exceptions=True) == [error] * 3


async def test_one_that_waits_no_more_takes_nothing_from_the_others() -> None:
    acceptance = Acceptance()
    leaving, staying = await waiting(acceptance.wait(), acceptance.wait())
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not staying.done()
    acceptance.settle(None)
    await staying


async def test_nobody_need_hear_of_a_refusal() -> None:
    acceptance = Acceptance()
    acceptance.settle(StoreError("the disk is full"))
    with pytest.raises(StoreError, match="the disk is full"):
        await acceptance.wait()


async def test_an_event_that_happens_once() -> None:
    event = OneTimeEvent()
    assert not event.is_set()
    leaving, staying = await waiting(event.wait(), event.wait())
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not staying.done()
    event.set()
    event.set()
    assert event.is_set()
    await staying
    await event.wait()
