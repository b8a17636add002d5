"""A server that has something to say in every metric."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from sagecp.config import JournalConfig
from sagecp.core import events as ev
from sagecp.core.config import SchedulerConfig
from sagecp.core.engine_state import EngineGauges, EngineProcess, EngineProcessState
from sagecp.core.errors import InstanceNotFoundError, ModelNotFoundError
from sagecp.core.gpu import GpuReading, XidError
from sagecp.core.prices import GpuPrices
from sagecp.core.types import EngineCondition, ExecutionInstance, RequestMetadata, RequestPriority
from sagecp.runtime.engines.base import EngineFailedError
from sagecp.runtime.store.memory import MemoryStore
from tests.support.rpc_rig import MODEL, Rig, running_rig
from tests.support.scripted_client import ScriptedCall
from tests.support.waiting import until

AGENT_INSTANCE = "gpu-1"
"""An instance with an agent, which reports two GPUs; the second has every trouble."""
AGENT_MODEL = "large"
WAITING_MODEL = "later"
"""Of an instance whose engine has not started."""

GAUGES = EngineGauges(
    running_request_count=3,
    waiting_request_count=1,
    key_value_cache_usage=0.5,
    prefix_cache_query_token_count=1000,
    prefix_cache_hit_token_count=250,
    prompt_token_count=5000,
    generation_token_count=700,
    preemption_count=2,
    sleeping=False,
)


def gpu_reading(index: int, **changes: Any) -> GpuReading:
    """Return a reading in which everything is known, and well unless it is changed."""
    figures: dict[str, Any] = {
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H100",
        "utilization": 0.75,
        "used_memory_bytes": 60 << 30,
        "total_memory_bytes": 80 << 30,
        "temperature_celsius": 61.0,
        "power_watts": 512.5,
        "power_limit_watts": 700.0,
        "sm_clock_mhz": 1980,
        "throttle_reasons": ("SwPowerCap",),
        "uncorrected_ecc_error_count": 0,
        "corrected_ecc_error_count": 4,
        "row_remap_pending": False,
        "row_remap_failed": False,
        "memory_temperature_celsius": 70.0,
        "nvlink_count": 18,
        "active_nvlink_count": 18,
        "nvlink_error_count": 0,
        "engine_memory_bytes": 59 << 30,
        "foreign_process_count": 0,
    }
    return GpuReading(index=index, **{**figures, **changes})


def beat(**changes: Any) -> ev.HeartbeatReceived:
    """Return a heartbeat of the instance with an agent."""
    figures: dict[str, Any] = {
        "condition": EngineCondition.HEALTHY,
        "gauges": GAUGES,
        "gpus": (gpu_reading(0), gpu_reading(1)),
    }
    return ev.HeartbeatReceived(AGENT_INSTANCE, 1, **{**figures, **changes})


@contextlib.asynccontextmanager
async def eloquent_rig(**config: Any) -> AsyncIterator[Rig]:
    """Run a server on which all of this happened.

    Requests that met an objective, missed one, were retried, were refused and wait; an instance
    that is out, GPUs with errors, heartbeats with bad figures, a journal.
    """
    store = MemoryStore(JournalConfig())
    # Nobody goes on sending heartbeats.
    scheduler = SchedulerConfig(lease_duration_s=3600.0, prices=GpuPrices(default_usd_per_gpu_hour=3.0))
    async with running_rig(scheduler=scheduler, store=store, **config) as rig:
        await _serve_requests(rig)
        await _report(rig)
        yield rig


async def _serve_requests(rig: Rig) -> None:
    manager = rig.manager
    first, second = await rig.add_engine("e1"), await rig.add_engine("e2")
    # The first attempt fails, wherever it is made.
    await manager.submit_request(_request("retried"))
    await until(lambda: bool(first.calls or second.calls), "the first attempt was made")
    for engine in (first, second):
        engine.automatic = _answer
    (first.calls or second.calls)[0].fail(EngineFailedError("broken", 500))
    await manager.wait_request("retried")
    requests: dict[str, dict[str, Any]] = {
        "met": {"slo_deadline_ms": 3_600_000.0, "ttft_slo_ms": 3_600_000.0, "tpot_slo_ms": 3_600_000.0},
        "missed": {"ttft_slo_ms": 1e-6, "priority": RequestPriority.HIGH},
        "of-a-tenant": {"tenant_id": "acme"},
    }
    for request_id, more in requests.items():
        await manager.submit_request(_request(request_id, **more))
        await manager.wait_request(request_id)
    with contextlib.suppress(ModelNotFoundError):
        await manager.submit_request(_request("refused", model_name="nobody serves it"))


async def _report(rig: Rig) -> None:
    manager = rig.manager
    # The second: a model's last instance is not taken out for what its GPUs have.
    for instance_id, model in ((AGENT_INSTANCE, AGENT_MODEL), ("gpu-2", AGENT_MODEL), ("i3", WAITING_MODEL)):
        manager.register_instance(
            ExecutionInstance(
                instance_id=instance_id, host="127.0.0.1", port=1, model_name=model, gpu_count=2
            ),
            incarnation=1,
        )
    await manager.submit_request(_request("waiting", model_name=WAITING_MODEL))
    manager.heartbeat(ev.HeartbeatReceived("gpu-2", 1, EngineCondition.HEALTHY))
    manager.heartbeat(beat())
    manager.heartbeat(
        beat(
            gpus=(
                gpu_reading(0),
                gpu_reading(
                    1,
                    uncorrected_ecc_error_count=2,
                    row_remap_pending=True,
                    xid_errors=(XidError(79, 1.0), XidError(31, 2.0), XidError(31, 3.0)),
                ),
            ),
            process=EngineProcess(state=EngineProcessState.RUNNING, process_id=7, restart_count=3),
            clock_offset_s=7.5,
            refusals=("gauges.key_value_cache_usage is NaN",),
        )
    )
    manager.refuse_heartbeat(AGENT_INSTANCE, InstanceNotFoundError(AGENT_INSTANCE))
    # A step of each phase, as an engine under load gives them.
    load = manager.instance(AGENT_INSTANCE).load
    load.kind.accuracy.observe_decode(0.02, 8.0, 8000.0, load.planned_ratio)
    load.kind.accuracy.observe_prefill(0.3, 2.0, 4000.0, 0.0, 0.0, load.planned_ratio)


def _request(request_id: str, **more: Any) -> RequestMetadata:
    more.setdefault("model_name", MODEL)
    return RequestMetadata(request_id=request_id, prompt="a secret prompt", max_tokens=10, **more)


def _answer(call: ScriptedCall) -> None:
    call.send("a", "b", "c")
    call.finish()
