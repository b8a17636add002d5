"""The dashboards are what the generator makes, and ask for what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.observability.promtool import DEPLOY, RULE_FILES, promtool
from tests.support.samples import read_samples
from tests.support.telemetry_world import eloquent_rig

DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
_NAME = re.compile(r"(?:\b\w+:)?\b(?:sagecp|process)_\w+(?::\w+)*|\bsagecp:\w+(?::\w+)*")
# Prometheus makes these itself.
_OWN = {"up"}


def panels(path: Path) -> list[dict[str, Any]]:
    """Return the panels of a dashboard that ask for something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> dict[str, str]:
    """Return every query of every panel, as Prometheus gets it, by where it is."""
    expressions = {}
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "5m")
                expr = re.sub(r'"\$\w+"', '".*"', expr)
                assert "$" not in expr, (path.name, panel["title"], expr)
                expressions[f"{path.stem} {panel['title']} {target['refId']} {panel['id']}"] = expr
    return expressions


def rule_expressions() -> dict[str, str]:
    rules = [
        rule
        for path in RULE_FILES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    return {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules}


def test_the_committed_dashboards_are_the_generated_ones() -> None:
    program = "import json, generate; print(json.dumps(generate.texts()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=DEPLOY / "grafana",
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    committed = {path.name: path.read_text() for path in DASHBOARDS}
    assert committed == json.loads(done.stdout), "run python deploy/grafana/generate.py"


def test_prometheus_takes_every_query_of_every_panel(tmp_path: Path) -> None:
    expressions = dashboard_expressions()
    assert len(expressions) > 80
    rules = [
        {"record": f"query_{number}", "expr": expr, "labels": {"panel": where}}
        for number, (where, expr) in enumerate(expressions.items())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


def test_panels_do_not_overlap_and_are_told_apart() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        everything = json.loads(path.read_text())["panels"]
        assert len({panel["id"] for panel in everything}) == len(everything)
        for panel in everything:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not taken & cells, (path.name, panel["title"])
            taken |= cells


async def test_rules_and_dashboards_ask_for_metrics_that_the_server_has() -> None:
    async with eloquent_rig() as rig:
        # One call, so that there are metrics of calls.
        await rig.submit("over-rpc")
        text = (await rig.server.exporter.render()).decode()
    there = {str(key[0]) for key in read_samples(text)} | _OWN | rule_expressions().keys()
    asked = {
        (name, where)
        for where, expr in {**dashboard_expressions(), **rule_expressions()}.items()
        for name in _NAME.findall(expr)
    }
    assert len({name for name, _ in asked}) > 60
    missing = sorted((name, where) for name, where in asked if name not in there)
    assert not missing, f"nobody exports these: {missing}"


async def test_promtool_finds_nothing_to_complain_about_in_the_metrics() -> None:
    async with eloquent_rig() as rig:
        await rig.submit("over-rpc")
        text = (await rig.server.exporter.render()).decode()
    assert promtool("check", "metrics", text=text) == ""
