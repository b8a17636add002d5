"""The parts of a page that say what was run, and what a simulation can tell."""

from __future__ import annotations

from html import escape

from sagecp.sim.fleet.experiment import Contender
from sagecp.sim.fleet.report import words
from sagecp.sim.fleet.report.contents import ReportContents
from sagecp.sim.fleet.report.page import pairs, section
from sagecp.sim.fleet.report.summary import METRICS

_SIMULATED = """
The scheduler is the production code, unchanged: it gets the same events, and its decisions are \
carried out on a virtual clock.
Engines batch continuously as vLLM does: a token budget per step, decodes first, chunked prefill, a \
block-wise prefix cache with LRU eviction, preemption by recomputation when memory runs out.
A step takes o + max(a0 + a1·T, b0 + b1·T) + g·KV + d·Σ c·(p + c/2) seconds for T scheduled tokens, \
KV tokens of decode context, and prefill chunks of c tokens at position p: a roofline with constants \
from published profiles (Vidur, MLSys'24) and, for g and d, from the hardware's data sheet.
"""
_NOT_SIMULATED = """
Networks, tokenizers, and the time that the scheduler itself takes: decisions cost nothing here.
Failures of engines, agents and networks; moving running requests; separate pools for prefill and \
decode; speculative decoding; adapters; memory tiers beyond the GPU.
Your hardware: constants were not measured on it. Compare contenders with each other here, and \
measure absolute figures on the real fleet.
"""


def configuration(contents: ReportContents) -> str:
    """Return what was run, and how to run it again."""
    workload, options = contents.workload, contents.workload.options
    rule = options.objectives
    size = words.plural(contents.trace_request_count, "request")
    window = f"{size} in {words.seconds(contents.trace_duration_s)}"
    kind = "sessions whose turns wait for each other" if contents.is_closed_loop else "recorded arrivals"
    gauges = "none are reported"
    if options.gauge_interval_s:
        gauges = (
            f"every {words.seconds(options.gauge_interval_s)}, {words.seconds(options.gauge_delay_s)} old"
        )
    per_1000 = words.seconds(rule.ttft_per_1000_tokens_s)
    ttft = f"{words.seconds(rule.ttft_base_s)} + {per_1000} per 1,000 prompt tokens"
    entries = [
        ("trace", f"{contents.trace_name}: {window} at scale 1, {kind}"),
        ("rates", "" if workload.rates_path is None else f"arrivals follow {workload.rates_path.name}"),
        ("fleet", _fleet(contents)),
        ("scales", ", ".join(f"{scale:g}" for scale in contents.scales)),
        ("seeds", ", ".join(map(str, contents.seeds))),
        ("objectives", f"TTFT {ttft}, TPOT {words.seconds(rule.tpot_s)}, where the trace states none"),
        ("engine metrics", gauges),
        (
            "news of tokens",
            f"{words.seconds(options.event_delay_s)} late" if options.event_delay_s else "at once",
        ),
        (
            "engine model",
            f"each constant off by a log-normal factor, standard deviation {workload.model_error:g}"
            if workload.model_error
            else "the scheduler starts from the right constants",
        ),
        (
            "slowdowns",
            "; ".join(
                f"{contents.fleet[each.instance_index].instance_id} takes {each.slowness:g} times as long "
                f"from {words.seconds(each.time_s)} on"
                for each in options.slowdowns
            ),
        ),
        *((each.label, describe(each)) for each in contents.contenders),
        ("event logs", ", ".join(contents.event_log_names)),
        ("made by", f"sagecp {contents.version}"),
    ]
    return section(
        "What was run", "", pairs(entries), "<h3>Again</h3>", f"<pre>{escape(contents.command)}</pre>"
    )


def _fleet(contents: ReportContents) -> str:
    usd_per_hour = sum(instance.usd_per_hour for instance in contents.fleet)
    count = words.plural(len(contents.fleet), "instance")
    return f"{contents.workload.fleet}: {count}, {words.usd(usd_per_hour)} per hour"


def describe(contender: Contender) -> str:
    """Return a contender in words."""
    parameters = ", ".join(f"{name} = {value}" for name, value in sorted(contender.parameters.items()))
    if contender.baseline:
        text = f"baseline {contender.baseline}"
    else:
        text = f"policy {contender.scheduling_policy}, routing {contender.routing_strategy}"
        if contender.routing_strategy == "load_balanced":
            text += f", balancer {contender.load_balancer}"
    return f"{text}, {parameters}" if parameters else text


def reading_guide(contents: ReportContents) -> str:
    """Return what the figures mean, and what is and is not simulated."""
    meanings = pairs([(metric.title, metric.about) for metric in METRICS])
    parts = ["<h3>Simulated</h3>", _list(_SIMULATED)]
    if any(contender.baseline for contender in contents.contenders):
        parts.append(
            "<p>Baselines are this project's own versions of published rules. They choose an instance when a "
            "request arrives and its engine's queue orders it. They are no measure of the products whose "
            "rules they follow.</p>"
        )
    parts += ["<h3>Not simulated</h3>", _list(_NOT_SIMULATED)]
    if len(contents.seeds) > 1:
        parts.append(
            f"<p>Figures are means over {len(contents.seeds)} seeds, each another window of the trace; ± and "
            "bands are 95 % intervals of the mean (Student's t).</p>"
        )
    parts += ["<h3>Figures</h3>", meanings]
    return section("How far this can be believed", "", *parts)


def _list(lines: str) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines.strip().splitlines()) + "</ul>"
