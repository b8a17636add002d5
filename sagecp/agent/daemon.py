"""The agent itself: registers engines, keeps their hearts beating, takes them out again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from sagecp.agent.backoff import Backoff, Reminder
from sagecp.agent.config import AgentConfig
from sagecp.agent.connection import ControlPlaneLink, FleetConnection
from sagecp.agent.errors import (
    EXIT_DEFECT,
    EXIT_ENGINE_ENDED,
    EXIT_UNREACHABLE,
    AgentError,
    ControlPlaneLostError,
    ForgottenError,
)
from sagecp.agent.heartbeat import HeartbeatLane, clamp_interval_s
from sagecp.agent.messages import Registration, beat_to_proto
from sagecp.agent.watch import MAX_LOOK_S, EngineWatch
from sagecp.core.engine_state import KvCacheUpdate
from sagecp.log import get_logger
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.wire.times import seconds_of

T = TypeVar("T")

_DEFAULT_INTERVAL_S = 1.0
_INTERVAL_JITTER = 0.1
# A beat must come well before the lease ends, even if one is lost.
_BEATS_PER_LEASE = 3
# Together at most 3 s for leaving.
_GOODBYE_TIMEOUT_S = 1.0
_DEREGISTER_TIMEOUT_S = 2.0
_MAX_CAUSE_LENGTH = 256
# What was sent is acknowledged within a round trip.
_SETTLE_TIMEOUT_S = 1.0
# A stream that lived this long was a success: the next trouble is a new one.
_STABLE_S = 10.0
# Timers of uvloop may be this early.
_TIMER_SLACK_S = 0.002


class _StoppedError(Exception):
    """The agent was asked to stop."""


async def run_agents(configs: Sequence[AgentConfig], stop: asyncio.Event) -> int:
    """Run an agent for each engine of a host, over one connection, until told to stop.

    Trouble of one engine does not concern the others: it ends with all of them.

    Args:
        configs: Validated, one for each engine; of one control plane.
        stop: Set by the caller to end the agents.

    Returns:
        The first exit code that is not 0, in the order of the engines; see :func:`run_agent`.
    """
    link = ControlPlaneLink(configs[0])
    tasks = [asyncio.create_task(run_agent(config, stop, link)) for config in configs]
    codes = await asyncio.gather(*tasks, return_exceptions=True)
    for config, code in zip(configs, codes, strict=True):
        if isinstance(code, Exception):
            # A defect in what one engine needs is no matter of the others either.
            logger = get_logger("sagecp.agent", instance_id=config.effective_instance_id)
            logger.error("the agent of this engine failed", exc_info=code)
    return next((code if isinstance(code, int) else EXIT_DEFECT for code in codes if code), 0)


async def run_agent(config: AgentConfig, stop: asyncio.Event, link: ControlPlaneLink | None = None) -> int:
    """Run an agent until it is told to stop, and take its instance out of the fleet.

    Several agents may run in one event loop. What happens, the end included, is
    logged; nothing is raised.

    Args:
        config: Validated configuration.
        stop: Set by the caller to end the agent.
        link: Shared with the agents of other engines; ``None``: it has its own.

    Returns:
        The exit code: 0 after ``stop``; 1 the engine that it owns ended too often;
        2 refused as invalid; 3 engine or control plane not reached within the
        timeouts; 4 not permitted; 5 another agent owns the instance id.
    """
    try:
        await Agent(config, stop, link or ControlPlaneLink(config)).run()
    except AgentError as error:
        get_logger("sagecp.agent", instance_id=config.effective_instance_id).error(
            str(error), exit_code=error.exit_code
        )
        return error.exit_code
    return 0


class Agent:
    """See :func:`run_agent`.

    Args:
        config: Validated configuration.
        stop: Ends the agent.
        link: To the control plane.
    """

    def __init__(self, config: AgentConfig, stop: asyncio.Event, link: ControlPlaneLink) -> None:
        self._config = config
        self._asked_to_stop = stop
        self._stop = asyncio.Event()
        self._link = link
        # Grows with every start; its microseconds tell two starts apart.
        self._registration = Registration(config.effective_instance_id, time.time_ns() // 1000)
        self._logger = get_logger("sagecp.agent", instance_id=config.effective_instance_id)
        self._wake = asyncio.Event()
        self._watch = EngineWatch(config, self._on_news)
        self._interval_s = config.interval_s or _DEFAULT_INTERVAL_S
        self._largest_interval_s = float("inf")
        self._backoff = Backoff()
        self._reminder = Reminder(asyncio.get_running_loop().time)
        self._tried_to_register = False
        self._registered = False
        self._deregistered = False
        self._desired_state = pb.DESIRED_STATE_SERVING

    async def run(self) -> None:
        """Run until stopped.

        Raises:
            AgentError: It cannot go on.
        """
        stopper = asyncio.create_task(self._wake_on_stop(), name="agent stop")
        supervisor = self._watch.supervisor
        try:
            async with self._watch:
                if supervisor is not None:
                    supervisor.start()
                try:
                    await self._or_stop(self._watch.wait_until_found())
                    await self._stay_registered()
                except _StoppedError:
                    await self._leave()
                finally:
                    # Last: by now nothing new is sent to it.
                    if supervisor is not None:
                        await supervisor.stop()
        finally:
            stopper.cancel()
            await asyncio.gather(stopper, return_exceptions=True)
        if supervisor is not None and supervisor.gave_up:
            raise AgentError(supervisor.gave_up, EXIT_ENGINE_ENDED)

    async def _wake_on_stop(self) -> None:
        await self._asked_to_stop.wait()
        self._stop.set()
        self._wake.set()

    def _on_news(self) -> None:
        supervisor = self._watch.supervisor
        if supervisor is not None and supervisor.gave_up:
            self._stop.set()
        self._wake.set()

    async def _or_stop(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` returns, unless the agent is stopped first.

        Raises:
            _StoppedError: It was.
        """
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _StoppedError
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    async def _stay_registered(self) -> None:
        """Connect, again and again, until stopped.

        Raises:
            AgentError: It cannot go on.
            _StoppedError: The agent was stopped, and may still be registered.
        """
        loop = asyncio.get_running_loop()
        limit_s = self._config.connect_timeout_s
        deadline_s = loop.time() + limit_s if limit_s else float("inf")
        while True:
            try:
                async with self._connect() as connection:
                    await self._serve(connection)
                return
            except ControlPlaneLostError as error:
                lost = error
            remaining_s = float("inf") if self._registered else deadline_s - loop.time()
            if self._config.once or remaining_s <= 0:
                raise AgentError(
                    f"cannot register at the control plane {self._config.control_plane}: {lost}. "
                    "Start it (sagecp serve), or check --control-plane",
                    EXIT_UNREACHABLE,
                )
            if self._reminder.is_due(str(lost)):
                self._logger.warning(
                    "no connection to the control plane; trying again",
                    control_plane=self._config.control_plane,
                    reason=str(lost),
                )
            wait_s = lost.retry_after_s + self._backoff.next_wait_s()
            await self._or_stop(asyncio.sleep(min(wait_s, remaining_s)))
            if self._watch.supervisor is not None:
                # Whether its engine was well counts when it ends, whoever was there to hear of it.
                await self._watch.look(_DEFAULT_INTERVAL_S, with_gauges=False)

    async def _serve(self, connection: FleetConnection) -> None:
        """Register and beat over one connection, until stopped; then leave over it.

        Raises:
            AgentError: It cannot go on.
            ControlPlaneLostError: The connection is of no use any more.
            _StoppedError: The agent was stopped before it was registered.
        """
        forgotten_at_once = False
        while True:
            self._tried_to_register = True
            response = await self._or_stop(connection.register(self._watch.spec))
            self._on_registered(response)
            async with connection.open_lane(self._wake.set) as lane:
                try:
                    await self._beat(lane)
                except ForgottenError as error:
                    if forgotten_at_once and not lane.acknowledged_sequence:
                        # Registered and unknown, twice: something is wrong over there.
                        raise ControlPlaneLostError(f"registered, and yet: {error}") from None
                    forgotten_at_once = not lane.acknowledged_sequence
                    self._logger.info("the control plane does not know this instance; registering again")
                    continue
            if self._stop.is_set() or self._config.once:
                await self._deregister(connection)
                return

    def _connect(self) -> FleetConnection:
        return FleetConnection(self._link, self._config, self._registration.incarnation)

    def _on_registered(self, response: pb.RegisterInstanceResponse) -> None:
        self._registration = replace(self._registration, lease_token=response.lease_token)
        lease_s = seconds_of(response.lease_duration)
        self._largest_interval_s = lease_s / _BEATS_PER_LEASE if lease_s > 0 else float("inf")
        asked_s = seconds_of(response.heartbeat_interval)
        self._set_interval(asked_s if asked_s > 0 else _DEFAULT_INTERVAL_S)
        if (self._config.interval_s or 0.0) > self._interval_s:
            self._logger.warning(
                "--interval is too long for the lease: beating more often",
                interval_s=self._interval_s,
                lease_s=lease_s,
            )
        self._logger.info(
            "registered again" if self._registered else "registered",
            control_plane=self._config.control_plane,
            incarnation=self._registration.incarnation,
            interval_s=self._interval_s,
            lease_s=lease_s,
        )
        self._registered = True
        self._reminder.reset()

    def _set_interval(self, asked_s: float) -> None:
        # The control plane knows its lease; whoever wrote the flag may not.
        own_s = self._config.interval_s
        self._interval_s = clamp_interval_s(min(own_s, self._largest_interval_s) if own_s else asked_s)

    async def _beat(self, lane: HeartbeatLane) -> None:
        """Send beats until stopped, or until the engine is another and must be registered anew.

        Raises:
            AgentError: The agent must stop.
            ForgottenError: The control plane does not know the instance.
            ControlPlaneLostError: It is gone, or silent.
        """
        loop = asyncio.get_running_loop()
        opened_s = loop.time()
        next_beat_s = opened_s
        self._watch.kv_events.tell_everything()
        while not self._stop.is_set():
            self._wake.clear()
            lane.check(self._interval_s)
            if self._config.once and lane.acknowledged_sequence:
                break
            if lane.asked_interval_s is not None:
                self._set_interval(lane.asked_interval_s)
                next_beat_s = min(next_beat_s, loop.time() + self._interval_s * (1 + _INTERVAL_JITTER))
            self._follow_wishes(lane)
            look_s = loop.time()
            due = look_s >= next_beat_s - _TIMER_SLACK_S
            changed = await self._watch.look(self._interval_s, with_gauges=due)
            if due or changed:
                await self._watch.read_gpus()
                jitter = random.uniform(1 - _INTERVAL_JITTER, 1 + _INTERVAL_JITTER)
                next_beat_s = look_s + self._interval_s * jitter
                await lane.send(self._message(lane, self._watch.kv_events.take_update()), self._interval_s)
            if self._watch.facts_are_old and await self._watch.refresh():
                await lane.settle(_SETTLE_TIMEOUT_S)
                return
            if loop.time() - opened_s >= _STABLE_S:
                self._backoff.reset()
            until_s = min(next_beat_s, loop.time() + MAX_LOOK_S, lane.silence_ends_s(self._interval_s))
            await self._sleep_until(until_s)
        goodbye = self._message(lane)
        goodbye.goodbye = True
        await lane.say_goodbye(goodbye, _GOODBYE_TIMEOUT_S)

    def _message(
        self, lane: HeartbeatLane, kv_cache_update: KvCacheUpdate | None = None
    ) -> pb.HeartbeatRequest:
        watch = self._watch
        return beat_to_proto(
            self._registration,
            lane.next_sequence(),
            watch.observation,
            watch.gpus,
            watch.supervisor.process if watch.supervisor is not None else None,
            watch.order_trouble,
            kv_cache_update,
        )

    async def _sleep_until(self, time_s: float) -> None:
        """Sleep, unless something happens: an end, a wish of the control plane, an engine that closed."""
        try:
            async with asyncio.timeout_at(time_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _follow_wishes(self, lane: HeartbeatLane) -> None:
        self._watch.wishes = lane.wishes or self._watch.wishes
        if lane.desired_state not in {self._desired_state, pb.DESIRED_STATE_UNSPECIFIED}:
            # Draining is done over there, where no more work is sent. Here it is only news.
            self._desired_state = lane.desired_state
            news = "the control plane sends work to this instance again"
            if lane.desired_state == pb.DESIRED_STATE_DRAINED:
                news = "the control plane drains this instance: it gets no new work"
            elif lane.desired_state == pb.DESIRED_STATE_ASLEEP:
                news = "the control plane has this engine sleep"
            self._logger.info(news, desired_state=pb.DesiredState.Name(lane.desired_state))
        request_ids = lane.take_abort_request_ids()
        if request_ids:
            self._watch.abort_soon(request_ids)

    async def _leave(self) -> None:
        """Take the instance out of the fleet over a new connection, if it may be in."""
        if not self._tried_to_register or self._deregistered:
            return
        async with self._connect() as connection:
            await self._deregister(connection)

    async def _deregister(self, connection: FleetConnection) -> None:
        self._deregistered = True
        cause = "set-up checked" if self._config.once else "agent stopped"
        if self._watch.supervisor is not None and self._watch.supervisor.gave_up:
            cause = self._watch.supervisor.gave_up
        try:
            await connection.deregister(cause[:_MAX_CAUSE_LENGTH], _DEREGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if self._registered and error.code() is not grpc.StatusCode.NOT_FOUND:
                self._logger.warning(
                    "could not deregister; the lease will end by itself",
                    reason=f"{error.code().name}: {error.details()}",
                )
        else:
            self._logger.info("deregistered")
