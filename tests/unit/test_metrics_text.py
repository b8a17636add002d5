"""The parser of Prometheus text, on a page of a real vLLM and on pages nobody should serve."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.agent.histograms import HistogramSnapshot
from sagecp.agent.metrics_text import EngineMetrics, MetricsParser, parse_metrics
from sagecp.core.types import EngineGauges

SAMPLE = (Path(__file__).parents[1] / "data" / "vllm-metrics-sample.txt").read_bytes()
# Read off the page by eye.
EXPECTED = EngineMetrics(
    gauges=EngineGauges(
        running_request_count=6,
        waiting_request_count=9,
        key_value_cache_usage=1.0,
        prefix_cache_query_token_count=28529,
        prefix_cache_hit_token_count=23552,
        prompt_token_count=28528,
        generation_token_count=12992,
        preemption_count=2,
        finished_request_count=25,
        sleeping=False,
        max_key_value_cache_usage=1.0,
    ),
    engine_count=1,
    key_value_token_capacity=9216,
)
NOTHING = EngineMetrics(gauges=EngineGauges())


def parse_pieces(pieces: list[bytes]) -> EngineMetrics:
    parser = MetricsParser()
    for piece in pieces:
        parser.feed(piece)
    return parser.finish()


def plain(metrics: EngineMetrics) -> EngineMetrics:
    """Leave out what the page has a lot of, which tests of their own look at."""
    return replace(metrics, histograms={}, settings={})


def test_a_real_page() -> None:
    metrics = parse_metrics(SAMPLE)
    assert plain(metrics) == EXPECTED
    assert set(metrics.histograms) == {"ttft", "inter_token_latency", "queue_wait"}
    gaps = metrics.histograms["inter_token_latency"]
    assert (gaps.bounds_s[:2], gaps.counts[:2], gaps.counts[-1]) == ((0.01, 0.025), (12788, 12952), 12958)
    assert gaps.total_s == pytest.approx(46.0525, abs=1e-3)
    assert metrics.histograms["ttft"].counts[-1] == 34
    assert metrics.histograms["queue_wait"].counts[-1] == 25
    assert metrics.settings["block_size"] == "128"
    assert metrics.settings["sliding_window"] == "None"


@pytest.mark.parametrize("size", [1, 7, 100, 4096, 65536])
def test_the_page_may_arrive_in_pieces_of_any_size(size: int) -> None:
    pieces = [SAMPLE[start : start + size] for start in range(0, len(SAMPLE), size)]
    assert plain(parse_pieces(pieces)) == EXPECTED


def test_the_page_may_be_cut_anywhere() -> None:
    random_source = random.Random(7)
    for _ in range(50):
        cuts = sorted(random_source.randrange(len(SAMPLE)) for _ in range(5))
        pieces = [SAMPLE[a:b] for a, b in zip([0, *cuts], [*cuts, len(SAMPLE)], strict=True)]
        assert plain(parse_pieces(pieces)) == EXPECTED
        assert parse_pieces(pieces).histograms == parse_metrics(SAMPLE).histograms


def test_a_last_line_without_newline_counts() -> None:
    assert parse_metrics(b"vllm:num_requests_running 3").gauges.running_request_count == 3


def test_windows_line_ends_and_times_are_fine() -> None:
    page = b'vllm:num_requests_running{engine="0"} 3.0 1795449655000\r\nvllm:num_requests_waiting 1\r\n'
    gauges = parse_metrics(page).gauges
    assert (gauges.running_request_count, gauges.waiting_request_count) == (3, 1)


def test_ranks_are_summed_and_cache_usage_is_averaged() -> None:
    page = b"\n".join(
        b"""vllm:num_requests_running{engine="%(e)d",model_name="m"} %(n)d.0
vllm:kv_cache_usage_perc{engine="%(e)d",model_name="m"} %(u)f
vllm:generation_tokens_total{engine="%(e)d",model_name="m"} 1.5e+03
vllm:engine_sleep_state{engine="%(e)d",sleep_state="awake"} %(a)d
vllm:engine_sleep_state{engine="%(e)d",sleep_state="discard_all"} 0.0
vllm:cache_config_info{block_size="16",engine="%(e)d",num_gpu_blocks="100"} 1.0"""
        % {b"e": e, b"n": n, b"u": u, b"a": a}
        for e, n, u, a in ((0, 3, 0.2, 1), (1, 4, 0.6, 0))
    )
    metrics = parse_metrics(page)
    assert metrics.engine_count == 2
    assert metrics.gauges.running_request_count == 7
    assert metrics.gauges.key_value_cache_usage == pytest.approx(0.4)
    assert metrics.gauges.max_key_value_cache_usage == pytest.approx(0.6)
    assert metrics.gauges.generation_token_count == 3000
    assert metrics.gauges.sleeping is True
    assert metrics.sleep_level == 1
    assert metrics.key_value_token_capacity == 3200
    # What no line tells stays unknown, which is not zero.
    assert metrics.gauges.waiting_request_count is None
    assert metrics.gauges.preemption_count is None


@pytest.mark.parametrize(
    "line",
    [
        b'vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0',
        b"vllm:generation_tokens_created 1.79e+09",
        b"vllm:generation_tokens 5",
        b'vllm:request_generation_tokens_sum{engine="0"} 3412.0',
        b"# HELP vllm:num_requests_running Number of requests",
        b"# TYPE vllm:num_requests_running gauge",
        b" vllm:num_requests_running 5",
        b"other:vllm:num_requests_running 5",
        b'vllm:request_success_total{finished_reason="abort"} 4.0',
    ],
)
def test_lines_that_only_look_alike(line: bytes) -> None:
    assert parse_metrics(line + b"\n") == NOTHING


@pytest.mark.parametrize(
    "value", [b"NaN", b"+Inf", b"-Inf", b"-1", b"", b"abc", b"1 2 3", b"0x10", b"\xff\xfe", b"1e999"]
)
def test_a_value_that_is_none_leaves_the_gauge_unknown(value: bytes) -> None:
    assert parse_metrics(b"vllm:num_requests_running " + value + b"\n") == NOTHING


def test_values_stay_within_what_the_contract_can_carry() -> None:
    page = b"vllm:num_requests_running 1e30\nvllm:generation_tokens_total 1e30\n"
    page += b"vllm:kv_cache_usage_perc 1.0001\n"
    gauges = parse_metrics(page).gauges
    assert gauges.running_request_count == 2**32 - 1
    assert gauges.generation_token_count == 2**64 - 1
    assert gauges.key_value_cache_usage == 1.0


def test_labels_may_hold_anything() -> None:
    page = rb'vllm:num_requests_running{model_name="a \"b\" } 9 \\",engine="3"} 2' + b"\n"
    metrics = parse_metrics(page)
    assert metrics.gauges.running_request_count == 2
    assert metrics.engine_count == 1


def test_cache_size_that_the_engine_did_not_work_out() -> None:
    line = b'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="None",num_gpu_blocks="%s"} 1.0\n'
    assert parse_metrics(line % b"72").key_value_token_capacity == 9216
    assert parse_metrics(line % b"None").key_value_token_capacity is None


def test_the_name_before_version_0_10() -> None:
    assert parse_metrics(b"vllm:gpu_cache_usage_perc 0.25\n").gauges.key_value_cache_usage == 0.25


def test_the_deeper_sleep_is_told_apart() -> None:
    page = (
        b'vllm:engine_sleep_state{sleep_state="awake"} 0.0\n'
        b'vllm:engine_sleep_state{sleep_state="weights_offloaded"} 0.0\n'
        b'vllm:engine_sleep_state{sleep_state="discard_all"} 1.0\n'
    )
    metrics = parse_metrics(page)
    assert (metrics.gauges.sleeping, metrics.sleep_level) == (True, 2)


def test_histograms_are_added_up_over_ranks_and_older_names_are_known() -> None:
    page = b"\n".join(
        b"""vllm:time_per_output_token_seconds_bucket{engine="%(e)d",le="0.1"} %(n)d.0
vllm:time_per_output_token_seconds_bucket{engine="%(e)d",le="+Inf"} 10.0
vllm:time_per_output_token_seconds_sum{engine="%(e)d"} 1.5
vllm:time_per_output_token_seconds_count{engine="%(e)d"} 10.0"""
        % {b"e": e, b"n": n}
        for e, n in ((0, 4), (1, 6))
    )
    assert parse_metrics(page).histograms == {
        "inter_token_latency": HistogramSnapshot((0.1, math.inf), (10.0, 20.0), 3.0)
    }
    newer = page + b"\n" + page.replace(b"time_per_output_token", b"inter_token_latency", 99)
    assert parse_metrics(newer).histograms["inter_token_latency"].counts == (10.0, 20.0)


@pytest.mark.parametrize(
    "page",
    [
        b'vllm:time_to_first_token_seconds_bucket{le="0.1"} 1\n',
        b'vllm:time_to_first_token_seconds_bucket{le="0.1"} 1\nvllm:time_to_first_token_seconds_sum 1\n',
        b'vllm:time_to_first_token_seconds_bucket{le="x"} 1\nvllm:time_to_first_token_seconds_sum 1\n',
        b"vllm:time_to_first_token_seconds_bucket 1\nvllm:time_to_first_token_seconds_sum 1\n",
    ],
    ids=["without a sum", "without an end", "of no bounds", "without a bound"],
)
def test_half_a_histogram_is_none(page: bytes) -> None:
    assert parse_metrics(page).histograms == {}


def test_the_adapters_in_use_are_those_told_last() -> None:
    line = b'vllm:lora_requests_info{max_lora="4",running_lora_adapters="%s",waiting_lora_adapters=""} %f\n'
    metrics = parse_metrics(line % (b"old", 1.7e9) + line % (b"red, blue", 1.8e9) + line % (b"", 1.6e9))
    assert metrics.gauges.running_lora_adapters == ("red", "blue")
    assert metrics.settings == {"max_loras": "4"}
    many = b",".join(b"a%d" % number for number in range(1000))
    assert len(parse_metrics(line % (many, 1.0)).gauges.running_lora_adapters) == 128


def test_a_page_of_sglang() -> None:
    labels = b'engine_type="unified",model_name="m",pp_rank="0"'
    page = b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{%(l)s,priority="",tp_rank="0"} 4.0
sglang:num_running_reqs{%(l)s,priority="-1",tp_rank="0"} 3.0
sglang:num_running_reqs{%(l)s,priority="",tp_rank="1"} 4.0
sglang:num_queue_reqs{%(l)s,tp_rank="0"} 2.0
sglang:token_usage{%(l)s,tp_rank="0"} 0.25
sglang:max_total_num_tokens{%(l)s,tp_rank="0"} 120000.0
sglang:max_total_num_tokens{%(l)s,tp_rank="1"} 120000.0
sglang:cache_hit_rate{%(l)s,tp_rank="0"} 0.5
sglang:gen_throughput{%(l)s,tp_rank="0"} 812.0
sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 900.0
sglang:prompt_tokens_total{is_streaming="false",model_name="m"} 100.0
sglang:generation_tokens_total{is_streaming="true",model_name="m"} 300.0
sglang:realtime_tokens_total{%(l)s,mode="decode",tp_rank="0"} 350.0
sglang:realtime_tokens_total{%(l)s,mode="prefill_compute",tp_rank="0"} 800.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 200.0
sglang:num_requests_total{is_streaming="true",model_name="m"} 7.0
sglang:num_retracted_requests_total{%(l)s,tp_rank="0"} 1.0
sglang:time_to_first_token_seconds_bucket{is_streaming="true",le="0.1",model_name="m"} 5.0
sglang:time_to_first_token_seconds_bucket{is_streaming="true",le="+Inf",model_name="m"} 6.0
sglang:time_to_first_token_seconds_bucket{is_streaming="false",le="0.1",model_name="m"} 1.0
sglang:time_to_first_token_seconds_bucket{is_streaming="false",le="+Inf",model_name="m"} 1.0
sglang:time_to_first_token_seconds_sum{is_streaming="true",model_name="m"} 0.9
sglang:time_to_first_token_seconds_sum{is_streaming="false",model_name="m"} 0.1
sglang:queue_time_seconds_bucket{%(l)s,le="+Inf",tp_rank="0"} 7.0
sglang:queue_time_seconds_bucket{%(l)s,le="+Inf",tp_rank="1"} 7.0
sglang:queue_time_seconds_sum{%(l)s,tp_rank="0"} 0.5
sglang:queue_time_seconds_sum{%(l)s,tp_rank="1"} 0.5
""" % {b"l": labels}
    metrics = parse_metrics(page)
    assert metrics.gauges == EngineGauges(
        running_request_count=4,
        waiting_request_count=2,
        key_value_cache_usage=0.25,
        max_key_value_cache_usage=0.25,
        prefix_cache_query_token_count=1000,
        prefix_cache_hit_token_count=200,
        prompt_token_count=1000,
        # The plain counter runs when requests end, this one with every token.
        generation_token_count=350,
        preemption_count=1,
        finished_request_count=7,
    )
    assert metrics.key_value_token_capacity == 120_000
    assert metrics.histograms == {
        "ttft": HistogramSnapshot((0.1, math.inf), (6.0, 7.0), 1.0),
        "queue_wait": HistogramSnapshot((math.inf,), (7.0,), 0.5),
    }


def test_an_endless_line_is_not_kept() -> None:
    parser = MetricsParser()
    for _ in range(64):
        parser.feed(b"x" * 65536)
        assert len(parser._rest) <= 1 << 20
    # The end of that line must not pass for a line of its own.
    parser.feed(b"\nvllm:num_requests_waiting 2\n")
    assert parser.finish().gauges == EngineGauges(waiting_request_count=2)


def test_the_end_of_an_endless_line_is_not_a_sample() -> None:
    parser = MetricsParser()
    parser.feed(b"x" * ((1 << 20) + 1))
    parser.feed(b"vllm:num_requests_running 5\nvllm:num_requests_waiting 2\n")
    assert parser.finish().gauges == EngineGauges(waiting_request_count=2)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from(
                [b"\n", b"vllm:num_requests_running", b'{engine="', b'"} ', b"5", b"vllm:cache_config_info{"]
            ),
        ),
        max_size=40,
    )
)
def test_garbage_never_raises_and_cuts_do_not_matter(pieces: list[bytes]) -> None:
    assert parse_pieces(pieces) == parse_metrics(b"".join(pieces))
