"""The table of models and plans, each with vLLM's verdict, that validity rules are held against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig

TABLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "plan_verdicts.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Row:
    """One plan of one model, what vLLM does with it, and words that must be in the reasons."""

    model: ModelDescription
    config: ParallelismConfig
    options: EngineOptions
    refused: bool
    says: str
    engine_says: str

    def __str__(self) -> str:
        return f"{self.model.name}-{self.config}"


def rows() -> list[Row]:
    """Return the table, in the order in which an engine is asked about it."""
    return [
        Row(
            model=parse_model_config(TABLE["models"][plan["model"]], name=plan["model"]),
            config=ParallelismConfig(
                tensor_parallel_size=plan["tensor"],
                pipeline_parallel_size=plan["pipeline"],
                data_parallel_size=plan["data"],
                expert_parallel_size=plan["expert"],
            ),
            options=EngineOptions(
                max_context_token_count=plan.get("context"),
                max_batch_token_count=plan.get("batch_tokens", 2048),
                max_running_request_count=plan.get("running", 256),
            ),
            refused=plan["refused"],
            says=plan.get("says", ""),
            engine_says=plan.get("engine_says", ""),
        )
        for plan in TABLE["plans"]
    ]
