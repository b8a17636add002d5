"""Secrets by which an agent shows that it is the one that registered an instance."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from sagecp.core.errors import PermissionDeniedError

TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 64


@dataclass(slots=True)
class _Token:
    incarnation: int
    secret: bytes
    # Whether a heartbeat has carried it: older agents know of none.
    used: bool = False


class LeaseTokens:
    """The token of each registration. As many as there are instances."""

    def __init__(self) -> None:
        self._tokens: dict[str, _Token] = {}

    def issue(self, instance_id: str, incarnation: int) -> bytes:
        """Return the token of a new registration; those of earlier ones are worth nothing."""
        secret = secrets.token_bytes(TOKEN_BYTES)
        self._tokens[instance_id] = _Token(incarnation, secret)
        return secret

    def check(self, instance_id: str, incarnation: int, offered: bytes) -> None:
        """Make sure that a heartbeat of a registered instance comes from who registered it.

        After a restart of the control plane nobody knows the tokens given before: the
        first one that is offered then is taken for the right one.

        Raises:
            PermissionDeniedError: It carries another token, or none although earlier ones did.
        """
        token = self._tokens.get(instance_id)
        if token is None or token.incarnation != incarnation:
            if offered:
                self._tokens[instance_id] = _Token(incarnation, offered[:MAX_TOKEN_BYTES], used=True)
            return
        if hmac.compare_digest(token.secret, offered[: MAX_TOKEN_BYTES + 1]):
            token.used = True
        elif offered or token.used:
            what = "another lease token than" if offered else "no lease token, unlike"
            raise PermissionDeniedError(
                f"the heartbeat for instance {instance_id!r} carries {what} its registration: another agent "
                "owns this id; give each its own, or register again",
                instance_id=instance_id,
            )

    def forget(self, instance_id: str) -> None:
        """The instance is gone."""
        self._tokens.pop(instance_id, None)
