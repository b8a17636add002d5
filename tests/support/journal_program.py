"""A program that writes to a journal and prints what was acknowledged, until it is killed.

    python -m tests.support.journal_program PATH FIRST_NUMBER

Prints ``open COUNT`` once the journal is open, then a line ``accepted ID``,
``output ID`` or ``ended ID`` for each record that was acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

from sagecp.config import JournalConfig
from sagecp.runtime.store.records import Record
from sagecp.runtime.store.sqlite import journal_file
from sagecp.runtime.store.sqlite.store import SqliteStore
from tests.support.journals import write
from tests.support.store_records import Wall, accepted, ended, output, piece

SUBMITTER_COUNT = 16


def say(what: str, subject: object) -> None:
    # One system call: a line is there whole, or not at all.
    os.write(sys.stdout.fileno(), f"{what} {subject}\n".encode())


async def serve(path: Path, first: int) -> None:
    store = SqliteStore(path, JournalConfig(ballast_bytes=0), wall_clock=Wall())
    say("open", len(await store.open()))
    numbers = itertools.count(first)

    async def put(what: str, record: Record, request_id: str, *, sync: bool) -> None:
        error = await write(store, record, sync=sync)
        if error is not None:
            raise error
        say(what, request_id)

    async def submit() -> None:
        for number in numbers:
            request_id = f"request-{number}"
            await put("accepted", accepted(request_id, metadata=b"m" * 1000), request_id, sync=True)
            await put("output", output(request_id, 0, 5), request_id, sync=False)
            if number % 3:
                pieces = (piece(f"answer to {request_id}", [number]),)
                await put("ended", ended(request_id, pieces=pieces), request_id, sync=True)

    await asyncio.gather(*(submit() for _ in range(SUBMITTER_COUNT)))


if __name__ == "__main__":
    # Small enough for a short life to have old rows cleaned, and the log folded in.
    journal_file._CLEANING_FROM_BYTES = 20_000
    journal_file._CHECKPOINT_PAGE_COUNT = 64
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
