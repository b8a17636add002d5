"""Checksums of rows, chained: each covers the one before, so that nothing can go missing unnoticed."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import msgspec

# Unambiguous: MessagePack tells where each value ends, and of which type it is.
_encode = msgspec.msgpack.Encoder().encode

# What the first row of a journal follows.
CHAIN_START = 0


class JournalRow(NamedTuple):
    """One row of the journal, in the order of its columns.

    Attributes:
        sequence: Number of the row: without gaps, in the order of writing.
        position: Sequence under which the record was written first; differs once it was moved.
        kind: Number of the record's type (its tag); 0 for a row that holds nothing.
        subject: Id of the request or instance.
        previous: Checksum of the row before.
        checksum: Checksum of all the others.
        body: The record as bytes.
    """

    sequence: int
    position: int
    kind: int
    subject: str
    previous: int
    checksum: int
    body: bytes


def checksum_of(*values: int | float | str | bytes) -> int:
    """Return 64 bits of BLAKE2b over values, as a signed integer that fits a BIGINT."""
    return int.from_bytes(blake2b(_encode(values), digest_size=8).digest(), "little", signed=True)


def make_row(sequence: int, position: int, kind: int, subject: str, previous: int, body: bytes) -> JournalRow:
    """Return a row with its checksum."""
    checksum = checksum_of(previous, sequence, position, kind, subject, body)
    return JournalRow(sequence, position, kind, subject, previous, checksum, body)


def is_whole(row: JournalRow) -> bool:
    """Return whether a row is what was written. Says nothing of the rows before it."""
    try:
        expected = checksum_of(row.previous, row.sequence, row.position, row.kind, row.subject, row.body)
    except (TypeError, ValueError):
        # Damage may have changed a value's type, or left text that is no UTF-8.
        return False
    return row.checksum == expected
