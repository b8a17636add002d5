"""The pieces of an output, in little memory: old ones are packed, and made anew when somebody asks."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import overload

from sagecp.runtime.engines.base import EngineDelta

# The last ones, which readers who keep up ask for, are left as they are.
LOOSE_COUNT = 4
# More of one batch are not left, however fresh.
_MAX_LOOSE_COUNT = 64
# What a piece costs in memory beside its text: the object, its list entries and one token id.
LOOSE_BYTES = 240
PACKED_BYTES = 16
# Of a piece without a token id, or one that is not packed.
_NO_TOKEN_ID = -1
_MAX_TOKEN_ID = (1 << 31) - 1


class DeltaLog(Sequence[EngineDelta]):
    """An append-only sequence of pieces of output.

    A piece with one token costs about 240 bytes as an object. All but the last
    few are packed, the text of all in one buffer, at about 10 bytes each beside
    it, with every boundary kept: what comes out equals what went in. Pieces that
    are anything but one token of plain text of the first choice (several tokens,
    a finish reason, an engine's event) stay objects.
    """

    __slots__ = ("_ends", "_odd", "_odd_indexes", "_tail", "_text", "_token_ids")

    def __init__(self) -> None:
        self._tail: list[EngineDelta] = []
        # Of the packed ones: all text, where in it each piece ends, and its token id.
        self._text = bytearray()
        self._ends = array("I")
        self._token_ids = array("i")
        # Those that are not packed, with their indexes, in order; `None` before there are any.
        self._odd_indexes: array[int] | None = None
        self._odd: list[EngineDelta] | None = None

    def extend(self, deltas: Sequence[EngineDelta]) -> int:
        """Append pieces; return how many bytes were freed by packing older ones."""
        tail = self._tail
        freed_bytes = 0
        if len(tail) + len(deltas) > LOOSE_COUNT:
            freed_bytes = self._pack(tail)
            tail.clear()
        tail.extend(deltas)
        if len(tail) > _MAX_LOOSE_COUNT:
            freed_bytes += self._pack(tail[:-LOOSE_COUNT])
            del tail[:-LOOSE_COUNT]
        return freed_bytes

    def __len__(self) -> int:
        return len(self._ends) + len(self._tail)

    @overload
    def __getitem__(self, index: int) -> EngineDelta: ...

    @overload
    def __getitem__(self, index: slice) -> list[EngineDelta]: ...

    def __getitem__(self, index: int | slice) -> EngineDelta | list[EngineDelta]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        packed_count = len(self._ends)
        if index < 0:
            index += packed_count + len(self._tail)
            if index < 0:
                raise IndexError(f"there are {len(self)} pieces")
        if index >= packed_count:
            return self._tail[index - packed_count]
        return self._unpacked(index)

    def __iter__(self) -> Iterator[EngineDelta]:
        for index in range(len(self)):
            yield self[index]

    def _pack(self, pieces: Sequence[EngineDelta]) -> int:
        text, ends, packed_ids = self._text, self._ends, self._token_ids
        packed_count = 0
        for piece in pieces:
            token_ids = piece.token_ids
            if (
                piece.token_count == 1
                and not piece.choice_index
                and piece.raw is None
                and not piece.finish_reason
                and not piece.stop_reason
                and (token_ids is None or (len(token_ids) == 1 and 0 <= token_ids[0] <= _MAX_TOKEN_ID))
            ):
                text += piece.text.encode("utf-8", "surrogatepass")
                packed_ids.append(_NO_TOKEN_ID if token_ids is None else token_ids[0])
                packed_count += 1
            else:
                self._keep(piece)
                packed_ids.append(_NO_TOKEN_ID)
            ends.append(len(text))
        return packed_count * (LOOSE_BYTES - PACKED_BYTES)

    def _keep(self, piece: EngineDelta) -> None:
        """Keep the next piece to be packed as it is."""
        if self._odd is None or self._odd_indexes is None:
            self._odd, self._odd_indexes = [], array("I")
        self._odd.append(piece)
        self._odd_indexes.append(len(self._ends))

    def _unpacked(self, index: int) -> EngineDelta:
        token_id = self._token_ids[index]
        if token_id == _NO_TOKEN_ID and self._odd is not None and self._odd_indexes is not None:
            position = bisect_left(self._odd_indexes, index)
            if position < len(self._odd) and self._odd_indexes[position] == index:
                return self._odd[position]
        begin = self._ends[index - 1] if index else 0
        text = self._text[begin : self._ends[index]].decode("utf-8", "surrogatepass")
        return EngineDelta(0, text, None if token_id == _NO_TOKEN_ID else (token_id,), 1)
