"""Keeps an eye on one engine: waits for it, knows what it is, and how it and its GPUs do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import aiohttp

from sagecp.agent.backoff import Backoff, Reminder
from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_probe import EngineAnswerError, EngineFacts, EngineProbe, Observation, describe
from sagecp.agent.errors import EXIT_UNREACHABLE, AgentError
from sagecp.agent.gpu_probe import GpuProbe, GpuReport, parse_visible_devices
from sagecp.agent.messages import spec_to_proto
from sagecp.agent.tripwire import Tripwire
from sagecp.core.types import EngineCondition
from sagecp.log import get_logger
from sagecp.v1 import instance_pb2

# The engine is looked at this often, however long the interval between beats is.
MAX_LOOK_S = 1.0
# Of the time between two looks, what one may take.
_PROBE_SHARE = 0.8
# And at least so long: at the shortest intervals a beat rather comes late than without its gauges.
_MIN_PROBE_S = 0.4
_FIRST_HEALTH_TIMEOUT_S = 2.0
_DISCOVERY_TIMEOUT_S = 10.0
# While beats are due, finding out must not hold them up.
_REDISCOVERY_TIMEOUT_S = 2.0
_MODELS_CHECK_S = 30.0
_GPU_TIMEOUT_S = 0.5


class EngineWatch:
    """One engine and its GPUs. Use as an asynchronous context manager.

    Args:
        config: Where the engine is, and what is known better than the engine tells.
        wake: Called when the engine should be looked at without delay.

    Attributes:
        observation: What was seen last.
        gpus: What the GPUs said last.
        facts_are_old: The engine may be another than the one described by ``spec``.
    """

    def __init__(self, config: AgentConfig, wake: Callable[[], None]) -> None:
        self._config = config
        self._logger = get_logger("sagecp.agent", instance_id=config.effective_instance_id)
        self._probe = EngineProbe(config)
        self._gpu_probe = GpuProbe(())
        # NVML blocks: it gets a thread, for one call at a time.
        self._gpu_thread: ThreadPoolExecutor | None = None
        self._gpu_reading: asyncio.Future[GpuReport] | None = None
        self._tripwire = Tripwire(config.engine.host, config.engine.port, wake)
        self._spec: instance_pb2.InstanceSpec | None = None
        self._served_names: frozenset[str] = frozenset()
        self._models_checked_s = 0.0
        self._reminder = Reminder(time.monotonic)
        self._abort_task: asyncio.Task[None] | None = None
        self._abort_trouble = ""
        self.observation = Observation(EngineCondition.UNKNOWN)
        self.gpus = GpuReport()
        self.facts_are_old = False

    async def __aenter__(self) -> EngineWatch:
        await self._probe.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tripwire.disarm()
        if self._abort_task is not None:
            self._abort_task.cancel()
            await asyncio.gather(self._abort_task, return_exceptions=True)
        if self._gpu_thread is not None:
            self._gpu_thread.submit(self._gpu_probe.close)
            self._gpu_thread.shutdown(wait=False)
        await self._probe.__aexit__()

    @property
    def spec(self) -> instance_pb2.InstanceSpec:
        """What the engine is. Only once it was found."""
        if self._spec is None:
            raise RuntimeError("the engine was not found yet")
        return self._spec

    async def wait_until_found(self) -> None:
        """Return once the engine answers and is known.

        Raises:
            AgentError: It did not in the time that the configuration gives it.
        """
        loop = asyncio.get_running_loop()
        limit_s = self._config.engine_timeout_s
        deadline_s = loop.time() + limit_s if limit_s else float("inf")
        backoff = Backoff(base_s=0.25, cap_s=2.0, draw=lambda: random.uniform(0.8, 1.0))
        while True:
            trouble = await self._find()
            if not trouble:
                return
            remaining_s = deadline_s - loop.time()
            if remaining_s <= 0:
                raise AgentError(
                    f"the engine at {self._config.engine.url} was not ready within {limit_s:g} s: {trouble}. "
                    "Start it, check --engine, or raise --engine-timeout",
                    EXIT_UNREACHABLE,
                )
            if self._reminder.is_due(trouble):
                self._logger.info("waiting for the engine", engine=self._config.engine.url, reason=trouble)
            await asyncio.sleep(min(backoff.next_wait_s(), remaining_s))

    async def look(self, interval_s: float, *, with_gauges: bool) -> bool:
        """Look at the engine; return whether its condition is another than before.

        Args:
            interval_s: Between two beats; a look takes less.
            with_gauges: Read the metrics too; they are read anyway when the engine came back.
        """
        loop = asyncio.get_running_loop()
        budget_s = max(_PROBE_SHARE * min(interval_s, MAX_LOOK_S), _MIN_PROBE_S)
        before = self.observation
        seen = await self._probe.observe(budget_s, with_gauges=with_gauges)
        changed = seen.condition is not before.condition
        if seen.condition is EngineCondition.HEALTHY:
            await self._tripwire.arm(loop.time(), budget_s)
            if changed and not with_gauges:
                seen = await self._probe.observe(budget_s)
            if changed and before.condition is not EngineCondition.UNKNOWN:
                self._logger.info("engine is back")
                self.facts_are_old = True
            elif loop.time() - self._models_checked_s > _MODELS_CHECK_S:
                await self._check_models()
        elif changed:
            self._logger.warning("engine is unhealthy", reason=seen.reason)
        self.observation = seen
        return changed

    async def refresh(self) -> bool:
        """Find out anew what the engine is; return whether that is something else than before."""
        before = self._spec
        trouble = await self._find(_REDISCOVERY_TIMEOUT_S)
        if trouble:
            # Tried again at the next look.
            if self._reminder.is_due(trouble):
                self._logger.warning("could not find out what the engine is now", reason=trouble)
            return False
        self._reminder.reset()
        return self._spec != before

    async def read_gpus(self) -> None:
        """Ask the GPUs. A driver that hangs does not hold up the caller."""
        if self._gpu_probe.is_resting:
            self.gpus = self._gpu_probe.read()
            return
        if self._gpu_reading is None:
            if self._gpu_thread is None:
                self._gpu_thread = ThreadPoolExecutor(1, thread_name_prefix="nvml")
            loop = asyncio.get_running_loop()
            self._gpu_reading = loop.run_in_executor(self._gpu_thread, self._gpu_probe.read)
        done, _ = await asyncio.wait({self._gpu_reading}, timeout=_GPU_TIMEOUT_S)
        if done:
            self.gpus, self._gpu_reading = self._gpu_reading.result(), None
        else:
            self.gpus = GpuReport(absent_reason="the NVIDIA driver does not answer")

    def abort_soon(self, request_ids: list[str]) -> None:
        """Have the engine stop requests, in the background; one batch at a time.

        A batch that comes meanwhile is dropped: the control plane asks again for what still runs.
        """
        if self._abort_task is None or self._abort_task.done():
            self._abort_task = asyncio.create_task(self._abort(request_ids), name="abort requests")

    async def _abort(self, request_ids: list[str]) -> None:
        trouble = await self._probe.abort(request_ids)
        if not trouble:
            self._logger.info("asked the engine to abort requests", request_ids=request_ids)
        elif trouble != self._abort_trouble:
            self._logger.warning("cannot abort requests", reason=trouble, request_ids=request_ids)
        self._abort_trouble = trouble

    async def _find(self, timeout_s: float = _DISCOVERY_TIMEOUT_S) -> str:
        """Look whether the engine is ready, and what it is; return what is in the way."""
        seen = await self._probe.observe(_FIRST_HEALTH_TIMEOUT_S, with_gauges=False)
        if seen.condition is not EngineCondition.HEALTHY:
            return seen.reason
        try:
            facts = await self._probe.discover(timeout_s)
        except EngineAnswerError as error:
            return str(error)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return f"the engine answers /health, but then: {describe(error)}"
        if self._spec is None:
            self._gpu_probe = _choose_gpus(self._config, facts)
        await self.read_gpus()
        before, self._spec = (
            self._spec,
            spec_to_proto(self._config, facts, self.gpus, gpus_are_selected=self._gpu_probe.is_selected),
        )
        self._served_names = frozenset({facts.model_name, *facts.model_aliases})
        self._models_checked_s = asyncio.get_running_loop().time()
        self.facts_are_old = False
        if self._spec != before:
            self._log_facts("engine found" if before is None else "engine changed", facts)
        return ""

    async def _check_models(self) -> None:
        """Notice adapters that were loaded or unloaded."""
        self._models_checked_s = asyncio.get_running_loop().time()
        with contextlib.suppress(EngineAnswerError, TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(MAX_LOOK_S):
                models = await self._probe.list_models()
            self.facts_are_old = frozenset(model.name for model in models) != self._served_names

    def _log_facts(self, event: str, facts: EngineFacts) -> None:
        spec, config = self.spec, self._config
        sizes = spec.parallel_sizes
        told = {
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "expert_parallel": config.expert_parallel_size,
            "max_sequence_count": config.max_concurrent_request_count,
        }
        self._logger.info(
            event,
            engine=config.engine.url,
            advertised=spec.engine_url,
            model=spec.model_name,
            alias_count=len(spec.model_aliases),
            kind="simulated" if facts.simulated else "vllm",
            version=spec.engine_version or "unknown",
            context_token_count=facts.max_context_token_count,
            key_value_token_capacity=facts.key_value_token_capacity,
            tensor_parallel_size=sizes.tensor_parallel_size,
            pipeline_parallel_size=sizes.pipeline_parallel_size,
            data_parallel_size=sizes.data_parallel_size,
            expert_parallel_size=sizes.expert_parallel_size,
            max_concurrency=spec.max_concurrent_request_count or None,
            gpu_count=spec.gpu_count,
            gpu_absent_reason=self.gpus.absent_reason or None,
            sources={**facts.sources, **{name: "flag" for name, value in told.items() if value is not None}},
            # Nobody said these: a size is taken as 1, the rest is left to the control plane.
            not_discovered=[name for name in facts.unknown() if told.get(name) is None],
        )


def _choose_gpus(config: AgentConfig, facts: EngineFacts) -> GpuProbe:
    """Decide which GPUs are the engine's: those named, else those that it, or this agent, may see."""
    if config.gpus is not None:
        return GpuProbe(config.gpus, "--gpus")
    if facts.simulated:
        return GpuProbe.none("the engine is simulated: it uses no GPU")
    if not facts.is_local:
        return GpuProbe.none(f"the engine runs on another host, {config.engine.host}; run its agent there")
    if facts.visible_devices is not None:
        return GpuProbe(parse_visible_devices(facts.visible_devices), "the engine's CUDA_VISIBLE_DEVICES")
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None:
        return GpuProbe(parse_visible_devices(own), "CUDA_VISIBLE_DEVICES")
    return GpuProbe()
