"""Which layers each pipeline stage gets, as vLLM divides them."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.parallelism.model_description import ModelDescription

# Models such as DeepSeek's begin with a few dense layers; where there are more, they alternate.
_MOST_LEADING_DENSE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    """The part of a model on the GPUs of one stage.

    Attributes:
        layer_count: Its layers.
        expert_layer_count: Those of them with experts.
        sliding_layer_count: Those of them that look back only over a window.
        is_first: Whether it has the input embedding.
        is_last: Whether it has the last norm and the output head.
    """

    layer_count: int
    expert_layer_count: int
    sliding_layer_count: int
    is_first: bool
    is_last: bool

    @property
    def dense_layer_count(self) -> int:
        """Its layers without experts."""
        return self.layer_count - self.expert_layer_count


def stage_layer_counts(layer_count: int, stage_count: int) -> tuple[int, ...]:
    """Return how many layers each stage has.

    Layers that are left over go to the stages before the last, from behind: the last one has
    the output head, and the first, which has the embedding, is the last to get one.
    """
    least, left_over = divmod(layer_count, stage_count)
    return tuple(
        least + (1 if stage_count - 1 - left_over <= index < stage_count - 1 else 0)
        for index in range(stage_count)
    )


def pipeline_stages(model: ModelDescription, stage_count: int) -> tuple[PipelineStage, ...]:
    """Divide a model into stages.

    Where its layers with a window and with experts are is not known beyond their number:
    a few dense layers come first, everything else is spread evenly.
    """
    counts = stage_layer_counts(model.layer_count, stage_count)
    stages, begin = [], 0
    for index, count in enumerate(counts):
        end = begin + count
        stages.append(
            PipelineStage(
                layer_count=count,
                expert_layer_count=_experts_before(model, end) - _experts_before(model, begin),
                sliding_layer_count=_spread_before(model.sliding_layer_count, end, model.layer_count)
                - _spread_before(model.sliding_layer_count, begin, model.layer_count),
                is_first=index == 0,
                is_last=index == stage_count - 1,
            )
        )
        begin = end
    return tuple(stages)


def _experts_before(model: ModelDescription, layer: int) -> int:
    if model.experts is None:
        return 0
    dense = model.dense_layer_count
    if dense <= _MOST_LEADING_DENSE_SHARE * model.layer_count:
        return max(0, layer - dense)
    return _spread_before(model.experts.layer_count, layer, model.layer_count)


def _spread_before(marked_count: int, layer: int, layer_count: int) -> int:
    return marked_count * layer // layer_count
