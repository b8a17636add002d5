"""Brings an engine to what the control plane wants of it: asleep or awake, and which LoRA adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from sagecp.agent.backoff import Backoff
from sagecp.agent.engine_facts import LOAD_ADAPTER_PATH, adapters_of, list_models
from sagecp.agent.engine_http import EngineAnswerError, EngineHttp
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.types import EngineGauges
from sagecp.log import get_logger

# Moving the weights of a large model takes this long at most.
_SLEEP_TIMEOUT_S = 300.0
_ADAPTER_TIMEOUT_S = 120.0
_LIST_TIMEOUT_S = 5.0
_RETRY_BASE_S = 1.0
_RETRY_CAP_S = 60.0
_UNLOAD_ADAPTER_PATH = "/v1/unload_lora_adapter"
_DROPPED_WEIGHTS_LEVEL = 2
_MAX_TROUBLE_COUNT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the control plane wants of an engine.

    Attributes:
        asleep: It should sleep. False: it should be awake, if it sleeps by our order. ``None``: as it is.
        sleep_level: How deep, 1 or 2.
        adapters: LoRA adapters that it should have, and no others; ``None``: as they are.
    """

    asleep: bool | None = None
    sleep_level: int = 1
    adapters: tuple[LoraAdapter, ...] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to have the engine do.

    Attributes:
        verb: ``sleep``, ``wake``, ``load`` or ``unload``.
        name: Of the adapter.
        path: Where the adapter is.
        level: How deep to sleep, or how deep it sleeps.
    """

    verb: str
    name: str = ""
    path: str = ""
    level: int = 0

    def __str__(self) -> str:
        return f"{self.verb} the LoRA adapter {self.name!r}" if self.name else f"{self.verb} the engine"


def steps_towards(
    wishes: Wishes,
    gauges: EngineGauges,
    loaded: tuple[LoraAdapter, ...],
    *,
    may_wake: bool,
    sleep_level: int | None = None,
    placed: dict[str, str] | None = None,
) -> list[Step]:
    """Return what remains to be done, in order.

    Args:
        wishes: What should be.
        gauges: What is.
        loaded: Adapters that are loaded.
        may_wake: The engine sleeps by our order; whoever put it to sleep otherwise wakes it up.
        sleep_level: How deep it sleeps.
        placed: Paths by name of the adapters that we loaded, as they were given: engines may
            show another form of them.
    """
    if gauges.sleeping:
        wakes = may_wake and wishes.asleep is False
        # Nothing can be loaded into memory that was given back.
        return [Step("wake", level=sleep_level or wishes.sleep_level)] if wakes else []
    steps: list[Step] = []
    if wishes.adapters is not None:
        wanted = {adapter.name: adapter.path for adapter in wishes.adapters}
        placed = placed or {}
        present: set[str] = set()
        for adapter in loaded:
            path = wanted.get(adapter.name)
            if path is not None and path in {adapter.path or path, placed.get(adapter.name)}:
                present.add(adapter.name)
            else:
                steps.append(Step("unload", adapter.name))
        replaced = {step.name for step in steps}
        steps += [
            Step("load", name, path)
            for name, path in wanted.items()
            # One that must go first is loaded once it has gone.
            if name not in present and name not in replaced
        ]
    is_idle = gauges.running_request_count == 0 and gauges.waiting_request_count == 0
    # One that does not say whether it sleeps would be told so without end.
    if wishes.asleep and gauges.sleeping is False and is_idle:
        steps.append(Step("sleep", level=wishes.sleep_level))
    return steps


@dataclass(slots=True)
class _Failure:
    trouble: str
    backoff: Backoff
    retry_s: float


class OrderKeeper:
    """Carries out orders in the background: one at a time, again and again until they are.

    Args:
        http: Speaks with the engine.
        instance_id: Of the engine, for the log.
        on_change: Called when an order was carried out, or failed in a new way.

    Attributes:
        loaded: LoRA adapters that the engine has, as it told last.
    """

    def __init__(
        self,
        http: EngineHttp,
        instance_id: str,
        on_change: Callable[[], None],
    ) -> None:
        self._http = http
        self._logger = get_logger("sagecp.agent", instance_id=instance_id)
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._put_to_sleep = False
        self._placed: dict[str, str] = {}
        # By verb and adapter; only of steps that are still wanted.
        self._failures: dict[tuple[str, str], _Failure] = {}
        self._unable = ""
        self._done_s = 0.0
        self.loaded: tuple[LoraAdapter, ...] = ()

    @property
    def trouble(self) -> str:
        """Why orders are not carried out; empty when they are, or there are none."""
        texts = [failure.trouble for failure in self._failures.values()]
        more = len(texts) - _MAX_TROUBLE_COUNT
        shown = [text for text in (self._unable, *texts[:_MAX_TROUBLE_COUNT]) if text]
        return "; ".join([*shown, f"and {more} more"] if more > 0 else shown)

    def follow(self, wishes: Wishes, gauges: EngineGauges, sleep_level: int | None, seen_s: float) -> None:
        """Begin what is to be done next, unless something is being done.

        Args:
            wishes: What should be.
            gauges: What is.
            sleep_level: How deep the engine sleeps, where it says so.
            seen_s: When the look at it began, on the loop's clock.
        """
        if wishes.asleep:
            self._put_to_sleep = True
        # What was seen before the last step ended may be what that step has changed.
        if (self._task is not None and not self._task.done()) or seen_s < self._done_s:
            return
        if wishes.asleep is False and gauges.sleeping is False:
            self._put_to_sleep = False
        self._unable = ""
        if wishes.asleep and gauges.sleeping is None:
            self._unable = "the engine does not say whether it sleeps (vllm:engine_sleep_state is missing)"
        steps = steps_towards(
            wishes,
            gauges,
            self.loaded,
            may_wake=self._put_to_sleep,
            sleep_level=sleep_level,
            placed=self._placed,
        )
        wanted = {(step.verb, step.name) for step in steps}
        self._failures = {key: each for key, each in self._failures.items() if key in wanted}
        now_s = asyncio.get_running_loop().time()
        for step in steps:
            failure = self._failures.get((step.verb, step.name))
            if failure is None or failure.retry_s <= now_s:
                self._task = asyncio.create_task(self._carry_out(step), name=str(step))
                return

    async def close(self) -> None:
        """Leave what is being done: the engine finishes it, or not."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _carry_out(self, step: Step) -> None:
        key = (step.verb, step.name)
        trouble = await self._perform(step)
        self._done_s = asyncio.get_running_loop().time()
        if not trouble:
            self._logger.info("an order of the control plane is carried out", order=str(step))
            self._failures.pop(key, None)
            if step.verb == "load":
                self._placed[step.name] = step.path
            elif step.verb == "unload":
                self._placed.pop(step.name, None)
            if step.name:
                await self._list_adapters()
            self._on_change()
            return
        failure = self._failures.get(key)
        if failure is None:
            backoff = Backoff(_RETRY_BASE_S, _RETRY_CAP_S)
            failure = self._failures.setdefault(key, _Failure("", backoff, 0.0))
        failure.retry_s = asyncio.get_running_loop().time() + failure.backoff.next_wait_s()
        text = f"cannot {step}: {trouble}"
        if text != failure.trouble:
            failure.trouble = text
            self._logger.warning("an order of the control plane does not work; trying again", reason=text)
            self._on_change()

    async def _perform(self, step: Step) -> str:
        """Have the engine do something; return why it did not."""
        if step.verb == "load":
            body = {"lora_name": step.name, "lora_path": step.path}
            return await self._post(LOAD_ADAPTER_PATH, _ADAPTER_TIMEOUT_S, body)
        if step.verb == "unload":
            return await self._post(_UNLOAD_ADAPTER_PATH, _ADAPTER_TIMEOUT_S, {"lora_name": step.name})
        if step.verb == "sleep":
            # A request that has come in since we looked is finished, not aborted.
            return await self._post(f"/sleep?level={step.level}&mode=wait", _SLEEP_TIMEOUT_S)
        if step.level != _DROPPED_WEIGHTS_LEVEL:
            return await self._post("/wake_up", _SLEEP_TIMEOUT_S)
        # Memory for the weights, the weights themselves, and then the cache: an engine that
        # serves before its weights are back answers nonsense.
        return (
            await self._post("/wake_up?tags=weights", _SLEEP_TIMEOUT_S)
            or await self._post("/collective_rpc", _SLEEP_TIMEOUT_S, {"method": "reload_weights"})
            or await self._post("/wake_up?tags=kv_cache", _SLEEP_TIMEOUT_S)
        )

    async def _post(self, path: str, timeout_s: float, body: dict[str, str] | None = None) -> str:
        status, trouble = await self._http.post(path, timeout_s, body)
        if status == 200:
            return ""
        page = path.partition("?")[0]
        if status == 404 and trouble.lower().removeprefix("404: ") in {"", "not found"}:
            wanted = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if "lora" in page else "VLLM_SERVER_DEV_MODE=1"
            return f"the engine has no page {page}; vLLM has it with {wanted} in its environment"
        return f"POST {page} answered {status}: {trouble}" if status else f"POST {page}: {trouble}"

    async def _list_adapters(self) -> None:
        with contextlib.suppress(EngineAnswerError, TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                self.loaded = adapters_of(await list_models(self._http))
