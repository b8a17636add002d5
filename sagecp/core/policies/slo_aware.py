"""Most requests within their objectives: late binding, least work first, pacing, a lane for the hopeless."""

from __future__ import annotations

from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord
from sagecp.core.slo_line import SloLine
from sagecp.core.types import RequestPriority
from sagecp.core.waiting_line import WaitingLine


class SloAwarePolicy(SchedulingPolicy):
    """Orders by the latest moment a request may start, and by the work it costs.

    The key is ``arrival + objective - work + weight * work``, all in seconds:
    the time at which a prefill must begin to meet its objective (least slack
    first), and ``weight`` seconds of age that a second of work counts as. With
    weight 0 it is least slack first, with 1 earliest deadline first, and with a
    large one least work first, which serves the most requests when not all can
    be. A request that would miss its objective even on the best instance goes
    to the best-effort lane.

    Attributes of the class say the rest: it waits for a better busy instance
    within the patience, and paces prefill so that decodes keep their objective.
    """

    name: ClassVar[str] = "slo_aware"
    is_patient = True
    is_paced = True
    demotes = True
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "slo_aware.work_weight", 2.0, 0.0, 1000.0, "Seconds of age that a second of work counts as."
        ),
        Parameter(
            "slo_aware.best_effort_share", 0.02, 0.0, 0.9, "Engine time kept for requests out of reach."
        ),
        Parameter(
            "slo_aware.demote_probability",
            0.5,
            0.01,
            1.0,
            "A request more likely to miss than this is hopeless.",
        ),
        Parameter(
            "slo_aware.pacing_margin",
            0.5,
            0.0,
            10.0,
            "Share of the time between a decode step and the TPOT objective that pacing leaves to prefill.",
        ),
        Parameter(
            "slo_aware.class_head_start_s",
            2.0,
            0.0,
            3600.0,
            "Head start of a class over the next less important.",
        ),
    )

    def new_line(self) -> WaitingLine:
        """Return a line by urgency."""
        return SloLine(self.key, self.parameters["slo_aware.best_effort_share"])

    def key(self, record: RequestRecord) -> float:
        """Return the key, on the core's clock."""
        weight = self.parameters["slo_aware.work_weight"] - 1.0
        head_start_s = self.parameters["slo_aware.class_head_start_s"]
        classes = record.metadata.priority - RequestPriority.NORMAL
        return record.arrival_s + record.ttft_objective_s + weight * record.work_s + classes * head_start_s

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        if record.demoted:
            return "slo_aware: from the best-effort lane, its objective is out of reach"
        return f"slo_aware: most urgent, {record.work_s:.2f} s of work within {record.ttft_objective_s:.2f} s"
