"""The history of load: what is counted where, what is forgotten, and what survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagecp.core.prediction.load_history import (
    BUCKET_S,
    MAX_BUCKET_COUNT,
    MAX_SERIES_COUNT,
    OTHER,
    LoadBucket,
    LoadHistory,
    bucket_number,
)
from sagecp.runtime.load_file import LoadFile

START_S = 1_000_000 * BUCKET_S


def test_load_counts_in_its_bucket_and_the_one_in_progress_is_not_told() -> None:
    history = LoadHistory(START_S)
    history.add(START_S + 1, "m", "a", requests=1, prompt_tokens=100)
    history.add(START_S + 2, "m", "b", requests=1, prompt_tokens=50)
    history.add(START_S + BUCKET_S + 1, "m", "a", output_tokens=7, cost_usd=0.5)
    history.add(START_S + 3 * BUCKET_S, "n", "", requests=1)
    assert history.finished()["requests"].tolist() == [2, 0, 0]
    assert history.finished("m", "a")["prompt_tokens"].tolist() == [100, 0, 0]
    assert history.finished("m")["cost_usd"].tolist() == [0, 0.5, 0]
    assert history.finished(tenant_id="b")["requests"].tolist() == [1, 0, 0]
    assert (history.models, history.tenant_ids) == (("m", "n"), ("a", "b"))
    assert history.finished_s == 3 * BUCKET_S
    assert history.end_s == START_S + 3 * BUCKET_S


def test_two_weeks_are_kept() -> None:
    history = LoadHistory(START_S)
    history.add(START_S, "old", "", requests=1)
    history.add(START_S + BUCKET_S, "new", "", requests=1)
    history.advance(START_S + (MAX_BUCKET_COUNT + 1) * BUCKET_S)
    assert len(history.finished()["requests"]) == MAX_BUCKET_COUNT
    assert history.models == ("new",)
    assert history.finished()["requests"].sum() == 1


def test_the_number_of_series_is_bounded_and_nothing_is_lost_by_it() -> None:
    history = LoadHistory(START_S)
    for number in range(3 * MAX_SERIES_COUNT):
        history.add(START_S, f"model-{number % 300}", f"tenant-{number}", requests=1)
    history.advance(START_S + BUCKET_S)
    assert history.finished()["requests"].sum() == 3 * MAX_SERIES_COUNT
    assert len(history.tenant_ids) <= MAX_SERIES_COUNT
    assert len(list(history.take_changed())) <= 2 * MAX_SERIES_COUNT + 1
    assert OTHER not in history.tenant_ids


def test_what_changed_is_given_once_and_comes_back() -> None:
    history = LoadHistory(START_S)
    history.add(START_S, "m", "a", requests=2, prompt_tokens=10)
    assert not list(history.take_changed())
    history.add(START_S + BUCKET_S, "m", "a", requests=1)
    buckets = list(history.take_changed())
    assert buckets == [LoadBucket(bucket_number(START_S), "m", "a", (2, 10, 0, 0))]
    assert not list(history.take_changed())
    last = list(history.take_changed(everything=True))
    again = LoadHistory(START_S + 5 * BUCKET_S)
    again.restore([*last, *buckets])
    assert again.finished("m", "a")["requests"].tolist() == [2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "bucket",
    [
        LoadBucket(bucket_number(START_S) + 9, "m", "", (1, 0, 0, 0)),
        LoadBucket(bucket_number(START_S) - MAX_BUCKET_COUNT - 1, "m", "", (1, 0, 0, 0)),
        LoadBucket(bucket_number(START_S) - 1, "m", "", (float("nan"), 0, 0, 0)),
        LoadBucket(bucket_number(START_S) - 1, "m", "", (-1, 0, 0, 0)),
    ],
)
def test_nonsense_is_not_restored(bucket: LoadBucket) -> None:
    history = LoadHistory(START_S)
    history.restore([bucket])
    assert history.finished()["requests"].sum() == 0
    assert history.finished_s == 0


def test_the_file_gives_back_what_was_written_but_for_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    file = LoadFile(path)
    assert file.read() == []
    first = LoadBucket(7, 'modèle\n"x"', "a", (1.0, 2.0, 3.0, 0.25))
    second = LoadBucket(8, "m", "", (4.0, 0.0, 0.0, 0.0))
    file.append([first])
    file.append([second])
    with path.open("a") as damaged:
        damaged.write('[1,9,"m","",5.0,')
    assert file.read() == [first, second]
    assert path.stat().st_mode & 0o777 == 0o600
    newer = LoadBucket(8, "m", "", (6.0, 0.0, 0.0, 0.0))
    file.rewrite([first, second])
    file.append([newer])
    assert file.read() == [first, newer]


@pytest.mark.parametrize(
    "line",
    ["", "null", "{}", '[1,"7","m","",1,1,1,1]', '[2,7,"m","",1,1,1,1]', '[1,7,"m","",1,1,1]', "[[" * 50],
)
def test_lines_that_are_no_buckets_are_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text(line + "\n")
    assert LoadFile(path).read() == []


def test_a_disk_that_refuses_is_complained_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LoadFile(tmp_path / "missing" / "load.jsonl")
    bucket = LoadBucket(7, "m", "a", (1.0, 2.0, 3.0, 0.25))
    file.append([bucket])
    file.append([bucket])
    file.rewrite([bucket])
    assert len(caplog.records) == 1


def test_the_last_buckets_of_a_model_are_added_up() -> None:
    history = LoadHistory(START_S)
    for number in range(5):
        history.add(
            START_S + number * BUCKET_S, "m", f"t{number % 2}", requests=1, prompt_tokens=10.0**number
        )
    history.add(START_S + 3 * BUCKET_S, "other", "", requests=7)
    # The one in progress does not count.
    assert history.recent("m", 2) == {
        "requests": 2, "prompt_tokens": 1100.0, "output_tokens": 0.0, "cost_usd": 0.0,
    }  # fmt: skip
    assert history.recent("m", 99)["requests"] == 4
    assert history.recent("nobody", 99)["requests"] == 0
