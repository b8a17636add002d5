"""The GPUs of an instance: how they do, how they reach each other, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from sagecp.cli import render
from sagecp.client.values import Instance
from sagecp.core.gpu import GpuDevice, GpuLinkKind, GpuReading

_GIB = 2**30
_COLUMNS = (
    render.Column("GPU", right=True),
    render.Column("NAME", flexible=True),
    render.Column("BUSY", right=True),
    render.Column("MEMORY", right=True),
    render.Column("TEMP", right=True),
    render.Column("POWER", right=True),
    render.Column("CLOCK", right=True),
    render.Column("NUMA", right=True, optional=True),
)


def show_gpus(instance: Instance) -> None:
    """Print the GPUs of an instance; nothing, where none is known."""
    devices = {device.index: device for device in instance.spec.gpu_devices}
    readings = {reading.index: reading for reading in instance.gpus}
    indexes = sorted(devices.keys() | readings.keys())
    if indexes:
        click.echo()
        render.print_table(
            _COLUMNS, [_row(index, devices.get(index), readings.get(index)) for index in indexes]
        )
        for line in link_lines([devices[index] for index in sorted(devices)]):
            click.echo(render.harmless(line))
    for index, reading in sorted(readings.items()):
        if text := trouble_text(reading):
            click.echo(render.harmless(f"GPU {index}: {text}"))
    if instance.gpu_faults:
        click.echo()
        render.print_table(
            (
                render.Column("FAULT"),
                render.Column("GPU", right=True),
                render.Column("SINCE", right=True),
                render.Column("QUARANTINE"),
                render.Column("WHAT", flexible=True),
            ),
            [
                (
                    fault.kind.name,
                    str(fault.gpu_index),
                    f"{render.age(fault.begin_s)} ago",
                    "yes" if fault.quarantines else "no",
                    fault.message,
                )
                for fault in instance.gpu_faults
            ],
        )


def _row(index: int, device: GpuDevice | None, reading: GpuReading | None) -> tuple[str, ...]:
    name = (reading.name if reading else "") or (device.name if device else "")
    numa = device.numa_node if device else None
    return (
        str(index),
        name or render.NONE,
        render.percent(reading.utilization if reading else None),
        _memory_text(device, reading),
        _figure(reading.temperature_celsius if reading else None, "C"),
        _power_text(reading),
        _figure(reading.sm_clock_mhz if reading else None, "MHz"),
        render.count(numa),
    )


def _figure(value: float | None, unit: str) -> str:
    return render.NONE if value is None else f"{value:.0f} {unit}"


def _memory_text(device: GpuDevice | None, reading: GpuReading | None) -> str:
    used = reading.used_memory_bytes if reading else None
    total = (reading.total_memory_bytes if reading else None) or (
        device.total_memory_bytes if device else None
    )
    if total is None:
        return render.NONE
    return f"{render.NONE if used is None else f'{used / _GIB:.1f}'} / {total / _GIB:.1f} GiB"


def _power_text(reading: GpuReading | None) -> str:
    if reading is None or reading.power_watts is None:
        return render.NONE
    limit = reading.power_limit_watts
    return f"{reading.power_watts:.0f}{f' / {limit:.0f}' if limit else ''} W"


def link_lines(devices: Sequence[GpuDevice]) -> list[str]:
    """Return how GPUs of a host reach each other: one line where all are alike, else one for each."""
    ways = {(link.kind, link.nvlink_count) for device in devices for link in device.links}
    if len(ways) == 1 and all(len(device.links) == len(devices) - 1 for device in devices):
        return [f"links: {_way_text(*ways.pop())} between all of them"]
    names = {device.uuid: str(device.index) for device in devices}
    return [f"GPU {device.index} links: {_links_text(device, names)}" for device in devices if device.links]


def _links_text(device: GpuDevice, names: Mapping[str, str]) -> str:
    """Return how a GPU reaches the others, nearest first: ``"nvlink x12 to 1,2; system to 4"``."""
    peers: dict[tuple[GpuLinkKind, int], list[str]] = {}
    for link in device.links:
        peers.setdefault((link.kind, link.nvlink_count), []).append(names.get(link.peer_uuid, link.peer_uuid))
    # What is not known comes last.
    ordered = sorted(peers.items(), key=lambda item: (item[0][0] is GpuLinkKind.UNKNOWN, item[0]))
    return "; ".join(f"{_way_text(*way)} to {','.join(sorted(others))}" for way, others in ordered)


def _way_text(kind: GpuLinkKind, nvlink_count: int) -> str:
    return kind.name.lower().replace("_", " ") + (f" x{nvlink_count}" if nvlink_count else "")


def trouble_text(reading: GpuReading) -> str:
    """Return what is unusual about a GPU; ``""``: nothing that it tells."""
    parts = []
    if reading.throttle_reasons:
        parts.append(f"slowed down: {', '.join(reading.throttle_reasons)}")
    if reading.uncorrected_ecc_error_count:
        parts.append(f"{render.plural(reading.uncorrected_ecc_error_count, 'uncorrected memory error')}")
    if reading.row_remap_failed:
        parts.append("bad memory, no spare rows left")
    elif reading.row_remap_pending:
        parts.append("bad memory waits for a reset")
    if reading.xid_errors:
        last = reading.xid_errors[-1]
        parts.append(f"XID {last.code} {render.age(last.time_s)} ago")
    links, active = reading.nvlink_count, reading.active_nvlink_count
    if links and active is not None and active < links:
        parts.append(f"{links - active} of {links} NVLinks down")
    if reading.nvlink_error_count:
        parts.append(f"{render.plural(reading.nvlink_error_count, 'NVLink error')}")
    if reading.foreign_process_count:
        others = reading.foreign_process_count
        parts.append(f"{others} foreign {'process holds' if others == 1 else 'processes hold'} memory of it")
    return ", ".join(parts)
