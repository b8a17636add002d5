"""The life of requests under random faults: engines that break, a control plane that is killed.

Five promises are checked, of every request, in every life: it is not lost once it was
acknowledged; it ends once; its tokens are numbered without gap or repetition; usage counts what was
delivered; nothing is left running for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sagecp.core.errors import ErrorReason, RequestNotFoundError
from sagecp.core.types import Durability, FailoverMode, InstanceState, RequestMetadata, RequestState
from sagecp.runtime.engines.base import (
    EngineFailedError,
    EngineRejectedError,
    EngineStreamBrokenError,
)
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.store.base import Written
from sagecp.runtime.store.memory import MemoryStore
from sagecp.runtime.store.records import Record
from tests.support.scripted_client import ScriptedCall, ScriptedFleet, unreachable
from tests.support.waiting import turns

INSTANCES = ("a", "b", "c")
PROMPT_IDS = (7, 8, 9)
MAX_TOKENS = 12
CHOICE = st.integers(0, 1 << 16)


class CuttableStore(MemoryStore):
    """A store whose process can be killed: what it is given afterwards is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.killed = False

    def append(self, record: Record, *, sync: bool = False, then: Written | None = None) -> None:
        if not self.killed:
            super().append(record, sync=sync, then=then)

    async def close(self) -> None:
        await super().close()
        self.killed = False


@dataclass
class Known:
    """What a caller knows of a request that was acknowledged."""

    durable: bool
    mode: FailoverMode
    # Texts in the order in which a reader that came back after each crash got them.
    seen: list[str] = field(default_factory=list)
    terminal: RequestState | None = None


def text_of(index: int) -> str:
    """The text of a token by its index: every engine gives the same one, as greedy decoding does."""
    return f"{index} "


class RequestLife(RuleBasedStateMachine):
    """A control plane on three scripted engines and a store that outlives it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = CuttableStore()
        self.fleet = ScriptedFleet()
        self.known: dict[str, Known] = {}
        self.number = 0
        self.manager: ControlPlaneManager

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.runner.run(self.end())
        self.runner.close()

    @initialize()
    def begin(self) -> None:
        self.runner.run(self.start(register=True))

    async def start(self, *, register: bool) -> None:
        self.manager = ControlPlaneManager(client_factory=self.fleet, store=self.store)
        await self.manager.start()
        if register:
            for instance_id in INSTANCES:
                self.manager.register_instance(self.fleet.instance(instance_id, limit=3))
        await turns(10)

    def run(self, *steps: object) -> None:
        async def settle() -> None:
            for step in steps:
                if asyncio.iscoroutine(step):
                    await step
            await turns(12)
            await self.read()

        self.runner.run(settle())

    # -- what callers do -------------------------------------------------------------

    @rule(
        durable=st.sampled_from([True, True, False]),
        modes=st.lists(st.sampled_from([*[FailoverMode.DEFAULT] * 5, *FailoverMode]), min_size=1, max_size=4),
    )
    def submit(self, durable: bool, modes: list[FailoverMode]) -> None:
        for mode in modes:
            self.number += 1
            self.run(self.submit_one(f"r{self.number}", durable, mode))

    async def submit_one(self, request_id: str, durable: bool, mode: FailoverMode) -> None:
        request = RequestMetadata(
            request_id=request_id,
            prompt="hello",
            max_tokens=MAX_TOKENS,
            failover_mode=mode,
            durability=Durability.DURABLE if durable else Durability.EPHEMERAL,
        )
        await self.manager.submit_request(request)
        self.known[request_id] = Known(durable, mode)
        # Again: the same request, not another run.
        await self.manager.submit_request(request)

    @precondition(lambda self: self.known)
    @rule(choice=CHOICE)
    def cancel(self, choice: int) -> None:
        request_id = sorted(self.known)[choice % len(self.known)]
        self.run(self.cancel_one(request_id))

    async def cancel_one(self, request_id: str) -> None:
        known = self.known[request_id]
        try:
            status, cancelled = await self.manager.cancel_request(request_id)
        except RequestNotFoundError:
            assert not known.durable
            return
        assert status.state.is_terminal
        assert not (cancelled and known.terminal is not None), "it had ended"

    async def read(self) -> None:
        """Look at every request as a reader does that has what it has."""
        for request_id, known in self.known.items():
            try:
                handle = await self.manager.find_request("", request_id)
            except RequestNotFoundError:
                assert not known.durable, f"{request_id} was acknowledged and is lost"
                continue
            output = handle.output
            assert output.token_count >= len(known.seen), "delivered tokens are gone"
            texts = [delta.text for delta in output.deltas if delta.token_count]
            assert texts[: len(known.seen)] == known.seen, "a delivered prefix changed"
            assert texts == [text_of(index) for index in range(len(texts))], "a gap or a repetition"
            known.seen = texts
            if handle.state.is_terminal and handle.ended.is_set():
                assert known.terminal in {None, handle.state}, "it ended twice, and differently"
                known.terminal = handle.state
                assert handle.usage().completion_token_count == len(texts), "usage is not what was delivered"

    # -- what engines do -------------------------------------------------------------

    def running(self) -> list[ScriptedCall]:
        return [call for instance_id in INSTANCES for call in self.fleet[instance_id].running]

    @rule(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def produce(self, counts: list[int]) -> None:
        """Every engine makes some progress with what it has."""
        self.run(self.produce_all(counts))

    async def produce_all(self, counts: list[int]) -> None:
        for number, call in enumerate(self.running()):
            await self.produce_some(call, counts[number % len(counts)])

    async def produce_some(self, call: ScriptedCall, count: int) -> None:
        already = self.already(call)
        if already == 0 and not getattr(call, "told", False):
            call.tell_prompt(PROMPT_IDS)
        call.told = True  # type: ignore[attr-defined]
        made = getattr(call, "made", 0)
        room = min(count, MAX_TOKENS - already - made)
        if room > 0:
            call.send(*(text_of(already + made + each) for each in range(room)))
            call.made = made + room  # type: ignore[attr-defined]

    @rule(choice=CHOICE)
    def finish(self, choice: int) -> None:
        self.run(self.finish_one(choice))

    async def finish_one(self, choice: int) -> None:
        call = self.pick(choice)
        if call is not None:
            call.finish("stop", prompt_token_count=len(PROMPT_IDS) + self.already(call))

    @rule(choice=CHOICE, kind=st.sampled_from(["broken", "failed", "rejected", "unreachable"]))
    def fail(self, choice: int, kind: str) -> None:
        errors = {
            "broken": EngineStreamBrokenError("the connection broke"),
            "failed": EngineFailedError("it failed", 500),
            "rejected": EngineRejectedError("it is wrong", 400),
            "unreachable": unreachable(),
        }
        self.run(self.fail_one(choice, errors[kind]))

    async def fail_one(self, choice: int, error: Exception) -> None:
        call = self.pick(choice)
        if call is not None:
            call.fail(error)

    @rule(instance=st.sampled_from(INSTANCES), healthy=st.sampled_from([True, True, False]))
    def health(self, instance: str, healthy: bool) -> None:
        self.run(self.change_health(instance, healthy))

    async def change_health(self, instance: str, healthy: bool) -> None:
        self.fleet[instance].healthy = healthy
        if not healthy:
            for call in self.fleet[instance].running:
                call.fail(EngineStreamBrokenError("the engine died"))

    @rule(instance=st.sampled_from(INSTANCES), undo=st.booleans(), move=st.booleans())
    def drain(self, instance: str, undo: bool, move: bool) -> None:
        self.run(self.drain_one(instance, undo, move))

    async def drain_one(self, instance: str, undo: bool, move: bool) -> None:
        if self.manager.scheduler.fleet.find(instance) is not None:
            self.manager.drain_instance(instance, undo=undo, force=True, grace_s=0.0 if move else None)

    def pick(self, choice: int) -> ScriptedCall | None:
        running = self.running()
        return running[choice % len(running)] if running else None

    @staticmethod
    def already(call: ScriptedCall) -> int:
        """Return how many tokens of output the call was given as part of its prompt."""
        prompt = call.body["prompt"]
        return 0 if isinstance(prompt, str) else len(prompt) - len(PROMPT_IDS)

    # -- what happens to the control plane ---------------------------------------------

    @precondition(lambda self: self.known)
    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        self.runner.run(self.restart_now(kill=kill))
        self.run()

    async def restart_now(self, *, kill: bool) -> None:
        await self.read()
        self.store.killed = kill
        if not kill:
            await self.manager.drain(0.0)
        await self.manager.stop()
        await turns(5)
        assert not self.running(), "work is left behind"
        self.forget_ephemeral()
        await self.start(register=False)

    def forget_ephemeral(self) -> None:
        self.known = {request_id: known for request_id, known in self.known.items() if known.durable}

    @invariant()
    def attempts_and_calls_agree(self) -> None:
        if hasattr(self, "manager"):
            # At most one attempt of a request runs anywhere.
            ids = [call.request_id.rpartition(".")[0] or call.request_id for call in self.running()]
            assert len(ids) == len(set(ids)), "two attempts of one request run"

    async def end(self) -> None:
        """Let everything come to its end: nothing that was acknowledged may be left over."""
        for instance_id in INSTANCES:
            self.fleet[instance_id].healthy = True
            if self.manager.scheduler.fleet.find(instance_id) is not None:
                self.manager.drain_instance(instance_id, undo=True)
            self.manager.deregister_instance(instance_id)
        self.manager.register_instance(self.fleet.instance("last"))
        for _ in range(2000):
            for call in self.running() + self.fleet["last"].running:
                already = self.already(call) + getattr(call, "made", 0)
                if already == 0:
                    call.tell_prompt(PROMPT_IDS)
                if already < MAX_TOKENS:
                    call.send(*(text_of(index) for index in range(already, MAX_TOKENS)))
                call.finish("length", prompt_token_count=len(PROMPT_IDS) + self.already(call))
            await asyncio.sleep(0.002)
            await self.read()
            live = self.manager.requests.live()
            if not live and self.manager.instance("last").state is InstanceState.READY:
                break
        # Ends are told once they are written.
        await turns(10)
        await self.read()
        for request_id, known in self.known.items():
            assert known.terminal is not None, await self.describe(request_id)
            if known.terminal is RequestState.FAILED:
                handle = await self.manager.find_request("", request_id)
                assert handle.failure is not None
                assert handle.failure.reason is not ErrorReason.INTERNAL
            if known.terminal is RequestState.SUCCEEDED and known.mode is FailoverMode.FAIL:
                handle = await self.manager.find_request("", request_id)
                assert len(handle.attempts) <= 1
        await self.manager.stop()
        await turns(5)
        assert not self.running()

    async def describe(self, request_id: str) -> str:
        """Return what could explain that a request did not end."""
        handle = await self.manager.find_request("", request_id)
        record = handle.record
        fleet = [
            f"{each.instance_id} {each.state.name} {each.state_reason!r} open={each.is_open} "
            f"holds={list(each.in_flight)}"
            for each in self.manager.instances()
        ]
        attempts = [(each.epoch, each.instance_id, each.failure) for each in handle.attempts]
        return (
            f"{request_id} never ended: {handle.state.name}, queued={record.queued}, "
            f"on {record.instance_id!r}, not on {record.excluded_instance_ids}, "
            f"waits for {record.waits_for!r}, attempts {attempts}, "
            f"calls {[call.request_id for call in self.running() + self.fleet['last'].running]}; {fleet}"
        )


RequestLife.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRequestLife = RequestLife.TestCase
