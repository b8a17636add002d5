"""JSON for programs: the contract's messages, with its own field names, one object per line."""

from __future__ import annotations

import click
from google.protobuf import json_format
from google.protobuf.message import Message


def print_message(message: Message) -> None:
    """Print a message as one line of JSON."""
    click.echo(to_json(message))


def to_json(message: Message) -> str:
    """Return a message as one line of JSON; counts that are zero are there, absent fields are not."""
    return json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
        ensure_ascii=False,
    )
