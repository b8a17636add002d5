"""The demo's traces, prompts and figures."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from sagecp.cli.demo.replay import GENERATE, RESUMED, Outcome
from sagecp.cli.demo.report import figures, quantile, show
from sagecp.cli.demo.trace import NAMES, TraceRow, load_trace, make_prompt
from sagecp.cli.failures import CliError
from tests.support.processes import ROOT

TRACES = ROOT / "bench" / "traces"


@pytest.mark.parametrize("name", NAMES)
def test_the_slices_are_whole_and_in_order(name: str) -> None:
    rows = load_trace(name, 10_000).rows
    assert len(rows) == 300
    assert rows[0].arrival_s == 0
    assert all(before.arrival_s <= after.arrival_s for before, after in itertools.pairwise(rows))
    assert all(row.prompt_token_count > 0 and row.output_token_count > 0 for row in rows)
    assert load_trace(name, 7).rows == rows[:7]


def test_the_note_knows_the_files() -> None:
    note = (TRACES / "README.md").read_text(encoding="utf-8")
    noted = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", note, re.MULTILINE))
    files = {path.name: path for path in TRACES.iterdir() if path.name != "README.md"}
    assert noted.keys() == files.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == noted[name], name
    assert "CC-BY-4.0" in note
    assert "Apache-2.0" in note


def test_prompts_have_the_lengths_of_the_trace_and_are_the_same_every_time() -> None:
    for number, row in enumerate(load_trace("azure", 20).rows):
        prompt = make_prompt(row, number)
        assert len(prompt.split()) == row.prompt_token_count
        assert prompt == make_prompt(row, number)
    assert make_prompt(TraceRow(0, 50, 1), 1) != make_prompt(TraceRow(0, 50, 1), 2)


def test_prompts_share_what_the_trace_says_they_shared() -> None:
    first = make_prompt(TraceRow(0, 1100, 1, (0, 1)), 1).split()
    second = make_prompt(TraceRow(0, 1030, 1, (0, 2)), 2).split()
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024]
    assert (len(first), len(second)) == (1100, 1030)
    assert len(make_prompt(TraceRow(0, 5, 1, (0,)), 1).split()) == 5


def test_own_files(tmp_path: Path) -> None:
    rows = [
        {"t_s": 5, "prompt_tokens": 10, "output_tokens": 0},
        {"t_s": 6, "prompt_tokens": 11, "output_tokens": 4},
    ]
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    trace = load_trace(str(path), 10)
    assert [row.arrival_s for row in trace.rows] == [0, 1]
    assert [row.output_token_count for row in trace.rows] == [1, 4]
    assert "mine.jsonl.gz" in trace.title


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "t_s,prompt_tokens,output_tokens\nx,1,2\n"])
def test_what_is_no_trace(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(CliError, match=r"is no trace|has no rows"):
        load_trace(str(path), 5)
    with pytest.raises(CliError, match="cannot read"):
        load_trace(str(tmp_path / "missing.csv"), 5)


def test_quantiles() -> None:
    assert [quantile([1, 2, 3, 4, 5], share) for share in (0, 0.5, 0.9, 1)] == [1, 3, pytest.approx(4.6), 5]
    assert quantile([7], 0.99) == 7


def outcomes() -> list[Outcome]:
    good = [
        Outcome(GENERATE, ttft_s=0.1 * number, end_to_end_s=1 + 0.1 * number, token_count=11,
                prompt_token_count=5, instance_id=f"e{number % 2}")
        for number in range(1, 11)
    ]  # fmt: skip
    return [*good, Outcome(RESUMED, error="ENGINE_FAILED: the engine died")]


def test_figures() -> None:
    report = figures(outcomes(), 10.0)
    assert (report["succeeded_count"], report["failed_count"]) == (10, 1)
    assert (report["output_token_count"], report["tokens_per_second"]) == (110, 11)
    assert report["ttft"]["p50_s"] == pytest.approx(0.55)
    assert report["ttft"]["max_s"] == pytest.approx(1.0)
    assert report["tpot"]["mean_s"] == pytest.approx(0.1)
    assert report["request_count_by_instance"] == {"e0": 5, "e1": 5}
    assert report["failures"] == {"ENGINE_FAILED: the engine died": 1}


def test_the_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    show(outcomes(), 10.0, as_json=False)
    shown = capsys.readouterr()
    assert "10 requests succeeded, 1 failed, in 10.0 s" in shown.out
    assert re.search(r"time to first token +550 ms +550 ms ", shown.out)
    assert re.search(r"^e0 +5 +25 +55 ", shown.out, re.MULTILINE)
    assert "1 failed: ENGINE_FAILED: the engine died" in shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines())
