"""What holds for every test."""

from __future__ import annotations

import os

# Parallel workers are told how wide the terminal is in which they were started. What a test
# starts writes to none, and must write the same wherever the tests run.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
