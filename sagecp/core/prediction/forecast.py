"""The load of the next hours, from that of the last days.

Three things are known of the load to come: what it is now, what it was at this
time of day, and what it was at this time of the week. A *profile* ``P`` is the
mean of the same time on earlier days, recent ones counting more. A forecast is
the profile, moved towards the present level ``r`` (the last hour by what the
profile says of it):

    f(t + h) = P(t + h) * r ** (a * 0.5 ** (h / 6 hours))

With ``a`` of 0 only the profile counts, with 1 the level first and the profile
later; without any profile the last hour goes on. Seasonal profiles with a
level are what Holt and Winters smooth (Winters, "Forecasting sales by
exponentially weighted moving averages", 1960). Means of two forecasts are often
better than either (Bates and Granger, "The combination of forecasts", 1969): so
there are some of the profile with the last hour, too. All of them are few and
need no fit. Which one is used is decided by how right each would have been over
the last day, at the horizon in question. Bounds are the quantiles of the ratios
of actual to forecast that were seen.

Errors are honest in this: at each past moment only what had come by then takes
part, also in the choice between the forecasts and in the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sagecp.core.prediction.load_history import BUCKET_S, QUANTITIES

Series = NDArray[np.float64]

BUCKETS_PER_HOUR = round(3600 / BUCKET_S)
BUCKETS_PER_DAY = 24 * BUCKETS_PER_HOUR
BUCKETS_PER_WEEK = 7 * BUCKETS_PER_DAY
LEAST_HISTORY_BUCKETS = BUCKETS_PER_HOUR
"""History that a forecast needs before it is more than the mean of what there was."""
LOW_SHARE, HIGH_SHARE = 0.1, 0.9

# Each earlier day, and week, counts this much less than the next one.
_FADING = 0.7
_DAY_COUNT, _WEEK_COUNT = 7, 2
_LEVEL_HALF_LIFE_BUCKETS = 6.0 * BUCKETS_PER_HOUR
# A level is believed within these bounds: an hour without load is no reason to expect none at noon.
_LEAST_LEVEL, _LARGEST_LEVEL = 0.05, 20.0
# Past moments that are looked at: every second bucket of the last three days.
_ORIGIN_STEP, _ORIGIN_COUNT = 2, 3 * BUCKETS_PER_DAY // 2
# Those that decide between the forecasts: the last day.
_CHOICE_COUNT = BUCKETS_PER_DAY // _ORIGIN_STEP
# Ratios that bounds need before they are believed.
_LEAST_RATIO_COUNT = 12
# Until then: a forecast may be so many times off.
_UNKNOWN_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Range:
    """An expected quantity: median, and the bounds that 80 % of the cases should lie between."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class ForecastAccuracy:
    """How right earlier forecasts of the whole horizon were.

    Attributes:
        sample_count: Forecasts compared.
        weighted_error: Sum of ``|forecast - actual|`` by the sum of the actual ones.
        naive_weighted_error: The same of a forecast that says the last hour will go on.
        coverage: Share of the actual ones within the bounds, where bounds were known.
    """

    sample_count: int
    weighted_error: float
    naive_weighted_error: float
    coverage: float


@dataclass(frozen=True, slots=True)
class SpanForecast:
    """What a span of time will bring.

    Attributes:
        start_s: When it begins, seconds from the end of the history.
        duration_s: How long it is.
        values: By quantity, in the names of ``load_history.QUANTITIES``.
    """

    start_s: float
    duration_s: float
    values: Mapping[str, Range]


@dataclass(frozen=True, slots=True)
class LoadForecast:
    """A forecast.

    Attributes:
        steps: One after the other from the end of the history on.
        total: The whole horizon.
        accuracy: Of requests; ``None``: nothing could be compared yet.
        basis: What it rests on, in words.
    """

    steps: tuple[SpanForecast, ...]
    total: SpanForecast | None
    accuracy: ForecastAccuracy | None
    basis: str


@dataclass(frozen=True, slots=True)
class _Method:
    """A way to forecast.

    Attributes:
        words: For people.
        profile: ``day``, ``week`` or ``""``: none.
        level_share: How much of the present level it takes.
        recent_weight: Weight of the last hour going on, against the profile.
    """

    words: str
    profile: str = ""
    level_share: float = 1.0
    recent_weight: float = 0.0


# The first stays the choice until another was better.
_METHODS = (
    _Method("the last hour going on"),
    _Method("the last hour, with some of the time of day", "day", recent_weight=0.7),
    _Method("the time of day and the last hour alike", "day", recent_weight=0.5),
    _Method("the time of day and half of the present level", "day", 0.5),
    _Method("the time of day", "day", 0.0),
    _Method("the last hour, with some of the time of the week", "week", recent_weight=0.7),
    _Method("the time of the week and the last hour alike", "week", recent_weight=0.5),
    _Method("the time of the week and half of the present level", "week", 0.5),
    _Method("the time of the week", "week", 0.0),
)


def forecast_load(history: Mapping[str, Series], horizon_s: float, step_s: float) -> LoadForecast:
    """Forecast requests, tokens and cost.

    Args:
        history: By quantity, one value per bucket, oldest first, without gaps.
        horizon_s: How far ahead, up to 24 hours; counted in whole buckets.
        step_s: Length of the steps, in whole buckets.

    Returns:
        The forecast; without steps where there is no history at all.
    """
    step = max(1, round(step_s / BUCKET_S))
    horizon = max(step, round(horizon_s / BUCKET_S))
    horizon -= horizon % step
    count = len(history[QUANTITIES[0]])
    if not count:
        return LoadForecast(
            (), None, None, "there is no history yet: the first five minutes must have passed"
        )
    starts = [begin * BUCKET_S for begin in range(0, horizon, step)]
    if count < LEAST_HISTORY_BUCKETS:
        return _early(history, starts, step, horizon)
    outlooks = {name: _Outlook(history[name], horizon, step) for name in QUANTITIES}
    requests = outlooks[QUANTITIES[0]]
    steps = tuple(
        SpanForecast(
            start_s, step * BUCKET_S, {name: outlook.steps[index] for name, outlook in outlooks.items()}
        )
        for index, start_s in enumerate(starts)
    )
    total = SpanForecast(0.0, horizon * BUCKET_S, {name: outlook.total for name, outlook in outlooks.items()})
    return LoadForecast(steps, total, requests.accuracy, requests.basis)


def _early(history: Mapping[str, Series], starts: list[float], step: int, horizon: int) -> LoadForecast:
    """The mean so far, between the least and the most that any bucket had."""

    def span(start_s: float, length: int) -> SpanForecast:
        values = {}
        for name, series in history.items():
            least, most = float(series.min()), float(series.max())
            # A mean may lie beside both by its rounding.
            mean = min(most, max(least, float(series.mean())))
            values[name] = Range(length * least, length * mean, length * most)
        return SpanForecast(start_s, length * BUCKET_S, values)

    minutes = len(history[QUANTITIES[0]]) * BUCKET_S / 60
    basis = (
        f"only {minutes:.0f} minutes of history: their mean, between their least and their most; "
        "a forecast proper needs an hour"
    )
    return LoadForecast(tuple(span(start, step) for start in starts), span(0.0, horizon), None, basis)


@dataclass(slots=True)
class _Outlook:
    """The forecast of one quantity."""

    series: Series
    horizon: int
    step: int
    steps: list[Range] = field(init=False)
    total: Range = field(init=False)
    accuracy: ForecastAccuracy | None = field(init=False, default=None)
    basis: str = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.series)
        profiles = {
            "day": _profile(self.series, BUCKETS_PER_DAY, _DAY_COUNT, self.horizon),
            "week": _profile(self.series, BUCKETS_PER_WEEK, _WEEK_COUNT, self.horizon),
        }
        sums = np.concatenate([[0.0], np.cumsum(self.series)])
        # The last one is now; the others are those whose whole horizon has passed.
        first = max(LEAST_HISTORY_BUCKETS, count - self.horizon - _ORIGIN_STEP * (_ORIGIN_COUNT - 1))
        past = np.arange(first, count - self.horizon + 1, _ORIGIN_STEP)
        origins = np.append(past, count)
        # By method, origin and step.
        forecasts = np.stack([self._forecasts(method, profiles, sums, origins) for method in _METHODS])
        begins = past[:, None] + np.arange(0, self.horizon, self.step)[None, :]
        actual = sums[begins + self.step] - sums[begins]
        chosen = self._choices(forecasts[:, :-1].sum(axis=2), actual.sum(axis=1), past, origins)
        picked = forecasts[chosen, np.arange(len(origins))]
        self._bound(picked, actual)
        self._judge(forecasts[0, :-1].sum(axis=1), picked[:-1].sum(axis=1), actual.sum(axis=1), past)
        days = count / BUCKETS_PER_DAY
        length = f"{days:.1f} days" if days >= 1 else f"{count / BUCKETS_PER_HOUR:.1f} hours"
        self.basis = f"{_METHODS[chosen[-1]].words}, from {length} of history"

    def _forecasts(
        self, method: _Method, profiles: Mapping[str, Series], sums: Series, origins: NDArray[np.int64]
    ) -> Series:
        """By origin and step; not-a-number where there was no profile yet."""
        recent = (sums[origins] - sums[origins - BUCKETS_PER_HOUR]) / BUCKETS_PER_HOUR
        ahead = np.arange(self.horizon)
        each = np.repeat(recent[:, None], self.horizon, axis=1)
        if method.profile:
            profile = profiles[method.profile]
            known = np.concatenate([[0.0], np.cumsum(np.nan_to_num(profile))])
            usual = (known[origins] - known[origins - BUCKETS_PER_HOUR]) / BUCKETS_PER_HOUR
            usual[np.isnan(profile[origins - BUCKETS_PER_HOUR])] = np.nan
            with np.errstate(divide="ignore", invalid="ignore"):
                level = np.clip(recent / usual, _LEAST_LEVEL, _LARGEST_LEVEL)
            level = np.where(usual > 0.0, level, 1.0)
            power = method.level_share * 0.5 ** ((ahead + 0.5) / _LEVEL_HALF_LIFE_BUCKETS)
            expected = profile[origins[:, None] + ahead[None, :]]
            seasonal = expected * level[:, None] ** power[None, :]
            each = method.recent_weight * each + (1.0 - method.recent_weight) * seasonal
            # The profile does not reach back to the hour that tells the level.
            each[np.isnan(usual)] = np.nan
        return np.asarray(each.reshape(len(origins), -1, self.step).sum(axis=2))

    def _choices(
        self, totals: Series, actual: Series, past: NDArray[np.int64], origins: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the method used at each origin: the one with the least error of what had come by then."""
        error = np.abs(totals - actual[None, :])
        # A method without a profile at some origin has no error there: it is compared where all
        # that are possible now were possible, so that hard hours count for all of them alike.
        possible = ~np.isnan(error)
        chosen = np.zeros(len(origins), dtype=np.int64)
        cumulated = np.cumsum(np.where(possible, error, 0.0), axis=1)
        counts = np.cumsum(possible, axis=1)
        ended = np.searchsorted(past, origins - self.horizon, side="right")
        for index, seen in enumerate(ended):
            if not seen:
                continue
            latest = counts[:, seen - 1]
            usable = [m for m in range(len(_METHODS)) if latest[m] >= _LEAST_RATIO_COUNT]
            if not usable:
                continue
            start = seen - min(_CHOICE_COUNT, *(int(latest[m]) for m in usable))
            before = cumulated[:, start - 1] if start else np.zeros(len(_METHODS))
            error_sums = cumulated[:, seen - 1] - before
            chosen[index] = min(usable, key=lambda m: (error_sums[m], m))
        return chosen

    def _bound(self, picked: Series, actual: Series) -> None:
        """Set the ranges: medians are the forecasts themselves, so that steps add up to the total."""
        ratios = _ratios(actual, picked[:-1])
        now = picked[-1]
        self.steps = [_range(float(now[j]), ratios[:, j]) for j in range(len(now))]
        self.total = _range(float(now.sum()), _ratios(actual.sum(axis=1), picked[:-1].sum(axis=1)))

    def _judge(self, naive: Series, picked: Series, actual: Series, past: NDArray[np.int64]) -> None:
        weight = float(actual.sum())
        if not len(past) or weight <= 0.0:
            return
        ratios = _ratios(actual, picked)
        ended = np.searchsorted(past, past - self.horizon, side="right")
        inside = [
            low <= ratios[index] <= high
            for index, seen in enumerate(ended)
            if seen >= _LEAST_RATIO_COUNT
            for low, high in [np.quantile(ratios[:seen], [LOW_SHARE, HIGH_SHARE])]
        ]
        self.accuracy = ForecastAccuracy(
            len(past),
            float(np.abs(picked - actual).sum()) / weight,
            float(np.abs(naive - actual).sum()) / weight,
            float(np.mean(inside)) if inside else 0.0,
        )


def _profile(series: Series, period: int, repeat_count: int, horizon: int) -> Series:
    """Return the mean of the same time in earlier periods, for every bucket and ``horizon`` ones more.

    Not-a-number before one period has passed. Up to a period ahead it needs nothing that is
    still to come.
    """
    count = len(series)
    total, weights = np.zeros(count + horizon), np.zeros(count + horizon)
    # A quarter of an hour up to the same time, so that one odd bucket does not come back.
    sums = np.concatenate([[0.0], np.cumsum(series)])
    ends = np.arange(1, count + 1)
    begins = np.maximum(0, ends - 3)
    smooth = (sums[ends] - sums[begins]) / (ends - begins)
    for repeat in range(1, repeat_count + 1):
        shift = repeat * period
        reach = min(count, count + horizon - shift)
        if reach <= 0:
            break
        weight = _FADING ** (repeat - 1)
        total[shift : shift + reach] += weight * smooth[:reach]
        weights[shift : shift + reach] += weight
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights > 0.0, total / weights, np.nan)


def _ratios(actual: Series, forecast: Series) -> Series:
    """Actual by forecast; one more of each, so that small counts and zeros stay finite."""
    return np.asarray((actual + 1.0) / (forecast + 1.0))


def _range(middle: float, ratios: Series) -> Range:
    if len(ratios) < _LEAST_RATIO_COUNT:
        return Range(middle / _UNKNOWN_FACTOR, middle, middle * _UNKNOWN_FACTOR)
    low, high = np.quantile(ratios, [LOW_SHARE, HIGH_SHARE])
    low_value, high_value = low * (middle + 1.0) - 1.0, high * (middle + 1.0) - 1.0
    return Range(max(0.0, min(middle, float(low_value))), middle, max(middle, float(high_value)))
