"""Small traces for tests of the fleet simulator, with everything in them that a policy looks at."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sagecp.sim.fleet.controller import ObjectiveRule
from sagecp.sim.fleet.experiment import Contender, RunTask, Workload
from sagecp.sim.fleet.simulation import SimulationOptions, Slowdown

FLEET = "2x8b-h100+1x8b-l4"
BLOCK_TOKENS = 16
HARSH_WORLD = SimulationOptions(
    objectives=ObjectiveRule(),
    gauge_interval_s=1.0,
    gauge_delay_s=0.3,
    event_delay_s=0.05,
    slowdowns=(Slowdown(2.0, 0, 4.0),),
)
"""Old metrics, late news, and an engine that becomes slow."""


def mixed_requests(count: int, *, seed: int = 0, per_s: float = 20.0) -> list[dict[str, Any]]:
    """Return requests of several tenants, sessions, classes and lengths, with shared beginnings."""
    draw = random.Random(seed)
    now = 0.0
    rows: list[dict[str, Any]] = []
    for number in range(count):
        now += draw.expovariate(per_s)
        family = draw.randrange(6)
        prompt_tokens = draw.choice([40, 400, 3000, 9000])
        shared = min(prompt_tokens // BLOCK_TOKENS, draw.randrange(1, 40))
        row: dict[str, Any] = {
            "t_s": round(now, 4),
            "prompt_tokens": prompt_tokens,
            "output_tokens": draw.choice([1, 20, 150]),
            "tenant": f"t{draw.randrange(3)}",
            "session": f"s{family}",
            "priority": draw.choice(["CRITICAL", "HIGH", "NORMAL", "LOW", "BACKGROUND"]),
            "block_hashes": [1000 * family + block for block in range(shared)],
            "block_tokens": BLOCK_TOKENS,
        }
        if number % 5 == 0:
            row["max_tokens"] = 200
        if number % 11 == 0:
            row["deadline_ms"] = 3000
        if number % 7 == 0:
            row["cost_budget_usd"] = 0.01
        rows.append(row)
    return rows


def write_trace(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a trace as JSON lines and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logged_run(
    folder: Path,
    rows: list[dict[str, Any]],
    contender: Contender | None = None,
    *,
    options: SimulationOptions = HARSH_WORLD,
    fleet: str = FLEET,
    seed: int = 0,
    suffix: str = ".jsonl.gz",
) -> Path:
    """Simulate a trace with the production scheduler and return the event log of the run."""
    log = folder / f"events{suffix}"
    RunTask(
        workload=Workload(
            trace_path=write_trace(folder / "trace.jsonl", rows),
            fleet=fleet,
            options=options,
            model_error=0.2,
        ),
        contender=contender or Contender(label="own"),
        seed=seed,
        event_log_path=log,
    ).execute()
    return log
