"""`ForecastLoad` and `sagecp forecast`, from a history on disk to what a person reads."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from sagecp.client import InvalidArgumentError, SageClient
from sagecp.config import JournalConfig, ServerConfig
from sagecp.core.prediction.load_history import BUCKET_S, LoadBucket, LoadHistory, bucket_number
from sagecp.core.types import RequestMetadata
from sagecp.rpc.server import ControlPlaneServer
from sagecp.runtime.load_file import LoadFile
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.v1 import admin_service_pb2 as pb
from tests.support.cli import Cli
from tests.support.core_world import make_instance
from tests.support.rpc_rig import Rig, fields_of, reason_of
from tests.support.scripted_client import ScriptedFleet

DAY_BUCKETS = 288
DAYS = 3


def daily_load() -> list[LoadBucket]:
    """Three days of a load that swings once a day, up to the bucket before this one."""
    now = bucket_number(time.time())
    buckets = []
    for number in range(now - DAYS * DAY_BUCKETS, now):
        requests = 60.0 - 40.0 * math.cos(2.0 * math.pi * number / DAY_BUCKETS)
        buckets.append(
            LoadBucket(number, "chat", "acme", (requests, 900 * requests, 200 * requests, 0.002 * requests))
        )
        buckets.append(LoadBucket(number, "code", "", (10.0, 1e4, 1e3, 0.0)))
    return buckets


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ControlPlaneServer]:
    await asyncio.to_thread(LoadFile(tmp_path / "journal.load.jsonl").append, daily_load())
    config = ServerConfig(listen="127.0.0.1:0", journal=JournalConfig(path=str(tmp_path / "journal.db")))
    server = ControlPlaneServer(config)
    await server.start()
    yield server
    await server.stop()


async def test_a_restarted_server_forecasts_from_what_earlier_runs_counted(
    server: ControlPlaneServer,
) -> None:
    async with SageClient(f"127.0.0.1:{server.port}") as client:
        answer = await client.forecast_load("chat", horizon_s=3600.0)
        everything = await client.forecast_load()
        acme = await client.forecast_load(tenant_id="acme")
    assert len(answer.steps) == 12
    assert answer.step.seconds == BUCKET_S
    ahead = bucket_number(time.time())
    expected = sum(60.0 - 40.0 * math.cos(2.0 * math.pi * (ahead + step) / DAY_BUCKETS) for step in range(12))
    assert answer.total.requests.p50 == pytest.approx(expected, rel=0.15)
    assert answer.total.requests.p10 <= answer.total.requests.p50 <= answer.total.requests.p90
    assert answer.total.cost_usd.p50 == pytest.approx(0.002 * answer.total.requests.p50, rel=0.05)
    assert answer.error.sample_count > 100
    assert answer.error.weighted_error < 0.2
    assert answer.history.seconds == pytest.approx(DAYS * 86_400, abs=600)
    assert everything.total.requests.p50 == pytest.approx(answer.total.requests.p50 + 120.0, rel=0.05)
    assert acme.total.requests.p50 == pytest.approx(answer.total.requests.p50, rel=1e-6)


async def test_what_was_never_counted_is_refused_with_what_was(server: ControlPlaneServer) -> None:
    async with SageClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InvalidArgumentError, match="known are chat, code"):
            await client.forecast_load("chta")
        with pytest.raises(InvalidArgumentError, match="known are acme"):
            await client.forecast_load(tenant_id="umbrella")


async def test_a_person_reads_the_forecast_and_how_right_it_has_been(server: ControlPlaneServer) -> None:
    cli = Cli(f"127.0.0.1:{server.port}")
    text = await asyncio.to_thread(cli, "forecast", "--model", "chat")
    assert text.count("\n") > 14
    assert "in all" in text
    assert "days of history" in text
    assert "Forecasts 1 h ahead were off by" in text
    assert max(map(len, text.splitlines())) <= 110
    (answer,) = await asyncio.to_thread(cli.json, "forecast", "--horizon", "24h")
    assert len(answer["steps"]) == 24
    refused = await asyncio.to_thread(cli.run, "forecast", "--model", "chta")
    assert refused.returncode == 2
    assert "known are chat, code" in refused.stderr


async def test_load_is_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.load.jsonl"
    for _ in range(2):
        manager = ControlPlaneManager(client_factory=ScriptedFleet(), load_file=LoadFile(path))
        await manager.start()
        manager.register_instance(make_instance("e1", model="chat"))
        await manager.submit_request(RequestMetadata(prompt="one two three", tenant_id="acme"))
        await manager.stop()
    kept = await asyncio.to_thread(LoadFile(path).read)
    history = LoadHistory(time.time() + BUCKET_S)
    history.restore(kept)
    assert history.finished("chat", "acme")["requests"].sum() == 2
    assert history.finished("chat", "acme")["prompt_tokens"].sum() > 0


async def test_before_the_first_bucket_is_over_it_says_so(rig: Rig) -> None:
    answer = await rig.admin.ForecastLoad(pb.ForecastLoadRequest())
    assert not answer.steps
    assert "no history yet" in answer.basis


@pytest.mark.parametrize("horizon_s", [0, 299, 86_401, -5])
async def test_horizons_out_of_range_are_refused(rig: Rig, horizon_s: int) -> None:
    request = pb.ForecastLoadRequest(model="x" * 513)
    request.horizon.seconds = horizon_s
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.admin.ForecastLoad(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_REQUEST"
    assert fields_of(caught.value) == {"horizon", "model"}
