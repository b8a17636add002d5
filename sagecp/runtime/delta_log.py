"""The pieces of an output, in little memory: old ones are packed, and made anew when somebody asks."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

from sagecp.runtime.engines.base import EngineDelta

# Pieces that are packed together.
RUN_LENGTH = 16
# The last ones, which readers who keep up ask for, are left as they are.
LOOSE_COUNT = 8
# What a piece costs in memory beside its text: the object, its list entries and one token id.
LOOSE_BYTES = 240
PACKED_BYTES = 32


class _Run:
    """A run of packed pieces, one token each."""

    __slots__ = ("_choice_index", "_ends", "_text", "_token_ids")

    def __init__(self, choice_index: int, text: str, ends: array[int], token_ids: array[int] | None) -> None:
        self._choice_index = choice_index
        self._text = text
        # Where each piece's text ends; the first begins at 0.
        self._ends = ends
        self._token_ids = token_ids

    def __getitem__(self, index: int) -> EngineDelta:
        begin = self._ends[index - 1] if index else 0
        ids = None if self._token_ids is None else (self._token_ids[index],)
        return EngineDelta(self._choice_index, self._text[begin : self._ends[index]], ids, 1)


class DeltaLog(Sequence[EngineDelta]):
    """An append-only sequence of pieces of output.

    A piece with one token costs about 240 bytes as an object. All but the last
    are packed in runs, at about 30 bytes each, with every boundary kept: what
    comes out equals what went in. Pieces that are anything but one token of
    plain text (several tokens, a finish reason, an engine's event) keep their
    run as it is.
    """

    __slots__ = ("_count", "_runs", "_tail")

    def __init__(self) -> None:
        self._runs: list[_Run | tuple[EngineDelta, ...]] = []
        self._tail: list[EngineDelta] = []
        self._count = 0

    def extend(self, deltas: Sequence[EngineDelta]) -> int:
        """Append pieces; return how many bytes were freed by packing older ones."""
        tail = self._tail
        tail.extend(deltas)
        self._count += len(deltas)
        freed_bytes = 0
        while len(tail) >= RUN_LENGTH + LOOSE_COUNT:
            pieces = tuple(tail[:RUN_LENGTH])
            del tail[:RUN_LENGTH]
            run = _packed(pieces)
            if run is not None:
                freed_bytes += RUN_LENGTH * (LOOSE_BYTES - PACKED_BYTES)
            self._runs.append(pieces if run is None else run)
        return freed_bytes

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> EngineDelta: ...

    @overload
    def __getitem__(self, index: slice) -> list[EngineDelta]: ...

    def __getitem__(self, index: int | slice) -> EngineDelta | list[EngineDelta]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._count))]
        in_tail = index - self._count
        if index < 0:
            index, in_tail = index + self._count, index
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} pieces")
        if -in_tail <= len(self._tail):
            return self._tail[in_tail]
        number, offset = divmod(index, RUN_LENGTH)
        return self._runs[number][offset]

    def __iter__(self) -> Iterator[EngineDelta]:
        for run in self._runs:
            for offset in range(RUN_LENGTH):
                yield run[offset]
        yield from self._tail


def _packed(pieces: Sequence[EngineDelta]) -> _Run | None:
    """Return pieces as one run, or ``None`` where that would lose something."""
    choice_index, has_ids = pieces[0].choice_index, pieces[0].token_ids is not None
    for piece in pieces:
        if (
            piece.token_count != 1
            or piece.choice_index != choice_index
            or piece.finish_reason
            or piece.stop_reason
            or piece.raw is not None
            or (len(piece.token_ids) != 1 if piece.token_ids is not None else has_ids)
            or (piece.token_ids is not None) is not has_ids
        ):
            return None
    ends = array("I", accumulate(len(piece.text) for piece in pieces))
    try:
        ids = array("i", [piece.token_ids[0] for piece in pieces if piece.token_ids]) if has_ids else None
    except OverflowError:
        # No token has such an id; it is passed on as it is.
        return None
    return _Run(choice_index, "".join([piece.text for piece in pieces]), ends, ids)
