"""Everything that was learned: step times by kind of instance, output lengths, and how right it was."""

from __future__ import annotations

from collections.abc import Callable

from sagecp.core.prediction.accuracy import PredictionAccuracy
from sagecp.core.prediction.output_length import OutputLengthModel
from sagecp.core.prediction.priors import prior_for
from sagecp.core.prediction.step_time import StepTimeModel, StepTimeParameters
from sagecp.core.prediction.step_time_accuracy import PlannedStepTime, StepTimeAccuracy
from sagecp.core.types import ExecutionInstance

# After this many observations a model that started from a guess is believed.
TRUSTED_OBSERVATION_COUNT = 8
# Kinds of instances that are remembered; more than any fleet has.
MAX_KIND_COUNT = 1000

_Kind = tuple[str, str, int, int, int, int]


class InstanceKind:
    """Instances of one model on one kind of GPU with the same parallel sizes, which learn together.

    Attributes:
        model: Its step-time model.
        source: Where its prior came from.
        name: For people.
        accuracy: How it keeps to the step times that were planned for it, or else to its prior.

    Args:
        prior: Where its model starts.
        trusted: Whether the prior may hold work back.
        source: Where the prior came from.
        name: For people.
        planned: What it is held to; ``None``: the prior.
    """

    __slots__ = ("_prior_trusted", "accuracy", "model", "name", "source")

    def __init__(
        self,
        prior: StepTimeParameters,
        *,
        trusted: bool,
        source: str,
        name: str = "",
        planned: PlannedStepTime | None = None,
    ) -> None:
        self.model = StepTimeModel(prior)
        self.accuracy = StepTimeAccuracy(
            planned or PlannedStepTime(step_times=prior, source=source, reliable=trusted)
        )
        self.source = source
        self.name = name
        self._prior_trusted = trusted

    @property
    def trusted(self) -> bool:
        """Whether its predictions may hold work back."""
        return self._prior_trusted or self.model.observation_count >= TRUSTED_OBSERVATION_COUNT


class PredictionBook:
    """What the core has learned. It outlives instances and changes of policy.

    Args:
        planned_for: Says what was planned for an instance; ``None``: nobody does.
    """

    def __init__(
        self, planned_for: Callable[[ExecutionInstance], PlannedStepTime | None] | None = None
    ) -> None:
        self._planned_for = planned_for
        self.output_lengths = OutputLengthModel()
        self.accuracy = PredictionAccuracy()
        self._kinds: dict[_Kind, InstanceKind] = {}

    def kind_of(self, spec: ExecutionInstance) -> InstanceKind:
        """Return what is known of instances like this one."""
        key = (
            spec.model_name,
            spec.gpu_name,
            spec.tensor_parallel_size,
            spec.pipeline_parallel_size,
            spec.data_parallel_size,
            spec.expert_parallel_size,
        )
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= MAX_KIND_COUNT:
                del self._kinds[next(iter(self._kinds))]
            if spec.step_time is not None:
                source = "given with the instance"
                kind = InstanceKind(spec.step_time, trusted=True, source=source, name=_name(key))
            else:
                prior = prior_for(
                    spec.gpu_name,
                    spec.model_name,
                    tensor_parallel_size=spec.tensor_parallel_size,
                    pipeline_parallel_size=spec.pipeline_parallel_size,
                )
                kind = InstanceKind(
                    prior.parameters,
                    trusted=prior.trusted,
                    source=prior.source,
                    name=_name(key),
                    planned=self._planned_for(spec) if self._planned_for is not None else None,
                )
            self._kinds[key] = kind
        return kind

    def kinds(self) -> dict[str, InstanceKind]:
        """Return every kind by a readable name."""
        return {kind.name: kind for kind in self._kinds.values()}


def _name(key: _Kind) -> str:
    return f"{key[0]} on {key[1] or 'unknown GPU'} x{key[2] * key[3]}"
