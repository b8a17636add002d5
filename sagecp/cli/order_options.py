"""Options of the orders that an operator gives for one instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sagecp.cli.options import DURATION, F

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration


def grace_options(function: F) -> F:
    """Add --grace, --now and --force; they arrive as ``grace_s``, ``now`` and ``force``."""
    decorated = click.option(
        "--force", is_flag=True, help="Even if the rest of the fleet could not carry the load."
    )(function)
    decorated = click.option(
        "--now", is_flag=True, help="Move what runs there at once; the same as --grace 0s."
    )(decorated)
    return click.option(
        "--grace",
        "grace_s",
        type=DURATION,
        metavar="T",
        help="Move what still runs there after this time: 30s, 5m.  [never: it runs to its end]",
    )(decorated)


def record_options(function: F) -> F:
    """Add --incarnation and --cause."""
    decorated = click.option("--cause", default="", help="Why, for the record.")(function)
    return click.option(
        "--incarnation",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Only this incarnation of the instance.  [whichever is registered]",
    )(decorated)


def check_grace(grace_s: float | None, *, now: bool) -> None:
    """Make sure that at most one grace time was given.

    Raises:
        click.UsageError: Two were.
    """
    if now and grace_s is not None:
        raise click.UsageError("--now is a grace time of 0 s; give it or --grace, not both")


def set_grace(field: Duration, grace_s: float | None, *, now: bool) -> None:
    """Put a grace time into a message, where one was given."""
    if now or grace_s is not None:
        field.FromMicroseconds(round((grace_s or 0.0) * 1e6))
