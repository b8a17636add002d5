"""Output for programs: the contract's messages as JSON, one a line, or as YAML, one a document.

Both have the contract's own field names. Counts that are zero are there, absent fields are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click
from google.protobuf.message import Message

from sagecp.cli.json_output import print_message, to_json


def is_for_programs(output: str) -> bool:
    """Return whether messages are printed as they are."""
    return output in {"json", "yaml"}


def print_object(message: Message, output: str) -> None:
    """Print the one message that a command is about."""
    if output == "yaml":
        print_values(json.loads(to_json(message)), output)
    else:
        print_message(message)


def print_values(values: Mapping[str, Any], output: str) -> None:
    """Print values that no message of the contract holds alone, as one line or document."""
    if output == "yaml":
        click.echo(to_yaml(values), nl=False)
    else:
        click.echo(json.dumps(values, ensure_ascii=False))


def print_entry(message: Message, output: str) -> None:
    """Print a message of several."""
    if output == "yaml":
        click.echo("---")
    print_object(message, output)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return a mapping as a YAML document, its keys in their order."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=110)
    return text
