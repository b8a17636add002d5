"""Counts the load of the control plane in buckets of five minutes, and has it forecast."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.prediction.forecast import LoadForecast, forecast_load
from sagecp.core.prediction.load_history import BUCKET_S, LoadHistory, bucket_number
from sagecp.core.request import RequestRecord
from sagecp.runtime.load_file import LoadFile

# Forecasts that are kept until the bucket is over: questions repeat, and one takes up to 0.1 s.
_MAX_KEPT_COUNT = 64
_LISTED_NAMES = 8


@dataclass(frozen=True, slots=True)
class ForecastAnswer:
    """A forecast with where it stands in time.

    Attributes:
        forecast: The forecast.
        start_s: Where its first step begins, Unix seconds.
        history_s: How much history it rests on, seconds.
    """

    forecast: LoadForecast
    start_s: float
    history_s: float


class LoadRecorder:
    """The load since the history began, over restarts where there is a file.

    Args:
        wall_time: Returns Unix seconds, never going back.
        file: Keeps the history; ``None``: it begins anew at each start.
    """

    def __init__(self, wall_time: Callable[[], float], file: LoadFile | None = None) -> None:
        self._wall_time = wall_time
        self._file = file
        self._written_number = bucket_number(wall_time())
        self._writing: asyncio.Task[None] | None = None
        self._kept: dict[tuple[str, str, float], ForecastAnswer] = {}
        self.history = LoadHistory(wall_time())
        """What was counted."""

    async def start(self) -> None:
        """Read what earlier runs counted, and write it anew without what is too old."""
        file = self._file
        if file is None:
            return
        buckets = await asyncio.to_thread(file.read)
        if not buckets:
            return
        self.history.restore(buckets)
        oldest = bucket_number(self._wall_time() - self.history.finished_s)
        await asyncio.to_thread(file.rewrite, [each for each in buckets if each.number >= oldest])

    async def stop(self) -> None:
        """Write down what has not been yet."""
        if self._writing is not None:
            await self._writing
        if self._file is not None:
            await asyncio.to_thread(self._file.append, list(self.history.take_changed(everything=True)))

    def note_arrival(self, record: RequestRecord) -> None:
        """Count a request that was accepted."""
        self.history.add(
            self._wall_time(),
            record.model,
            record.metadata.tenant_id,
            requests=1.0,
            prompt_tokens=float(record.prompt_token_count),
        )

    def note_end(self, model: str, tenant_id: str, output_token_count: int, cost_usd: float | None) -> None:
        """Count a request that ended; ``cost_usd`` is ``None`` where no price is known."""
        self.history.add(
            self._wall_time(),
            model,
            tenant_id,
            output_tokens=float(output_token_count),
            cost_usd=cost_usd or 0.0,
        )

    def advance(self) -> None:
        """Have finished buckets written down, where there are new ones. Waits for no disk."""
        now_s = self._wall_time()
        if bucket_number(now_s) == self._written_number:
            return
        if self._writing is not None and not self._writing.done():
            return
        self._written_number = bucket_number(now_s)
        self.history.advance(now_s)
        if self._file is not None:
            buckets = list(self.history.take_changed())
            self._writing = asyncio.create_task(
                asyncio.to_thread(self._file.append, buckets), name="sagecp-load-history"
            )

    async def forecast(self, model: str, tenant_id: str, horizon_s: float) -> ForecastAnswer:
        """Forecast the load of a model and tenant; ``""``: of all.

        Raises:
            InvalidRequestError: Nothing was ever counted of the model or the tenant; names those known.
        """
        history = self.history
        history.advance(self._wall_time())
        self._check("model", model, history.models)
        self._check("tenant_id", tenant_id, history.tenant_ids)
        key = (model, tenant_id, horizon_s)
        kept = self._kept.get(key)
        if kept is None or kept.start_s != history.end_s:
            series = history.finished(model, tenant_id)
            start_s, history_s = history.end_s, history.finished_s
            forecast = await asyncio.to_thread(forecast_load, series, horizon_s, step_of(horizon_s))
            kept = ForecastAnswer(forecast, start_s, history_s)
            self._kept.pop(key, None)
            if len(self._kept) >= _MAX_KEPT_COUNT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = kept
        return kept

    @staticmethod
    def _check(field: str, name: str, known: tuple[str, ...]) -> None:
        if not name or name in known:
            return
        listed = ", ".join(known[:_LISTED_NAMES]) + (" and others" if len(known) > _LISTED_NAMES else "")
        raise InvalidRequestError(
            [FieldViolation(field, f"no load of {name[:64]!r} was counted; known are {listed or 'none yet'}")]
        )


def step_of(horizon_s: float) -> float:
    """Return the length of the steps that a horizon is told in, seconds: about a dozen of them."""
    if horizon_s <= 2 * 3600.0:
        return BUCKET_S
    return 900.0 if horizon_s <= 6 * 3600.0 else 3600.0
