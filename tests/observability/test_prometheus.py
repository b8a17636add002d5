"""A real Prometheus scrapes a real server and evaluates the rules."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.promtool import RULE_FILES
from tests.support.processes import Program, eventually, free_ports, require
from tests.support.telemetry_world import WAITING_MODEL, eloquent_rig

WAIT_S = 40.0


class Prometheus:
    """A running Prometheus, asked over its API."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/{path}?{query}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expr: str) -> list[Any]:
        """Return the present series of an expression; none before it listens."""
        try:
            result: list[Any] = self.get("query", query=expr)["result"]
        except OSError:
            return []
        return result

    def wait_for(self, expr: str) -> list[Any]:
        """Return the series of an expression once there are any."""
        return eventually(lambda: self.query(expr), bool, timeout_s=WAIT_S, interval_s=0.2)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start a Prometheus that scrapes a port every second; ended after the test."""
    programs: list[Program] = []

    def start(metrics_port: int) -> Prometheus:
        tool = require("prometheus", "it is Debian's package of that name")
        (port,) = free_ports(1)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in RULE_FILES],
            "scrape_configs": [
                {"job_name": "sagecp", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}
            ],
        }
        path = tmp_path / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        programs.append(
            Program(
                "prometheus",
                [
                    tool,
                    f"--config.file={path}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
            )
        )
        return Prometheus(f"127.0.0.1:{port}")

    yield start
    for program in programs:
        program.stop()


async def test_it_scrapes_everything_without_a_warning_and_evaluates_the_rules(started: Any) -> None:
    async with eloquent_rig(metrics_listen="127.0.0.1:0") as rig:
        prometheus: Prometheus = started(rig.server.metrics_port)

        def look() -> None:
            up = prometheus.wait_for('up{job="sagecp"} == 1')
            assert len(up) == 1
            series = prometheus.wait_for("sagecp_build_info")
            assert series[0]["metric"]["job"] == "sagecp"
            targets = prometheus.get("targets")["activeTargets"]
            assert [(each["health"], each["lastError"]) for each in targets] == [("up", "")]
            # What was written twice, or out of order, would be missing here.
            scraped = prometheus.query('scrape_samples_scraped{job="sagecp"}')[0]["value"][1]
            kept = prometheus.query('count({job="sagecp", __name__=~"sagecp_.*|process_.*"})')[0]["value"][1]
            assert int(kept) == int(scraped)
            assert prometheus.wait_for("sagecp:slo_error_budget:ratio")[0]["value"][1] == "0.01"
            # Nothing of this model is READY: pending at first, as it must hold for a minute.
            waiting = prometheus.wait_for('ALERTS{alertname="SagecpModelWithoutReadyInstance"}')
            assert [each["metric"]["model"] for each in waiting] == [WAITING_MODEL]
            groups = prometheus.get("rules")["groups"]
            assert sum(len(group["rules"]) for group in groups) > 40
            wrong = [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
            assert not wrong

        await asyncio.to_thread(look)
