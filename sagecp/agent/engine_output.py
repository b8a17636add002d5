"""What a supervised engine writes: passed on, and its last lines kept."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

LINE_COUNT = 20
LINE_LENGTH = 256
_PIECE_BYTES = 1 << 16
_MAX_REST_BYTES = 1 << 13
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Engines that are told to log requests write what users have said.
_PROMPT = re.compile(r"(prompt\w*['\"]?\s*[:=]).+", re.IGNORECASE)
# Access logs of what agents ask for every second; they would push out what matters.
_OWN_QUESTION = re.compile(r'"GET /(?:health|metrics)[^" ]* HTTP/[0-9.]+" 200')


class OutputPump:
    """Reads a pipe in a thread of its own, until every process that writes to it has gone.

    A thread, because whoever takes the output may be slow: then the engine waits,
    as it would without an agent, and the agent does not.

    Args:
        pipe_fd: The end to read from; closed at the end.
        log_file: Appended to; ``None``, or where that cannot be done: the agent's standard output.
        secrets: Texts that are not kept.
    """

    def __init__(self, pipe_fd: int, log_file: Path | None, secrets: Collection[str] = ()) -> None:
        self._pipe_fd = pipe_fd
        self._log_file = log_file
        self._secrets = sorted((text for text in secrets if text), key=len, reverse=True)
        self._lines: deque[str] = deque(maxlen=LINE_COUNT)
        self._thread = threading.Thread(target=self._run, name="engine output", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> tuple[str, ...]:
        """Wait for the end of the output, and return its last lines, oldest first."""
        self._thread.join(timeout_s)
        return tuple(self._lines)

    def _run(self) -> None:
        with open(self._pipe_fd, "rb", buffering=0) as pipe, contextlib.ExitStack() as stack:  # noqa: PTH123
            sink: BinaryIO = sys.stdout.buffer
            if self._log_file is not None:
                # Rather on standard output than an engine that nobody reads from, which would end.
                with contextlib.suppress(OSError):
                    sink = stack.enter_context(self._log_file.open("ab", buffering=0))
            rest = b""
            while piece := pipe.read(_PIECE_BYTES):
                # A full disk or a closed pipe must not end the engine.
                with contextlib.suppress(OSError, ValueError):
                    sink.write(piece)
                    sink.flush()
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._keep(line)
                rest = rest[:_MAX_REST_BYTES]
            if rest:
                self._keep(rest)

    def _keep(self, line: bytes) -> None:
        text = _ESCAPE_SEQUENCE.sub("", line[:_MAX_REST_BYTES].decode("utf-8", "replace"))
        if _OWN_QUESTION.search(text):
            return
        text = _PROMPT.sub(r"\1 ...", text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = "".join(character if character.isprintable() else " " for character in text).strip()
        if text:
            self._lines.append(text[:LINE_LENGTH])


def open_pump(log_file: Path | None, secrets: Collection[str]) -> tuple[OutputPump, int]:
    """Return a pump and the file descriptor to write to, which the caller closes."""
    read_fd, write_fd = os.pipe()
    return OutputPump(read_fd, log_file, secrets), write_fd
