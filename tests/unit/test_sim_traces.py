"""Traces of the fleet simulator: what is read, what is refused, what a transformation keeps."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.types import RequestPriority
from sagecp.sim.fleet.traces import (
    DEFAULT_SESSIONS_PER_S,
    Trace,
    TraceError,
    TraceRequest,
    read_trace,
    transform,
)
from tests.support.processes import ROOT

SLICES = ROOT / "bench" / "traces"


def lines(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def row(t_s: float = 0.0, prompt: float = 10, output: int = 2, **more: Any) -> dict[str, Any]:
    return {"t_s": t_s, "prompt_tokens": prompt, "output_tokens": output, **more}


def turn(session: str, number: int, t_s: float, think_s: float = 0.0, **more: Any) -> dict[str, Any]:
    return row(t_s, **{"session": session, "turn": number, "think_s": think_s, "prompt": 640, **more})


def read(tmp_path: Path, text: str, name: str = "some.trace") -> Trace:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_trace(path)


def evenly(count: int, gap_s: float = 1.0) -> Trace:
    """Return an open-loop trace of one request every ``gap_s``."""
    requests = tuple(
        TraceRequest(
            request_id=f"r{number:06d}",
            arrival_s=number * gap_s,
            prompt_token_count=100 + number,
            output_token_count=5,
        )
        for number in range(count)
    )
    return Trace("even", 16, requests, count * gap_s, False)


def test_a_csv_is_read_and_brought_in_order(tmp_path: Path) -> None:
    trace = read(tmp_path, "t_s,tenant,prompt_tokens,output_tokens\n2.5,7,30,4\n0.5,8,20,0\n\n4.5,,40,6\n")
    assert [request.request_id for request in trace.requests] == ["r000000", "r000001", "r000002"]
    assert [request.arrival_s for request in trace.requests] == [0.5, 2.5, 4.5]
    assert [request.tenant_id for request in trace.requests] == ["8", "7", ""]
    # An engine asked for nothing still makes one token.
    assert [request.output_token_count for request in trace.requests] == [1, 4, 6]
    assert (trace.name, trace.is_closed_loop, trace.block_token_count) == ("some", False, 16)
    # The last arrival and one mean gap of 2 s.
    assert trace.duration_s == 6.5


@pytest.mark.parametrize(
    ("name", "block_token_count", "has_blocks"),
    [("azure_conversation.csv", 16, False), ("mooncake_conversation.jsonl", 512, True)],
)
def test_the_slices_are_read(name: str, block_token_count: int, has_blocks: bool) -> None:
    trace = read_trace(SLICES / name)
    assert len(trace.requests) == 300
    assert trace.block_token_count == block_token_count
    for request in trace.requests:
        full = request.prompt_token_count // block_token_count
        assert len(request.block_hashes) == (full if has_blocks else 0)
    assert read_trace(SLICES / name) == trace


def test_the_format_follows_from_the_content(tmp_path: Path) -> None:
    text = lines(row(0.0, 1100, hash_ranges=[0, 2, 7, 1]), row(1.0, 1024, hash_ranges=[0, 1, 9, 1]))
    plain = read(tmp_path, text, "x.csv")
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_trace(packed) == plain
    # The third block of the first prompt is not full.
    assert [request.block_hashes for request in plain.requests] == [(0, 1), (0, 9)]


def test_every_documented_field_arrives(tmp_path: Path) -> None:
    entry = row(
        3.0, 40, 7, tenant="t", user="u", session="s", priority="HIGH", deadline_ms=9000, ttft_slo_ms=500.5,
        tpot_slo_ms=80, max_tokens=64, cost_budget_usd=0.25, model="m", block_hashes=[5, -1, 6],
        block_tokens=16,
    )  # fmt: skip
    trace = read(tmp_path, lines(entry))
    assert trace.requests == (
        TraceRequest(
            request_id="r000000",
            arrival_s=3.0,
            prompt_token_count=40,
            output_token_count=7,
            block_hashes=(5, 2**63 - 1),
            tenant_id="t",
            user_id="u",
            session_id="s",
            model="m",
            priority=RequestPriority.HIGH,
            deadline_ms=9000.0,
            ttft_slo_ms=500.5,
            tpot_slo_ms=80.0,
            max_tokens=64,
            cost_budget_usd=0.25,
        ),
    )
    assert trace.block_token_count == 16


def test_a_csv_has_every_field_but_lists(tmp_path: Path) -> None:
    text = "t_s,prompt_tokens,output_tokens,priority,ttft_slo_ms,max_tokens,session\n1,20,3,LOW,250,,s1\n"
    (request,) = read(tmp_path, text).requests
    assert (request.priority, request.ttft_slo_ms) == (RequestPriority.LOW, 250.0)
    assert (request.max_tokens, request.session_id) == (None, "s1")


HEADER = "t_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: lacks the columns t_s, prompt_tokens, output_tokens (found: nothing)"),
        (HEADER, "has no requests"),
        ("t_s,total_rps\n0,1\n", "line 1: is a series of rates, not a trace"),
        ("t_s,prompt_tokens,output_tokens,ttft\n0,1,1,1\n", "line 1: has an unknown column 'ttft'; known"),
        (HEADER + "0,1,1\n0,1\n", "line 3: has 2 cells, but the header names 3"),
        (HEADER + "0,many,1\n", "line 2: prompt_tokens must be a whole number from 1 to 100000000, not 'm"),
        (HEADER + "nan,1,1\n", "line 2: t_s must be a number from 0 to 1e+15, not nan"),
        (HEADER + ",1,1\n", "line 2: lacks t_s"),
        (lines(row()) + "{bad\n", "line 2: is not JSON"),
        (lines(row()) + "[1]\n", "line 2: is list, not an object"),
        (lines(row(ttft_slo=3)), "line 1: has an unknown field 'ttft_slo'; known are t_s"),
        (lines({"t_s": 0, "prompt_tokens": 5}), "line 1: lacks output_tokens"),
        (lines(row(prompt=0)), "line 1: prompt_tokens must be a whole number from 1"),
        (lines(row(prompt=2.5)), "not 2.5"),
        (lines(row(t_s=True)), "t_s must be a number of at least 0, not True"),
        (lines(row(t_s=-1)), "t_s must be a number from 0"),
        (lines(row(t_s=10**400)), "t_s must be a number from 0"),
        (lines(row(priority="URGENT")), "priority must be one of CRITICAL, HIGH, NORMAL, LOW, BACKGROUND"),
        (lines(row(priority=["HIGH"])), "priority must be one of"),
        (lines(row(tenant=[1])), "tenant must be a text"),
        (lines(row(hash_ranges=[1])), "hash_ranges must be pairs of numbers"),
        (lines(row(hash_ranges=[0, -1])), "none negative"),
        (lines(row(block_hashes="abc")), "block_hashes must be a list of whole numbers"),
        (lines(row(block_hashes=[1], hash_ranges=[0, 1])), "has both hash_ranges and block_hashes"),
        (
            lines(row(prompt=600, hash_ranges=[0, 10**9])),
            "names 1000000000 blocks, but a prompt of 600 tokens has 2 of 512",
        ),
        (
            lines(row(block_tokens=16), row(), row(block_tokens=32)),
            "line 3: block_tokens is 32, but line 1 says 16",
        ),
        (lines(turn("a", 0, 0), row(1)), "line 2: lacks turn, unlike the lines before it"),
        (lines(row(1), turn("a", 0, 0)), "line 2: has turn, unlike the lines before it"),
        (lines(row(1, turn=0)), "line 1: has turn but no session"),
        (lines(turn("a", 0, 0), turn("a", 0, 1)), "line 2: is turn 0 of session a, as is line 1"),
        (lines(turn("a", 0, 5), turn("a", 1, 4)), "line 2: turn 1 of session a is at 4 s, before turn 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(TraceError) as caught:
        read(tmp_path, text, "bad.trace")
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "bad.trace"))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(HEADER.encode() * 99)[:-20])
    with pytest.raises(TraceError, match="is damaged gzip"):
        read_trace(tmp_path / "cut.gz")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="is not UTF-8 text"):
        read_trace(tmp_path / "binary")


FAMILY = lines(
    turn("s1", 0, 0.0, hash_ranges=[1, 10], shared_prefix_tokens=64, parent=None),
    turn("s1", 1, 19.0, 12.0, hash_ranges=[1, 10]),
    turn("s1", 2, 60.0, 5.0, hash_ranges=[1, 8, 40, 2]),
    turn("s1.001", 0, 30.0, parent="s1", hash_ranges=[1, 10]),
    turn("s1.001", 1, 33.0, 1.0, hash_ranges=[1, 10]),
    turn("s2", 0, 0.0, 3.0, hash_ranges=[1, 10]),
    turn("s2.001", 0, 0.0, parent="s2"),
    turn("s3.007", 0, 50.0, parent="s3"),
)


def test_turns_wait_for_the_turns_before_them(tmp_path: Path) -> None:
    trace = read(tmp_path, FAMILY)
    assert (trace.is_closed_loop, trace.block_token_count, trace.duration_s) == (True, 64, 0.0)
    named = {request.request_id: request for request in trace.requests}
    chain = [
        (request.session_id, named[request.after].session_id if request.after else "", request.think_s)
        for request in trace.requests
    ]
    assert chain == [
        ("s1", "", 0.0),
        ("s1", "s1", 12.0),
        # Turn 0 of the parent ended at 19 - 12 = 7 s, turn 1 ended at 60 - 5 = 55 s, after this began.
        ("s1.001", "s1", 23.0),
        ("s1.001", "s1.001", 1.0),
        ("s1", "s1", 5.0),
        # Nobody thinks before a session's first turn.
        ("s2", "", 0.0),
        ("s2.001", "s2", 0.0),
        # Its parent is not in the file.
        ("s3.007", "", 0.0),
    ]
    positions = {request.request_id: number for number, request in enumerate(trace.requests)}
    assert all(
        positions[request.after] < positions[request.request_id]
        for request in trace.requests
        if request.after
    )


def test_blocks_are_shared_in_a_family_and_nowhere_else(tmp_path: Path) -> None:
    by_session: dict[str, list[TraceRequest]] = {}
    for request in read(tmp_path, FAMILY).requests:
        by_session.setdefault(request.session_id, []).append(request)
    first = by_session["s1"][0].block_hashes
    assert len(set(first)) == 10
    assert by_session["s1.001"][0].block_hashes == first
    assert by_session["s1"][2].block_hashes[:8] == first[:8]
    assert not set(by_session["s1"][2].block_hashes[8:]) & set(first)
    assert not set(by_session["s2"][0].block_hashes) & set(first)
    assert all(0 <= number < 2**63 for number in first)
    # Equal ids are one object: long sessions would not fit in memory otherwise.
    assert by_session["s1"][1].block_hashes[3] is first[3]


def test_huge_ids_of_ranges_are_as_good(tmp_path: Path) -> None:
    trace = read(
        tmp_path, lines(row(0, 1024, hash_ranges=[2**62, 2]), row(1, 1024, hash_ranges=[2**62, 1, 3, 1]))
    )
    assert trace.requests[0].block_hashes == (2**62, 2**62 + 1)
    assert trace.requests[1].block_hashes == (2**62, 3)


def arrivals(requests: Sequence[TraceRequest]) -> list[float]:
    return [request.arrival_s for request in requests]


def test_nothing_asked_changes_nothing() -> None:
    trace = evenly(7, 0.5)
    assert transform(trace) == trace


def test_a_window_is_cut_before_it_is_compressed() -> None:
    part = transform(evenly(100), scale=2.0, start_s=10.0, duration_s=20.0)
    assert [request.request_id for request in part.requests] == [f"r{number:06d}" for number in range(10, 30)]
    assert arrivals(part.requests) == [number / 2 for number in range(20)]
    assert part.duration_s == 10.0
    # It ends with the trace at the latest.
    assert transform(evenly(100), start_s=90.0, duration_s=600.0).duration_s == 10.0


def test_a_limit_keeps_the_rate() -> None:
    part = transform(evenly(100, 0.25), limit=12)
    assert len(part.requests) == 12
    assert part.duration_s == 3.0
    assert transform(evenly(5), limit=50) == evenly(5)


def test_seeds_rotate_the_trace() -> None:
    trace = evenly(1000)
    windows = [transform(trace, seed=seed, duration_s=140.0).requests for seed in range(1, 6)]
    firsts = sorted(int(window[0].request_id[1:]) for window in windows)
    # Five windows of 140 of 1,000 requests that do not overlap.
    assert all(after - before >= 140 for before, after in itertools.pairwise([*firsts, firsts[0] + 1000]))
    whole = transform(trace, seed=3)
    assert {request.request_id for request in whole.requests} == {
        request.request_id for request in trace.requests
    }
    gaps = [after - before for before, after in itertools.pairwise(arrivals(whole.requests))]
    assert gaps == pytest.approx([1.0] * 999)
    assert transform(trace, seed=3) == whole


@given(
    st.integers(0, 50),
    st.floats(0.1, 10),
    st.floats(0, 3),
    st.lists(st.floats(0, 1e4), min_size=2, max_size=40),
)
def test_a_whole_trace_keeps_its_requests_in_order(
    seed: int, scale: float, jitter: float, times_s: list[float]
) -> None:
    requests = tuple(
        TraceRequest(request_id=str(number), arrival_s=t_s, prompt_token_count=1, output_token_count=1)
        for number, t_s in enumerate(sorted(times_s))
    )
    duration_s = requests[-1].arrival_s + (requests[-1].arrival_s - requests[0].arrival_s) / (
        len(requests) - 1
    )
    trace = Trace("any", 16, requests, duration_s, False)
    changed = transform(trace, seed=seed, scale=scale, jitter=jitter)
    assert sorted(int(request.request_id) for request in changed.requests) == list(range(len(requests)))
    assert arrivals(changed.requests) == sorted(arrivals(changed.requests))
    assert changed.duration_s == pytest.approx(duration_s / scale)
    assert all(0 <= arrival_s <= changed.duration_s for arrival_s in arrivals(changed.requests))


def test_jitter_moves_arrivals_a_little() -> None:
    trace = evenly(200)
    moved = transform(trace, jitter=0.4)
    by_id = {request.request_id: request.arrival_s for request in moved.requests}
    shifts = [by_id[request.request_id] - request.arrival_s for request in trace.requests[1:]]
    assert max(map(abs, shifts)) <= 0.4
    assert len({round(shift, 6) for shift in shifts}) > 150


def sessions(tmp_path: Path, count: int) -> Trace:
    entries = [
        turn(f"s{number}", index, 10.0 * index, 1e5 if index == 2 else 2.0)
        for number in range(count)
        for index in range(3)
    ]
    return read(tmp_path, lines(*entries))


def test_sessions_start_at_random_and_keep_their_turns(tmp_path: Path) -> None:
    trace = transform(sessions(tmp_path, 400), sessions_per_s=0.5)
    starts = [request.arrival_s for request in trace.requests if not request.after]
    assert len(starts) == 400
    assert starts == sorted(starts)
    # 400 exponential gaps of 2 s have a mean within 2 +- 0.3 but once in 400 seeds.
    assert starts[-1] / 400 == pytest.approx(2.0, abs=0.3)
    assert trace.duration_s == starts[-1] + 2.0
    assert len(trace.requests) == 1200
    assert {request.think_s for request in trace.requests if request.after} == {2.0, 1e5}


def test_sessions_are_scaled_cut_and_shuffled(tmp_path: Path) -> None:
    trace = sessions(tmp_path, 50)
    plain = transform(trace, sessions_per_s=1.0)
    faster = transform(trace, sessions_per_s=1.0, scale=4.0)
    assert arrivals(faster.requests) == pytest.approx([t_s / 4 for t_s in arrivals(plain.requests)])
    assert transform(trace) == transform(trace, sessions_per_s=DEFAULT_SESSIONS_PER_S)
    other = transform(trace, sessions_per_s=1.0, seed=2)
    assert other == transform(trace, sessions_per_s=1.0, seed=2)
    assert [request.session_id for request in other.requests] != [
        request.session_id for request in plain.requests
    ]
    part = transform(trace, sessions_per_s=1.0, start_s=5.0, duration_s=10.0, longest_think_s=30.0)
    starts = [request for request in part.requests if not request.after]
    assert all(0 <= request.arrival_s < 10 for request in starts)
    assert len(part.requests) == 3 * len(starts)
    assert {request.think_s for request in part.requests if request.after} == {2.0, 30.0}
    assert part.duration_s == 10.0


def test_a_limit_of_turns_cuts_a_session_but_no_chain(tmp_path: Path) -> None:
    part = transform(sessions(tmp_path, 10), sessions_per_s=1.0, limit=7)
    kept = {request.request_id for request in part.requests}
    assert len(kept) == 7
    assert all(request.after in kept for request in part.requests if request.after)
    fourth = transform(sessions(tmp_path, 10), sessions_per_s=1.0).requests[9]
    assert part.duration_s == fourth.arrival_s


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"scale": 0.0}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"start_s": -1.0}, "start_s must be"),
        ({"duration_s": 0.0}, "duration_s must be"),
        ({"limit": 0}, "limit must be"),
        ({"seed": -1}, "seed must be"),
        ({"jitter": -0.1}, "jitter must be"),
        ({"sessions_per_s": 1.0}, "has arrivals, not sessions"),
        ({"start_s": 10.0}, "lasts 10 s and has nothing after 10 s"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        transform(evenly(10), **arguments)


def test_a_trace_of_one_moment_keeps_its_requests(tmp_path: Path) -> None:
    trace = read(tmp_path, lines(row(0.0), row(0.0)))
    assert transform(trace, seed=4, scale=2.0) == trace
