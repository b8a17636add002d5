"""The rules are valid, every alert fires when it should, and the runbook knows what to do then."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from sagecp.cli.main import main
from tests.observability.promtool import DEPLOY, RULE_FILES, promtool
from tests.support.processes import ROOT

RULE_TESTS = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))
RUNBOOK = ROOT / "docs" / "runbook.md"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULE_FILES[1].read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_prometheus_takes_the_rules() -> None:
    for path in RULE_FILES:
        assert "SUCCESS" in promtool("check", "rules", path)


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for expression in test["promql_expr_test"]:
                found = re.search(r'alertname="(\w+)"', expression["expr"])
                assert found, expression
                (fires if expression["exp_samples"] else silent).add(found[1])
    names = {alert["alert"] for alert in alerts()}
    assert fires == names
    assert silent == names


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}
    annotations = alert["annotations"]
    assert len(annotations["summary"]) < 120
    assert len(annotations["description"]) > 80
    page, _, anchor = annotations["runbook"].partition("#")
    assert ROOT / page == RUNBOOK
    assert anchor == alert["alert"].lower()
    section = re.search(
        rf"^## {alert['alert']}\n(.+?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL
    )
    assert section, f"docs/runbook.md has no section {alert['alert']}"
    for part in ("**Means.**", "**Look at.**", "**Do.**"):
        assert part in section[1], f"{alert['alert']} has no {part}"


def commands() -> list[str]:
    """Return every command of ours that the runbook or an alert names."""
    texts = [RUNBOOK.read_text(), *(alert["annotations"]["description"] for alert in alerts())]
    return sorted(
        {" ".join(found.split()) for text in texts for found in re.findall(r"`(sagecp [^`]+)`", text)}
    )


@pytest.mark.parametrize("line", commands())
def test_every_command_that_is_named_exists_with_its_options(line: str) -> None:
    words = line.split()[1:]
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, f"{line}: there is no {words[0]}"
        command = found
        words.pop(0)
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word in options, f"{line}: there is no {word}"


def test_the_runbook_has_no_alerts_that_are_none() -> None:
    sections = set(re.findall(r"^## (Sagecp\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    assert sections == {alert["alert"] for alert in alerts()}
