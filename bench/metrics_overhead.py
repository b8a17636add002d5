"""CPU that metrics cost the control plane under load.

    python -m bench.metrics_overhead [--rounds 20] [--seconds 3] [--tokens 32]

First, one server under load with the time taken of everything that is done for
metrics: counting calls and requests, samples, a scrape per 15 s and a reader of
`WatchMetrics`. Their share of its CPU time is the figure to go by.

Then two servers take the same load in turn, one with all of that and one without
it. That also has what cannot be timed from within, such as what is pushed out of
the processor's caches, and whatever else the machine does: a few percent either
way on a busy one. The quietest quarter of the rounds is the best of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import urllib.request
from pathlib import Path

import grpc

from bench.processes import (
    Measured,
    free_port,
    machine,
    print_table,
    served_by,
    simulated_engine,
    write_json,
)
from bench.token_path import MODEL, load, register
from sagecp.v1 import admin_service_pb2, admin_service_pb2_grpc

_SCRAPE_INTERVAL_S = 15.0


async def _watch(server: Measured) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        async for _ in stub.WatchMetrics(admin_service_pb2.WatchMetricsRequest()):
            pass


def _scrape(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return len(answer.read())


async def _round(server: Measured, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the CPU us and the number of the requests of one round."""
    result = await load(server, arguments.streams, arguments.tokens, arguments.seconds)
    count = result.requests_per_second * arguments.seconds
    return result.cpu_us_per_request * count, count


async def _scraped_round(
    server: Measured, arguments: argparse.Namespace, port: int, scrapes: int
) -> tuple[float, float]:
    watch = asyncio.create_task(_watch(server))
    before_s = server.cpu_s()
    for _ in range(scrapes):
        await asyncio.to_thread(_scrape, port)
    scrape_s = server.cpu_s() - before_s
    cpu_us, count = await _round(server, arguments)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    return cpu_us + scrape_s * 1e6, count


async def _scrape_for_ever(port: int) -> None:
    while True:
        await asyncio.to_thread(_scrape, port)
        await asyncio.sleep(_SCRAPE_INTERVAL_S)


async def _timed_load(server: Measured, arguments: argparse.Namespace, port: int) -> tuple[float, float]:
    """Return the CPU seconds of a load with a watcher and scrapes, and the number of its requests."""
    others = [asyncio.create_task(_watch(server)), asyncio.create_task(_scrape_for_ever(port))]
    seconds = arguments.rounds * arguments.seconds / 2
    cpu_s = server.cpu_s()
    result = await load(server, arguments.streams, arguments.tokens, seconds)
    cpu_s = server.cpu_s() - cpu_s
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return cpu_s, result.requests_per_second * seconds


def _time_within(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the CPU us per request of everything done for metrics, and the share of the whole."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        with (
            simulated_engine(MODEL, "--profile", "instant") as engine,
            served_by("bench.metrics_overhead_server", "timed", str(port), str(file)) as server,
        ):
            asyncio.run(register(server, engine))
            cpu_s, request_count = asyncio.run(_timed_load(server, arguments, port))
        times = json.loads(file.read_text())["seconds"]
    figures = {name: seconds / request_count * 1e6 for name, seconds in times.items()}
    return figures | {"share": sum(times.values()) / cpu_s}


async def _measure(arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    port = free_port()
    rounds: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    with (
        simulated_engine(MODEL, "--profile", "instant") as engine,
        served_by("bench.metrics_overhead_server", "with", str(port)) as measured,
        served_by("bench.metrics_overhead_server", "without", "0") as bare,
    ):
        await register(measured, engine)
        await register(bare, engine)
        scrapes_made = 0
        for number in range(arguments.rounds):
            due = int((number + 1) * arguments.seconds / _SCRAPE_INTERVAL_S + 0.999)
            # In turn, so that neither is always the first.
            for name in ("with", "without") if number % 2 else ("without", "with"):
                if name == "without":
                    rounds[name].append(await _round(bare, arguments))
                else:
                    found = await _scraped_round(measured, arguments, port, due - scrapes_made)
                    rounds[name].append(found)
                    scrapes_made = due
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each load")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    within = _time_within(arguments)
    rounds = asyncio.run(_measure(arguments))
    per_round = {name: sorted(cpu_us / count for cpu_us, count in found) for name, found in rounds.items()}
    figures = {
        "all rounds": {
            name: sum(cpu_us for cpu_us, _ in found) / sum(count for _, count in found)
            for name, found in rounds.items()
        },
        "median round": {name: statistics.median(each) for name, each in per_round.items()},
        # What else the machine does only ever adds.
        "quietest quarter": {
            name: statistics.fmean(each[: max(1, len(each) // 4)]) for name, each in per_round.items()
        },
    }
    print(
        f"\n{machine()}; {arguments.streams} streams of {arguments.tokens} tokens, "
        f"{arguments.rounds} rounds of {arguments.seconds:g} s each\n"
    )
    print_table(
        ("done for metrics", "CPU us per request"),
        [(name, f"{each:.1f}") for name, each in within.items() if name != "share"],
    )
    print(f"\n{within['share']:.1%} of the CPU time of the server\n")
    print_table(
        ("CPU us per request", "with metrics", "without", "overhead"),
        [
            (
                name,
                f"{each['with']:.0f}",
                f"{each['without']:.0f}",
                f"{each['with'] / each['without'] - 1:+.1%}",
            )
            for name, each in figures.items()
        ],
    )
    write_json(arguments.json, {"within": within, "figures": figures, "rounds": per_round})


if __name__ == "__main__":
    main()
