"""Keeps an eye on one engine: waits for it, knows what it is, and how it and its GPUs do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import replace

import aiohttp

from sagecp.agent.backoff import Backoff, Reminder
from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts, adapters_of
from sagecp.agent.engine_http import EngineAnswerError, describe
from sagecp.agent.engine_probe import EngineProbe, Observation
from sagecp.agent.errors import EXIT_UNREACHABLE, AgentError
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.report import GpuReport
from sagecp.agent.gpu.watch import GpuWatch, choose_gpus
from sagecp.agent.kv_events.watch import KvEventsWatch
from sagecp.agent.messages import spec_to_proto
from sagecp.agent.orders import OrderKeeper, Wishes
from sagecp.agent.supervisor import EngineSupervisor
from sagecp.agent.tripwire import Tripwire
from sagecp.core.engine_state import LoraAdapter
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
_MAX_ADAPTER_COUNT = 128


class EngineWatch:
    """One engine and its GPUs. Use as an asynchronous context manager.

    Args:
        config: Where the engine is, and what is known better than the engine tells.
        wake: Called when the engine should be looked at without delay.

    Attributes:
        observation: What was seen last.
        gpus: What the GPUs said last.
        facts_are_old: The engine may be another than the one described by ``spec``.
        wishes: What the control plane wants of the engine; ``None``: it has not said yet.
        supervisor: Of the engine's process, where the agent owns it.
        kv_events: What the engine says of its prefix cache.
    """

    def __init__(self, config: AgentConfig, wake: Callable[[], None]) -> None:
        self._config = config
        self._logger = get_logger("sagecp.agent", instance_id=config.effective_instance_id)
        self._probe = EngineProbe(config)
        self._wake = wake
        self._orders = OrderKeeper(self._probe.http, config.effective_instance_id, self._on_news)
        # Something happened that the control plane should hear of without delay.
        self._has_news = False
        self._gpu_watch = GpuWatch(GpuProbe(dcgm_exporter=config.dcgm_exporter), self._logger)
        self._tripwire = Tripwire(config.engine.host, config.engine.port, wake)
        self._spec: instance_pb2.InstanceSpec | None = None
        self._served_names: frozenset[str] = frozenset()
        self._registered_adapters: tuple[LoraAdapter, ...] = ()
        self._models_checked_s = 0.0
        self._reminder = Reminder(time.monotonic)
        self._abort_task: asyncio.Task[None] | None = None
        self._abort_trouble = ""
        self.observation = Observation(EngineCondition.UNKNOWN)
        self.gpus = GpuReport()
        self._registered_gpus = GpuReport()
        self.facts_are_old = False
        self.wishes: Wishes | None = None
        self.kv_events = KvEventsWatch(config, self._logger)
        self.supervisor = EngineSupervisor(config, self._on_news) if config.supervision else None

    async def __aenter__(self) -> EngineWatch:
        await self._probe.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tripwire.disarm()
        await self._orders.close()
        if self._abort_task is not None:
            self._abort_task.cancel()
            await asyncio.gather(self._abort_task, return_exceptions=True)
        self._gpu_watch.close()
        await self.kv_events.close()
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
        """Look at the engine; return whether something about it is news.

        Args:
            interval_s: Between two beats; a look takes less.
            with_gauges: Read the metrics too; they are read anyway when the engine came back.
        """
        loop = asyncio.get_running_loop()
        budget_s = max(_PROBE_SHARE * min(interval_s, MAX_LOOK_S), _MIN_PROBE_S)
        before, seen_s = self.observation, loop.time()
        news, self._has_news = self._has_news, False
        with_gauges = with_gauges or news
        seen = self._judge(await self._probe.observe(budget_s, with_gauges=with_gauges))
        changed = seen.condition is not before.condition
        if seen.condition is EngineCondition.HEALTHY:
            await self._tripwire.arm(loop.time(), budget_s)
            if changed and not with_gauges:
                seen = self._judge(await self._probe.observe(budget_s))
            if changed and before.condition is not EngineCondition.UNKNOWN:
                self._logger.info("engine is back")
                self.facts_are_old = True
            elif loop.time() - self._models_checked_s > _MODELS_CHECK_S:
                await self._check_models()
        elif changed and seen.condition is EngineCondition.STARTING:
            self._logger.info("engine is starting")
        elif changed:
            self._logger.warning("engine is unhealthy", reason=seen.reason)
        if seen.gauges is not None:
            if self.wishes is not None:
                self._orders.follow(self.wishes, seen.gauges, seen.sleep_level, seen_s)
            names = tuple(adapter.name for adapter in self._orders.loaded)[:_MAX_ADAPTER_COUNT]
            self.facts_are_old = self.facts_are_old or self._orders.loaded != self._registered_adapters
            seen = replace(seen, gauges=replace(seen.gauges, loaded_lora_adapters=names))
        self.observation = seen
        return changed or news

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
        await self._gpu_watch.read()
        self.gpus = self._gpu_watch.report
        if (
            self._spec is not None
            and self.gpus.devices != self._registered_gpus.devices
            and self.gpus.devices
        ):
            # An engine that loads holds no GPU yet.
            self.facts_are_old = True

    @property
    def order_trouble(self) -> str:
        """Why orders of the control plane are not carried out; empty when they are."""
        return self._orders.trouble

    def _on_news(self) -> None:
        self._has_news = True
        self._wake()

    def _judge(self, seen: Observation) -> Observation:
        return seen if self.supervisor is None else self.supervisor.judge(seen)

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
        seen = self._judge(await self._probe.observe(_FIRST_HEALTH_TIMEOUT_S, with_gauges=False))
        if seen.condition is not EngineCondition.HEALTHY:
            return seen.reason
        try:
            facts = await self._probe.discover(timeout_s)
        except EngineAnswerError as error:
            return str(error)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return f"the engine answers /health, but then: {describe(error)}"
        supervised = self.supervisor.process.process_id if self.supervisor else None
        self._gpu_watch.choose(choose_gpus(self._config, facts, supervised))
        await self.read_gpus()
        self._registered_gpus = self._gpu_watch.known
        before, self._spec = (
            self._spec,
            spec_to_proto(self._config, facts, self._registered_gpus),
        )
        self.kv_events.choose(facts, self._spec.parallel_sizes.data_parallel_size)
        self._served_names = frozenset({facts.model_name, *facts.model_aliases})
        self._orders.loaded = self._registered_adapters = facts.adapters
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
            self._orders.loaded = adapters_of(models)
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
            gpus_chosen_by=self._registered_gpus.chosen_by or None,
            gpu_absent_reason=self.gpus.absent_reason or None,
            sources={**facts.sources, **{name: "flag" for name, value in told.items() if value is not None}},
            # Nobody said these: a size is taken as 1, the rest is left to the control plane.
            not_discovered=[name for name in facts.unknown() if told.get(name) is None],
        )
