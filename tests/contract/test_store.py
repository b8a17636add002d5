"""The contract of a store, run over every implementation.

A further store joins with one entry in ``STORES``: how it is opened on a folder,
and opened again on the same folder after it was closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import Store, StoreError
from sagecp.runtime.store.memory import MemoryStore
from sagecp.runtime.store.records import (
    InstanceDropped,
    InstanceKept,
    Record,
    RequestAccepted,
)
from sagecp.runtime.store.sqlite.store import SqliteStore
from tests.support.store_records import Wall, accepted, dispatched, ended, lost, output, piece, prompt, values
from tests.support.waiting import until

Factory = Callable[[Path, JournalConfig, Wall], Store]


def sqlite_factory(folder: Path, config: JournalConfig, wall: Wall) -> Store:
    return SqliteStore(folder / "journal.db", config, wall_clock=wall)


class MemoryFactory:
    """Gives the same object for the same folder: that is all that a memory can keep."""

    def __init__(self) -> None:
        self._stores: dict[Path, MemoryStore] = {}

    def __call__(self, folder: Path, config: JournalConfig, wall: Wall) -> Store:
        return self._stores.setdefault(folder, MemoryStore(config, wall_clock=wall))


STORES: dict[str, Callable[[], Factory]] = {"memory": MemoryFactory, "sqlite": lambda: sqlite_factory}


@dataclass
class Bench:
    """A store under test, and what it takes to open it again."""

    factory: Factory
    folder: Path
    config: JournalConfig = field(default_factory=lambda: JournalConfig(ballast_bytes=0))
    wall: Wall = field(default_factory=Wall)
    store: Store | None = None

    async def open(self, **changes: Any) -> Sequence[Record]:
        self.config = replace(self.config, **changes)
        self.store = self.factory(self.folder, self.config, self.wall)
        return await self.store.open()

    async def reopen(self) -> Sequence[Record]:
        await self.now.close()
        return await self.open()

    @property
    def now(self) -> Store:
        assert self.store is not None
        return self.store

    async def write(self, *records: Record, sync: bool = True) -> list[StoreError | None]:
        """Append records and return what each was answered, in order."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[StoreError | None]] = [loop.create_future() for _ in records]
        for record, answer in zip(records, answers, strict=True):
            self.now.append(record, sync=sync, then=answer.set_result)
        return list(await asyncio.gather(*answers))


@pytest.fixture(params=STORES)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(STORES[request.param](), tmp_path)
    yield made
    if made.store is not None:
        await made.store.close()


async def test_a_new_store_is_empty(bench: Bench) -> None:
    assert values(await bench.open()) == values([])
    status = bench.now.status()
    assert status.accepting
    assert status.trouble == ""
    assert not bench.now.may_have_ended("tenant", "request")
    assert await bench.now.find_ended("tenant", "request") is None


async def test_records_are_answered_in_order_and_never_at_once(bench: Bench) -> None:
    await bench.open()
    order: list[int] = []
    for number in range(20):
        record = accepted(f"request-{number}") if number % 2 == 0 else output(f"request-{number - 1}", 0, 1)
        bench.now.append(record, sync=number % 3 == 0, then=lambda error, n=number: order.append(n))  # type: ignore[misc]
    assert order == []
    await until(lambda: len(order) == 20)
    assert order == list(range(20))


async def test_everything_of_live_requests_comes_back_in_the_order_of_writing(bench: Bench) -> None:
    await bench.open()
    records: list[Record] = [
        accepted("one"),
        accepted("two"),
        dispatched("one", 1),
        prompt("one"),
        output("one", 0, 3),
        dispatched("two", 1),
        output("one", 3, 2),
        lost("one", 1),
        InstanceKept("engine-0", 4, False, b"specification"),
        dispatched("one", 2),
    ]
    assert await bench.write(*records) == [None] * len(records)
    assert values(await bench.reopen()) == values(records)
    assert values(await bench.reopen()) == values(records)


async def test_what_was_not_synced_survives_a_close(bench: Bench) -> None:
    await bench.open()
    bench.now.append(accepted("one"), sync=True)
    bench.now.append(output("one", 0, 1))
    assert values(await bench.reopen()) == values([accepted("one"), output("one", 0, 1)])


async def test_an_ended_request_is_kept_apart_with_its_output(bench: Bench) -> None:
    await bench.open()
    end = ended("one", pieces=(piece("hello", [1, 2]), piece("", [], finish_reason="stop")))
    await bench.write(accepted("one"), output("one", 0, 1), accepted("two"), end)
    assert values(await bench.reopen()) == values([accepted("two")])
    assert bench.now.may_have_ended("tenant", "one")
    assert values([await bench.now.find_ended("tenant", "one")]) == values([end])
    assert await bench.now.find_ended("other", "one") is None
    assert await bench.now.find_ended("tenant", "two") is None


async def test_an_ended_request_is_found_before_it_is_written(bench: Bench) -> None:
    await bench.open()
    bench.now.append(accepted("one"))
    bench.now.append(ended("one"))
    assert bench.now.may_have_ended("tenant", "one")
    assert values([await bench.now.find_ended("tenant", "one")]) == values([ended("one")])


async def test_the_same_id_of_two_tenants_is_two_ended_requests(bench: Bench) -> None:
    await bench.open()
    for tenant_id in ("red", "blue"):
        await bench.write(accepted("one", tenant_id=tenant_id), ended("one", tenant_id=tenant_id))
    await bench.reopen()
    for tenant_id in ("red", "blue"):
        found = await bench.now.find_ended(tenant_id, "one")
        assert found is not None
        assert found.tenant_id == tenant_id


async def test_records_belong_to_the_request_accepted_last(bench: Bench) -> None:
    await bench.open()
    again = accepted("one", sequence=2)
    await bench.write(accepted("one"), output("one", 0, 4), again, output("one", 0, 1))
    assert values(await bench.reopen()) == values([again, output("one", 0, 1)])


async def test_an_id_can_be_used_again_after_it_ended(bench: Bench) -> None:
    await bench.open()
    first, second = (
        ended("one", end_wall_s=1000.0, pieces=(piece("a", [1]),)),
        ended("one", end_wall_s=1001.0),
    )
    await bench.write(accepted("one"), first)
    await bench.write(accepted("one", sequence=2))
    assert values([await bench.now.find_ended("tenant", "one")]) == values([first])
    assert values(await bench.reopen()) == values([accepted("one", sequence=2)])
    await bench.write(second)
    assert values(await bench.reopen()) == values([])
    assert values([await bench.now.find_ended("tenant", "one")]) == values([second])


async def test_writing_an_end_again_changes_nothing(bench: Bench) -> None:
    await bench.open()
    end = ended("one", pieces=(piece("a", [1]),))
    await bench.write(accepted("one"), end, end)
    await bench.write(end)
    assert values(await bench.reopen()) == values([])
    assert values([await bench.now.find_ended("tenant", "one")]) == values([end])


async def test_records_of_what_is_not_live_are_let_go_of(bench: Bench) -> None:
    await bench.open()
    answers = await bench.write(
        output("never", 0, 1), accepted("one"), ended("one"), output("one", 0, 1), InstanceDropped("nobody")
    )
    assert answers == [None] * 5
    assert values(await bench.reopen()) == values([])


async def test_of_an_instance_the_last_record_counts(bench: Bench) -> None:
    await bench.open()
    last = InstanceKept("engine-0", 2, True, b"new")
    await bench.write(
        InstanceKept("engine-0", 1, False, b"old"),
        InstanceKept("engine-1", 1, False, b"other"),
        last,
        InstanceDropped("engine-1"),
    )
    assert values(await bench.reopen()) == values([last])
    await bench.write(InstanceDropped("engine-0"))
    assert values(await bench.reopen()) == values([])


async def test_the_oldest_ended_requests_go_when_there_are_too_many(bench: Bench) -> None:
    await bench.open(max_ended_count=10)
    for number in range(25):
        await bench.write(accepted(f"request-{number}"), ended(f"request-{number}"))
    await until(lambda: not bench.now.may_have_ended("tenant", "request-14"))
    kept = [number for number in range(25) if bench.now.may_have_ended("tenant", f"request-{number}")]
    assert kept == list(range(15, 25))
    await bench.reopen()
    assert await bench.now.find_ended("tenant", "request-14") is None
    assert values([await bench.now.find_ended("tenant", "request-15")]) == values([ended("request-15")])


async def test_ended_requests_go_with_time(bench: Bench) -> None:
    await bench.open(retention_s=100.0, output_retention_s=50.0)
    await bench.write(accepted("old"), ended("old", end_wall_s=bench.wall()))
    bench.wall.now_s += 80
    await bench.write(accepted("new"), ended("new", end_wall_s=bench.wall()))
    assert bench.now.may_have_ended("tenant", "old")
    bench.wall.now_s += 30
    await bench.write(accepted("live"))
    await until(lambda: not bench.now.may_have_ended("tenant", "old"))
    assert await bench.now.find_ended("tenant", "old") is None
    assert bench.now.may_have_ended("tenant", "new")


async def test_output_goes_sooner_than_the_request(bench: Bench) -> None:
    await bench.open(output_retention_s=50.0)
    end = ended("old", end_wall_s=bench.wall(), pieces=(piece("hello", [1]),))
    await bench.write(accepted("old"), end)
    bench.wall.now_s += 51
    await bench.write(accepted("live"))
    await _until_without_output(bench, "old")
    assert values([await bench.now.find_ended("tenant", "old")]) == values(
        [ended("old", end_wall_s=end.end_wall_s)]
    )


async def test_the_oldest_outputs_go_when_they_take_too_much(bench: Bench) -> None:
    await bench.open(max_output_bytes=20_000)
    for number in range(10):
        pieces = (piece("x" * 5000, []),)
        await bench.write(accepted(f"request-{number}"), ended(f"request-{number}", pieces=pieces))
    await _until_without_output(bench, "request-6")
    with_output = [
        number
        for number in range(10)
        if (found := await bench.now.find_ended("tenant", f"request-{number}")) is not None and found.pieces
    ]
    assert with_output == [7, 8, 9]


async def _until_without_output(bench: Bench, request_id: str) -> None:
    while True:
        found = await bench.now.find_ended("tenant", request_id)
        assert found is not None
        if not found.pieces:
            return
        await asyncio.sleep(0)


async def test_many_at_once_are_all_kept(bench: Bench) -> None:
    await bench.open()

    async def submit(number: int) -> None:
        request_id = f"request-{number}"
        assert await bench.write(accepted(request_id)) == [None]
        assert await bench.write(dispatched(request_id, 1)) == [None]

    await asyncio.gather(*(submit(number) for number in range(300)))
    status = bench.now.status()
    assert status.written_count == 600
    assert status.pending_count == 0
    if status.size_bytes:
        # Durable ones share transactions, or they would be slow.
        assert status.commit_count < 200
    live = await bench.reopen()
    assert {each.request_id for each in live if isinstance(each, RequestAccepted)} == {
        f"request-{number}" for number in range(300)
    }
    assert len(live) == 600


async def test_flush_returns_when_all_is_written(bench: Bench) -> None:
    await bench.open()
    answered: list[StoreError | None] = []
    for number in range(50):
        bench.now.append(accepted(f"request-{number}"), then=answered.append)
    await bench.now.flush()
    assert answered == [None] * 50
    await bench.now.flush()


async def test_close_writes_what_waits_and_can_be_called_again(bench: Bench) -> None:
    await bench.open()
    answers: list[StoreError | None] = []
    bench.now.append(accepted("one"), sync=True, then=answers.append)
    await bench.now.close()
    await asyncio.gather(bench.now.close(), bench.now.close())
    assert answers == [None]
    assert not bench.now.status().accepting
    refused: list[StoreError | None] = []
    bench.now.append(accepted("two"), then=refused.append)
    await until(lambda: len(refused) == 1)
    assert isinstance(refused[0], StoreError)
    assert values(await bench.open()) == values([accepted("one")])


async def test_a_callback_that_fails_keeps_no_other_from_being_called(bench: Bench) -> None:
    await bench.open()
    answers: list[StoreError | None] = []

    def fail(_error: StoreError | None) -> None:
        raise LookupError("on purpose")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, _context: None)
    bench.now.append(accepted("one"), then=fail)
    bench.now.append(accepted("two"), then=answers.append)
    await until(lambda: answers == [None])


async def test_large_records_come_back_whole(bench: Bench) -> None:
    await bench.open()
    large = accepted("large", metadata=bytes(range(256)) * 8192)
    pieces = tuple(piece(f"token {number} ✓ ", [number], raw=b'{"x":1}') for number in range(2000))
    await bench.write(large, accepted("ending"), ended("ending", pieces=pieces))
    assert values(await bench.reopen()) == values([large])
    assert values([await bench.now.find_ended("tenant", "ending")]) == values(
        [ended("ending", pieces=pieces)]
    )
