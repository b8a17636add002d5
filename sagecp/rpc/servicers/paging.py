"""Pages of lists: their sizes, and the tokens that say where the next one starts."""

from __future__ import annotations

import base64

from sagecp.core.errors import FieldViolation

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def page_size(asked: int, violations: list[FieldViolation]) -> int:
    """Return the size of a page; note a violation when it is too large."""
    if asked > MAX_PAGE_SIZE:
        violations.append(FieldViolation("page_size", f"is {asked}; must be at most {MAX_PAGE_SIZE}"))
    return asked or DEFAULT_PAGE_SIZE


def page_token(kind: str, position: str) -> str:
    """Return a token for a position; ``kind`` keeps tokens of different lists apart.

    Encoded, so that nobody takes its content for a promise.
    """
    return base64.urlsafe_b64encode(f"{kind}:{position}".encode()).decode()


def position_of(kind: str, token: str, violations: list[FieldViolation]) -> str:
    """Return the position in a token, ``""`` for no token; note a violation when it is not one of ours."""
    if not token:
        return ""
    try:
        found, separator, position = base64.b64decode(token, b"-_", validate=True).decode().partition(":")
    except ValueError:
        found = separator = position = ""
    if not separator or found != kind or not position:
        violations.append(not_our_token())
        return ""
    return position


def not_our_token() -> FieldViolation:
    """Return what is said of a token that this list did not give."""
    return FieldViolation("page_token", "is not a token of this list; give next_page_token, or none to start")
