"""Follows the KV-cache events of the engine of the moment, where the configuration wants it."""

from __future__ import annotations

import asyncio

import structlog
import zmq

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts
from sagecp.agent.kv_events.address import AUTO, OFF, KvEventsAddress, parse_address
from sagecp.agent.kv_events.follower import EventFollower
from sagecp.agent.kv_events.subscriber import follow_events
from sagecp.core.engine_state import KvCacheUpdate


class KvEventsWatch:
    """What is known of one engine's prefix cache.

    Args:
        config: Whether it is followed, and where.
        logger: Is told whether it is followed, and why not.
    """

    def __init__(self, config: AgentConfig, logger: structlog.typing.FilteringBoundLogger) -> None:
        self._config = config
        self._logger = logger
        self._followed: tuple[KvEventsAddress, str] | None = None
        self._follower: EventFollower | None = None
        self._task: asyncio.Task[None] | None = None
        self._told_trouble = ""

    def choose(self, facts: EngineFacts, data_parallel_size: int) -> None:
        """Follow the engine that was found; the same one is followed on.

        Args:
            facts: What it is.
            data_parallel_size: Its ranks.
        """
        if self._config.kv_events == OFF:
            return
        wanted, trouble = self._address(facts, data_parallel_size)
        if trouble and trouble != self._told_trouble:
            self._logger.warning("KV-cache events are not followed", reason=trouble)
        self._told_trouble = trouble
        followed = None if wanted is None else (wanted, facts.model_name)
        if followed == self._followed and (self._task is None or not self._task.done()):
            return
        self._stop()
        self._followed = followed
        if wanted is not None:
            self._follower = EventFollower(facts.model_name)
            self._task = asyncio.create_task(
                self._follow(wanted, self._follower), name="follow KV-cache events"
            )

    def tell_everything(self) -> None:
        """Have the next updates tell all there is: a stream of heartbeats begins."""
        if self._follower is not None:
            self._follower.tell_everything()

    def take_update(self) -> KvCacheUpdate | None:
        """Return what the next heartbeat tells; ``None``: nothing."""
        return None if self._follower is None else self._follower.take_update()

    async def close(self) -> None:
        """Follow nothing any more."""
        task = self._task
        self._stop()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def _address(self, facts: EngineFacts, data_parallel_size: int) -> tuple[KvEventsAddress | None, str]:
        """Return where to listen, or why nowhere."""
        if data_parallel_size > 1:
            return None, (
                f"the engine has {data_parallel_size} data-parallel ranks, each with a cache of its own, "
                "and the agent cannot tell which one a request will come to"
            )
        if self._config.kv_events != AUTO:
            return parse_address(self._config.kv_events), ""
        if facts.kv_events is None:
            return None, (
                "the engine shows no --kv-events-config that publishes over zmq on an endpoint with a "
                "wildcard, such as tcp://*:5557; name the endpoint with --kv-events"
            )
        return facts.kv_events.at(self._config.engine.host), ""

    async def _follow(self, address: KvEventsAddress, follower: EventFollower) -> None:
        try:
            await follow_events(address, follower, self._logger)
        except zmq.ZMQError as error:
            follower.reset()
            self._logger.error(
                "KV-cache events cannot be followed", endpoint=address.endpoint, reason=str(error)
            )

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = self._follower = None
