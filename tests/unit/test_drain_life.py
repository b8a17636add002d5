"""Long lives of a busy, healthy fleet whose operator drains instances and takes that back, all the time.

The scheduler's state machine keeps the books and says what must hold: nothing is
dispatched to an instance that drains, DRAINED means that nothing is in flight, no
request is lost or doubled, and a replay of the log does the same.
"""

from __future__ import annotations

import random
from collections import Counter

from sagecp.core import events as ev
from sagecp.core.types import EngineCondition, FailoverMode
from tests.support.core_world import ENGINE_FAILED, STEP_TIME
from tests.unit.test_scheduler_machine import INSTANCE_IDS, REQUEST_CHOICES, Move, SchedulerMachine, chosen

STEP_COUNT = 400
KIND = {"model": "m1", "model_aliases": (), "limit": 4, "step_time": STEP_TIME}


def check(machine: SchedulerMachine) -> None:
    machine.requests_are_accounted_for()
    machine.work_is_accounted_for_where_it_runs()
    machine.indexes_agree_with_the_records()
    machine.loads_agree_with_what_runs()
    machine.books_balance()
    machine.pins_are_those_of_running_prompts()
    machine.lines_are_in_order()
    machine.nobody_waits_for_nothing()


def live(seed: int) -> Counter[str]:
    """Live once; return how often each effect and error came, and each state was seen."""
    draw, seen = random.Random(seed), Counter[str]()
    machine = SchedulerMachine()
    machine.begin(
        draw.choice(["priority", "slo_aware", "fifo"]),
        "load_balanced",
        draw.choice(["predicted_latency", "least_connections"]),
        queue_limit=100,
        byte_limit=1 << 20,
        fleet=[(dict(KIND), EngineCondition.HEALTHY) for _ in INSTANCE_IDS],
        start_s=draw.choice([0.0, 1.7e9]),
    )

    def arrive() -> None:
        fields = chosen(draw, REQUEST_CHOICES) | {
            "slo_deadline_ms": None,
            "cost_budget": None,
            "prompt": (40, False),
            "choice_count": 1,
            "failover_mode": draw.choice([*[FailoverMode.DEFAULT] * 3, *FailoverMode]),
        }
        machine.arrive(
            draw.randrange(150), taken=False, count=draw.randint(1, 4), model_choice=0, fields=fields
        )

    def attempt_moves() -> None:
        kind = draw.choice(["progress", "progress", "succeed", "succeed", "fail"])
        move = Move(kind, ENGINE_FAILED, token_count=draw.choice([1, 5]), counts=draw.random() < 0.5)
        if machine.running():
            machine.attempts_move([(draw.randrange(12), move)])

    def drain() -> None:
        machine.drain(
            draw.randrange(12),
            draw.choice([None, None, 0, -1, 1]),
            draw.choice([0.0, 0.0, 0.5, 3.0, None]),
            force=draw.random() < 0.6,
            undo=False,
        )

    def undo() -> None:
        early = draw.random() < 0.2
        draining = [
            each.instance_id
            for each in machine.scheduler.fleet
            if each.drain is not None and (early or not each.in_flight)
        ]
        if draining:
            machine.feed(ev.DrainRequested(draw.choice(draining), undo=True))

    def come_back() -> None:
        if machine.interrupted:
            machine.interrupted_attempts_come_back(draw.randint(1, 8), draw.choice([0, 5]))

    def beat(number: int) -> None:
        machine.heartbeat(number, 0, EngineCondition.HEALTHY, None, None, None, None, has_gauges=False)

    def fleet_changes() -> None:
        """An agent is away for a while, or registers anew."""
        instance_id = draw.choice(INSTANCE_IDS)
        known = machine.scheduler.fleet.find(instance_id)
        for _ in range(3):
            machine.time_passes(2.5, alive=False, tell=True)
            for number, each in enumerate(sorted(machine.states)):
                if each != instance_id:
                    beat(number)
        seen.update(each.state.name for each in machine.scheduler.fleet)
        incarnation = known.incarnation + 1 if known is not None else 1
        machine.join(instance_id, incarnation, dict(KIND), EngineCondition.HEALTHY)
        for number in range(len(machine.states)):
            beat(number)

    def time_passes() -> None:
        machine.time_passes(draw.choice([0.01, 0.5, 2.0]), alive=True, tell=True)

    steps = [arrive, attempt_moves, drain, undo, come_back, fleet_changes, time_passes, machine.wake_up]
    for _ in range(STEP_COUNT):
        draw.choices(steps, weights=[12, 18, 5, 6, 8, 1, 3, 3])[0]()
        check(machine)
        seen.update(each.state.name for each in machine.scheduler.fleet)
    seen.update(text.split("(")[0].split(":")[0] for text in machine.texts)
    machine.teardown()
    return seen


def test_long_lives_of_drains() -> None:
    seen: Counter[str] = Counter()
    for seed in range(8):
        seen += live(seed)
    # Otherwise the lives prove little.
    for name in ("InterruptAttempt", "RequestRequeued", "DrainRefusedError", "DRAINED", "DRAINING", "LOST"):
        assert seen[name] > 10, name
