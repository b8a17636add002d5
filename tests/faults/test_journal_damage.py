"""Rows 38 and 39: a journal whose end was cut off, or in which bits have flipped."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from sagecp.runtime.store.base import StoreCorruptError, StoreError
from sagecp.runtime.store.records import Record
from sagecp.runtime.store.sqlite.checking import inspect_journal
from sagecp.runtime.store.sqlite.salvage import salvage_journal
from tests.support.journals import copy_journal, flip_bit, open_journal, write
from tests.support.store_records import accepted, dispatched, ended, output, piece, values

FRAME_BYTES = 24 + 8192
WAL_HEADER_BYTES = 32


def promised_records() -> list[Record]:
    """Return what every journal here was told to keep: live requests, and some that have ended."""
    records: list[Record] = []
    for number in range(40):
        request_id = f"request-{number:02d}"
        records.append(accepted(request_id, sequence=number, metadata=bytes([number]) * 1500))
        if number % 4 == 0:
            records.append(ended(request_id, pieces=(piece(f"answer {number} " * 100, [number]),)))
        else:
            records += [dispatched(request_id, 1), output(request_id, 0, 3)]
    return records


def live_records() -> list[Record]:
    gone = {record.request_id for record in promised_records() if type(record).__name__ == "RequestEnded"}  # type: ignore[union-attr]
    return [record for record in promised_records() if record.request_id not in gone]  # type: ignore[union-attr]


ENDED_IDS = [f"request-{number:02d}" for number in range(0, 40, 4)]


@pytest.fixture
async def crashed(tmp_path: Path) -> Path:
    """Return a journal as a crash leaves it: all of it acknowledged, most of it in the log."""
    path = tmp_path / "origin" / "journal.db"
    async with open_journal(path) as (store, _):
        for record in promised_records():
            assert await write(store, record) is None
        return copy_journal(path, tmp_path / "crashed" / "journal.db")


@pytest.fixture
async def closed(crashed: Path, tmp_path: Path) -> Path:
    """Return a journal as an orderly end leaves it: all of it in the main file."""
    async with open_journal(crashed):
        pass
    return copy_journal(crashed, tmp_path / "closed" / "journal.db")


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


async def ended_found(path: Path) -> dict[str, bool]:
    """Open a journal and return which ended requests it finds whole; all live ones must be there."""
    found = {}
    async with open_journal(path) as (store, live):
        assert values(live) == values(live_records())
        for request_id in ENDED_IDS:
            try:
                record = await store.find_ended("tenant", request_id)
            except StoreCorruptError:
                found[request_id] = False
            else:
                assert record is not None
                assert record.pieces[0].text.startswith("answer ")
                found[request_id] = True
    return found


async def test_after_a_crash_everything_that_was_acknowledged_is_there(crashed: Path) -> None:
    assert size_of(wal_of(crashed)) > WAL_HEADER_BYTES
    assert all((await ended_found(crashed)).values())


async def test_a_flipped_bit_in_the_log_is_named_and_costs_no_more_than_its_page(
    crashed: Path, tmp_path: Path
) -> None:
    choose = random.Random(4)
    size = size_of(wal_of(crashed))
    offsets = [0, 8, WAL_HEADER_BYTES, WAL_HEADER_BYTES + 8, size - 1, size - FRAME_BYTES + 9]
    offsets += [choose.randrange(size) for _ in range(24)]
    for number, offset in enumerate(offsets):
        path = copy_journal(crashed, tmp_path / f"flip-{number}" / "journal.db")
        flip_bit(wal_of(path), offset, choose.randrange(8))
        with pytest.raises(StoreCorruptError, match="sagecp journal salvage") as caught:
            async with open_journal(path):
                pass
        assert caught.value.path == str(path)
        frame_offset = max(0, (offset - WAL_HEADER_BYTES) // FRAME_BYTES) * FRAME_BYTES + WAL_HEADER_BYTES
        named = 0 if offset < WAL_HEADER_BYTES else frame_offset
        # The message names the frame; where a flip makes it look like one of an older log, its beginning.
        assert f"offset {named}" in str(caught.value)
        # Refusing changed nothing: it can be refused again.
        with pytest.raises(StoreCorruptError):
            inspect_journal(path)
        await check_salvage(path)


async def refusal(path: Path) -> StoreError | None:
    """Return why a journal does not open; one that does has everything that is live."""
    try:
        await ended_found(path)
    except StoreError as error:
        return error
    return None


def size_of(path: Path) -> int:
    return path.stat().st_size


async def check_salvage(path: Path) -> None:
    """Salvage a journal: what is there afterwards was written, and the rest is accounted for."""
    report = salvage_journal(path)
    assert report.record_count + report.lost_record_count == len(promised_records())
    # One page holds a few rows.
    assert report.lost_record_count <= 12
    inspect_journal(path, thoroughly=True)
    lost = {number for first, last in report.lost_records for number in range(first, last + 1)}
    kept = [record for number, record in enumerate(promised_records(), 1) if number not in lost]
    kept_ids = {record.request_id for record in kept if type(record).__name__ == "RequestAccepted"}  # type: ignore[union-attr]
    expected = [record for record in live_records() if record.request_id in kept_ids]  # type: ignore[union-attr]
    async with open_journal(path) as (_store, live):
        found = values(live)
        for record in expected:
            if record in kept:
                assert values([record])[0] in found
        written = values(promised_records())
        assert all(record in written for record in found)


async def test_a_flipped_bit_in_the_file_is_noticed_where_it_matters(closed: Path, tmp_path: Path) -> None:
    choose = random.Random(5)
    size = size_of(closed)
    refused = 0
    for number in range(100):
        path = copy_journal(closed, tmp_path / f"flip-{number}" / "journal.db")
        flip_bit(path, choose.randrange(size), choose.randrange(8))
        error = await refusal(path)
        if error is None:
            continue
        refused += 1
        assert str(path) in str(error)
        if isinstance(error, StoreCorruptError):
            assert f"sagecp journal salvage {path}" in str(error)
            await check_salvage(path)
    # Most of the file is rows.
    assert refused > 40


async def test_a_first_page_that_is_gone_is_replaced(closed: Path) -> None:
    with closed.open("r+b") as file:
        file.write(bytes(8192))
    with pytest.raises(StoreCorruptError):
        async with open_journal(closed):
            pass
    report = salvage_journal(closed)
    assert report.lost_record_count == 0
    assert all((await ended_found(closed)).values())


async def test_a_write_that_was_cut_off_is_dropped(crashed: Path, tmp_path: Path) -> None:
    """The last record was never acknowledged: its frames are there in part, and the mark is older."""
    async with open_journal(crashed) as (store, _):
        await write(store, accepted("late", metadata=b"m" * 30_000))
        torn = copy_journal(crashed, tmp_path / "torn" / "journal.db")
        whole = size_of(wal_of(torn))
    _unmark(torn)
    for cut in (1, FRAME_BYTES, FRAME_BYTES + 100, 2 * FRAME_BYTES):
        path = copy_journal(torn, tmp_path / f"cut-{cut}" / "journal.db")
        with wal_of(path).open("r+b") as file:
            file.truncate(whole - cut)
        assert all((await ended_found(path)).values())


def _unmark(path: Path) -> None:
    """Take the newer of a mark's two halves back: its record was not acknowledged yet."""
    mark = path.with_name(path.name + "-mark")
    data = bytearray(mark.read_bytes())
    sequences = [int.from_bytes(data[offset + 12 : offset + 20], "little") for offset in (0, 4096)]
    newest = (0, 4096)[sequences.index(max(sequences))]
    data[newest : newest + 32] = bytes(32)
    mark.write_bytes(data)


async def test_a_log_that_was_deleted_is_noticed(crashed: Path) -> None:
    wal_of(crashed).unlink()
    with pytest.raises(StoreCorruptError, match="promised"):
        async with open_journal(crashed):
            pass


async def test_a_file_that_was_deleted_is_noticed(closed: Path) -> None:
    elsewhere = closed.with_name("elsewhere.db")
    shutil.move(closed, elsewhere)
    with pytest.raises(StoreCorruptError, match="missing or empty"):
        async with open_journal(closed):
            pass
    shutil.move(elsewhere, closed)
    assert all((await ended_found(closed)).values())


async def test_an_older_copy_of_the_file_is_noticed(closed: Path, tmp_path: Path) -> None:
    old = copy_journal(closed, tmp_path / "old" / "journal.db")
    async with open_journal(closed) as (store, _):
        await write(store, accepted("new"))
    old.rename(closed)
    with pytest.raises(StoreCorruptError, match="are missing"):
        async with open_journal(closed):
            pass


async def test_the_mark_of_another_journal_is_noticed(closed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    async with open_journal(other) as (store, _):
        await write(store, accepted("one"))
    mark = closed.with_name(closed.name + "-mark")
    mark.write_bytes(other.with_name(other.name + "-mark").read_bytes())
    with pytest.raises(StoreError, match="another journal"):
        async with open_journal(closed):
            pass


async def test_without_its_mark_a_journal_opens(closed: Path) -> None:
    closed.with_name(closed.name + "-mark").unlink()
    assert all((await ended_found(closed)).values())
    assert inspect_journal(closed).promised_record > 0


async def test_something_else_is_not_taken_for_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("shopping list\n" * 1000)
    with pytest.raises(StoreCorruptError, match="not that of a SQLite file"):
        async with open_journal(path):
            pass
    assert path.read_text() == "shopping list\n" * 1000
