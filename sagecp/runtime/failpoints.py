"""Places where a test may end this process at once, as a crash would.

    SAGECP_FAILPOINT=journal.before_commit      # at the first pass
    SAGECP_FAILPOINT=journal.before_commit:3    # at the third

The process exits with status 86, running no handler and flushing nothing.
Without the variable :func:`reach` does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

EXIT_STATUS = 86
VARIABLE = "SAGECP_FAILPOINT"
NAMES = ("journal.after_write", "journal.before_commit", "journal.after_commit", "journal.before_ack")


def _reach_nothing(_name: str) -> None:
    """Pass by."""


def make_failpoint(environment: Mapping[str, str]) -> Callable[[str], None]:
    """Return what is called at every failpoint with its name.

    Raises:
        ValueError: The variable names no failpoint; lists those that exist.
    """
    setting = environment.get(VARIABLE, "")
    if not setting:
        return _reach_nothing
    wanted, _, number = setting.partition(":")
    if wanted not in NAMES or (number and not (number.isascii() and number.isdigit() and int(number) > 0)):
        raise ValueError(
            f"{VARIABLE}={setting!r} is no failpoint; give NAME or NAME:COUNT, with NAME one of "
            + ", ".join(NAMES)
        )
    passes_left = int(number or 1)

    def reach_one(name: str) -> None:
        nonlocal passes_left
        if name == wanted:
            passes_left -= 1
            if passes_left == 0:
                os._exit(EXIT_STATUS)

    return reach_one


reach = make_failpoint(os.environ)
