"""Whether an engine can be told to do something while it runs."""

from __future__ import annotations

from sagecp.core.engine_state import EngineCapability
from sagecp.core.errors import IllegalOrderError
from sagecp.core.types import ExecutionInstance

_HINTS = {
    EngineCapability.SLEEP: (
        "sleep",
        "start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, or drain it and stop its engine",
    ),
    EngineCapability.LORA: (
        "load LoRA adapters while it runs",
        "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or name them at its start",
    ),
}


def check_capability(spec: ExecutionInstance, incarnation: int, capability: EngineCapability) -> None:
    """Make sure that an engine can do something, as far as is known.

    Args:
        spec: The engine's instance.
        incarnation: 0: there is no agent that could tell the engine.
        capability: SLEEP or LORA.

    Raises:
        IllegalOrderError: It cannot; says what to do about that.
    """
    what, hint = _HINTS[capability]
    if not incarnation:
        raise IllegalOrderError(
            f"instance {spec.instance_id!r} has no agent that could have its engine {what}; run one beside "
            "the engine",
            instance_id=spec.instance_id,
        )
    # An agent that says nothing at all may be an older one.
    if spec.engine_capabilities and capability not in spec.engine_capabilities:
        raise IllegalOrderError(
            f"the engine of instance {spec.instance_id!r} cannot {what}; {hint}", instance_id=spec.instance_id
        )
