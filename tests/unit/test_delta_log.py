"""Packed pieces of output come out as they went in, and cost little."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.runtime.delta_log import PACKED_BYTES, DeltaLog
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.output import OutputLog


def piece(number: int, **fields: object) -> EngineDelta:
    values = {"choice_index": 0, "text": f" t{number}", "token_ids": (number,), "token_count": 1, **fields}
    return EngineDelta(**values)  # type: ignore[arg-type]


def value(delta: EngineDelta) -> object:
    """Return what a piece holds; pieces themselves are compared by identity."""
    return msgspec.to_builtins(delta)


def values(deltas: object) -> list[object]:
    return [value(delta) for delta in deltas]  # type: ignore[attr-defined]


PLAIN = st.builds(piece, st.integers(0, 200_000), text=st.text(max_size=6))
ODD = st.one_of(
    st.builds(piece, st.integers(0, 9), choice_index=st.integers(0, 2)),
    st.builds(piece, st.integers(0, 9), token_ids=st.none()),
    st.builds(piece, st.integers(0, 9), token_ids=st.just((1, 2, 3)), token_count=st.just(3)),
    st.builds(piece, st.integers(0, 9), token_ids=st.sampled_from([(2**40,), (2**31,), (2**31 - 1,), (-1,)])),
    st.builds(piece, st.integers(0, 9), text=st.just("a\ud800b")),
    st.builds(piece, st.integers(0, 9), token_ids=st.just(()), token_count=st.just(0)),
    st.builds(piece, st.integers(0, 9), finish_reason=st.just("stop"), stop_reason=st.just("x")),
    st.builds(piece, st.integers(0, 9), raw=st.just(b"{}")),
)


@given(
    st.lists(st.lists(st.one_of(PLAIN, PLAIN, PLAIN, PLAIN, ODD), max_size=100), max_size=8), st.booleans()
)
def test_what_comes_out_is_what_went_in(batches: list[list[EngineDelta]], plain: bool) -> None:
    log, expected = DeltaLog(), list[EngineDelta]()
    for given_batch in batches:
        batch = given_batch
        if plain:
            batch = [piece(number, text=each.text) for number, each in enumerate(given_batch)]
        expected += batch
        log.extend(batch)
        assert len(log) == len(expected)
    assert values(log) == values(expected)
    assert values(log[index] for index in range(len(log))) == values(expected)
    assert values(log[-index] for index in range(1, len(log) + 1)) == values(reversed(expected))
    for part in (slice(None), slice(3, 150, 7), slice(-4, None), slice(5, 2)):
        assert values(log[part]) == values(expected[part])
    for beyond in (len(log), -len(log) - 1):
        with pytest.raises(IndexError):
            log[beyond]


@pytest.mark.parametrize("ids", [True, False])
def test_a_long_output_costs_a_small_part(ids: bool) -> None:
    count = 4096

    def size_bytes(fill: object) -> int:
        tracemalloc.start()
        kept = fill()  # type: ignore[operator]
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(kept) == count
        return size

    def pieces() -> list[EngineDelta]:
        return [piece(1000 + number, **({} if ids else {"token_ids": None})) for number in range(count)]

    def packed() -> DeltaLog:
        log = DeltaLog()
        for number in range(count):
            log.extend([piece(1000 + number, **({} if ids else {"token_ids": None}))])
        return log

    assert size_bytes(packed) < size_bytes(pieces) / 4
    assert size_bytes(packed) < count * (PACKED_BYTES + 16)


def test_a_reader_resumes_exactly_at_any_token_of_a_packed_output() -> None:
    log = OutputLog(lambda: None)
    for number in range(1000):
        log.on_deltas([piece(number)])
    for index in (0, 1, 63, 64, 65, 500, 871, 872, 999):
        cursor = log.seek(index)
        assert log.first_index(cursor) == index
        assert log.deltas[cursor].token_ids == (index,)
        assert log.deltas[cursor].text == f" t{index}"
    assert log.seek(1000) == 1000
    assert log.token_ids() == list(range(1000))
    assert log.size_bytes < 1000 * 50
