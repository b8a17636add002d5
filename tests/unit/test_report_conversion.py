"""Readings and gauges that agents report: every field comes through, unknown ones as such."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from sagecp.core.engine_state import EngineGauges
from sagecp.core.gpu import GpuDevice, GpuReading
from sagecp.v1 import instance_pb2
from sagecp.wire.engine import gauges_from_proto
from sagecp.wire.gpu import device_from_proto, reading_from_proto

KINDS: tuple[tuple[Any, Any, Any], ...] = (
    (GpuReading, instance_pb2.GpuReading, reading_from_proto),
    (EngineGauges, instance_pb2.EngineGauges, gauges_from_proto),
)
SCALARS = [
    pytest.param(value_type, message_type, convert, field, id=f"{value_type.__name__}.{field.name}")
    for value_type, message_type, convert in KINDS
    for field in message_type.DESCRIPTOR.fields
    if field.has_presence and field.type != FieldDescriptor.TYPE_MESSAGE
]


@pytest.mark.parametrize(("value_type", "message_type", "convert", "field"), SCALARS)
def test_zero_is_not_unknown(
    value_type: Any, message_type: Any, convert: Any, field: FieldDescriptor
) -> None:
    base = {"index": 0} if value_type is GpuReading else {}
    for value in (False, True) if field.type == FieldDescriptor.TYPE_BOOL else (0, 1):
        message = message_type()
        setattr(message, field.name, value)
        found = convert(message_type.FromString(message.SerializeToString()))
        assert found == value_type(**base, **{field.name: value})
        assert type(getattr(found, field.name)) is type(getattr(message, field.name))


@pytest.mark.parametrize(("value_type", "message_type", "convert"), KINDS)
def test_what_is_made_is_as_if_its_class_had_made_it(
    value_type: Any, message_type: Any, convert: Any
) -> None:
    found = convert(message_type())
    assert type(found) is value_type
    assert found == value_type(index=0) if value_type is GpuReading else found == value_type()
    assert hash(found) == hash(dataclasses.replace(found))
    for field in message_type.DESCRIPTOR.fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(found, field.name, None)


def test_lists_come_through() -> None:
    gauges = instance_pb2.EngineGauges(loaded_lora_adapters=["a", "b"], running_lora_adapters=["b"])
    assert gauges_from_proto(gauges) == EngineGauges(
        loaded_lora_adapters=("a", "b"), running_lora_adapters=("b",)
    )
    reading = instance_pb2.GpuReading(index=2, throttle_reasons=["SwPowerCap"])
    assert reading_from_proto(reading) == GpuReading(index=2, throttle_reasons=("SwPowerCap",))


def test_hosts_with_many_gpus_hold_each_name_and_link_once() -> None:
    def device(index: int) -> GpuDevice:
        message = instance_pb2.GpuDevice(index=index, uuid=f"GPU-{index}", name="H100")
        for peer in {0, 1, 2} - {index}:
            message.links.add(
                peer_uuid=f"GPU-{peer}", kind=instance_pb2.GPU_LINK_KIND_NVLINK, nvlink_count=18
            )
        return device_from_proto(instance_pb2.GpuDevice.FromString(message.SerializeToString()))

    first, second, third = device(0), device(1), device(2)
    assert first.name is second.name
    assert first.links[1] is second.links[1]
    assert first.links[1].peer_uuid is third.uuid
    reading = instance_pb2.GpuReading(index=2, uuid="GPU-2", name="H100")
    assert (
        reading_from_proto(instance_pb2.GpuReading.FromString(reading.SerializeToString())).uuid is third.uuid
    )
