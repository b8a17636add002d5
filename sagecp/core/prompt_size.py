"""How large a prompt is, before any engine has seen it."""

from __future__ import annotations

from sagecp.core.types import RequestMetadata

# Without a tokenizer: four bytes of text make about one token in English prose
# and code with current vocabularies.
BYTES_PER_TOKEN = 4


def estimate_prompt_token_count(metadata: RequestMetadata) -> int:
    """Return how many tokens the prompt probably has, at least 1; exact for token ids."""
    if metadata.prompt_token_ids:
        return len(metadata.prompt_token_ids)
    return max(1, payload_size_bytes(metadata) // BYTES_PER_TOKEN)


def payload_size_bytes(metadata: RequestMetadata) -> int:
    """Return roughly how many bytes the prompt holds in memory, for queue bounds."""
    size = len(metadata.openai_body) + 8 * len(metadata.prompt_token_ids)
    if metadata.prompt is not None:
        size += len(metadata.prompt)
    for message in metadata.messages:
        content = message.get("content")
        # Parts may hold images as data URLs; their text form is close to their size.
        size += len(content) if isinstance(content, str) else len(str(content))
    if metadata.tools:
        # Chat templates write them into the prompt.
        size += len(str(metadata.tools))
    return size
