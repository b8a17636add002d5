"""Where the history of load is written down: a text file with one line per bucket, beside the journal.

Not in the journal: that is about promises, is fsynced at every acceptance and is
checked as a whole; these are statistics, a line every five minutes, of which
losing the last is no harm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from sagecp.core.prediction.load_history import MAX_BUCKET_COUNT, MAX_SERIES_COUNT, LoadBucket

logger = logging.getLogger(__name__)

_MAX_LINE_COUNT = 2 * MAX_BUCKET_COUNT * MAX_SERIES_COUNT
_VERSION = 1


class LoadFile:
    """Appends finished buckets, and reads them back after a restart. Its methods block on the disk.

    Args:
        path: The file; its folder must exist when something is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fault = ""

    def read(self) -> list[LoadBucket]:
        """Return every bucket that can be read; without the file, none.

        Lines that cannot be read, such as one that a crash cut short, are left out.
        """
        buckets: dict[tuple[int, str, str], LoadBucket] = {}
        try:
            with self._path.open(encoding="utf-8") as file:
                for _, line in zip(range(_MAX_LINE_COUNT), file, strict=False):
                    bucket = _bucket_from_line(line)
                    if bucket is not None:
                        # What was written last of a bucket counts.
                        buckets[bucket.number, bucket.model, bucket.tenant_id] = bucket
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            self._complain("read", error)
            return []
        return list(buckets.values())

    def rewrite(self, buckets: Iterable[LoadBucket]) -> None:
        """Replace the file by these buckets, or leave it as it was."""
        beside = self._path.with_name(self._path.name + ".new")
        try:
            with open(beside, "w", encoding="utf-8", opener=_private) as file:
                file.writelines(map(_line_of, buckets))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            self._complain("written", error)
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def append(self, buckets: Iterable[LoadBucket]) -> None:
        """Add buckets at the end."""
        text = "".join(map(_line_of, buckets))
        if not text:
            return
        try:
            with open(self._path, "a", encoding="utf-8", opener=_private) as file:
                file.write(text)
            self._fault = ""
        except OSError as error:
            self._complain("written", error)

    def _complain(self, what: str, error: Exception) -> None:
        """Say once that forecasts will forget."""
        fault = type(error).__name__
        if fault != self._fault:
            self._fault = fault
            logger.warning(
                "the history of load cannot be %s; forecasts begin anew after a restart",
                what,
                extra={"path": str(self._path), "reason": str(error)},
            )


def _private(path: str, flags: int) -> int:
    """Open a file that nobody else may read: it names tenants, as the journal does."""
    return os.open(path, flags, 0o600)


def _line_of(bucket: LoadBucket) -> str:
    fields = [_VERSION, bucket.number, bucket.model, bucket.tenant_id, *bucket.values]
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def _bucket_from_line(line: str) -> LoadBucket | None:
    try:
        version, number, model, tenant_id, *values = json.loads(line)
        if version != _VERSION or len(values) != 4 or type(number) is not int:
            return None
        if not (isinstance(model, str) and isinstance(tenant_id, str)):
            return None
        requests, prompt_tokens, output_tokens, cost_usd = map(float, values)
    except (ValueError, TypeError):
        return None
    return LoadBucket(number, model, tenant_id, (requests, prompt_tokens, output_tokens, cost_usd))
