"""Registries: a name for every policy, strategy and balancer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from sagecp.core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: What the names name, for messages: ``scheduling policy``.
        planned: Names that the contract fixes and this version lacks.
    """

    def __init__(
        self, kind: str, entries: Iterable[tuple[str, type[T]]], planned: Iterable[str] = ()
    ) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._planned = frozenset(planned)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that can be used, sorted."""
        return tuple(sorted(self._entries))

    def get(self, name: str) -> type[T]:
        """Return the class of a name.

        Raises:
            UnknownNameError: There is none; lists those that exist.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries, self._planned) from None
