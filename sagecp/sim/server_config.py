"""What a simulated engine is told at its start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.misbehaviour import Misbehaviour
from sagecp.sim.paced_engine import PacedEngineModel
from sagecp.sim.profiles import FIXED_PROFILE, get_profile


@dataclass(frozen=True, slots=True)
class EngineServerConfig:
    """Configuration of an engine server; names follow vLLM's options where one exists.

    Attributes:
        host: The address to listen on.
        port: The port; 0 takes a free one.
        model_names: Names the model is served under; answers carry the one asked for.
        profile: What steps cost: a name of :data:`sagecp.sim.profiles.PROFILES`.
        speed: Factor on the pace of everything: 2 is twice as fast.
        time_to_first_token_s: With profile ``fixed``: from arrival to the first token.
        inter_token_s: With profile ``fixed``: between tokens.
        seed: The model's seed: two engines with the same one give the same greedy answers.
        endless_answers: Sampled answers, too, run to their ``max_tokens``.
        max_model_len: Longest sequence, prompt and answer, in tokens.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: Tokens of one step.
        kv_token_capacity: Tokens in the KV cache; ``None`` takes the profile's.
        block_size: Tokens in a KV block.
        enable_prefix_caching: Whether prompts share blocks.
        tensor_parallel_size: GPUs it claims to run on; ``None`` takes the profile's.
        max_num_queued_reqs: Unfinished requests from which on new ones get 503; ``None`` is no bound.
        enable_lora: Whether LoRA adapters can be loaded and unloaded.
        max_loras: Adapters in one batch, as far as is told.
        api_key: When set, ``/v1`` asks for it as a bearer token.
        max_body_bytes: Larger request bodies are refused.
        misbehaviour: Faults from the start.
    """

    host: str = "127.0.0.1"
    port: int = 0
    model_names: tuple[str, ...] = ("sim",)
    profile: str = "8b-h100"
    speed: float = 1.0
    time_to_first_token_s: float | None = None
    inter_token_s: float | None = None
    seed: int = 0
    endless_answers: bool = False
    max_model_len: int = 8192
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_token_capacity: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    tensor_parallel_size: int | None = None
    max_num_queued_reqs: int | None = None
    enable_lora: bool = False
    max_loras: int = 1
    api_key: str = field(default="", repr=False)
    max_body_bytes: int = 64 * 1024 * 1024
    misbehaviour: Misbehaviour = field(default_factory=Misbehaviour)

    def __post_init__(self) -> None:
        profile = get_profile(self.profile)
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        if not self.model_names or not all(self.model_names):
            raise ValueError("at least one model name is needed, and none may be empty")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_body_bytes",
            "max_loras",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("kv_token_capacity", "tensor_parallel_size", "max_num_queued_reqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise ValueError(f"speed must be a positive number, not {self.speed}")
        for name in ("time_to_first_token_s", "inter_token_s"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.profile != FIXED_PROFILE:
                raise ValueError(f"{name} needs profile {FIXED_PROFILE!r}, not {self.profile!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        capacity = self.kv_token_capacity or profile.kv_token_capacity
        whole = capacity // self.block_size * self.block_size
        if self.max_model_len > whole:
            raise ValueError(
                f"max_model_len {self.max_model_len} does not fit in a KV cache of {whole} tokens; "
                "lower it or raise kv_token_capacity"
            )

    def limits(self) -> EngineLimits:
        """Return what the engine can hold."""
        return EngineLimits(
            kv_token_capacity=self.kv_token_capacity or get_profile(self.profile).kv_token_capacity,
            max_running_requests=self.max_num_seqs,
            max_batch_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            prefix_caching=self.enable_prefix_caching,
        )

    def make_model(self) -> EngineModel:
        """Build the engine."""
        if self.profile == FIXED_PROFILE:
            return PacedEngineModel(
                self.limits(), self.time_to_first_token_s or 0.0, self.inter_token_s or 0.0
            )
        return EngineModel(get_profile(self.profile), self.limits())

    @property
    def parallel_size(self) -> int:
        """GPUs per replica."""
        return self.tensor_parallel_size or get_profile(self.profile).tensor_parallel_size
