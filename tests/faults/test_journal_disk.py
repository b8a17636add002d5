"""Rows 36 and 37: a disk that is full, or that does not sync, or late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.records import Record, RequestAccepted, RequestEnded
from sagecp.runtime.store.sqlite import journal_file, writer
from sagecp.runtime.store.sqlite.checking import inspect_journal
from sagecp.runtime.store.sqlite.store import SqliteStore
from tests.support.faulty_disk import FaultyDisk, faulty_disk
from tests.support.journals import SMALL, open_journal, write
from tests.support.store_records import Wall, accepted, dispatched, ended, output, piece, values
from tests.support.waiting import until


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyDisk]:
    monkeypatch.setattr(writer, "RETRY_INTERVAL_S", 0.01)
    with faulty_disk() as made:
        yield made


@contextlib.asynccontextmanager
async def store_with(path: Path, config: JournalConfig = SMALL) -> AsyncIterator[SqliteStore]:
    async with open_journal(path, config) as (store, _records):
        yield store


async def test_a_full_disk_refuses_new_requests_and_lets_running_ones_finish(
    disk: FaultyDisk, tmp_path: Path
) -> None:
    path = tmp_path / "journal.db"
    async with store_with(path) as store:
        assert await write(store, accepted("running")) is None
        disk.is_full = True
        refused = await write(store, accepted("new"))
        assert refused is not None
        assert refused.retry_after_s is not None
        assert str(path) not in str(refused)
        assert not store.status().accepting
        assert "full" in store.status().trouble
        # Refused at once from now on, without a try.
        again = await write(store, accepted("another"))
        assert again is not None
        assert again.retry_after_s is not None
        end = ended("running", pieces=(piece("all of it", [1]),))
        for record in (dispatched("running", 1), output("running", 0, 2), end):
            assert await write(store, record) is None
        assert store.status().pending_count == 3
        assert values([await store.find_ended("tenant", "running")]) == values([end])
        disk.is_full = False
        await until(lambda: store.status().accepting)
        assert store.status().pending_count == 0
        assert await write(store, accepted("later")) is None
    async with open_journal(path) as (store, live):
        assert values(live) == values([accepted("later")])
        assert values([await store.find_ended("tenant", "running")]) == values([end])


async def test_a_write_that_fails_is_tried_again(disk: FaultyDisk, tmp_path: Path) -> None:
    async with store_with(tmp_path / "journal.db") as store:
        assert await write(store, accepted("running")) is None
        disk.fails_to_write = True
        assert await write(store, output("running", 0, 1)) is None
        await until(lambda: not store.status().accepting)
        disk.fails_to_write = False
        await until(lambda: store.status().accepting)
    async with open_journal(tmp_path / "journal.db") as (_store, live):
        assert values(live) == values([accepted("running"), output("running", 0, 1)])


async def test_flush_says_when_it_cannot(disk: FaultyDisk, tmp_path: Path) -> None:
    async with store_with(tmp_path / "journal.db") as store:
        store.append(accepted("one"))
        await store.flush()
        disk.is_full = True
        store.append(output("one", 0, 1))
        with pytest.raises(StoreError):
            await store.flush()
        disk.is_full = False


async def test_a_full_disk_does_not_keep_the_store_from_closing(disk: FaultyDisk, tmp_path: Path) -> None:
    async with store_with(tmp_path / "journal.db") as store:
        assert await write(store, accepted("one")) is None
        disk.is_full = True
        assert await write(store, output("one", 0, 1)) is None
    disk.is_full = False
    async with open_journal(tmp_path / "journal.db") as (_store, live):
        assert values(live) == values([accepted("one")])


async def test_after_a_failed_sync_nothing_is_promised_any_more(disk: FaultyDisk, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with store_with(path) as store:
        assert await write(store, accepted("before")) is None
        disk.fails_to_sync = True
        refused = await write(store, accepted("new"))
        assert refused is not None
        # Not to be tried again: only a restart can tell what is on the disk.
        assert refused.retry_after_s is None
        disk.fails_to_sync = False
        again = await write(store, accepted("another"))
        assert again is not None
        assert not store.status().accepting
        assert "restart" in store.status().trouble
        assert await write(store, output("before", 0, 1)) is None
        with pytest.raises(StoreError):
            await store.flush()
    async with open_journal(path) as (_store, live):
        # The one whose sync failed may be there: nobody was told that it is.
        assert values(live)[:1] == values([accepted("before")])
        assert len(live) <= 2


async def test_a_slow_sync_is_answered_late_and_never_early(disk: FaultyDisk, tmp_path: Path) -> None:
    async with store_with(tmp_path / "journal.db") as store:
        assert await write(store, accepted("before")) is None
        await write(store, ended("before"))
        disk.may_sync.clear()
        answers: list[StoreError | None] = []
        store.append(accepted("slow"), sync=True, then=answers.append)
        store.append(output("slow", 0, 1), then=answers.append)
        await until(disk.waits_to_sync.is_set)
        assert answers == []
        # The loop goes on, and so do reads.
        assert values([await store.find_ended("tenant", "before")]) == values([ended("before")])
        assert answers == []
        disk.may_sync.set()
        await until(lambda: answers == [None, None])


async def test_whatever_the_disk_does_what_was_answered_is_kept(
    disk: FaultyDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random records while the disk fails and works by turns, against a plain model."""
    monkeypatch.setattr(journal_file, "_CLEANING_FROM_BYTES", 1000)
    monkeypatch.setattr(journal_file, "_CHECKPOINT_PAGE_COUNT", 15)
    refusals = 0
    for seed in range(8):
        choose, path = random.Random(seed), tmp_path / f"journal-{seed}.db"
        live: dict[str, list[Record]] = {}
        gone: dict[str, RequestEnded] = {}
        async with store_with(path) as store:
            for step in range(150):
                disk.is_full = disk.is_full if choose.random() < 0.8 else not disk.is_full
                disk.fails_to_write = choose.random() < 0.1
                request_id, kind = f"request-{choose.randrange(8)}", choose.randrange(4)
                if kind == 0:
                    record: Record = accepted(request_id, sequence=step, metadata=b"m" * 500)
                    error = await write(store, record)
                    refusals += error is not None
                    if error is None:
                        live[request_id] = [record]
                elif kind == 1:
                    end = ended(request_id, pieces=(piece(str(step), [step]),))
                    assert await write(store, end) is None
                    live.pop(request_id, None)
                    gone[request_id] = end
                else:
                    record = output(request_id, step, 1)
                    assert await write(store, record, sync=kind == 2) is None
                    if request_id in live:
                        live[request_id].append(record)
                for name, end in gone.items():
                    assert values([await store.find_ended("tenant", name)]) == values([end])
            disk.is_full = disk.fails_to_write = False
            await until(lambda store=store: store.status().accepting)  # type: ignore[misc]
            assert store.status().pending_count == 0
        async with open_journal(path) as (_store, found):
            by_id: dict[str, list[Record]] = {}
            for each in found:
                by_id.setdefault(each.request_id, []).append(each)  # type: ignore[union-attr]
            assert {name: values(records) for name, records in by_id.items()} == {
                name: values(records) for name, records in live.items()
            }
        inspect_journal(path, thoroughly=True)
    assert refusals > 20


async def test_what_was_synced_survives_a_loss_of_power(
    disk: FaultyDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_CHECKPOINT_PAGE_COUNT", 12)
    monkeypatch.setattr(journal_file, "_CLEANING_FROM_BYTES", 3000)
    choose = random.Random(11)
    for number in range(12):
        path = tmp_path / f"power-{number}" / "journal.db"
        platter = tmp_path / f"platter-{number}" / "journal.db"
        platter.parent.mkdir()
        disk.platter = platter.parent
        async with store_with(path) as store:
            promised: list[Record] = []
            unsynced: list[Record] = []
            for step in range(choose.randrange(5, 120)):
                request_id = f"request-{step}"
                is_ended, is_synced = choose.random() < 0.5, choose.random() < 0.4
                unsynced.append(accepted(request_id, metadata=b"m" * choose.randrange(3000)))
                await write(store, unsynced[-1], sync=False)
                if is_ended:
                    unsynced.append(ended(request_id))
                    await write(store, unsynced[-1], sync=False)
                if is_synced:
                    unsynced.append(accepted(f"synced-{step}"))
                    await write(store, unsynced[-1], sync=True)
                    promised += unsynced
                    unsynced.clear()
            # The mark is never synced: it may be there in its newest form all the same.
            shutil.copyfile(f"{path}-mark", f"{platter}-mark")
            disk.platter = None
        async with open_journal(platter) as (store, live):
            found = values(live)
            gone = {each.request_id for each in promised if isinstance(each, RequestEnded)}
            for record in promised:
                assert isinstance(record, RequestAccepted | RequestEnded)
                if record.request_id in gone:
                    assert await store.find_ended("tenant", record.request_id) is not None
                else:
                    assert values([record])[0] in found


async def test_what_waits_for_a_slow_disk_is_bounded(disk: FaultyDisk, tmp_path: Path) -> None:
    config = JournalConfig(ballast_bytes=0, max_pending_bytes=100_000)
    async with store_with(tmp_path / "journal.db", config) as store:
        assert await write(store, accepted("running")) is None
        disk.may_sync.clear()
        answers: list[StoreError | None] = []
        for number in range(100):
            record = accepted(f"request-{number}", metadata=b"m" * 2000)
            store.append(record, sync=True, then=answers.append)
        await until(lambda: len(answers) > 0)
        refused = list(answers)
        assert 40 < len(refused) < 70
        assert all(error is not None and error.retry_after_s is not None for error in refused)
        # Output goes on until twice as much waits, and ends always do.
        left_out: list[StoreError | None] = []
        for number in range(100):
            store.append(output("running", number * 20, 20), then=left_out.append)
        await until(lambda: len(left_out) > 0)
        assert left_out == [None] * len(left_out)
        end = ended("running", pieces=(piece("x" * 5000, [1]),))
        store.append(end, then=left_out.append)
        disk.may_sync.set()
        await store.flush()
        assert store.status().accepting
        assert len(answers) == 100
        assert len(left_out) == 101
        found = await store.find_ended("tenant", "running")
        assert found is not None
        assert found.pieces == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 24 MiB of memory as a disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_disk_that_fills_up_gives_its_ballast_for_what_was_promised(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_INTERVAL_S", 0.02)
    path = small_disk / "journal.db"
    config = JournalConfig(ballast_bytes=4 << 20)
    store = SqliteStore(path, config, wall_clock=Wall())
    await store.open()
    try:
        ballast = path.with_name("journal.db-ballast")
        assert size_of(ballast) == 4 << 20
        kept: list[str] = []
        while True:
            request_id = f"request-{len(kept)}"
            if await write(store, accepted(request_id, metadata=os.urandom(100_000))) is not None:
                break
            kept.append(request_id)
        assert len(kept) > 20
        await until(lambda: size_of(ballast) == 0)
        # Room for what was promised was kept: written, although the disk was full.
        ends = [ended(request_id, pieces=(piece("x" * 1000, [1]),)) for request_id in kept]
        assert await asyncio.gather(*(write(store, end) for end in ends)) == [None] * len(kept)
        await until(lambda: store.status().pending_count == 0, "the ends are written in the ballast's room")
        # Ended requests were let go of, but the file is as large as it was: somebody must make room.
        assert not store.status().accepting
        resize(small_disk, 64)
        await until(lambda: store.status().accepting)
        assert size_of(ballast) == 4 << 20
        assert await write(store, accepted("later")) is None
    finally:
        await store.close()
    async with open_journal(path, config) as (reopened, live):
        assert values(live) == values([accepted("later")])
        for end in ends:
            assert values([await reopened.find_ended("tenant", end.request_id)]) == values([end])


async def test_a_journal_opens_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "journal.db"
    config = JournalConfig(ballast_bytes=4 << 20)
    async with store_with(path, config) as store:
        assert await write(store, accepted("one")) is None
    path.with_name("journal.db-shm").unlink()
    fill(small_disk / "filler")
    async with open_journal(path, config) as (store, live):
        assert values(live) == values([accepted("one")])
        assert not store.status().accepting
        refused = await write(store, accepted("two"))
        assert refused is not None
        assert refused.retry_after_s is not None
        assert await write(store, ended("one")) is None
        await until(lambda: store.status().pending_count == 0)
    async with open_journal(path, config) as (_store, live):
        assert live == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def resize(folder: Path, mebibytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={mebibytes}m", str(folder)], check=True)
