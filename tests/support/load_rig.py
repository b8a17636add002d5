"""An instance's load beside the engine that it is an estimate of: predictions against what happens."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from sagecp.core.instance_load import InstanceLoad
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.prediction.book import InstanceKind
from sagecp.core.prediction.placement import predict
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.fleet.engine import EngineJob, FleetEngine, NewsKind
from sagecp.sim.profiles import StepProfile, get_profile
from tests.support.placement_rows import candidate_row, request_row


def known(profile: StepProfile, **factors: float) -> StepTimeParameters:
    """What is known of a profile; some constants may be wrong by factors."""
    values = {field.name: getattr(profile, field.name) for field in fields(StepTimeParameters)}
    for name, factor in factors.items():
        values[name] *= factor
    return StepTimeParameters(**values)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that goes to the engine at a time."""

    time_s: float
    prompt: int
    output: int


@dataclass(slots=True)
class Seen:
    """What was predicted of a job when it went, and what came of it."""

    job: Job
    ttft_s: float
    tpot_s: float
    context_tokens: float
    true_context_tokens: float
    true_ttft_s: float = math.nan
    true_tpot_s: float = math.nan


class LoadRig:
    """One engine, and the load that follows it from the outside."""

    def __init__(
        self,
        profile_name: str = "8b-h100",
        *,
        believed: StepTimeParameters | None = None,
        trusted: bool = True,
        slowness: float = 1.0,
    ) -> None:
        profile = replace(get_profile(profile_name), kv_token_capacity=2_000_000)
        limits = EngineLimits(kv_token_capacity=profile.kv_token_capacity, prefix_caching=False)
        self.engine = FleetEngine(profile, limits, slowness=slowness)
        self.kind = InstanceKind(believed or known(profile), trusted=trusted, source="a test")
        self.load = InstanceLoad(self.kind, 0.0)
        self.seen: dict[str, Seen] = {}
        self.now = 0.0

    def row(self) -> CandidateRow:
        """The instance as a placement sees it now."""
        load, now = self.load, self.now
        values = {
            "backlog_s": load.backlog_s(now),
            "decode_count": load.decode_count,
            "context_token_count": load.context_token_count(now),
            "prefill_share": load.prefill_share(now),
            "ttft_factor": load.ttft.factor(now),
            "tpot_factor": load.tpot.factor(now),
            "sigma": load.ttft.sigma,
            "step_time": load.kind.model.parameters,
        }
        return candidate_row("a", **values)

    def advance(self, time_s: float) -> None:
        """Let the engine run, and tell the load what it does when it does it."""
        while (event_s := self.engine.next_event_s()) <= time_s:
            for news in self.engine.advance(event_s):
                self.now = news.time_s
                job = news.job
                seen = self.seen[job.request_id]
                if news.kind is NewsKind.FIRST_TOKEN:
                    self.load.note_first_token(job.request_id, self.now)
                    seen.true_ttft_s = self.now - job.added_s
                else:
                    self.load.note_end(job.request_id, job.output_token_count, self.now, learn=True)
                    if job.output_token_count > 1:
                        seen.true_tpot_s = (self.now - job.first_token_s) / (job.output_token_count - 1)
        self.engine.advance(time_s)
        self.now = time_s

    def send(self, job: Job) -> Seen:
        """Send a job now; note what is expected of it."""
        request: RequestRow = request_row(prompt_token_count=job.prompt, output_token_count=float(job.output))
        predicted = predict(request, self.row())
        name = f"r{len(self.seen)}"
        seen = Seen(
            job,
            predicted.ttft_s,
            predicted.tpot_s,
            self.load.context_token_count(self.now),
            float(self.engine.decode_context_token_count),
        )
        self.seen[name] = seen
        self.load.note_dispatch(name, job.prompt, 0, self.now)
        self.engine.add(EngineJob(name, job.prompt, job.output), self.now)
        return seen

    def run(self, jobs: Iterable[Job]) -> list[Seen]:
        """Send jobs at their times, and run until all have ended."""
        for job in jobs:
            self.advance(job.time_s)
            self.send(job)
        while self.engine.request_count:
            self.advance(self.now + 1.0)
        return list(self.seen.values())


def poisson(
    rate_per_s: float, count: int, prompts: list[int], outputs: list[int], seed: int = 1, start_s: float = 0.0
) -> list[Job]:
    """Arrivals without memory."""
    draw, now, jobs = random.Random(seed), start_s, []
    for _ in range(count):
        now += draw.expovariate(rate_per_s)
        jobs.append(Job(now, draw.choice(prompts), draw.choice(outputs)))
    return jobs
