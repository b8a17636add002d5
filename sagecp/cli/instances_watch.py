"""What `sagecp instances watch` watches and prints."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from sagecp.cli.instance_fields import INSTANCE_FIELDS
from sagecp.cli.instances_view import InstanceFilter, fetch, fetch_one
from sagecp.cli.listing import ChangeList, print_names, shown_fields
from sagecp.cli.output import is_for_programs, print_entry
from sagecp.cli.watch import Source
from sagecp.client import SageClient, convert
from sagecp.v1 import instance_pb2

_LIFE = {"INSTANCE", "STATE", "ORDER", "LOAD", "FAULTS", "REASON"}


def source(only: InstanceFilter, instance_id: str, *, figures: bool) -> Source[instance_pb2.Instance]:
    """Return what `watch` watches: one instance, or those that match.

    Args:
        only: Which ones.
        instance_id: Or this one.
        figures: Whether changes of load and speed are told as well.
    """

    async def one(client: SageClient) -> list[instance_pb2.Instance]:
        return [await fetch_one(client, instance_id)]

    def news(message: instance_pb2.Instance) -> Hashable:
        instance = convert.instance(message)
        seen = (
            instance.state,
            instance.state_reason,
            instance.incarnation,
            instance.drain is None,
            instance.sleep and (instance.sleep.level, instance.sleep.asleep),
            instance.desired_lora_adapters,
            tuple(sorted((fault.gpu_uuid, fault.kind) for fault in instance.gpu_faults)),
            instance.engine_process
            and (instance.engine_process.state, instance.engine_process.restart_count),
            instance.refused_heartbeat_count,
        )
        if not figures:
            return seen
        return seen, tuple(field.cell(instance) for field in INSTANCE_FIELDS if not field.ages)

    return Source(
        fetch=one if instance_id else lambda client: fetch(client, only),
        fetch_one=fetch_one,
        identify=lambda message: message.spec.instance_id,
        news=news,
        is_over=lambda _message: False,
        gone=_gone,
        ends=bool(instance_id),
    )


def _gone(message: instance_pb2.Instance) -> instance_pb2.Instance:
    left = instance_pb2.Instance()
    left.CopyFrom(message)
    left.state = instance_pb2.INSTANCE_STATE_UNSPECIFIED
    left.state_reason = "no longer registered"
    return left


def printer(
    output: str, *, headers: bool, figures: bool
) -> Callable[[Sequence[instance_pb2.Instance]], None]:
    """Return what prints instances that have changed."""
    if figures or output == "wide":
        fields = [field for field in shown_fields(INSTANCE_FIELDS, output) if not field.ages]
    else:
        fields = [field for field in INSTANCE_FIELDS if field.column.title in _LIFE]
    table = ChangeList(fields, headers=headers)

    def show(messages: Sequence[instance_pb2.Instance]) -> None:
        if is_for_programs(output):
            for message in messages:
                print_entry(message, output)
        elif output == "name":
            print_names([message.spec.instance_id for message in messages])
        else:
            table.print(
                [
                    (convert.instance(message), message.state == instance_pb2.INSTANCE_STATE_UNSPECIFIED)
                    for message in messages
                ]
            )

    return show
