"""An engine that gives every request its tokens at fixed times after its arrival.

Not how an engine behaves, but what a measurement needs: the first token after
exactly so many milliseconds, then one every so many, whatever else runs.
Batch size, KV blocks, prefix cache and preemption work as in the real model.
"""

from __future__ import annotations

import heapq
import math

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineLimits, EngineRequest, RequestState, TokenOutput
from sagecp.sim.profiles import FIXED_PROFILE, get_profile

# As in the batched model: a late wake-up does not delay the tokens after it.
_CATCH_UP_S = 0.05


class PacedEngineModel(EngineModel):
    """The engine with fixed times.

    Args:
        limits: What fits.
        time_to_first_token_s: From admission to the first token.
        inter_token_s: Between tokens.
    """

    def __init__(self, limits: EngineLimits, time_to_first_token_s: float, inter_token_s: float) -> None:
        super().__init__(get_profile(FIXED_PROFILE), limits)
        for name, value in (
            ("time_to_first_token_s", time_to_first_token_s),
            ("inter_token_s", inter_token_s),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        self.time_to_first_token_s = time_to_first_token_s
        self.inter_token_s = inter_token_s
        # (due, order, request, its preemption count when this was pushed)
        self._due: list[tuple[float, int, EngineRequest, int]] = []
        self._order = 0

    def begin_step(self, now: float) -> float | None:
        """Admit what fits, and return when the next token is due."""
        while self._waiting and self.running_count < self.limits.max_running_requests:
            request = self._admit(now, len(self._waiting[0].tokens))
            if request is None:
                break
            self._push(request, now + self.time_to_first_token_s * self.slowness)
        while self._due and not self._is_current(self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def finish_step(self, now: float) -> list[TokenOutput]:
        """Emit every token that is due."""
        plan: list[EngineRequest] = []
        times: list[float] = []
        while self._due and self._due[0][0] <= now:
            entry = heapq.heappop(self._due)
            due, _, request, _ = entry
            if not self._is_current(entry):
                continue
            request.chunk = len(request.tokens) - request.computed
            if request.computed + request.chunk > request.capacity and not self._grow(request, request.chunk):
                continue
            plan.append(request)
            times.append(due if now - due <= _CATCH_UP_S else now)
        if not plan:
            return []
        self._plan = plan
        self._planned_tokens = sum(request.chunk for request in plan)
        outputs = super().finish_step(now)
        for request, due in zip(plan, times, strict=True):
            if request.state is RequestState.RUNNING:
                self._push(request, due + self.inter_token_s * self.slowness)
        return outputs

    def _push(self, request: EngineRequest, due: float) -> None:
        self._order += 1
        heapq.heappush(self._due, (due, self._order, request, request.preemption_count))

    @staticmethod
    def _is_current(entry: tuple[float, int, EngineRequest, int]) -> bool:
        _, _, request, preemption_count = entry
        return request.state is RequestState.RUNNING and request.preemption_count == preemption_count
