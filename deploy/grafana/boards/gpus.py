"""How GPUs are used, and which are broken."""

from typing import Any

from panels import GPU_INSTANCE, Dashboard, Panel, Query, Row, top


def _gpus(title: str, expr: str, unit: str = "short", **more: Any) -> Panel:  # noqa: ANN401 - Panel has the types
    return top(title, expr, "{{instance_id}} {{gpu}}", unit=unit, **more)


_USE = Row(
    "Use",
    (
        top(
            "Mean utilization by instance",
            "avg by (instance_id) (sagecp_gpu_utilization_ratio{GPU})",
            unit="percentunit",
            maximum=1,
        ),
        _gpus(
            "Used memory",
            "sagecp_gpu_memory_used_bytes{GPU} / sagecp_gpu_memory_size_bytes{GPU}",
            "percentunit",
            maximum=1,
        ),
        Panel(
            "Memory in all",
            [
                Query("sum(sagecp_gpu_memory_size_bytes{GPU})", "there is"),
                Query("sum(sagecp_gpu_memory_used_bytes{GPU})", "used"),
                Query("sum(sagecp_gpu_engine_memory_bytes{GPU})", "by engines"),
            ],
            unit="bytes",
        ),
    ),
)

_HEAT = Row(
    "Power and heat",
    (
        _gpus("Power", "sagecp_gpu_power_watts{GPU}", "watt"),
        _gpus("Temperature", "sagecp_gpu_temperature_celsius{GPU}", "celsius", limits=(80, 88)),
        _gpus(
            "Temperature of the memory",
            "sagecp_gpu_memory_temperature_celsius{GPU}",
            "celsius",
            limits=(90, 98),
        ),
        Panel(
            "Reasons for reduced clocks",
            [
                Query(
                    'count by (reason) (sagecp_gpu_throttled{GPU, reason!="GpuIdle"} == 1)',
                    "{{reason}}",
                )
            ],
        ),
        Panel(
            "The slowest clocks",
            [Query("bottomk(20, sagecp_gpu_sm_clock_hertz{GPU})", "{{instance_id}} {{gpu}}")],
            unit="hertz",
        ),
        _gpus(
            "Nearness to the power limit",
            "sagecp_gpu_power_watts{GPU} / sagecp_gpu_power_limit_watts{GPU}",
            "percentunit",
        ),
    ),
)

_ERRORS = Row(
    "Errors",
    (
        Panel("Faults", [Query("sagecp_gpu_fault{GPU} == 1")], kind="table"),
        Panel("Xid errors", [Query("sagecp_gpu_xid_errors{GPU} > 0")], kind="table"),
        Panel(
            "Memory that waits for a reset, or for another GPU",
            [Query("sagecp_gpu_row_remap_pending{GPU} == 1"), Query("sagecp_gpu_row_remap_failed{GPU} == 1")],
            kind="table",
        ),
        _gpus(
            "Uncorrected memory errors per hour", "increase(sagecp_gpu_ecc_errors_uncorrected_total{GPU}[1h])"
        ),
        _gpus("NVLinks that do not work", "sagecp_gpu_nvlinks{GPU} - sagecp_gpu_nvlinks_active{GPU}"),
        _gpus("NVLink errors per second", "rate(sagecp_gpu_nvlink_errors_total{GPU}[RATE])"),
        _gpus("Foreign processes", "sagecp_gpu_foreign_processes{GPU}", limits=(1, 2)),
    ),
)

GPUS = Dashboard(
    uid="sagecp-gpus",
    title="sagecp / GPUs",
    description="How GPUs are used, what slows them down, and which are broken.",
    variables=(GPU_INSTANCE,),
    rows=(_USE, _HEAT, _ERRORS),
)
