"""The control plane is killed at random moments, again and again, while callers submit and stream.

    python -m tests.faults.crash_cycles --cycles 200 --seed 1

Nothing that was acknowledged may be lost, repeated or changed; the exit status is 1 if it was.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness.load import Load
from tests.faults.harness.programs import SimEngine
from tests.faults.harness.site import running_site
from tests.faults.soak import QUIET, report

WEIGHTS = {"plain": 6.0, "repeated": 1.0, "cancelled": 1.0}
# A crash while it starts, before anything is served.
_EARLY_SHARE = 0.1
_LONGEST_S = 1.0


async def crash(cycles: int, seed: int, caller_count: int) -> bool:
    """Run so many cycles; return whether everything added up."""
    generator = random.Random(seed)
    began_s = time.monotonic()
    ready_s: list[float] = []
    engines = [SimEngine(f"e{number}", inter_token_ms=10) for number in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        async with running_site(engines, settings=QUIET, folder=Path(folder)) as site:
            load = Load(site.ledger, random.Random(seed + 1), WEIGHTS)
            async with load.running(caller_count, engines):
                for _ in range(cycles):
                    await asyncio.sleep(generator.uniform(0.0, _LONGEST_S))
                    site.control_plane.kill()
                    site.control_plane.spawn()
                    if generator.random() >= _EARLY_SHARE:
                        ready_s.append(await site.control_plane.serving())
                await site.control_plane.serving()
    ready_s.sort()
    sys.stdout.write(f"{cycles} cycles; ready after {ready_s[len(ready_s) // 2]:.2f} s (median), ")
    sys.stdout.write(f"{ready_s[-1]:.2f} s (longest)\n")
    kills = Counter({"control plane killed": cycles})
    return report(site.ledger, load, kills, None, time.monotonic() - began_s)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Kill the control plane again and again under load.")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callers", type=int, default=16)
    options = parser.parse_args()
    return 0 if asyncio.run(crash(options.cycles, options.seed, options.callers)) else 1


if __name__ == "__main__":
    sys.exit(main())
