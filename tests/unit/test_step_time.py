"""The step-time formula, and the model that learns its constants."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import astuple, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.least_squares import RecursiveLeastSquares
from sagecp.core.prediction.step_time import StepTimeModel, StepTimeParameters

MS, US, NS = 1e-3, 1e-6, 1e-9
NAMES = [field.name for field in fields(StepTimeParameters)]


def constants(
    o_ms: float, a0_ms: float, a1_us: float, b0_ms: float, b1_us: float, g_us: float, d_ns: float
) -> StepTimeParameters:
    return StepTimeParameters(
        overhead_s=o_ms * MS,
        memory_base_s=a0_ms * MS,
        memory_per_token_s=a1_us * US,
        compute_base_s=b0_ms * MS,
        compute_per_token_s=b1_us * US,
        context_per_token_s=g_us * US,
        attention_per_token_pair_s=d_ns * NS,
    )


LARGE = constants(2.5, 16.8, 18, 12.0, 66.6, 0.031, 1.2)  # 70B on four H100
SMALL = constants(2.0, 10.0, 25, 6.4, 67.2, 0.082, 2.8)  # 8B on an A100
SLOW = constants(2.5, 62, 60, 10, 210, 0.55, 8.7)  # 8B on an L4: memory-bound up to 347 tokens
TRUTHS = {"70b-h100-tp4": LARGE, "8b-a100": SMALL, "8b-l4": SLOW}


# -- the formula ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "context", "pairs", "expected_ms"),
    [
        (1, 0, 0, 2.5 + 16.818),
        (1, 100_000, 0, 2.5 + 16.818 + 3.1),
        (98, 0, 0, 2.5 + 12.0 + 6.5268 + 0.0372),  # still memory-bound: 16.8 + 1.764
        (2048, 0, 0, 2.5 + 12.0 + 136.3968),
        (2048, 50_000, 2048 * 1024, 2.5 + 12.0 + 136.3968 + 1.55 + 2.5165824),
    ],
)
def test_one_step(tokens: int, context: int, pairs: float, expected_ms: float) -> None:
    assert LARGE.step_s(tokens, context, pairs) == pytest.approx(expected_ms * MS, rel=1e-9)
    if not pairs:
        assert LARGE.decode_step_s(tokens, context) == LARGE.step_s(tokens, context)


def exact_prefill(
    truth: StepTimeParameters, uncached: int, prompt: int, decodes: int, context: float, batch: int = 2048
) -> tuple[float, int]:
    """Duration and number of steps, chunk by chunk."""
    duration_s, steps, position = 0.0, 0, prompt - uncached
    while position < prompt:
        chunk = min(batch - decodes, prompt - position)
        duration_s += truth.step_s(decodes + chunk, context, chunk * (position + chunk / 2))
        position += chunk
        steps += 1
    return duration_s, steps


@given(
    name=st.sampled_from(sorted(TRUTHS)),
    prompt=st.integers(1, 100_000),
    cached_share=st.floats(0.0, 0.99),
    decodes=st.integers(0, 255),
    context_each=st.integers(0, 10_000),
)
def test_a_prefill_is_the_sum_of_its_steps(
    name: str, prompt: int, cached_share: float, decodes: int, context_each: int
) -> None:
    truth, uncached, context = TRUTHS[name], max(1, int(prompt * (1 - cached_share))), decodes * context_each
    expected_s, _ = exact_prefill(truth, uncached, prompt, decodes, context)
    assert truth.prefill_s(uncached, prompt, decodes, context) == pytest.approx(expected_s, rel=1e-9)


def test_a_compute_bound_prefill_follows_the_closed_form() -> None:
    uncached, prompt, decodes, context = 5000, 9000, 20, 60_000
    steps = math.ceil(uncached / (2048 - decodes))
    fixed_s = LARGE.overhead_s + LARGE.compute_base_s + LARGE.compute_per_token_s * decodes
    expected_s = (
        steps * (fixed_s + LARGE.context_per_token_s * context)
        + LARGE.compute_per_token_s * uncached
        + LARGE.attention_per_token_pair_s * uncached * (prompt - uncached / 2)
    )
    assert LARGE.prefill_s(uncached, prompt, decodes, context) == pytest.approx(expected_s, rel=1e-12)


def test_work_is_a_prefill_in_full_batches() -> None:
    assert LARGE.work_s(20_480, 20_480) == pytest.approx(LARGE.prefill_s(20_480, 20_480), rel=1e-9)
    assert LARGE.work_s(64, 64) < LARGE.prefill_s(64, 64) / 3
    assert LARGE.work_s(0, 100) == 0.0


def test_edges_of_a_prefill() -> None:
    assert LARGE.prefill_s(0, 100) == 0.0
    # Decodes fill the batch: one token of prefill a step.
    assert LARGE.prefill_s(3, 3, decode_count=2048) == pytest.approx(
        3 * LARGE.step_s(2049) + LARGE.attention_per_token_pair_s * 4.5
    )


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_constants_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(LARGE, **{name: value})


# -- learning --------------------------------------------------------------------


def draw_prefill(generator: random.Random) -> tuple[int, int, int, float]:
    prompt = min(60_000, int(generator.lognormvariate(7.5, 1.2))) + 16
    uncached = max(1, int(prompt * generator.choice((1.0, 1.0, 0.7, 0.3))))
    decodes = generator.randrange(100)
    return uncached, prompt, decodes, decodes * generator.uniform(500, 6000)


def draw_decode(generator: random.Random) -> tuple[int, float]:
    decodes = generator.randrange(1, 200)
    return decodes, decodes * generator.uniform(500, 6000)


def perturbed(
    truth: StepTimeParameters, generator: random.Random, spread: float = 0.25
) -> StepTimeParameters:
    return StepTimeParameters(
        **{name: getattr(truth, name) * math.exp(generator.gauss(0.0, spread)) for name in NAMES}
    )


def observe_truth(
    model: StepTimeModel,
    truth: StepTimeParameters,
    generator: random.Random,
    count: int,
    *,
    noise: float = 0.05,
) -> None:
    """Let a model see prefills and decodes of a true engine."""
    for _ in range(count):
        factor = generator.lognormvariate(0.0, noise)
        if generator.random() < 0.5:
            uncached, prompt, decodes, context = draw_prefill(generator)
            duration_s, steps = exact_prefill(truth, uncached, prompt, decodes, context)
            model.observe_prefill(
                duration_s * factor,
                steps,
                uncached + decodes * steps,
                context * steps,
                uncached * (prompt - uncached / 2),
            )
        else:
            decodes, context = draw_decode(generator)
            model.observe_decode(truth.decode_step_s(decodes, context) * factor, decodes, context)


def median_errors(parameters: StepTimeParameters, truth: StepTimeParameters) -> tuple[float, float]:
    """Median relative error of decode steps and of prefills."""
    generator = random.Random(99)
    decode, prefill = [], []
    for _ in range(200):
        batch = draw_decode(generator)
        decode.append(abs(parameters.decode_step_s(*batch) / truth.decode_step_s(*batch) - 1))
        case = draw_prefill(generator)
        prefill.append(abs(parameters.prefill_s(*case) / exact_prefill(truth, *case)[0] - 1))
    return statistics.median(decode), statistics.median(prefill)


@pytest.mark.parametrize("name", sorted(TRUTHS))
def test_two_hundred_observations_correct_a_wrong_prior(name: str) -> None:
    truth = TRUTHS[name]
    before: list[float] = []
    after: list[float] = []
    for seed in range(10):
        generator = random.Random(seed)
        model = StepTimeModel(perturbed(truth, generator))
        before += median_errors(model.parameters, truth)
        observe_truth(model, truth, generator, 200)
        assert model.observation_count == 200
        after.append(max(median_errors(model.parameters, truth)))
    assert statistics.mean(before) > 0.1
    assert statistics.mean(after) < 0.02
    assert max(after) < 0.05


def test_a_prior_three_times_off_is_corrected() -> None:
    model = StepTimeModel(StepTimeParameters(**{name: getattr(LARGE, name) / 3.5 for name in NAMES}))
    observe_truth(model, LARGE, random.Random(1), 200)
    assert max(median_errors(model.parameters, LARGE)) < 0.05


def test_it_follows_change() -> None:
    generator = random.Random(2)
    model = StepTimeModel(LARGE)
    observe_truth(model, LARGE, generator, 300)
    slower = StepTimeParameters(**{name: getattr(LARGE, name) * 1.4 for name in NAMES})
    observe_truth(model, slower, generator, 600)
    assert max(median_errors(model.parameters, slower)) < 0.05


def test_an_outlier_moves_little() -> None:
    generator = random.Random(3)
    model = StepTimeModel(LARGE)
    observe_truth(model, LARGE, generator, 50)
    before = model.parameters.decode_step_s(20, 40_000)
    model.observe_decode(100 * before, 20, 40_000)
    assert model.parameters.decode_step_s(20, 40_000) == pytest.approx(before, rel=0.01)
    model.observe_decode(before / 100, 20, 40_000)
    assert model.parameters.decode_step_s(20, 40_000) == pytest.approx(before, rel=0.01)


def test_pauses_now_and_then_do_not_spoil_it() -> None:
    generator = random.Random(4)
    model = StepTimeModel(perturbed(SMALL, generator))
    for _ in range(40):
        observe_truth(model, SMALL, generator, 9)
        model.observe_decode(20 * SMALL.decode_step_s(10, 20_000), 10, 20_000)
    assert max(median_errors(model.parameters, SMALL)) < 0.05


def test_what_is_not_seen_stays_known() -> None:
    generator = random.Random(5)
    model = StepTimeModel(perturbed(LARGE, generator))
    observe_truth(model, LARGE, generator, 300)
    before = model.parameters.prefill_s(4000, 4000)
    for _ in range(20_000):
        model.observe_decode(LARGE.decode_step_s(8, 16_000) * generator.lognormvariate(0, 0.05), 8, 16_000)
    # One batch tells two constants apart no more; neither may run away.
    assert model.parameters.decode_step_s(8, 16_000) == pytest.approx(
        LARGE.decode_step_s(8, 16_000), rel=0.02
    )
    assert model.parameters.prefill_s(4000, 4000) == pytest.approx(before, rel=0.02)
    observe_truth(model, LARGE, generator, 20)
    assert max(median_errors(model.parameters, LARGE)) < 0.06


def test_the_estimate_is_rebuilt_only_when_it_changed() -> None:
    model = StepTimeModel(LARGE)
    assert model.parameters is LARGE
    model.observe_decode(math.nan, 1, 1)
    assert model.parameters is LARGE
    model.observe_decode(0.03, 10, 1000)
    changed = model.parameters
    assert changed is not LARGE
    assert model.parameters is changed


def test_the_overhead_stays_unless_the_bases_fall_below_it() -> None:
    model = StepTimeModel(LARGE)
    observe_truth(model, LARGE, random.Random(6), 100)
    assert model.parameters.overhead_s == LARGE.overhead_s
    fast = StepTimeParameters(**{name: getattr(LARGE, name) / 20 for name in NAMES})
    observe_truth(model, fast, random.Random(6), 3000)
    assert model.parameters.overhead_s < LARGE.overhead_s
    assert max(median_errors(model.parameters, fast)) < 0.1


def test_same_observations_same_estimate() -> None:
    models = [StepTimeModel(LARGE), StepTimeModel(LARGE)]
    for model in models:
        observe_truth(model, SMALL, random.Random(7), 100)
    assert models[0].parameters == models[1].parameters


def test_a_prior_of_nothing_learns_nothing() -> None:
    model = StepTimeModel(constants(0, 0, 0, 0, 0, 0, 0))
    model.observe_decode(0.1, 5, 100)
    assert model.observation_count == 0
    assert model.parameters.step_s(10) == 0.0


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e-300, 1e300, 5e-324, math.inf, math.nan]),
    st.floats(1e-4, 1e6),
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=40))
def test_constants_stay_sane_whatever_is_observed(observations: list[tuple[float, ...]]) -> None:
    model = StepTimeModel(SMALL)
    for duration_s, steps, tokens, context, pairs in observations:
        model.observe_prefill(duration_s, steps, tokens, context, pairs)
        model.observe_decode(duration_s, tokens, context)
        # Checks each constant, too.
        assert all(0.0 <= value < math.inf for value in astuple(model.parameters))
    assert 0.0 < model.parameters.decode_step_s(10, 10_000) < math.inf
    observe_truth(model, SMALL, random.Random(8), 20)
    assert all(0.0 <= value < math.inf for value in astuple(model.parameters))


# -- the estimator ----------------------------------------------------------------


def test_least_squares_solves_a_noiseless_system() -> None:
    estimator = RecursiveLeastSquares(
        [1.0, 1.0, 1.0], initial_variance=1e4, forgetting=1.0, lower=0.0, upper=10.0
    )
    generator = random.Random(9)
    truth = [0.5, 2.0, 3.0]
    for _ in range(30):
        features = [generator.random() for _ in truth]
        predicted = sum(map(math.prod, zip(features, estimator.coefficients, strict=True)))
        estimator.update(features, sum(map(math.prod, zip(features, truth, strict=True))) - predicted)
    assert estimator.coefficients == pytest.approx(truth, rel=1e-3)


@given(st.integers(0, 2**32), st.floats(0.9, 1.0))
def test_no_variance_exceeds_the_initial_one(seed: int, forgetting: float) -> None:
    generator = random.Random(seed)
    estimator = RecursiveLeastSquares(
        [1.0] * 3, initial_variance=4.0, forgetting=forgetting, lower=0.0, upper=10.0
    )
    for _ in range(300):
        features = [generator.choice((0.0, 1e-3, 0.1, 1.0)) * generator.random() for _ in range(3)]
        estimator.update(features, generator.gauss(0.0, 1.0), generator.choice((0.01, 1.0)))
    for index, row in enumerate(estimator._rows):
        assert 0.0 < row[index] <= 4.0 * (1 + 1e-9)
        assert row == [other[index] for other in estimator._rows]


@pytest.mark.parametrize(
    "wrong",
    [{"forgetting": 0.0}, {"forgetting": 1.1}, {"initial_variance": 0.0}, {"initial_variance": math.inf}],
)
def test_arguments_of_the_estimator(wrong: dict[str, float]) -> None:
    arguments = {"initial_variance": 1.0, "forgetting": 0.99, "lower": 0.0, "upper": 1.0} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecursiveLeastSquares([1.0], **arguments)
