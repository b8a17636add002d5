"""Reading SQLite's write-ahead log (the ``-wal`` file) without SQLite.

SQLite takes the first frame whose checksum is wrong for the end of the log,
and drops it and everything after it without a word. So the log is read before
SQLite opens it: to name the place if acknowledged records turn out missing, and
to salvage the frames behind it.

Source: "Database File Format", section 4 (The Write-Ahead Log),
https://www.sqlite.org/fileformat2.html#walformat. A header of 32 bytes is
followed by frames: 24 bytes (page number, database size after a commit or 0,
two salts, two checksums), then a page. Checksums run on from frame to frame,
over pairs of 32-bit words: ``s0 += x0 + s1; s1 += x1 + s0``. They cover the
first 8 bytes of the frame's header, and the page.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682  # the lowest bit says whether checksums read big-endian words
_FRAMES_AT_ONCE = 512

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class WalFrame:
    """A frame of the present generation.

    Attributes:
        offset: Where it begins in the file, in bytes.
        page_number: Page it holds, from 1.
        database_page_count: Size of the database after a commit; 0: no commit ends here.
        follows: Whether its checksum continues that of the frame before, as stored there.
    """

    offset: int
    page_number: int
    database_page_count: int
    follows: bool


@dataclass(frozen=True, slots=True)
class WalLog:
    """What a write-ahead log holds.

    Attributes:
        page_size_bytes: 0 where there is no log.
        frames: Those of the present generation, good or not.
        damage_offset: Byte at which the first bad part begins, or ``None``. At the
            end of a log this may be a write that was cut off, which is no damage.
    """

    page_size_bytes: int = 0
    frames: Sequence[WalFrame] = ()
    damage_offset: int | None = None

    @property
    def end_offset(self) -> int:
        """Byte behind the last frame."""
        return _HEADER.size + len(self.frames) * (_FRAME.size + self.page_size_bytes)


def read_wal(path: Path, page_size_bytes: int) -> WalLog:
    """Read a write-ahead log and check every frame. A missing or empty file is an empty log.

    Args:
        path: The log.
        page_size_bytes: Of the database: believed where the log's header is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return WalLog()
    if not data:
        return WalLog()
    if len(data) < _HEADER.size:
        return WalLog(damage_offset=0)
    magic, _version, page_size, _number, salt_0, salt_1, stored_0, stored_1 = _HEADER.unpack_from(data)
    order = ">u4" if magic & 1 else "<u4"
    start = _checksum_serially(np.frombuffer(data, order, 6), (0, 0))
    damage = None
    if magic & ~1 != _MAGIC or start != (stored_0, stored_1):
        damage, page_size = 0, page_size_bytes
        order = ">u4" if sys.byteorder == "big" else "<u4"
        if len(data) >= _HEADER.size + _FRAME.size:
            salt_0, salt_1 = _FRAME.unpack_from(data, _HEADER.size)[2:4]
    frame_size = _FRAME.size + page_size
    weights = _weights(2 + page_size // 4)
    frames: list[WalFrame] = []
    # What is stored, not what was computed: so that one bad frame does not condemn those after it.
    before = (stored_0, stored_1)
    offset = _HEADER.size
    while offset + frame_size <= len(data):
        count = min(_FRAMES_AT_ONCE, (len(data) - offset) // frame_size)
        block = np.frombuffer(data, np.uint8, count * frame_size, offset).reshape(count, frame_size)
        covered = np.concatenate((block[:, :8], block[:, _FRAME.size :]), axis=1)
        own = covered.view(order).astype(np.uint32) @ weights.contributions
        for index in range(count):
            page_number, page_count, frame_salt_0, frame_salt_1, sum_0, sum_1 = _FRAME.unpack_from(
                data, offset
            )
            if (frame_salt_0, frame_salt_1) != (salt_0, salt_1):
                # An older generation's, left behind; or a flipped bit, if frames of this one follow.
                later = data.find(struct.pack(">2I", salt_0, salt_1), offset + _FRAME.size)
                if (later - _HEADER.size - 8) % frame_size == 0 and later > 0:
                    damage = offset if damage is None else damage
                else:
                    return WalLog(page_size, frames, damage)
            follows = page_number > 0 and weights.carry(before, own[index]) == (sum_0, sum_1)
            if not follows and damage is None:
                damage = offset
            frames.append(WalFrame(offset, page_number, page_count, follows))
            before = (sum_0, sum_1)
            offset += frame_size
    if damage is None and offset < len(data):
        damage = offset
    return WalLog(page_size, frames, damage)


def _checksum_serially(words: npt.NDArray[np.generic], start: tuple[int, int]) -> tuple[int, int]:
    sum_0, sum_1 = start
    values = [int(word) for word in words]
    for first, second in zip(values[::2], values[1::2], strict=True):
        sum_0 = (sum_0 + first + sum_1) & 0xFFFFFFFF
        sum_1 = (sum_1 + second + sum_0) & 0xFFFFFFFF
    return sum_0, sum_1


@dataclass(frozen=True, slots=True)
class _Weights:
    """The checksum is linear modulo 2**32: how much each word, and the sums before, count in the end.

    Attributes:
        contributions: Shape (words, 2): of each word to both sums.
        matrix: Of the sums before a frame to those after it, row by row.
    """

    contributions: Words
    matrix: tuple[int, int, int, int]

    def carry(self, before: tuple[int, int], own: Words) -> tuple[int, int]:
        a, b, c, d = self.matrix
        sum_0 = (a * before[0] + b * before[1] + int(own[0])) & 0xFFFFFFFF
        sum_1 = (c * before[0] + d * before[1] + int(own[1])) & 0xFFFFFFFF
        return sum_0, sum_1


def _weights(word_count: int) -> _Weights:
    # One step is s0' = s0 + s1 + x0 and s1' = s0 + 2 s1 + x0 + x1; its powers are taken from the end.
    a, b, c, d = 1, 0, 0, 1
    contributions = np.empty((word_count, 2), np.uint32)
    for pair in range(word_count // 2 - 1, -1, -1):
        contributions[2 * pair] = ((a + b) & 0xFFFFFFFF, (c + d) & 0xFFFFFFFF)
        contributions[2 * pair + 1] = (b, d)
        a, b, c, d = (
            (a + b) & 0xFFFFFFFF,
            (a + 2 * b) & 0xFFFFFFFF,
            (c + d) & 0xFFFFFFFF,
            (c + 2 * d) & 0xFFFFFFFF,
        )
    return _Weights(contributions, (a, b, c, d))
