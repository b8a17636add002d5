"""What engines report of their prefix caches, and what that says of prompts that are text.

An engine's blocks are of token ids. The digest of a text is taken before any
tokenizer, so that it has other blocks; which of them an engine has follows from
the tokens that it made of a text, once it has told them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

from sagecp.core.engine_state import KvCacheUpdate
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.types import PromptDigest

MAX_LINKED_BLOCK_COUNT = 100_000
"""Blocks of tokens whose blocks of text are remembered, about 300 bytes each."""
MAX_TEXTS_PER_BLOCK = 16
"""Blocks of text that are remembered for one block of tokens: of several texts, or of a sparse one."""


class KvCacheReports:
    """Tells the prefix index what engines report.

    Args:
        prefixes: The index.
        max_linked_block_count: See :data:`MAX_LINKED_BLOCK_COUNT`.
    """

    def __init__(self, prefixes: PrefixIndex, max_linked_block_count: int = MAX_LINKED_BLOCK_COUNT) -> None:
        self._prefixes = prefixes
        self._max_linked_block_count = max_linked_block_count
        # By block of tokens, the least recently used first: blocks of text that end in it.
        self._texts: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def take(self, record: InstanceRecord, update: KvCacheUpdate) -> None:
        """Take an update of an instance's cache.

        One that does not follow the last says that something was missed, so that
        what was known is void; what it says itself holds nevertheless.
        """
        instance_id = record.instance_id
        if update.reset or update.sequence != record.kv_cache_sequence + 1:
            self._prefixes.reset(instance_id)
        record.kv_cache_sequence = update.sequence
        removed, stored = update.removed_block_hashes, update.stored_block_hashes
        self._prefixes.note_removed(instance_id, removed)
        self._prefixes.note_stored(instance_id, stored)
        if self._texts:
            self._prefixes.note_removed(
                instance_id, [text for block in removed for text in reversed(self._texts.get(block, ()))]
            )
            self._prefixes.insert(instance_id, self._texts_of(stored), pinned=False)

    def link(self, digest: PromptDigest, token_count: int, token_block_hashes: Iterable[int]) -> None:
        """Remember which blocks of tokens a text became.

        Text and tokens do not align: a block of text is taken to end where the same
        share of the prompt's tokens ends, in a block of tokens that goes with it. Where
        a template writes before the text, or its start is denser than its end, that is
        off by a block or so, which costs a placement that much of a cached prefix.
        Blocks at a prompt's end that no whole block of tokens covers go with the last.

        Args:
            digest: Of the text.
            token_count: Tokens that an engine made of it.
            token_block_hashes: Their blocks.
        """
        tokens = tuple(token_block_hashes)
        texts = digest.block_hashes
        if not tokens or not texts or texts[0] == tokens[0]:
            return
        tokens_per_text_block = token_count * digest.block_token_count / digest.token_count
        ends_in: dict[int, list[int]] = {}
        for number, text in enumerate(texts, 1):
            end = math.ceil(number * tokens_per_text_block / digest.block_token_count) - 1
            ends_in.setdefault(tokens[max(0, min(end, len(tokens) - 1))], []).append(text)
        if max(map(len, ends_in.values())) > MAX_TEXTS_PER_BLOCK:
            # More than 64 characters a token: not what became of this text.
            return
        for block, found in ends_in.items():
            known = self._texts.get(block, ())
            new = [text for text in found if text not in known]
            if new:
                # Whole texts are forgotten, not parts: a start must not be gone before its end.
                has_room = len(known) + len(new) <= MAX_TEXTS_PER_BLOCK
                self._texts[block] = (*known, *new) if has_room else tuple(found)
            self._texts.move_to_end(block)
        while len(self._texts) > self._max_linked_block_count:
            self._texts.popitem(last=False)

    def _texts_of(self, blocks: Iterable[int]) -> list[int]:
        found: list[int] = []
        for block in blocks:
            texts = self._texts.get(block)
            if texts is not None:
                self._texts.move_to_end(block)
                found += texts
        return found
