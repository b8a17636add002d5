"""What a GPU costs, and by whose word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sagecp.config import ConfigError, ServerConfig, load_config
from sagecp.core.config import SchedulerConfig
from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.prices import GpuPrice, GpuPrices
from sagecp.core.types import PriceSource
from sagecp.rpc.server import ControlPlaneServer
from sagecp.sim.fleet.event_log import EventLogWriter, read_config
from sagecp.v1 import instance_pb2
from tests.support.core_world import World, healthy, make_instance

H100 = "NVIDIA H100 80GB HBM3"
CONFIGURED = GpuPrices(usd_per_gpu_hour={"H100-SXM-80GB": 2.9}, default_usd_per_gpu_hour=0.5)
USUAL = GpuPrices(use_usual_prices=True, default_usd_per_gpu_hour=0.5)


@pytest.mark.parametrize(
    ("prices", "fields", "expected"),
    [
        (GpuPrices(), {"gpu_name": H100}, GpuPrice()),
        (GpuPrices(), {"usd_per_gpu_hour": 1.5}, GpuPrice(1.5, PriceSource.INSTANCE)),
        (CONFIGURED, {"usd_per_gpu_hour": 1.5, "gpu_name": H100}, GpuPrice(1.5, PriceSource.INSTANCE)),
        # Somebody who says that it is free means it.
        (CONFIGURED, {"usd_per_gpu_hour": 0.0, "gpu_name": H100}, GpuPrice(0.0, PriceSource.INSTANCE)),
        (CONFIGURED, {"gpu_name": H100}, GpuPrice(2.9, PriceSource.GPU_KIND)),
        (GpuPrices(usd_per_gpu_hour={H100: 3.1}), {"gpu_name": H100}, GpuPrice(3.1, PriceSource.GPU_KIND)),
        (CONFIGURED, {"gpu_name": "NVIDIA L4"}, GpuPrice(0.5, PriceSource.DEFAULT)),
        (CONFIGURED, {}, GpuPrice(0.5, PriceSource.DEFAULT)),
        (USUAL, {"gpu_name": H100}, GpuPrice(require_gpu(H100).usd_per_hour, PriceSource.USUAL)),
        (USUAL, {"gpu_name": "mystery"}, GpuPrice(0.5, PriceSource.DEFAULT)),
    ],
)
def test_the_word_that_counts(prices: GpuPrices, fields: dict[str, Any], expected: GpuPrice) -> None:
    assert prices.price_of(make_instance("a", **fields)) == expected


def test_what_is_wrong_with_prices_is_named_at_once() -> None:
    prices = GpuPrices(
        usd_per_gpu_hour={"H10": 1.0, "h100": -1.0, H100: math.nan, "L4-24GB": math.inf},
        default_usd_per_gpu_hour=-0.5,
    )
    found = {
        each.field: each.description for each in prices.violations() if "keep one" not in each.description
    }
    assert found.keys() == {
        "usd_per_gpu_hour['H10']",
        "usd_per_gpu_hour['h100']",
        f"usd_per_gpu_hour[{H100!r}]",
        "usd_per_gpu_hour['L4-24GB']",
        "default_usd_per_gpu_hour",
    }
    assert "Known are GB200, B200" in found["usd_per_gpu_hour['H10']"]
    assert any("is H100-SXM-80GB, as 'h100' is" in each.description for each in prices.violations())
    assert CONFIGURED.violations() == []


def test_numbers_of_sources_are_the_contracts() -> None:
    named = {value.name.removeprefix("PRICE_SOURCE_"): value.number for value in
             instance_pb2.PriceSource.DESCRIPTOR.values if value.number}  # fmt: skip
    assert named == {source.name: source.value for source in PriceSource if source}


def test_instances_without_a_price_of_their_own_get_one() -> None:
    world = World(prices=CONFIGURED)
    world.feed(healthy("a", gpu_name=H100, gpu_count=4), healthy("b", usd_per_gpu_hour=1.0, gpu_count=4))
    assert world.instance("a").usd_per_hour == pytest.approx(4 * 2.9)
    assert world.instance("b").usd_per_hour == 4.0
    assert world.instance("a").spec.usd_per_gpu_hour is None, "what it said stays what it said"


# -- configuration -------------------------------------------------------------------------


def config_of(tmp_path: Path, text: str) -> ServerConfig:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return load_config(path).validate()


def test_prices_are_configured_in_a_table_of_their_own(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        """
        [prices]
        default_usd_per_gpu_hour = 1
        use_usual_prices = true
        [prices.usd_per_gpu_hour]
        "H100-SXM-80GB" = 2.9
        A100 = 2
        """,
    )
    assert config.prices.by_kind() == {"H100-SXM-80GB": 2.9, "A100-SXM-80GB": 2.0}
    assert (config.prices.default_usd_per_gpu_hour, config.prices.use_usual_prices) == (1.0, True)
    assert ControlPlaneServer(config).manager.scheduler.config.prices == config.prices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prices.usd_per_gpu_hour]\nH10 = 1", "prices.usd_per_gpu_hour['H10']: 'H10' is not a GPU"),
        ("[prices]\ndefault_usd_per_gpu_hour = -1", "prices.default_usd_per_gpu_hour: is -1; must be 0"),
        ("[prices]\nusd_per_hour = 1", "prices.usd_per_hour: is not a setting; known here"),
        ("[prices]\nusd_per_gpu_hour = 1", "must be a table [prices.usd_per_gpu_hour]"),
        ("[prices.usd_per_gpu_hour]\nH100 = 'x'", "must be a number"),
        ("[scheduler.prices]\nuse_usual_prices = true", "scheduler.prices: is not a setting; prices are in"),
    ],
)
def test_bad_prices_are_refused_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert message in str(caught.value)


def test_a_log_of_events_holds_the_prices_that_decisions_depend_on(tmp_path: Path) -> None:
    config = SchedulerConfig(prices=CONFIGURED)
    EventLogWriter(tmp_path / "log.jsonl", config).close()
    assert read_config(tmp_path / "log.jsonl") == config
