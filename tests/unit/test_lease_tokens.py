"""Who may send heartbeats for an instance."""

from __future__ import annotations

import pytest

from sagecp.core.errors import PermissionDeniedError
from sagecp.runtime.lease_tokens import LeaseTokens


def refused(tokens: LeaseTokens, offered: bytes, incarnation: int = 1) -> str:
    with pytest.raises(PermissionDeniedError) as caught:
        tokens.check("i", incarnation, offered)
    return caught.value.message


def test_a_registration_is_shown_by_its_token() -> None:
    tokens = LeaseTokens()
    token = tokens.issue("i", 1)
    assert token != tokens.issue("other", 1)
    # An older agent knows of none.
    tokens.check("i", 1, b"")
    assert "another lease token" in refused(tokens, b"wrong")
    tokens.check("i", 1, token)
    assert "no lease token" in refused(tokens, b"")
    assert "another lease token" in refused(tokens, b"x" * 10_000)
    assert token.hex() not in refused(tokens, b"")
    tokens.check("i", 1, token)


def test_another_registration_has_another_token() -> None:
    tokens = LeaseTokens()
    old = tokens.issue("i", 1)
    new = tokens.issue("i", 1)
    refused(tokens, old)
    tokens.check("i", 1, new)


def test_after_a_restart_the_first_token_is_taken_for_the_right_one() -> None:
    tokens = LeaseTokens()
    tokens.check("i", 1, b"")
    tokens.check("i", 1, b"from before")
    refused(tokens, b"another")
    refused(tokens, b"")
    tokens.check("i", 1, b"from before")


def test_what_is_gone_is_forgotten() -> None:
    tokens = LeaseTokens()
    tokens.issue("i", 1)
    tokens.forget("i")
    tokens.forget("i")
    assert not tokens._tokens
