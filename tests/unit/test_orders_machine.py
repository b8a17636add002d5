"""Whatever is wanted, and whatever happens to an engine meanwhile: its orders are carried out in the end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sagecp.agent.orders import Step, Wishes, steps_towards
from sagecp.core.engine_state import LoraAdapter
from sagecp.core.types import EngineGauges

NAMES = ("red", "blue", "green")
PATHS = ("/a", "/b")
ADAPTERS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(PATHS))
MOST_STEPS = 2 * len(NAMES) + 2


class OrdersMachine(RuleBasedStateMachine):
    """An engine, what is wanted of it, and people who do things to it."""

    def __init__(self) -> None:
        super().__init__()
        self.wishes = Wishes()
        self.loaded: dict[str, str] = {}
        self.placed: dict[str, str] = {}
        self.asleep = False
        self.put_to_sleep = False
        self.running_count = 0

    def steps(self) -> list[Step]:
        gauges = EngineGauges(
            running_request_count=self.running_count, waiting_request_count=0, sleeping=self.asleep
        )
        loaded = tuple(LoraAdapter(name, path) for name, path in sorted(self.loaded.items()))
        if self.wishes.asleep:
            self.put_to_sleep = True
        return steps_towards(
            self.wishes, gauges, loaded, may_wake=self.put_to_sleep, placed=dict(self.placed)
        )

    def carry_out(self, step: Step) -> None:
        """Do as the engine does, which refuses what makes no sense."""
        if step.verb == "sleep":
            assert not self.asleep
            assert self.running_count == 0, "what runs would be cut off"
            self.asleep = True
        elif step.verb == "wake":
            assert self.asleep
            self.asleep = self.put_to_sleep = False
        else:
            assert not self.asleep, "there is no memory to load anything into"
            assert (step.name in self.loaded) is (step.verb == "unload")
            if step.verb == "load":
                self.loaded[step.name] = self.placed[step.name] = step.path
            else:
                del self.loaded[step.name]
                self.placed.pop(step.name, None)

    @rule(asleep=st.sampled_from((True, False, None)), adapters=st.none() | ADAPTERS)
    def want(self, asleep: bool | None, adapters: dict[str, str] | None) -> None:
        wanted = None if adapters is None else tuple(LoraAdapter(*each) for each in adapters.items())
        self.wishes = Wishes(asleep=asleep, adapters=wanted)

    @rule(count=st.integers(0, 2))
    def requests_run(self, count: int) -> None:
        if not self.asleep:
            self.running_count = count

    @rule(adapters=ADAPTERS)
    def somebody_loads_and_unloads(self, adapters: dict[str, str]) -> None:
        if not self.asleep:
            self.loaded = adapters
            self.placed = {name: path for name, path in self.placed.items() if self.loaded.get(name) == path}

    @rule()
    def the_engine_starts_again(self) -> None:
        self.asleep, self.running_count, self.loaded = False, 0, {}

    @rule()
    def one_step(self) -> None:
        for step in self.steps()[:1]:
            self.carry_out(step)

    @rule()
    def settle(self) -> None:
        for _ in range(MOST_STEPS):
            steps = self.steps()
            if not steps:
                break
            self.carry_out(steps[0])
        assert self.steps() == [], "it does the same things over and over"
        if self.wishes.asleep:
            assert self.asleep or self.running_count
        elif self.wishes.asleep is False and self.put_to_sleep:
            assert not self.asleep
        if not self.asleep and self.wishes.adapters is not None:
            assert self.loaded == {each.name: each.path for each in self.wishes.adapters}

    @invariant()
    def the_next_step_can_be_carried_out(self) -> None:
        steps = self.steps()
        assert len({(step.verb, step.name) for step in steps}) == len(steps)
        assert not (self.asleep and any(step.name for step in steps))


OrdersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOrdersMachine = OrdersMachine.TestCase
