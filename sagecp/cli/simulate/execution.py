"""Runs an experiment for a person: progress, Ctrl-C, failures as lines, files."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.simulate.progress import Progress

if TYPE_CHECKING:
    from sagecp.cli.simulate.options import ExperimentOptions
    from sagecp.sim.fleet.experiment import Contender, Task
    from sagecp.sim.fleet.report.contents import ReportContents

ARGUMENTS = "sagecp.simulate.arguments"
"""Where the group keeps the words of the command line."""


def run_experiment(
    experiment: ExperimentOptions,
    contenders: Sequence[Contender],
    *,
    with_charts: bool,
    with_bounds: bool,
    with_event_log: bool = False,
) -> ReportContents:
    """Run every contender at every scale with every seed.

    Raises:
        CliError: A run cannot be done, or its files cannot be written.
    """
    from sagecp.sim.fleet.experiment import Bounds, BoundsTask, RunResult, RunTask
    from sagecp.sim.fleet.report.contents import ReportContents
    from sagecp.version import __version__

    workload, out = experiment.workload, experiment.out
    if out is not None:
        _make_folder(out)
    tasks: list[Task] = [
        RunTask(
            workload=workload,
            contender=contender,
            scale=scale,
            seed=seed,
            event_log_path=out / _log_name(experiment, scale, seed) if out and with_event_log else None,
            # Charts are of the first seed.
            with_charts=with_charts and seed == experiment.seeds[0],
        )
        for contender in contenders
        for scale in experiment.scales
        for seed in experiment.seeds
    ]
    trace = workload.trace(1.0, experiment.seeds[0])
    # What arrives in a closed loop depends on the fleet: there is nothing to bound.
    if with_bounds and not trace.is_closed_loop:
        tasks += [
            BoundsTask(workload=workload, scale=scale, seed=seed)
            for scale in experiment.scales
            for seed in experiment.seeds
        ]
    results = _run(tasks, experiment.job_count)
    arguments = click.get_current_context().find_root().meta.get(ARGUMENTS, [])
    return ReportContents(
        command=shlex.join(["sagecp", "simulate", *arguments]),
        version=__version__,
        workload=workload,
        fleet=experiment.fleet,
        trace_name=trace.name,
        trace_request_count=len(trace.requests),
        trace_duration_s=trace.duration_s,
        is_closed_loop=trace.is_closed_loop,
        contenders=tuple(contenders),
        scales=experiment.scales,
        seeds=experiment.seeds,
        runs=tuple(result for result in results if isinstance(result, RunResult)),
        bounds=tuple(result for result in results if isinstance(result, Bounds)),
        event_log_names=tuple(
            task.event_log_path.name for task in tasks if isinstance(task, RunTask) and task.event_log_path
        ),
    )


def _log_name(experiment: ExperimentOptions, scale: float, seed: int) -> str:
    name = f"events-{seed}" if len(experiment.scales) == 1 else f"events-{scale:g}-{seed}"
    return f"{name}.jsonl.gz"


def _run(tasks: list[Task], job_count: int) -> list[object]:
    from concurrent.futures.process import BrokenProcessPool

    from sagecp.sim.fleet.workers import run_tasks

    # SIGTERM ends the workers as Ctrl-C does, instead of leaving them behind.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Progress(len(tasks)) as progress:
            return list(run_tasks(tasks, job_count=job_count, on_progress=progress.update))
    except BrokenProcessPool as error:
        raise CliError(
            "a process that simulated was killed",
            hint="if memory ran out: use fewer --jobs, or a shorter window with --duration or --limit",
        ) from error
    except OSError as error:
        raise CliError(f"cannot write {error.filename}: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(
            f"cannot make the folder {out}: {error.strerror}", exit_code=ExitCode.INVALID
        ) from error
    if not os.access(out, os.W_OK):
        raise CliError(f"the folder {out} cannot be written to", exit_code=ExitCode.INVALID)


def write_report(out: Path, contents: ReportContents, make_page: Callable[[ReportContents], str]) -> None:
    """Write both files of a report.

    Raises:
        CliError: They cannot be written.
    """
    from sagecp.sim.fleet.report.json_report import report_json

    try:
        (out / "report.json").write_text(report_json(contents), encoding="utf-8")
        (out / "report.html").write_text(make_page(contents), encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {error.filename}: {error.strerror}") from error
