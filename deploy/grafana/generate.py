"""Writes the dashboards from what boards.py says: `python deploy/grafana/generate.py`.

The files are committed, so that nobody needs Python to import them. They are not
edited by hand: a test makes them anew and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from boards import DASHBOARDS  # noqa: E402 - found beside this file, wherever it is started from


def texts() -> dict[str, str]:
    """Return the dashboards as they should be on disk, by file name."""
    return {
        f"{dashboard.uid}.json": json.dumps(dashboard.to_json(), indent=1, sort_keys=True) + "\n"
        for dashboard in DASHBOARDS
    }


def main() -> None:
    """Write them, and remove what is none any more."""
    folder = FOLDER / "dashboards"
    folder.mkdir(exist_ok=True)
    wanted = texts()
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
