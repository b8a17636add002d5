"""What `sagecp check` asks for and prints."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from sagecp.cli import instances_view, metrics_view, render
from sagecp.cli.check_rules import RULES, Facts, Finding, Status, find
from sagecp.cli.connect import talk
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import ServerOptions
from sagecp.cli.output import to_yaml
from sagecp.cli.thresholds import parse_range
from sagecp.client import SageClient
from sagecp.core.fleet_event import EventKind
from sagecp.v1 import admin_service_pb2 as pb

# Monitoring systems give up on a check sooner than people on a command.
_TIMEOUT_S = 10.0
_MOST_REFUSALS = 1000
# What the line says when nothing is wrong.
_HIGHLIGHTS = ("ready", "queue", "slo")


def run(
    connection: ServerOptions,
    *,
    warn: Mapping[str, str],
    crit: Mapping[str, str],
    models: Sequence[str],
    window_s: float,
    verbose: bool,
    output: str,
) -> int:
    """Ask, judge, print a line, and return the exit code.

    Raises:
        CliError: An option is wrong, or the server refused to answer.
    """
    for thresholds in (warn, crit):
        _check(thresholds)
    if connection.timeout_s is None:
        connection = dataclasses.replace(connection, timeout_s=_TIMEOUT_S)
    try:
        facts = talk(connection, lambda client: _ask(client, models, window_s))
    except CliError as error:
        if error.code not in {ExitCode.UNREACHABLE, ExitCode.DEADLINE}:
            raise
        _print(Status.CRITICAL, error.message, [], output, verbose=verbose)
        return Status.CRITICAL
    findings = find(facts, warn, crit)
    status = max(finding.status for finding in findings)
    texts = [each.text for each in sorted(findings, key=lambda each: -each.status) if each.status]
    if not facts.status.accepting:
        status = max(status, Status.WARNING)
        texts.append("the server shuts down")
    if not texts:
        texts = [each.text for each in findings if each.rule.name in _HIGHLIGHTS]
    _print(status, ", ".join(texts), findings, output, verbose=verbose)
    return status


def _check(thresholds: Mapping[str, str]) -> None:
    names = [rule.name for rule in RULES]
    for name, text in thresholds.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise CliError(f"nothing is called {name!r}: {hint}", exit_code=ExitCode.INVALID)
        if text:
            try:
                parse_range(text)
            except ValueError as error:
                raise CliError(f"{name}: {error}", exit_code=ExitCode.INVALID) from None


async def _ask(client: SageClient, models: Sequence[str], window_s: float) -> Facts:
    query = metrics_view.query(window_s=window_s)
    status, instances, snapshot, refusals = await asyncio.gather(
        client.connection.unary(client.connection.admin.GetStatus, pb.GetStatusRequest()),
        instances_view.fetch(client, instances_view.InstanceFilter()),
        metrics_view.fetch(client, query),
        _count_refusals(client, window_s),
    )
    return Facts(
        status=status,
        instances=instances,
        metrics=snapshot.overall,
        refusals=refusals,
        expected_models=models,
    )


async def _count_refusals(client: SageClient, window_s: float) -> int:
    """Return how many events of the window tell of refused heartbeats."""
    count = 0
    async for event in client.list_events(kinds=[EventKind.HEARTBEAT_REFUSED]):
        if event.time_s < time.time() - window_s or count == _MOST_REFUSALS:
            break
        count += 1
    return count


def _print(status: Status, summary: str, findings: Sequence[Finding], output: str, *, verbose: bool) -> None:
    # A "|" would begin the performance data, and a line end the details.
    summary = render.harmless(" ".join(summary.split())).replace("|", "/")
    if output != "table":
        values = _values(status, summary, findings)
        click.echo(json.dumps(values, ensure_ascii=False) if output == "json" else to_yaml(values).rstrip())
        return
    data = " ".join(filter(None, (finding.performance_data for finding in findings)))
    click.echo(f"SAGECP {status.name}: {summary}{' | ' if data else ''}{data}")
    if verbose:
        for finding in findings:
            state = "-" if finding.value is None else finding.status.name
            click.echo(f"{finding.rule.name:<10} {state:<8} {finding.text.replace('|', '/')}")


def _values(status: Status, summary: str, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "status": status.name,
        "exit_code": int(status),
        "summary": summary,
        "checks": [
            {
                "name": finding.rule.name,
                "status": finding.status.name,
                "value": finding.value,
                "unit": finding.rule.unit,
                "warn": finding.warn.text if finding.warn else "",
                "crit": finding.crit.text if finding.crit else "",
                "text": finding.text,
            }
            for finding in findings
        ],
    }
