"""Which content the blocks of a trace's prompts have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from sagecp.sim.fleet.trace_formats import TraceError, TraceRow

_ID_MODULUS = 1 << 63
# Ids of ranges beyond this are not kept to be shared: a few huge ids would need a huge table.
_SHARED_ID_LIMIT = 1 << 22


class BlockReader:
    """Makes block ids of rows, with one integer object per id.

    The ids of ranges are local to a family of sessions; a stable hash of the
    family's name moves them to where they meet no other family's.
    """

    def __init__(self, path: Path, token_count: int) -> None:
        self.token_count = token_count
        self._path = path
        self._ids: list[int] = []
        self._base = 0
        self._family = ""

    def read(self, row: TraceRow, family: str) -> tuple[int, ...]:
        """Return the ids of the prompt's full blocks; rows of one family come together."""
        if row.block_hashes:
            counts: Iterable[int] = (len(row.block_hashes),)
        else:
            counts = row.hash_ranges[1::2]
        id_count, block_count = sum(counts), -(-row.prompt_token_count // self.token_count)
        if id_count > block_count:
            raise TraceError(
                self._path,
                row.line_number,
                f"names {id_count} blocks, but a prompt of {row.prompt_token_count} tokens has {block_count} "
                f"of {self.token_count}; correct the ids, or set block_tokens",
            )
        full_block_count = row.prompt_token_count // self.token_count
        if row.block_hashes:
            return row.block_hashes[:full_block_count]
        if family != self._family:
            self._family, self._ids = family, []
            self._base = (
                int.from_bytes(hashlib.blake2b(family.encode(), digest_size=8).digest()) % _ID_MODULUS
            )
        ids: list[int] = []
        for start, count in zip(row.hash_ranges[::2], row.hash_ranges[1::2], strict=True):
            ids += self._range(start, start + count)
        return tuple(ids[:full_block_count])

    def _range(self, start: int, end: int) -> list[int]:
        if end > _SHARED_ID_LIMIT:
            return [(self._base + number) % _ID_MODULUS for number in range(start, end)]
        known = len(self._ids)
        if end > known:
            self._ids += [(self._base + number) % _ID_MODULUS for number in range(known, end)]
        return self._ids[start:end]
