"""Mixed load and random faults for as long as you like, and a ledger at the end.

    python -m tests.faults.soak --minutes 10 --seed 1

Control planes, engines and agents are killed, frozen and started again, connections are reset,
lines swallow what is sent, engines talk nonsense; callers of every kind go on. At the end the faults
stop, everything that was accepted must have ended, once, with the output that an unbroken run gives,
and no engine may work on anything. The exit status is 1 if it is otherwise.

In the last third the control plane is left alive, so that its memory can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.faults.harness.fault_proxy import DOWN, UP, FaultProxy, fault_proxy
from tests.faults.harness.ledger import Ledger
from tests.faults.harness.load import Load
from tests.faults.harness.programs import Agent, Part, Settings, SimEngine
from tests.faults.harness.site import Site, running_site

ENGINE_COUNT = 4
WEIGHTS = {
    "plain": 4.0,
    "elsewhere": 2.0,
    "repeated": 1.0,
    "cancelled": 2.0,
    "hurried": 1.0,
    "slow": 1.0,
    "generate": 1.0,
}
# What is kept of ended requests is soon all that is ever kept, so that memory does not grow because of it.
QUIET: Settings = {"": {"log_level": "warning"}, "runtime": {"retained_request_count": 500}}
_NONSENSE = ("eof", "cut", "done", "error", "abort", "garbage", "bad_json")
_CALM_SHARE = 1 / 3


@dataclasses.dataclass
class Memory:
    """Resident memory of the control plane over the part in which it lives."""

    first_bytes: int = 0
    last_bytes: int = 0

    @property
    def drift(self) -> float:
        """How much it grew, as a share."""
        return self.last_bytes / self.first_bytes - 1.0 if self.first_bytes else 0.0


class Faults:
    """What can go wrong at a site, one thing at a time; each puts back what it broke.

    Args:
        site: The site.
        generator: Draws what happens, and when.
        callers: The way to the control plane that some callers take.
        beats: The way that agents take.
    """

    def __init__(self, site: Site, generator: random.Random, callers: FaultProxy, beats: FaultProxy) -> None:
        self._site = site
        self._random = generator
        self._callers = callers
        self._beats = beats
        self.counts: Counter[str] = Counter()

    async def run(self, until_s: float, *, spare_control_plane: bool) -> None:
        """Let something happen every second or so, until a time of the monotonic clock."""
        kinds: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "engine killed": (3, self._kill_engine),
            "engine frozen": (2, self._freeze_engine),
            "engine talks nonsense": (3, self._nonsense),
            "agent killed": (2, self._kill_agent),
            "agent frozen": (1, self._freeze_agent),
            "connections reset": (3, self._reset),
            "line swallows": (2, self._swallow),
        }
        if not spare_control_plane:
            kinds["control plane killed"] = (2, self._kill_control_plane)
            kinds["control plane replaced"] = (1, self._replace_control_plane)
            kinds["control plane frozen"] = (1, self._freeze_control_plane)
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        while time.monotonic() < until_s:
            await asyncio.sleep(self._random.expovariate(1.0))
            (name,) = self._random.choices(names, weights)
            self.counts[name] += 1
            await kinds[name][1]()

    async def heal(self) -> None:
        """Put everything back that should be there."""
        self._callers.heal()
        self._beats.heal()
        for part in self._site.parts():
            part.thaw()
            if not part.running:
                part.spawn()
        await self._site.control_plane.serving()
        for engine in self._site.engines:
            await engine.ready()
            await engine.misbehave(**{f"{fault}_after_tokens": None for fault in _NONSENSE})

    async def _pause(self, longest_s: float) -> None:
        await asyncio.sleep(self._random.uniform(0.1, longest_s))

    async def _kill_control_plane(self) -> None:
        control_plane = self._site.control_plane
        control_plane.kill()
        await self._pause(1.0)
        control_plane.spawn()
        if self._random.random() < 0.8:
            await control_plane.serving()
        # Else the next fault may hit it while it starts.

    async def _replace_control_plane(self) -> None:
        control_plane = self._site.control_plane
        with contextlib.suppress(AssertionError):
            await control_plane.serving()
        control_plane.terminate()
        await control_plane.ended()
        control_plane.spawn()
        await control_plane.serving()

    async def _freeze_control_plane(self) -> None:
        await self._freeze(self._site.control_plane, 3.0)

    async def _freeze(self, part: Part, longest_s: float) -> None:
        part.freeze()
        await self._pause(longest_s)
        part.thaw()

    async def _kill_engine(self) -> None:
        engine = self._random.choice(self._site.engines)
        engine.kill()
        await self._pause(2.0)
        engine.spawn()
        await engine.ready()

    async def _freeze_engine(self) -> None:
        await self._freeze(self._random.choice(self._site.engines), 6.0)

    async def _nonsense(self) -> None:
        engine = self._random.choice(self._site.engines)
        fault = f"{self._random.choice(_NONSENSE)}_after_tokens"
        await engine.misbehave(**{fault: self._random.randint(0, 30), "stream_fault_limit": 3})
        await self._pause(1.0)
        await engine.misbehave(**{fault: None, "stream_fault_limit": None})

    async def _kill_agent(self) -> None:
        agent = self._random.choice(self._site.agents)
        if agent.running:
            agent.kill()
        await self._pause(3.0)
        agent.spawn()

    async def _freeze_agent(self) -> None:
        agent = self._random.choice(self._site.agents)
        if agent.running:
            await self._freeze(agent, 4.0)

    async def _reset(self) -> None:
        (self._callers if self._random.random() < 0.7 else self._beats).reset()

    async def _swallow(self) -> None:
        line = self._callers if self._random.random() < 0.5 else self._beats
        line.swallow(*self._random.choice(((UP,), (DOWN,), (UP, DOWN))))
        await self._pause(3.0)
        line.heal()
        line.reset()


async def soak(minutes: float, seed: int, caller_count: int) -> bool:
    """Run it; return whether everything added up."""
    generator = random.Random(seed)
    began_s = time.monotonic()
    end_s = began_s + minutes * 60.0
    calm_s = end_s - minutes * 60.0 * _CALM_SHARE
    engines = [SimEngine(f"e{number}", inter_token_ms=20) for number in range(ENGINE_COUNT)]
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        async with (
            running_site(engines, settings=QUIET, folder=Path(folder)) as site,
            fault_proxy(site.control_plane.address) as callers,
            fault_proxy(site.control_plane.address) as beats,
        ):
            # Agents take over from the registrations that the site began with.
            for engine in engines:
                site.agents.append(Agent(engine, beats.address))
                site.agents[-1].spawn()
            for agent in site.agents:
                await agent.registered()
            other = Ledger(callers.address)
            load = Load(site.ledger, random.Random(seed + 1), WEIGHTS, other)
            faults = Faults(site, generator, callers, beats)
            try:
                async with load.running(caller_count, engines):
                    await faults.run(calm_s, spare_control_plane=False)
                    await faults.heal()
                    memory.first_bytes = site.control_plane.resident_bytes()
                    await faults.run(end_s, spare_control_plane=True)
                    memory.last_bytes = site.control_plane.resident_bytes()
                    await faults.heal()
            finally:
                await other.close()
    return report(site.ledger, load, faults.counts, memory, time.monotonic() - began_s)


def report(ledger: Ledger, load: Load, faults: Counter[str], memory: Memory | None, lasted_s: float) -> bool:
    """Print the ledger; return whether it adds up."""
    states = load.states + ledger.states()
    violations = ledger.violations
    rows: list[tuple[str, object]] = [
        ("lasted", f"{lasted_s:.0f} s"),
        *((f"requests, {kind}", count) for kind, count in sorted(load.counts.items())),
        *((f"refused, {code}", count) for code, count in sorted(load.refusals.items())),
        ("accepted", sum(states.values())),
        *((f"ended, {state or 'not at all'}", count) for state, count in sorted(states.items())),
        ("lost", sum("I1" in text or "NOT_FOUND" in text for text in violations)),
        ("two ends", sum("I2" in text for text in violations)),
        ("gaps, repetitions, changes", sum("I3" in text for text in violations)),
        ("wrong charges", sum("I4" in text for text in violations)),
        ("engines busy after the end", sum("I5" in text for text in violations)),
        *((f"fault: {name}", count) for name, count in sorted(faults.items())),
    ]
    if memory is not None:
        first, last = memory.first_bytes >> 20, memory.last_bytes >> 20
        rows.append(("memory of the control plane", f"{first} MiB, then {last} MiB: {memory.drift:+.1%}"))
    for name, value in rows:
        sys.stdout.write(f"{name:<32} {value}\n")
    for text in violations[:50]:
        sys.stdout.write(f"VIOLATION {text}\n")
    sys.stdout.write("it adds up\n" if not violations else f"{len(violations)} violations\n")
    return not violations


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Mixed load and random faults; ends with a ledger.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callers", type=int, default=24)
    options = parser.parse_args()
    return 0 if asyncio.run(soak(options.minutes, options.seed, options.callers)) else 1


if __name__ == "__main__":
    sys.exit(main())
