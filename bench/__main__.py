"""Every benchmark, one after the other: `python -m bench [--quick]` (about half an hour, or two minutes)."""

from __future__ import annotations

import argparse
import subprocess
import sys

_RUNS: dict[str, tuple[list[str], list[str]]] = {
    # Module: arguments of a full run, of a quick one.
    "decision": ([], ["--quick"]),
    "fleet_engine": ([], ["--quick"]),
    "journal": ([], ["--seconds", "1", "--records", "5000"]),
    "engine_client": ([], ["--rounds", "1"]),
    "token_path": ([], ["--rounds", "1", "--seconds", "2"]),
    "latency": ([], ["--seconds", "10"]),
    "durable_submit": ([], ["--seconds", "2", "--rounds", "1"]),
    "cancel": ([], ["--count", "20"]),
    "overload": ([], ["--seconds", "3"]),
    "slow_readers": ([], ["--streams", "500", "--seconds", "10"]),
    "top": ([], ["--instances", "100", "--seconds", "5", "--size", "80x24"]),
    "get_metrics": ([], ["--rounds", "3", "--samples", "20000"]),
    "metrics_overhead": ([], ["--rounds", "2", "--seconds", "2"]),
    "scrape": ([], ["--instances", "100", "--queued", "1000", "--rounds", "2"]),
    "tracing": ([], ["--requests", "500", "--rounds", "2"]),
    "kv_events": ([], ["--blocks", "20000", "--rounds", "2"]),
    "plan_memory": ([], []),
    "cost_accuracy": ([], []),
    "plan_time": ([], []),
    "plan_search": ([], []),
    "plan_regret": ([], ["--quick"]),
    "forecast": ([], ["--quick"]),
    "heartbeats": ([], ["--agents", "100", "--seconds", "3"]),
}


def main() -> int:
    """Run them; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that they run")
    quick = parser.parse_args().quick
    failed = []
    for name, (full_arguments, quick_arguments) in _RUNS.items():
        arguments = quick_arguments if quick else full_arguments
        print(f"\n## python -m bench.{name} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
