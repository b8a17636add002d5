"""A report for programs. ``docs/simulator-formats.md`` describes it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from sagecp.sim.fleet.experiment import Contender, RunResult
from sagecp.sim.fleet.intervals import Interval
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.report.summary import (
    TARGET_ATTAINMENT,
    GoodputSummary,
    LoadSummary,
    summarise_bounds,
    summarise_goodput,
    summarise_loads,
)

FORMAT = "sagecp-simulation-report"
VERSION = 1


def report_json(contents: ReportContents) -> str:
    """Return the report as JSON text; equal contents make equal text."""
    return json.dumps(report_object(contents), indent=1, allow_nan=False) + "\n"


def report_object(contents: ReportContents) -> dict[str, Any]:
    """Return the report as JSON values."""
    workload = contents.workload
    options = workload.options
    return {
        "format": FORMAT,
        "version": VERSION,
        "sagecp_version": contents.version,
        "command": contents.command,
        "trace": {
            "name": contents.trace_name,
            "request_count": contents.trace_request_count,
            "duration_s": contents.trace_duration_s,
            "is_closed_loop": contents.is_closed_loop,
            "start_s": workload.start_s,
            "limit": workload.limit,
            "sessions_per_s": workload.sessions_per_s,
            "longest_think_s": workload.longest_think_s,
            "rates": None if workload.rates_path is None else workload.rates_path.name,
        },
        "fleet": {
            "text": workload.fleet,
            "usd_per_hour": sum(instance.usd_per_hour for instance in contents.fleet),
            "instances": [
                {
                    "instance_id": instance.instance_id,
                    "profile": instance.profile.name,
                    "kv_token_capacity": instance.kv_token_capacity,
                    "slowness": instance.slowness,
                    "usd_per_hour": instance.usd_per_hour,
                }
                for instance in contents.fleet
            ],
        },
        "world": {
            "objectives": dataclasses.asdict(options.objectives),
            "gauge_interval_s": options.gauge_interval_s,
            "gauge_delay_s": options.gauge_delay_s,
            "event_delay_s": options.event_delay_s,
            "slowdowns": [dataclasses.asdict(each) for each in options.slowdowns],
            "model_error": workload.model_error,
        },
        "scales": list(contents.scales),
        "seeds": list(contents.seeds),
        "contenders": [_contender(each) for each in contents.contenders],
        "summary": summary_objects(summarise_loads(contents)),
        "target_attainment": TARGET_ATTAINMENT,
        "goodput": [_goodput(each) for each in summarise_goodput(contents)],
        "bounds": [dataclasses.asdict(each) for each in summarise_bounds(contents)],
        "bounds_by_seed": [dataclasses.asdict(each) for each in contents.bounds],
        "event_logs": list(contents.event_log_names),
        "runs": [_run(each) for each in contents.runs],
    }


def summary_objects(loads: tuple[LoadSummary, ...]) -> list[dict[str, Any]]:
    """Return the figures over all seeds as JSON values."""
    return [
        {
            "label": each.label,
            "scale": each.scale,
            "load_per_s": _interval(each.load_per_s),
            "figures": {name: _interval(value) for name, value in each.figures.items()},
        }
        for each in loads
    ]


def _contender(contender: Contender) -> dict[str, Any]:
    parameters = dict(sorted(contender.parameters.items()))
    if contender.baseline:
        return {"label": contender.label, "baseline": contender.baseline, "parameters": parameters}
    return {
        "label": contender.label,
        "scheduling_policy": contender.scheduling_policy,
        "routing_strategy": contender.routing_strategy,
        "load_balancer": contender.load_balancer,
        "parameters": parameters,
    }


def _goodput(goodput: GoodputSummary) -> dict[str, Any]:
    return {
        "label": goodput.label,
        "rate_per_s": _interval(goodput.rate),
        "bound": goodput.bound,
        "ratio_to_best_baseline": _interval(goodput.ratio),
        "ratio_bound": None if goodput.ratio is None else goodput.ratio_bound,
    }


def _interval(value: Interval | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"mean": value.mean, "low": value.low, "high": value.high, "count": value.count}


def _run(run: RunResult) -> dict[str, Any]:
    found = dataclasses.asdict(run)
    if run.charts is None:
        del found["charts"]
    return found
