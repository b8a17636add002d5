"""The SQLite store beside its contract: its files, its bounds, its log."""

from __future__ import annotations

import asyncio
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sagecp.config import JournalConfig
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.open_store import journal_path, make_store
from sagecp.runtime.store.records import Record
from sagecp.runtime.store.sqlite import journal_file
from sagecp.runtime.store.sqlite.checking import inspect_journal
from sagecp.runtime.store.sqlite.database import PAGE_SIZE_BYTES
from sagecp.runtime.store.sqlite.store import SqliteStore
from sagecp.runtime.store.sqlite.wal_file import read_wal
from tests.support.journals import SMALL, copy_journal, open_journal, write
from tests.support.processes import ROOT
from tests.support.store_records import accepted, dispatched, ended, output, piece, values
from tests.support.waiting import until


def files_of(path: Path) -> dict[str, int]:
    """Return the permissions of the files of a journal, by the end of their names."""
    return {
        each.name.removeprefix(path.name): stat.S_IMODE(each.stat().st_mode)
        for each in path.parent.iterdir()
        if each.name.startswith(path.name)
    }


async def test_its_files_are_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "journal.db"
    async with open_journal(path, JournalConfig(ballast_bytes=1 << 20)) as (store, _):
        await write(store, accepted("one"))
        assert files_of(path) == dict.fromkeys(("", "-wal", "-shm", "-lock", "-mark", "-ballast"), 0o600)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with open_journal(path):
        pass
    path.chmod(0o644)
    async with open_journal(path):
        assert files_of(path)[""] == 0o600


async def test_a_second_opener_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    program = (
        "import asyncio, sys; from pathlib import Path;"
        "from sagecp.runtime.store.sqlite.store import SqliteStore;"
        "asyncio.run(SqliteStore(Path(sys.argv[1])).open())"
    )
    async with open_journal(path) as (store, _):
        other = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert other.returncode == 1
        assert "is in use by process" in other.stderr
        with pytest.raises(StoreError, match="is in use by process"):
            async with open_journal(path):
                pass
        assert await write(store, accepted("still here")) is None
    async with open_journal(path) as (_store, live):
        assert values(live) == values([accepted("still here")])


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(StoreError, match="file"):
        async with open_journal(in_the_way / "journal.db"):
            pass


async def test_the_file_does_not_grow_with_what_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that lives on keeps its records, in order, while thousands come and go around it."""
    monkeypatch.setattr(journal_file, "_CLEANING_FROM_BYTES", 200_000)
    monkeypatch.setattr(journal_file, "_CHECKPOINT_PAGE_COUNT", 60)
    path = tmp_path / "journal.db"
    config = JournalConfig(ballast_bytes=0, max_ended_count=50)
    async with open_journal(path, config) as (store, _):
        kept: list[Record] = [accepted("long", metadata=b"k" * 5000), dispatched("long", 1)]
        for record in kept:
            store.append(record, sync=True)
        sizes = []
        for turn in range(40):
            for number in range(50):
                request_id = f"request-{turn}-{number}"
                store.append(accepted(request_id, metadata=b"m" * 2000), sync=True)
                store.append(ended(request_id, pieces=(piece("x" * 500, [1]),)))
            kept.append(output("long", turn, 1))
            store.append(kept[-1])
            await store.flush()
            sizes.append(store.status().size_bytes)
        # 40 times 100 kB were written.
        assert max(sizes[20:]) <= 1.5 * max(sizes[:20])
        assert max(sizes) < 20 * 100_000
    assert inspect_journal(path, thoroughly=True).first_record > 1000
    async with open_journal(path, config) as (_store, live):
        assert values(live) == values(kept)


async def test_the_log_is_folded_in_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "_CHECKPOINT_PAGE_COUNT", 30)
    path = tmp_path / "journal.db"
    async with open_journal(path) as (store, _):
        for number in range(300):
            await write(store, accepted(f"request-{number}", metadata=b"m" * 2000))
        # 300 commits of two pages and more.
        assert path.with_name("journal.db-wal").stat().st_size < 100 * PAGE_SIZE_BYTES
        crashed = copy_journal(path, tmp_path / "crashed" / "journal.db")
    async with open_journal(crashed) as (_store, live):
        assert len(live) == 300


async def test_a_record_that_cannot_be_encoded_stops_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    half_a_pair = (EngineDelta(0, "\ud800", [1], 1),)
    async with open_journal(path) as (store, _):
        assert await write(store, accepted("one")) is None
        bad = await asyncio.gather(
            write(store, accepted("two")),
            write(store, msgspec_replace(output("one", 0, 1), half_a_pair)),
            write(store, output("two", 0, 1)),
        )
        assert [type(each) for each in bad] == [type(None), StoreError, type(None)]
        assert store.status().accepting
    async with open_journal(path) as (_store, live):
        assert values(live) == values([accepted("one"), accepted("two"), output("two", 0, 1)])


def msgspec_replace(record: Record, pieces: Sequence[EngineDelta]) -> Record:
    import msgspec

    changed: Record = msgspec.structs.replace(record, pieces=tuple(pieces))
    return changed


async def test_an_index_that_is_damaged_hides_no_ended_request(tmp_path: Path) -> None:
    """Found by reading the table: to run an ended request again would be worse than to be slow."""
    import apsw

    path = tmp_path / "journal.db"
    async with open_journal(path) as (store, _):
        await write(store, accepted("one"))
        await write(store, ended("one"))
    connection = apsw.Connection(str(path))
    ((root,),) = connection.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_ended_2'"
    )
    connection.close()
    data = bytearray(path.read_bytes())
    page = data[(root - 1) * PAGE_SIZE_BYTES : root * PAGE_SIZE_BYTES]
    assert page.count(b"tenant") == 1
    data[(root - 1) * PAGE_SIZE_BYTES : root * PAGE_SIZE_BYTES] = page.replace(b"tenant", b"tenanu")
    path.write_bytes(data)
    async with open_journal(path) as (store, _):
        assert values([await store.find_ended("tenant", "one")]) == values([ended("one")])


async def test_a_store_is_opened_once(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "journal.db", SMALL)
    with pytest.raises(RuntimeError, match="not open"):
        store.append(accepted("one"))
    await store.open()
    with pytest.raises(RuntimeError, match="opened before"):
        await store.open()
    await store.close()
    store._keys.add(hash(("tenant", "one")))
    with pytest.raises(StoreError, match="closed"):
        await store.find_ended("tenant", "one")


async def test_a_store_that_was_never_opened_can_be_closed(tmp_path: Path) -> None:
    await SqliteStore(tmp_path / "journal.db", SMALL).close()
    assert not (tmp_path / "journal.db").exists()


async def test_the_log_is_read_as_sqlite_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with open_journal(path) as (store, _):
        for number in range(20):
            await write(store, accepted(f"request-{number}"))
        log = read_wal(path.with_name("journal.db-wal"), PAGE_SIZE_BYTES)
        assert log.damage_offset is None
        assert log.page_size_bytes == PAGE_SIZE_BYTES
        assert log.frames
        assert all(frame.follows for frame in log.frames)
        assert sum(1 for frame in log.frames if frame.database_page_count) == 20
        assert log.end_offset == path.with_name("journal.db-wal").stat().st_size


@pytest.mark.parametrize("content", [None, b"", b"short", bytes(32), bytes(9000)])
def test_what_is_no_log_has_no_frames(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "journal.db-wal"
    if content is not None:
        path.write_bytes(content)
    log = read_wal(path, PAGE_SIZE_BYTES)
    assert [frame for frame in log.frames if frame.follows] == []
    assert (log.damage_offset is None) == (not content)


@pytest.mark.parametrize(
    ("config", "port", "environment", "expected"),
    [
        (JournalConfig(path="/data/j.db"), 0, {}, "/data/j.db"),
        (JournalConfig(), 7, {"XDG_STATE_HOME": "/state"}, "/state/sagecp/journal-7.db"),
        (JournalConfig(), 7, {"XDG_STATE_HOME": "relative"}, "~/.local/state/sagecp/journal-7.db"),
        (JournalConfig(), 7, {}, "~/.local/state/sagecp/journal-7.db"),
    ],
)
def test_where_the_journal_is(
    config: JournalConfig, port: int, environment: dict[str, str], expected: str
) -> None:
    assert journal_path(config, port, environment) == Path(expected).expanduser()


def test_without_a_journal_there_is_no_store(tmp_path: Path) -> None:
    assert make_store(JournalConfig(enabled=False, path=str(tmp_path / "journal.db")), 1) is None
    assert make_store(JournalConfig(), 0) is None
    assert isinstance(make_store(JournalConfig(path=str(tmp_path / "journal.db")), 0), SqliteStore)


async def test_a_backup_of_the_three_files_is_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with open_journal(path) as (store, _):
        await write(store, accepted("one"))
    backup = tmp_path / "backup"
    backup.mkdir()
    for suffix in ("", "-wal", "-mark"):
        shutil.copyfile(f"{path}{suffix}", backup / f"journal.db{suffix}")
    async with open_journal(backup / "journal.db") as (_store, live):
        assert values(live) == values([accepted("one")])


async def test_status_tells_what_waits(tmp_path: Path) -> None:
    async with open_journal(tmp_path / "journal.db") as (store, _):
        store.append(accepted("one"), sync=True)
        assert store.status().pending_count == 1
        await until(lambda: store.status().pending_count == 0)
        assert store.status().written_count == 1
        assert store.status().size_bytes > 0
