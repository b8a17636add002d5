"""Rows 36, 38 and 39: the disk fills up, loses the end of the journal, or changes a bit of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from sagecp.cli.exit_codes import ExitCode
from tests.faults.harness.programs import SimEngine
from tests.faults.harness.site import Site, running_site
from tests.faults.harness.waiting import becomes
from tests.support.processes import ROOT, SAGECP
from tests.support.rpc_rig import detail_of, reason_of

_DISK_BYTES = 24 << 20
_BALLAST_BYTES = 2 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        # Not a missing tool: many machines let nobody but root mount.
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Take all that is left of a disk."""
    filler = place / "filler"
    block = b"x" * 4096
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError:
            return filler


async def test_row_36_the_disk_is_full(small_disk: Path) -> None:
    """Submit is refused and says when to come back; what runs ends; with space again all is as before."""
    engines = [SimEngine("e0", inter_token_ms=50)]
    settings = {"journal": {"ballast_bytes": _BALLAST_BYTES}}
    async with running_site(engines, settings=settings, folder=small_disk) as site:
        ledger = site.ledger
        running = [await ledger.submit(f"r{number}", token_count=60) for number in range(5)]
        reading = [asyncio.create_task(ledger.read(entry)) for entry in running]
        filler = fill(small_disk)
        refused = await refusals(site)
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(refused) == "JOURNAL_UNAVAILABLE"
        assert detail_of(refused, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        # What needs no disk is served.
        stateless = ledger.entry("stateless", token_count=5)
        await ledger.generate(stateless)
        assert stateless.state == "SUCCEEDED"
        await asyncio.gather(*reading)
        filler.unlink()
        await ledger.submit("again", insist_s=60)
        site.control_plane.kill()
        site.control_plane.spawn()
        await site.control_plane.serving()
        # It was kept in memory only.
        del ledger.entries["stateless"]
        await ledger.settle(engines)
        assert set(ledger.states()) == {"SUCCEEDED"}


async def refusals(site: Site) -> grpc.aio.AioRpcError:
    """Submit until that is refused, and return the refusal: not every request needs a new page."""
    number = 0
    while True:
        number += 1
        try:
            await site.ledger.submit(f"until-refused-{number}", token_count=1, prompt="x" * 20_000)
        except grpc.aio.AioRpcError as error:
            return error
        assert number < 2_000, "nothing is refused"


async def run_and_kill(site: Site) -> int:
    """Serve some requests, leave others unfinished, and kill; return how many were accepted."""
    ledger = site.ledger
    done = [await ledger.submit(f"done-{number}", token_count=5) for number in range(10)]
    for entry in done:
        await ledger.read(entry)
    for number in range(10):
        await ledger.submit(f"open-{number}", token_count=200)
    site.control_plane.kill()
    return 20


def tear(journal: Path) -> None:
    """Leave the beginning of a frame at the end of the log, as a loss of power does."""
    with Path(f"{journal}-wal").open("ab") as file:
        file.write(os.urandom(1_000))


def cut_off(journal: Path) -> None:
    """Cut the second half of the log off."""
    log = Path(f"{journal}-wal")
    os.truncate(log, log.stat().st_size // 2)


def flip(journal: Path) -> None:
    """Change one bit in the middle of the log."""
    log = Path(f"{journal}-wal")
    damaged = bytearray(log.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    log.write_bytes(damaged)


def salvage(journal: Path) -> str:
    """Salvage a journal with the command line; return what that says."""
    command = [str(SAGECP), "journal", "salvage", str(journal), "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def is_known(site: Site, request_id: str) -> bool:
    """Return whether the control plane knows a request."""
    try:
        await site.ledger.look(request_id)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise
    return True


async def test_row_38_the_end_of_the_journal_is_torn() -> None:
    """A write that was not complete was never acknowledged: it is dropped, and everything else is there."""
    async with running_site(1) as site:
        await run_and_kill(site)
        tear(site.control_plane.journal)
        site.control_plane.spawn()
        await site.control_plane.serving()
        await site.ledger.settle(site.engines)
        assert site.ledger.states() == {"SUCCEEDED": 20}


async def test_row_38_acknowledged_records_cut_off_are_missed() -> None:
    """A tail that was acknowledged does not vanish silently: the start is refused."""
    async with running_site(1) as site:
        await run_and_kill(site)
        cut_off(site.control_plane.journal)
        await refuses_to_start(site)


async def refuses_to_start(site: Site) -> str:
    """Start the control plane on a damaged journal; return what it says."""
    site.control_plane.spawn()
    assert await site.control_plane.ended() == ExitCode.NOT_FOUND_OR_CONFLICT
    message = site.control_plane.output
    assert str(site.control_plane.journal) in message
    assert f"sagecp journal salvage {site.control_plane.journal}" in message
    assert "Traceback" not in message
    return message


async def test_row_39_a_bit_of_the_journal_is_flipped() -> None:
    """The start is refused and names file and place; salvage keeps what is whole, and it starts."""
    async with running_site(1) as site:
        await run_and_kill(site)
        flip(site.control_plane.journal)
        message = await refuses_to_start(site)
        assert re.search(r"(offset|byte|record) \d+", message), message
        saved = json.loads(await asyncio.to_thread(salvage, site.control_plane.journal))
        site.control_plane.spawn()
        await site.control_plane.serving()
        missing = [request_id for request_id in site.ledger.entries if not await is_known(site, request_id)]
        for request_id in missing:
            # What salvage says is lost is no promise any more.
            del site.ledger.entries[request_id]
        assert len(site.ledger.entries) == saved["live_request_count"] + saved["ended_count"], saved
        assert bool(missing) <= bool(saved["lost_record_count"]), saved
        await site.reaches("e0", "READY")
        await becomes(site.control_plane.health, lambda status: status == 1, "it serves")
        await site.ledger.submit("new")
        await site.ledger.settle(site.engines)
