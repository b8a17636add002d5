"""Settings of vLLM that memory and speed depend on, with values that are usual for servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What `vllm serve` would be told.

    Attributes:
        gpu_memory_utilization: Share of each GPU's memory that the engine takes.
        max_batch_token_count: Most tokens of one step (``--max-num-batched-tokens``).
        max_running_request_count: Most requests of one batch (``--max-num-seqs``).
        max_context_token_count: Longest context; ``None``: what the model was made for.
        key_value_bytes: Bytes of one element of the KV cache: 2, or 1 for fp8.
        block_token_count: Tokens of one KV block.
        cuda_graphs: Whether decode steps are captured (not ``--enforce-eager``).
    """

    gpu_memory_utilization: float = 0.9
    max_batch_token_count: int = 8192
    max_running_request_count: int = 256
    max_context_token_count: int | None = None
    key_value_bytes: float = 2.0
    block_token_count: int = 16
    cuda_graphs: bool = True
