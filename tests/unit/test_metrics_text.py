"""The parser of Prometheus text, on a page of a real vLLM and on pages nobody should serve."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    ),
    engine_count=1,
    max_key_value_cache_usage=1.0,
    key_value_token_capacity=9216,
)
NOTHING = EngineMetrics(gauges=EngineGauges())


def parse_pieces(pieces: list[bytes]) -> EngineMetrics:
    parser = MetricsParser()
    for piece in pieces:
        parser.feed(piece)
    return parser.finish()


def test_a_real_page() -> None:
    assert parse_metrics(SAMPLE) == EXPECTED


@pytest.mark.parametrize("size", [1, 7, 100, 4096, 65536])
def test_the_page_may_arrive_in_pieces_of_any_size(size: int) -> None:
    pieces = [SAMPLE[start : start + size] for start in range(0, len(SAMPLE), size)]
    assert parse_pieces(pieces) == EXPECTED


def test_the_page_may_be_cut_anywhere() -> None:
    random_source = random.Random(7)
    for _ in range(50):
        cuts = sorted(random_source.randrange(len(SAMPLE)) for _ in range(5))
        pieces = [SAMPLE[a:b] for a, b in zip([0, *cuts], [*cuts, len(SAMPLE)], strict=True)]
        assert parse_pieces(pieces) == EXPECTED


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
    assert metrics.max_key_value_cache_usage == pytest.approx(0.6)
    assert metrics.gauges.generation_token_count == 3000
    assert metrics.gauges.sleeping is True
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
