"""`sagecp simulate replay`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import debug_option, no_color, output_option


@click.command("replay")
@click.argument("log", metavar="LOG", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output_option
@no_color
@debug_option
def replay(log: Path, as_json: bool) -> int:
    """Decide again what an event log recorded, and compare.

    LOG is what --event-log writes, or a server's recorder. Its events are
    fed to a fresh scheduler; exits 0 if every decision is the same, with the
    same scores to the last bit, and 1 if not.
    """
    import json

    from sagecp.core.errors import SageError
    from sagecp.sim.fleet.event_log import EventLogError, replay_differences
    from sagecp.sim.fleet.event_log import replay as read_steps

    event_count = decision_count = 0
    try:
        for step in read_steps(log):
            event_count += 1
            decision_count += sum(each["effect"] == "DispatchAttempt" for each in step.effects)
        difference = next(iter(replay_differences(log)), None)
    except EventLogError as error:
        raise CliError(str(error), exit_code=ExitCode.INVALID) from error
    except SageError as error:
        raise CliError(f"{log}: this version refuses an event of the log: {error.message}") from error
    if as_json:
        found = {"event_count": event_count, "decision_count": decision_count, "is_same": difference is None}
        if difference is not None:
            found["first_different_line"] = difference.line_number
        click.echo(json.dumps(found))
    elif difference is None:
        click.echo(f"{event_count:,} events, {decision_count:,} decisions: all the same")
    else:
        click.echo(f"line {difference.line_number} ({difference.event_name}) is decided otherwise:")
        for line in _changes(difference.recorded, difference.replayed):
            click.echo(f"  {line}")
    return ExitCode.OK if difference is None else ExitCode.UNEXPECTED


def _changes(recorded: Sequence[Mapping[str, Any]], replayed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is different in the first effects that differ, a line for each field."""
    for then, now in itertools.zip_longest(recorded, replayed):
        if then == now:
            continue
        if then is None or now is None or then["effect"] != now["effect"]:
            return [f"{_name(then)} then, {_name(now)} now"]
        before, after = ({**each, **each.get("receipt", {})} for each in (then, now))
        return [_name(then)] + [
            f"{name}: {before.get(name)} then, {after.get(name)} now"
            for name in sorted((before.keys() | after.keys()) - {"receipt"})
            if before.get(name) != after.get(name)
        ]
    return []


def _name(effect: Mapping[str, Any] | None) -> str:
    if effect is None:
        return "nothing"
    return " ".join(
        [effect["effect"], str(effect.get("request_id") or effect.get("instance_id") or "")]
    ).strip()
