"""Options of `sagecp simulate` and `sagecp simulate compare`, and what they mean."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import DURATION, DurationType

if TYPE_CHECKING:
    from sagecp.sim.fleet.experiment import Contender, Workload
    from sagecp.sim.fleet.fleet_file import SimInstance
    from sagecp.sim.fleet.simulation import Slowdown

F = TypeVar("F", bound=Callable[..., Any])

# How often engines report their metrics when reports are stale, as vLLM's agents do.
_GAUGE_INTERVAL_S = 1.0

CONTENDER_SYNTAX = """\b
  [LABEL:]POLICY[/ROUTING[/BALANCER]][?PARAMETER=VALUE[&PARAMETER=VALUE...]]
  [LABEL:]BASELINE[?PARAMETER=VALUE[&PARAMETER=VALUE...]]"""


class NumbersType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """Numbers above 0, separated by commas; each once, in the order given."""

    name = "numbers"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(dict.fromkeys(float(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; for example 1.0,1.4,1.8", param, ctx)
        if not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r}: scales must be above 0", param, ctx)
        return numbers


class SettingType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """PARAMETER=NUMBER."""

    name = "parameter=number"

    def convert(
        self, value: str | tuple[str, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        try:
            return read_setting(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SlowType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """INSTANCE@TIME=FACTOR: the name or number of an instance, a duration, a factor above 0."""

    name = "instance@time=factor"

    def convert(
        self, value: str | tuple[str, float, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float, float]:
        """Return instance, time in seconds, and factor."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(.+)@([^@=]+)=(\d+(?:\.\d+)?)", value)
        if match is None or float(match[3]) <= 0:
            self.fail(f"{value!r} is not INSTANCE@TIME=FACTOR; for example 0@60s=4", param, ctx)
        return match[1], DurationType().convert(match[2], param, ctx), float(match[3])


class FiniteRange(click.FloatRange):
    """A number in a range; infinity and what is no number are in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401 - as click has it
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class TimeSpanType(DurationType):
    """A duration above 0."""

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        span_s = super().convert(value, param, ctx)
        if not 0 < span_s < math.inf:
            self.fail(f"{value!r} is not above 0", param, ctx)
        return span_s


NUMBERS = NumbersType()
TIME_SPAN = TimeSpanType()
SETTING = SettingType()
SLOW = SlowType()


def read_setting(text: str) -> tuple[str, float]:
    """Return name and value of PARAMETER=NUMBER.

    Raises:
        ValueError: It is something else.
    """
    name, equals, number = text.partition("=")
    try:
        if name and equals:
            return name, float(number)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not PARAMETER=NUMBER; for example slo_aware.work_weight=2")


def _baseline_setting(text: str) -> tuple[str, float | str]:
    """Return name and value of a baseline's parameter: a whole number, a number, or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{text!r} is not PARAMETER=VALUE; for example queue_weight=3")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def read_contenders(texts: Sequence[str], *, are_baselines: bool) -> list[Contender]:
    """Return the contenders of some lists separated by commas; ``none`` alone is an empty list.

    Raises:
        CliError: One cannot be read.
    """
    tokens = [token.strip() for text in texts for token in text.split(",") if token.strip()]
    if tokens == ["none"]:
        return []
    return [_contender(token, is_baseline=are_baselines) for token in tokens]


def _contender(token: str, *, is_baseline: bool) -> Contender:
    from sagecp.sim.fleet.experiment import Contender

    head, _, settings = token.partition("?")
    label, colon, name = head.rpartition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > (1 if is_baseline else 3) or (colon and not label):
        raise CliError(
            f"{token!r} is no {'baseline' if is_baseline else 'policy'}",
            hint="write " + CONTENDER_SYNTAX.splitlines()[2 if is_baseline else 1].strip(),
            exit_code=ExitCode.INVALID,
        )
    read = _baseline_setting if is_baseline else read_setting
    try:
        parameters = dict(read(text) for text in settings.split("&") if text)
    except ValueError as error:
        raise CliError(f"{token!r}: {error}", exit_code=ExitCode.INVALID) from error
    # Without a label it is called what was written, so that two settings of one policy are told apart.
    label = label or token
    if is_baseline:
        return Contender(label=label, baseline=name, parameters=parameters)
    routing, balancer = (*parts[1:], "", "")[:2]
    defaults = Contender(label=label)
    return Contender(
        label=label,
        scheduling_policy=parts[0],
        routing_strategy=routing or defaults.routing_strategy,
        load_balancer=balancer or defaults.load_balancer,
        parameters=parameters,
    )


def check_contenders(contenders: Sequence[Contender]) -> None:
    """Make sure that all can be made and are told apart.

    Raises:
        CliError: One cannot, or two have one label.
    """
    from sagecp.sim.fleet.experiment import ContenderError

    labels: set[str] = set()
    for contender in contenders:
        if contender.label in labels:
            raise CliError(
                f"two contenders are called {contender.label!r}",
                hint="give one another name: NAME:" + contender.label,
                exit_code=ExitCode.INVALID,
            )
        labels.add(contender.label)
        try:
            contender.check()
        except ContenderError as error:
            raise CliError(str(error), exit_code=ExitCode.INVALID) from error


@dataclass(frozen=True, slots=True)
class ExperimentOptions:
    """What both commands take.

    Attributes:
        fleet: The instances that the workload's text names.
        out: Folder for the report; ``None``: only the terminal is written to.
        job_count: Worker processes.
    """

    workload: Workload
    fleet: tuple[SimInstance, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    out: Path | None
    job_count: int


def experiment_options(function: F) -> F:
    """Add the options of both commands; they arrive as ``experiment``."""

    @functools.wraps(function)
    def wrapper(
        trace: Path,
        fleet: str,
        scale: tuple[float, ...],
        seeds: int,
        out: Path | None,
        jobs: int | None,
        **rest: Any,  # noqa: ANN401 - the world's options, and the command's own
    ) -> Any:  # noqa: ANN401 - whatever the command returns
        world = {name: rest.pop(name) for name in _WORLD_NAMES}
        options = _experiment(trace, fleet, world, scale, seeds, out, jobs)
        return function(experiment=options, **rest)

    decorated: Any = wrapper
    for option in reversed(_options()):
        decorated = option(decorated)
    result: F = decorated
    return result


_WORLD_NAMES = (
    "rates", "start", "duration", "limit", "sessions_per_s", "longest_think", "ttft_base", "ttft_per_1000",
    "tpot", "stale", "event_delay", "model_error", "slow",
)  # fmt: skip


def _options() -> list[Callable[[Any], Any]]:
    above_0 = FiniteRange(min=0, min_open=True)
    return [
        click.option(
            "--trace", required=True, metavar="FILE", help="Requests: CSV or JSON lines, also as .gz.",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
        ),
        click.option(
            "--fleet", required=True, metavar="FLEET",
            help="Instances: 8x70b-h100-tp4, a built-in name such as 8b-mixed, or a .toml file.",
        ),
        click.option(
            "--scale", "--scales", type=NUMBERS, default="1.0", show_default=True, metavar="X[,X...]",
            help="Arrivals relative to the trace; several make a curve.",
        ),
        click.option(
            "--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="N",
            help="Runs of each, seeds 0 to N-1; each sees another window of the trace.",
        ),
        click.option(
            "--rates", metavar="FILE", help="CSV of t_s and total_rps, whose shape arrivals follow.",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
        ),
        click.option("--start", type=DURATION, default="0s", metavar="T", help="Skip this much of a trace."),
        click.option("--duration", type=TIME_SPAN, metavar="T", help="Stop after this much of the trace."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N requests."),
        click.option(
            "--sessions-per-s", type=above_0, metavar="X",
            help="Session starts per second, for traces of sessions.",
        ),
        click.option(
            "--longest-think", type=DURATION, metavar="T", help="Cut longer pauses in sessions to this."
        ),
        click.option(
            "--ttft-base", type=above_0, default=1.0, show_default=True, metavar="S",
            help="Objective: seconds to the first token,",
        ),
        click.option(
            "--ttft-per-1000", type=FiniteRange(min=0), default=0.25, show_default=True, metavar="S",
            help="and more per 1,000 prompt tokens.",
        ),
        click.option(
            "--tpot", type=above_0, default=0.15, show_default=True, metavar="S",
            help="Objective: seconds per further token.",
        ),
        click.option(
            "--stale", type=DURATION, metavar="T",
            help="Engines report their metrics once a second, this late.  [no reports]",
        ),
        click.option(
            "--event-delay", type=DURATION, default="0s", metavar="T",
            help="News of tokens and ends come this late.",
        ),
        click.option(
            "--model-error", type=FiniteRange(min=0, max=3), default=0.0, show_default=True, metavar="X",
            help="Spread of the error in what is known of the engines at first (log-normal).",
        ),
        click.option(
            "--slow", type=SLOW, multiple=True, metavar="INSTANCE@TIME=FACTOR",
            help="An instance slows down, such as 0@60s=4; may be repeated.",
        ),
        click.option(
            "--jobs", type=click.IntRange(1, 256), metavar="N", help="Processes.  [one per CPU core]"
        ),
        click.option(
            "--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
            help="Write report.html and report.json there.",
        ),
    ]  # fmt: skip


def _experiment(
    trace: Path,
    fleet: str,
    world: dict[str, Any],
    scales: tuple[float, ...],
    seed_count: int,
    out: Path | None,
    jobs: int | None,
) -> ExperimentOptions:
    import os

    from sagecp.sim.fleet.controller import ObjectiveRule
    from sagecp.sim.fleet.experiment import Workload
    from sagecp.sim.fleet.fleet_file import FleetFileError, read_fleet
    from sagecp.sim.fleet.simulation import SimulationOptions
    from sagecp.sim.fleet.traces import TraceError

    try:
        instances = read_fleet(fleet)
    except FleetFileError as error:
        raise CliError(str(error), exit_code=ExitCode.INVALID) from error
    stale_s: float | None = world["stale"]
    workload = Workload(
        trace_path=trace,
        fleet=fleet,
        rates_path=world["rates"],
        start_s=world["start"],
        duration_s=world["duration"],
        limit=world["limit"],
        sessions_per_s=world["sessions_per_s"],
        longest_think_s=world["longest_think"],
        options=SimulationOptions(
            objectives=ObjectiveRule(world["ttft_base"], world["ttft_per_1000"], world["tpot"]),
            gauge_interval_s=0.0 if stale_s is None else _GAUGE_INTERVAL_S,
            gauge_delay_s=stale_s or 0.0,
            event_delay_s=world["event_delay"],
            slowdowns=tuple(_slowdown(each, instances) for each in world["slow"]),
        ),
        model_error=world["model_error"],
    )
    seeds = tuple(range(seed_count))
    try:
        for seed in seeds:
            workload.trace(scales[0], seed)
    except (TraceError, ValueError) as error:
        raise CliError(str(error), exit_code=ExitCode.INVALID) from error
    return ExperimentOptions(workload, instances, scales, seeds, out, jobs or os.cpu_count() or 1)


def _slowdown(given: tuple[str, float, float], instances: tuple[SimInstance, ...]) -> Slowdown:
    from sagecp.sim.fleet.simulation import Slowdown

    name, time_s, factor = given
    names = [instance.instance_id for instance in instances]
    if name in names:
        return Slowdown(time_s, names.index(name), factor)
    if name.isdecimal() and int(name) < len(names):
        return Slowdown(time_s, int(name), factor)
    more = ", ..." if len(names) > 10 else ""
    raise CliError(
        f"--slow: there is no instance {name!r}",
        hint=f"instances are {', '.join(names[:10])}{more}, or 0 to {len(names) - 1}",
        exit_code=ExitCode.INVALID,
    )
