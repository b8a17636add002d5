"""What the journal costs: acknowledgements, unsynced output, opening, and CPU on the event loop.

    python -m bench.journal [--seconds 5] [--records 100000] [--folder DIR]

Submitters append an accepted request of 2 KiB, wait until it is synced, and
append the next: a closed loop. Give a folder on the disk that is to be measured;
on a memory file system fsync costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.processes import machine, print_table, write_json
from sagecp.config import JournalConfig
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.event_loop import run
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.memory import MemoryStore
from sagecp.runtime.store.records import Moment, OutputProduced, RequestAccepted, RequestEnded
from sagecp.runtime.store.sqlite.store import SqliteStore

_METADATA_BYTES = 2048
_MOMENT = Moment(1.0, 1.0, "boot")
_METADATA = [os.urandom(_METADATA_BYTES) for _ in range(64)]


def _accepted(number: int) -> RequestAccepted:
    return RequestAccepted(
        f"request-{number:08d}", "tenant", number, b"f" * 32, "model", _MOMENT, _METADATA[number % 64]
    )


def _ended(number: int) -> RequestEnded:
    pieces = (EngineDelta(0, "some words of an answer ", [1, 2, 3, 4, 5], 5, "stop"),)
    return RequestEnded(f"request-{number:08d}", "tenant", number, b"f" * 32, time.time(), b"s" * 300, pieces)


async def _synced(store: SqliteStore, record: RequestAccepted | RequestEnded) -> None:
    done: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    store.append(record, sync=True, then=done.set_result)
    error = await done
    if error is not None:
        raise error


@dataclass
class _Numbers:
    """Hands out numbers of requests."""

    last: int = 0

    def next(self) -> int:
        self.last += 1
        return self.last


async def _submit(
    store: SqliteStore, submitter_count: int, seconds: float, *, whole: bool
) -> dict[str, float]:
    """Return rates and latencies; ``whole``: every request also ends, so that the file is cleaned."""
    latencies_s: list[float] = []
    numbers = _Numbers(store.status().written_count)
    before = store.status()
    started_s = time.perf_counter()
    end_s = started_s + seconds

    async def submitter() -> None:
        while time.perf_counter() < end_s:
            number = numbers.next()
            sent_s = time.perf_counter()
            await _synced(store, _accepted(number))
            latencies_s.append(time.perf_counter() - sent_s)
            if whole:
                await _synced(store, _ended(number))

    await asyncio.gather(*(submitter() for _ in range(submitter_count)))
    took_s = time.perf_counter() - started_s
    latencies_s.sort()
    after = store.status()
    return {
        "acks_per_second": len(latencies_s) / took_s,
        "p50_ms": latencies_s[len(latencies_s) // 2] * 1000,
        "p99_ms": latencies_s[int(len(latencies_s) * 0.99)] * 1000,
        "records_per_commit": (after.written_count - before.written_count)
        / max(1, after.commit_count - before.commit_count),
        "file_mib": after.size_bytes / (1 << 20),
    }


async def _acknowledgements(folder: Path, seconds: float) -> list[dict[str, float]]:
    rows = []
    for whole in (False, True):
        for submitter_count in (1, 64, 512):
            path = folder / f"acks-{submitter_count}-{whole}.db"
            store = SqliteStore(path, JournalConfig(max_ended_count=20_000))
            await store.open()
            figures = await _submit(store, submitter_count, seconds, whole=whole)
            await store.close()
            rows.append({"submitters": submitter_count, "ended_too": whole, **figures})
            _delete(path)
    return rows


def _delete(path: Path) -> None:
    for each in path.parent.glob(path.name + "*"):
        each.unlink()


async def _outputs(folder: Path, count: int) -> float:
    """Return unsynced output records per second, of 100 requests with a piece each per tick."""
    store = SqliteStore(folder / "outputs.db")
    await store.open()
    for number in range(100):
        store.append(_accepted(number))
    await store.flush()
    started_s = time.perf_counter()
    for tick in range(count // 100):
        for number in range(100):
            pieces = (EngineDelta(0, " word", [tick], 1),)
            store.append(OutputProduced(f"request-{number:08d}", 1, tick, pieces))
        # As the loop would: the writer follows meanwhile.
        if tick % 100 == 99:
            await store.flush()
        await asyncio.sleep(0)
    await store.flush()
    rate = count / (time.perf_counter() - started_s)
    await store.close()
    return rate


async def _opening(folder: Path, count: int) -> dict[str, float]:
    """Return how long it takes to open a journal with so many requests that wait."""
    path = folder / "opening.db"
    store = SqliteStore(path)
    await store.open()
    for start in range(0, count, 1000):
        for number in range(start, min(count, start + 1000)):
            store.append(_accepted(number))
        await store.flush()
    await store.close()
    size_mib = path.stat().st_size / (1 << 20)
    store = SqliteStore(path)
    started_s = time.perf_counter()
    records = await store.open()
    took_s = time.perf_counter() - started_s
    if len(records) != count:
        raise RuntimeError(f"{len(records)} of {count} records came back")
    await store.close()
    return {"open_s": took_s, "open_file_mib": size_mib}


async def _loop_cost(folder: Path, count: int) -> dict[str, float]:
    """Return CPU microseconds per record on the event loop's thread: appending, and being answered."""
    figures = {}
    for name, store in (("sqlite", SqliteStore(folder / "cost.db")), ("memory", MemoryStore())):
        await store.open()
        answers: list[StoreError | None] = []
        records = [_accepted(number) for number in range(count)]
        before_s = time.thread_time()
        for start in range(0, count, 64):
            for record in records[start : start + 64]:
                store.append(record, sync=True, then=answers.append)
            await asyncio.sleep(0)
        await store.flush()
        if len(answers) != count:
            raise RuntimeError(f"{len(answers)} of {count} records were answered")
        figures[f"loop_us_per_record_{name}"] = (time.thread_time() - before_s) / count * 1e6
        await store.close()
    return figures


async def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    rows = await _acknowledgements(folder, arguments.seconds)
    print_table(
        tuple(rows[0]),
        [tuple(f"{value:g}" if value < 1000 else f"{value:,.0f}" for value in row.values()) for row in rows],
    )
    figures = {"outputs_per_second": await _outputs(folder, arguments.records)}
    figures |= await _opening(folder, arguments.records)
    figures |= await _loop_cost(folder, min(20_000, arguments.records))
    print()
    print_table(("figure", "value"), [(name, f"{value:,.2f}") for name, value in figures.items()])
    write_json(arguments.json, {"acknowledgements": rows, **figures})


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each closed loop")
    parser.add_argument("--records", type=int, default=100_000, help="to open, and of output")
    parser.add_argument(
        "--folder", type=Path, help="where the journals are written; default: a temporary one"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:

        async def measure() -> int:
            await _measure(arguments, Path(folder))
            return 0

        return run(measure())


if __name__ == "__main__":
    raise SystemExit(main())
