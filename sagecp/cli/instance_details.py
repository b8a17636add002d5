"""Everything about one instance, for a person."""

from __future__ import annotations

import time
from collections.abc import Mapping

import click

from sagecp.cli import render
from sagecp.cli.drain_view import drain_text
from sagecp.cli.gpu_tables import show_gpus
from sagecp.cli.output import is_for_programs, print_object
from sagecp.client import convert
from sagecp.client.values import Instance
from sagecp.core.engine_state import EngineProcess, EngineProcessState
from sagecp.core.types import DurationQuantiles, PriceSource
from sagecp.v1 import instance_pb2

# The way of a heartbeat is in the offset, so less than this is nothing to tell.
_CLOCKS_AGREE_S = 0.1
_NAMES_WIDTH = len("lost attempts")


def show_one(message: instance_pb2.Instance, output: str) -> None:
    """Print one instance."""
    if is_for_programs(output):
        print_object(message, output)
        return
    instance = convert.instance(message)
    render.print_pairs(_what_it_is(instance), least_width=_NAMES_WIDTH)
    click.echo()
    render.print_pairs(_how_it_does(instance), least_width=_NAMES_WIDTH)
    _show_speed(instance)
    show_gpus(instance)
    process = instance.engine_process
    if process is not None and process.last_log_lines:
        click.echo("\nlast words of the engine's process that ended:")
        for line in process.last_log_lines:
            click.echo(render.harmless(f"  {line}"))


def _what_it_is(instance: Instance) -> list[tuple[str, str]]:
    spec = instance.spec
    state = render.state_text(instance.state.name)
    sizes = (
        ("tensor", spec.tensor_parallel_size),
        ("pipeline", spec.pipeline_parallel_size),
        ("data", spec.data_parallel_size),
        ("expert", spec.expert_parallel_size),
    )
    return [
        ("instance", instance.instance_id),
        ("state", f"{state}{'; ' + instance.state_reason if instance.state_reason else ''}"),
        ("drain", drain_text(instance)),
        ("sleep", _sleep_text(instance)),
        ("model", ", ".join(spec.served_models)),
        ("engine", f"{spec.engine_url}  {spec.engine_kind} {spec.engine_version}".rstrip()),
        ("settings", render.wrapped(_mapping(spec.engine_configuration), _NAMES_WIDTH)),
        ("can", ", ".join(each.name.lower() for each in sorted(spec.engine_capabilities))),
        ("process", _process_text(instance.engine_process)),
        ("host", spec.host_id),
        ("parallel", ", ".join(f"{name} {size}" for name, size in sizes if size > 1)),
        ("context", _tokens(spec.max_context_token_count)),
        ("KV capacity", _tokens(spec.key_value_token_capacity)),
        ("LoRA", _adapters_text(instance)),
        ("price", _price_text(instance)),
        ("labels", render.wrapped(_mapping(spec.labels), _NAMES_WIDTH)),
    ]


def _how_it_does(instance: Instance) -> list[tuple[str, str]]:
    lease = instance.lease_expire_time_s
    refused = instance.refused_heartbeat_count
    return [
        ("load", f"{instance.in_flight_request_count} of at most {instance.max_concurrent_request_count}"),
        ("completed", render.count(instance.completed_request_count)),
        ("lost attempts", render.count(instance.failed_attempt_count)),
        ("registered", render.clock_time(instance.register_time_s)),
        (
            "heartbeat",
            f"{render.age(instance.heartbeat_time_s)} ago" if instance.heartbeat_time_s else "no agent",
        ),
        ("lease", f"until {render.clock_time(lease)}" if lease else ""),
        ("agent", f"version {instance.agent_version}" if instance.agent_version else ""),
        ("its clock", _clock_text(instance.clock_offset_s)),
        (
            "refused",
            f"{render.plural(refused, 'heartbeat')}; the last one: {instance.heartbeat_refusal}"
            if refused
            else "",
        ),
        ("engine says", _gauges_text(instance)),
        ("GPUs", "" if instance.gpus else instance.gpu_absent_reason),
    ]


_PRICE_SOURCES = {
    PriceSource.INSTANCE: "stated by the instance",
    PriceSource.GPU_KIND: "configured for its kind of GPU",
    PriceSource.DEFAULT: "the configured default",
    PriceSource.USUAL: "the usual rent of its kind of GPU",
}


def _price_text(instance: Instance) -> str:
    price = instance.price
    if price is None:
        return ""
    source = _PRICE_SOURCES.get(price.source)
    text = f"{price.usd_per_gpu_hour:g} USD per GPU and hour{f', {source}' if source else ''}"
    if price.busy_usd or price.idle_usd:
        text += f"; {render.usd(price.busy_usd)} busy, {render.usd(price.idle_usd)} idle since it registered"
    return text


def _clock_text(offset_s: float | None) -> str:
    if offset_s is None:
        return ""
    if abs(offset_s) < _CLOCKS_AGREE_S:
        return "agrees with the control plane's"
    return f"{render.duration(abs(offset_s))} {'ahead of' if offset_s > 0 else 'behind'} the control plane's"


def _mapping(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items()))


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number:,} tokens"


def _sleep_text(instance: Instance) -> str:
    order = instance.sleep
    if order is None:
        sleeping = instance.engine is not None and instance.engine.sleeping
        return "the engine sleeps, and nobody here ordered it" if sleeping else ""
    since = f"ordered {render.duration(max(0.0, time.time() - order.begin_time_s))} ago, level {order.level}"
    return f"{'asleep' if order.asleep else 'not yet asleep'}, {since}"


def _adapters_text(instance: Instance) -> str:
    loaded = set(instance.engine.loaded_lora_adapters) if instance.engine is not None else set()
    running = set(instance.engine.running_lora_adapters) if instance.engine is not None else set()
    wanted = instance.desired_lora_adapters
    if wanted is None:
        return ", ".join(f"{name}{' (in use)' if name in running else ''}" for name in sorted(loaded))
    lines = [
        f"{adapter.name} from {adapter.path}: "
        + ("in use" if adapter.name in running else "loaded" if adapter.name in loaded else "not loaded yet")
        for adapter in wanted
    ]
    lines += [f"{name}: to be unloaded" for name in sorted(loaded - {adapter.name for adapter in wanted})]
    return "\n".join(lines) or "ordered: none"


def _process_text(process: EngineProcess | None) -> str:
    if process is None:
        return ""
    parts = [process.state.name.lower().replace("_", " ")]
    if process.process_id:
        parts.append(f"pid {process.process_id}")
    if process.start_time_s is not None:
        parts.append(f"started {render.age(process.start_time_s)} ago")
    if process.restart_count:
        parts.append(
            f"started again {'once' if process.restart_count == 1 else f'{process.restart_count:,} times'}"
        )
    if process.last_exit_code is not None:
        code = process.last_exit_code
        parts.append(f"last ended by signal {-code}" if code < 0 else f"last ended with status {code}")
    if process.state is EngineProcessState.BACKING_OFF and process.next_start_time_s is not None:
        parts.append(f"next start in {render.duration(max(0.0, process.next_start_time_s - time.time()))}")
    return ", ".join(parts)


def _gauges_text(instance: Instance) -> str:
    gauges = instance.engine
    if gauges is None:
        return "nothing yet"
    fullest = gauges.max_key_value_cache_usage
    spread = (
        f" (fullest rank {render.percent(fullest)})"
        if fullest is not None and fullest != gauges.key_value_cache_usage
        else ""
    )
    lines = []
    lines.append(
        f"running {render.count(gauges.running_request_count)}, "
        f"waiting {render.count(gauges.waiting_request_count)}, "
        f"KV cache {render.percent(gauges.key_value_cache_usage)}{spread}"
    )
    queries, hits = gauges.prefix_cache_query_token_count, gauges.prefix_cache_hit_token_count
    if queries and hits is not None:
        lines.append(f"prefix hits {render.percent(hits / queries)} of {render.compact(queries)} tokens")
    lines.append(
        f"tokens in {render.compact(gauges.prompt_token_count)}, "
        f"out {render.compact(gauges.generation_token_count)}, "
        f"preemptions {render.count(gauges.preemption_count)}"
    )
    return "\n".join(lines)


# -- what was seen, what the engine says, and what is predicted ------------------------------------------


def _show_speed(instance: Instance) -> None:
    engine, learned = instance.engine, instance.learned
    rows = [
        (
            "time to first token",
            render.duration(instance.mean_ttft_s),
            *_quantiles(engine.ttft if engine else None),
            render.duration(learned.ttft_s if learned else None),
        ),
        (
            "time per token",
            render.NONE,
            *_quantiles(engine.inter_token_latency if engine else None),
            render.duration(learned.step_s if learned else None),
        ),
        ("wait in the engine", render.NONE, *_quantiles(engine.queue_wait if engine else None), render.NONE),
    ]
    rows = [row for row in rows if any(cell != render.NONE for cell in row[1:])]
    if not rows:
        return
    click.echo()
    render.print_table(
        (
            render.Column("SPEED"),
            *(
                render.Column(title, right=True)
                for title in ("SEEN HERE", "ENGINE P50", "ENGINE P99", "PREDICTED")
            ),
        ),
        rows,
    )
    if learned is not None:
        evidence = (
            f"learned from {render.plural(learned.observation_count, 'observation')}"
            if learned.observation_count
            else "a guess: nothing of its kind was observed"
        )
        click.echo(
            render.wrapped(
                f"predicted for 1,000 prompt tokens and the load of now, {evidence}; {learned.slowdown:.2f} "
                f"times as slow as its kind ({render.harmless(learned.kind)}); alone "
                f"{render.duration(learned.single_step_s)} per token, "
                f"prompts {render.compact(learned.prefill_tokens_per_second)} tokens/s",
                0,
            )
        )


def _quantiles(quantiles: DurationQuantiles | None) -> tuple[str, str]:
    if quantiles is None or not quantiles.sample_count:
        return render.NONE, render.NONE
    return render.duration(quantiles.p50_s), render.duration(quantiles.p99_s)
