"""From the configuration to a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sagecp.config import JournalConfig
from sagecp.runtime.load_file import LoadFile
from sagecp.runtime.store.base import Store


def journal_path(config: JournalConfig, port: int, environment: Mapping[str, str] | None = None) -> Path:
    """Return the file of the journal: the configured one, or one in the user's state folder.

    That is named by the port, so that each of several control planes of a machine has its own.
    """
    if config.path:
        return Path(config.path).expanduser()
    variables = os.environ if environment is None else environment
    state = variables.get("XDG_STATE_HOME", "")
    # The base directory specification tells to ignore one that is not absolute.
    folder = Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()
    return folder / "sagecp" / f"journal-{port}.db"


def make_load_file(config: JournalConfig, port: int) -> LoadFile | None:
    """Return where the history of load is kept: beside the journal; ``None`` without one."""
    if not config.enabled or (port == 0 and not config.path):
        return None
    return LoadFile(journal_path(config, port).with_suffix(".load.jsonl"))


def make_store(config: JournalConfig, port: int) -> Store | None:
    """Return the store that is configured, not opened yet; ``None``: none is.

    A control plane whose port is another one at each start (``port`` 0) would not find its
    journal again: it has one only where the file is named.
    """
    if not config.enabled or (port == 0 and not config.path):
        return None
    # Only who keeps a journal needs SQLite.
    from sagecp.runtime.store.sqlite.store import SqliteStore

    return SqliteStore(journal_path(config, port), config)
