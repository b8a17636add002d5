"""A small tokenizer that needs no files: any text in, the same text out.

Common words, syllables, short numbers and runs of spaces are one token each;
everything else falls back to bytes. Nothing depends on the process, so ids mean
the same everywhere. Chat messages are rendered with markers around each role.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence

from sagecp.sim.vocabulary import COMMON_WORDS

BOS_ID, EOS_ID, START_ID, END_ID = range(4)
SPECIAL_NAMES = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>")
_FIRST_BYTE_ID = len(SPECIAL_NAMES)
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
# Bounds the memory that remembered words take.
_CACHE_LIMIT = 65_536
_SPLIT = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,3}| {2,16}|\n{1,4}|.", re.DOTALL)
_LONGEST_SYLLABLE = 3


def _pieces() -> list[str]:
    """Return every piece of text that is a token of its own, in the order of their ids."""
    words = [prefix + word for word in COMMON_WORDS for prefix in (" ", "")]
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    syllables += [v + c for v in _VOWELS for c in _CONSONANTS]
    syllables += [c + v + d for c in _CONSONANTS for v in _VOWELS for d in _CONSONANTS]
    letters = [" " + letter for letter in string.ascii_letters]
    numbers = [prefix + str(number) for number in range(100) for prefix in (" ", "")]
    numbers += [str(number) for number in range(100, 1000)]
    spaces = [" " * count for count in range(2, 17)] + ["\n" * count for count in range(2, 5)]
    punctuation = [mark + " " for mark in ",.;:!?"] + ["()", "://", "==", "->", "..."]
    return [
        piece
        for piece in dict.fromkeys(words + letters + syllables + numbers + spaces + punctuation)
        if piece
    ]


_TOKEN_BYTES: tuple[bytes, ...] = (
    *(b"" for _ in SPECIAL_NAMES),
    *(bytes([value]) for value in range(256)),
    *(piece.encode() for piece in _pieces() if len(piece) > 1),
)
_ID_OF: dict[str, int] = {
    piece.decode(): token_id
    for token_id, piece in enumerate(_TOKEN_BYTES)
    if piece and (len(piece) > 1 or piece < b"\x80")
}

VOCABULARY_SIZE = len(_TOKEN_BYTES)
"""Token ids run from 0 to one less than this."""

TOKEN_TEXTS: tuple[str, ...] = tuple(piece.decode("utf-8", "replace") for piece in _TOKEN_BYTES)
"""The text of each token alone; empty for the special ones."""

TOKEN_JSON: tuple[bytes, ...] = tuple(json.dumps(text)[1:-1].encode() for text in TOKEN_TEXTS)
"""The text of each token as it stands inside a JSON string."""

GENERATED_IDS: tuple[int, ...] = tuple(_ID_OF[" " + word] for word in COMMON_WORDS if len(word) > 1)
"""The tokens that the simulated model can emit: words, printable and never empty."""

_remembered: dict[str, tuple[int, ...]] = {}


def encode(text: str) -> list[int]:
    """Turn text into token ids; :func:`decode` gives the text back."""
    ids: list[int] = []
    extend, remembered = ids.extend, _remembered
    for piece in _SPLIT.findall(text):
        known = remembered.get(piece)
        extend(known if known is not None else _encode_piece(piece))
    return ids


def decode(token_ids: Iterable[int]) -> str:
    """Turn token ids into text; special tokens vanish, and broken UTF-8 is replaced."""
    return b"".join([_TOKEN_BYTES[token_id] for token_id in token_ids]).decode("utf-8", "replace")


def token_name(token_id: int) -> str:
    """Return a token's text for people, the special ones with their names."""
    return SPECIAL_NAMES[token_id] if token_id < len(SPECIAL_NAMES) else TOKEN_TEXTS[token_id]


def encode_chat(messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
    """Render (role, text) pairs with markers, ready for the assistant's turn, and encode them."""
    ids = [BOS_ID]
    for role, text in messages:
        ids += [START_ID, *encode(f"{role}\n{text}"), END_ID, *_NEWLINE]
    if add_generation_prompt:
        ids += [START_ID, *_ASSISTANT]
    return ids


def _encode_piece(piece: str) -> tuple[int, ...]:
    whole = _ID_OF.get(piece)
    if whole is not None:
        ids: tuple[int, ...] = (whole,)
    else:
        collected: list[int] = []
        position = 0
        while position < len(piece):
            for length in range(_LONGEST_SYLLABLE, 0, -1):
                token_id = _ID_OF.get(piece[position : position + length])
                if token_id is not None:
                    break
            if token_id is None:
                length = 1
                # A lone surrogate cannot be encoded; it becomes a question mark.
                raw = piece[position].encode("utf-8", "replace")
                collected += [_FIRST_BYTE_ID + value for value in raw]
            else:
                collected.append(token_id)
            position += length
        ids = tuple(collected)
    if len(_remembered) >= _CACHE_LIMIT:
        _remembered.clear()
    if len(piece) <= 32:
        _remembered[piece] = ids
    return ids


_NEWLINE = encode("\n")
_ASSISTANT = encode("assistant\n")
