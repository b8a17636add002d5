"""What a text became in the engine's tokenizer, as blocks that its cache reports can be compared with."""

from __future__ import annotations

from sagecp.core.events import AttemptProgressed
from sagecp.core.prompt_digest import has_cache_salt, token_block_hashes
from sagecp.core.request import RequestRecord
from sagecp.runtime.output import OutputLog
from sagecp.runtime.store.codec import unpack_token_ids


def first_output(
    record: RequestRecord, output: OutputLog, *, engine_reports_cache: bool
) -> AttemptProgressed:
    """Return the event for the first output of a request's attempt.

    It tells the blocks of the prompt's tokens where they are of use: for a text
    whose engine has told its tokens and reports what it has cached. About 2 us a block.

    Args:
        record: The request.
        output: Its output.
        engine_reports_cache: Whether the engine says which blocks it has.
    """
    packed, metadata = output.prompt_token_ids, record.metadata
    if (
        not engine_reports_cache
        or not packed
        or not record.digest.block_hashes
        or metadata.prompt_token_ids
        or has_cache_salt(metadata)
    ):
        return AttemptProgressed(record.request_id, output.epoch)
    token_ids = unpack_token_ids(packed)
    return AttemptProgressed(
        record.request_id, output.epoch, len(token_ids), token_block_hashes(token_ids, record.model)
    )
