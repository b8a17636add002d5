"""The log that readers of a request's output follow."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import TokenIndexOutOfRangeError
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.output import OutputLog
from tests.support.waiting import turns


def make_log() -> OutputLog:
    return OutputLog(lambda: None)


def piece(text: str, count: int = 1, **more: object) -> EngineDelta:
    return EngineDelta(0, text, None, count, **more)  # type: ignore[arg-type]


def test_pieces_are_kept_in_order_with_the_indices_of_their_tokens() -> None:
    log = make_log()
    log.on_deltas([piece("a"), piece("bc", 2)])
    log.on_deltas([piece("", 0), piece("d")])
    assert [delta.text for delta in log.deltas] == ["a", "bc", "", "d"]
    assert [log.first_index(cursor) for cursor in range(4)] == [0, 1, 3, 3]
    assert log.token_count == 4
    assert log.first_index(4) == 4


def test_the_first_output_is_told_once() -> None:
    told: list[int] = []
    log = OutputLog(lambda: told.append(len(log.deltas)))
    log.on_deltas([piece("a")])
    log.on_deltas([piece("b")])
    # The output is there already when it is told.
    assert told == [1]


def test_nothing_is_added_after_the_end() -> None:
    told: list[str] = []
    log = OutputLog(lambda: told.append("first"))
    log.close()
    log.on_deltas([piece("late")])
    assert not log.deltas
    assert log.token_count == 0
    assert told == []


def test_the_size_counts_text_and_raw_events() -> None:
    log = make_log()
    log.on_deltas([piece("abc")])
    one = log.size_bytes
    log.on_deltas([piece("abc", raw=b"0123456789")])
    assert log.size_bytes == 2 * one + 10
    assert one > 3


@pytest.mark.parametrize(
    ("index", "cursor"),
    [
        pytest.param(0, 0, id="the beginning"),
        pytest.param(1, 1, id="the first token of a piece"),
        pytest.param(2, 1, id="a token inside a piece: the whole piece"),
        pytest.param(4, 3, id="the end: why it ended is said again"),
    ],
)
def test_seek_finds_the_piece_that_holds_a_token(index: int, cursor: int) -> None:
    log = make_log()
    log.on_deltas([piece("a"), piece("bcd", 2), piece("e"), piece("", 0, finish_reason="stop")])
    assert log.seek(index) == cursor


def test_seek_beyond_the_next_token_says_how_far_one_may_go() -> None:
    log = make_log()
    log.on_deltas([piece("a")])
    with pytest.raises(TokenIndexOutOfRangeError, match="ask for at most 1"):
        log.seek(2)


@given(st.lists(st.integers(0, 4), max_size=40), st.data())
def test_reading_from_any_index_gives_every_token_from_there_on(
    counts: list[int], data: st.DataObject
) -> None:
    log = make_log()
    for count in counts:
        log.on_deltas([piece("x" * count, count)])
    index = data.draw(st.integers(0, log.token_count))
    cursor = log.seek(index)
    first = log.first_index(cursor)
    assert first <= index
    assert first + sum(delta.token_count for delta in log.deltas[cursor:]) == log.token_count
    if cursor < len(log.deltas):
        # No more is repeated than the piece that holds the token.
        assert index - first < max(1, log.deltas[cursor].token_count)


async def test_a_reader_waits_for_output_and_every_reader_is_woken() -> None:
    log = make_log()
    readers = [asyncio.create_task(log.wait_beyond(0)) for _ in range(3)]
    await turns()
    assert not any(reader.done() for reader in readers)
    log.on_deltas([piece("a")])
    await asyncio.gather(*readers)


async def test_what_is_there_already_is_not_waited_for() -> None:
    log = make_log()
    log.on_deltas([piece("a")])
    await asyncio.wait_for(log.wait_beyond(0), 1)
    waiting = asyncio.create_task(log.wait_beyond(1))
    await turns()
    assert not waiting.done()
    log.close()
    await waiting


async def test_a_reader_that_leaves_is_forgotten() -> None:
    log = make_log()
    stays = asyncio.create_task(log.wait_beyond(0))
    leaves = asyncio.create_task(log.wait_beyond(0))
    await turns()
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    assert leaves.cancelled()
    assert len(log._waiters) == 1
    log.on_deltas([piece("a")])
    await stays
    assert log._waiters == []


def test_output_that_is_not_kept_any_more_is_not_taken_for_none() -> None:
    log = make_log()
    log.let_go(3)
    log.close()
    assert log.seek(3) == 0
    for index in (0, 2):
        with pytest.raises(TokenIndexOutOfRangeError, match="not kept any more"):
            log.seek(index)
