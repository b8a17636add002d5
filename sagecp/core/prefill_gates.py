"""When an engine gets more prefill work."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sagecp.core.fleet import Fleet
from sagecp.core.instance_load import PREFILL_SHARE_TIME_S
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT

# Pacing never takes prefill below this share of an engine's time.
_LEAST_PREFILL_SHARE = 0.05


class PrefillGates:
    """Opens and closes the gates of instances: what a closed one will not get waits here.

    Where it waits it can still be ordered and placed.

    Args:
        fleet: The instances.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._parameters: Mapping[str, float] = {}
        self._is_paced = False

    def configure(self, parameters: Mapping[str, float], *, is_paced: bool) -> None:
        """Take parameters into use, and whether the policy in force paces prefill."""
        self._parameters = parameters
        self._is_paced = is_paced

    def settle(self, instance: InstanceRecord, now: float) -> None:
        """Open an instance's gate, or close it until it has room for more prefill work.

        Work waits here while the engine has more than the window before it,
        and, under a pacing policy, while prefill has had so large a share of
        the engine's time that its decodes would miss their objective. With
        ``phi`` the share, their time per token is
        ``1 / (phi / t_prefill_step + (1 - phi) / t_decode_step)``; the bound on
        ``phi`` solves that for the objective.
        """
        load = instance.load
        if not load.kind.trusted or instance.in_flight_count == 0:
            self._fleet.open_gate(instance)
            return
        wait_s = load.backlog_s(now) - self._parameters["dispatch.prefill_window_s"]
        if self._is_paced and load.decode_count:
            wait_s = max(wait_s, self._pacing_wait_s(instance, now))
        opens_s = now + wait_s
        # A wait too short for the clock to tell would have no end: its time is the present.
        if wait_s > 1e-9 and opens_s > now:
            self._fleet.close_gate(instance, opens_s)
        else:
            self._fleet.open_gate(instance)

    def _pacing_wait_s(self, instance: InstanceRecord, now: float) -> float:
        """Return how long without prefill brings its share down to what the objective leaves it."""
        load = instance.load
        share = load.prefill_share(now)
        if share <= _LEAST_PREFILL_SHARE:
            return 0.0
        step = load.kind.model.parameters
        context = load.context_token_count(now)
        factor = load.tpot.factor(now)
        decode_s = step.decode_step_s(load.decode_count, context) * factor
        prefill_s = step.step_s(BATCH_TOKEN_COUNT, context) * factor
        objective_s = min(self._parameters["objectives.tpot_s"], instance.least_tpot_objective_s)
        # A share of what an engine has to spare: a slow one has less, and would else never be fed.
        spare_s = max(0.0, objective_s - decode_s)
        goal_s = decode_s + self._parameters["slo_aware.pacing_margin"] * spare_s
        if prefill_s <= goal_s or prefill_s <= decode_s:
            return 0.0
        paced = (1.0 / decode_s - 1.0 / goal_s) / (1.0 / decode_s - 1.0 / prefill_s)
        bound = max(_LEAST_PREFILL_SHARE, paced)
        # Without prefill the share falls exponentially.
        return PREFILL_SHARE_TIME_S * math.log(share / bound) if share > bound else 0.0
