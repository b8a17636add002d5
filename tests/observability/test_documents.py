"""The documentation of metrics names what the server exports, and nothing else; the set-up fits its files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.observability.promtool import DEPLOY, promtool
from tests.support.processes import ROOT
from tests.support.telemetry_world import eloquent_rig

OBSERVABILITY = DEPLOY / "observability"


async def test_the_table_of_metrics_is_complete() -> None:
    async with eloquent_rig() as rig:
        await rig.submit("over-rpc")
        text = (await rig.server.exporter.render()).decode()
    exported = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(text)
        if family.name.startswith("sagecp_")
    }
    table = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`(sagecp_\w+)`", table))
    assert documented == exported


def test_prometheus_takes_the_configuration_for_one_machine(tmp_path: Path) -> None:
    # Laid out as in the container.
    shutil.copy(OBSERVABILITY / "prometheus.yml", tmp_path)
    (tmp_path / "rules").mkdir()
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        shutil.copy(path, tmp_path / "rules")
    output = promtool("check", "config", tmp_path / "prometheus.yml")
    assert "2 rule files found" in output


def test_every_file_that_containers_are_given_is_there() -> None:
    compose = yaml.safe_load((OBSERVABILITY / "compose.yml").read_text())
    sources = [
        volume.partition(":")[0] for service in compose["services"].values() for volume in service["volumes"]
    ]
    named = set(compose["volumes"])
    assert named <= set(sources)
    for source in set(sources) - named:
        assert (OBSERVABILITY / source).exists(), source
