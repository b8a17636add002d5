"""How right forecasts of load are, on a week of published rates.

Every half hour of the week a forecast is made from what had come by then, and
held against what came. Beside it: that the last hour goes on (naive), and that
yesterday comes again (seasonal naive). The rates are those of ServeGen's
large model (see workloads/README.md), six values an hour, each taken for two
buckets of five minutes::

    python -m bench.forecast           # a minute and a half
    python -m bench.forecast --quick
"""

from __future__ import annotations

import argparse
import csv
import gzip
import time
from pathlib import Path

import numpy as np

from sagecp.core.prediction.forecast import BUCKETS_PER_DAY, BUCKETS_PER_HOUR, forecast_load
from sagecp.core.prediction.load_history import BUCKET_S, QUANTITIES

RATES = Path(__file__).parent / "workloads" / "servegen_mlarge_rates_week1.csv.gz"
ORIGIN_STEP = BUCKETS_PER_HOUR // 2


def read_rates() -> np.ndarray:
    """Return requests per bucket."""
    with gzip.open(RATES, "rt") as file:
        rates = [float(row["total_rps"]) for row in csv.DictReader(file)]
    # Ten minutes are two buckets.
    return np.repeat(rates, 2) * BUCKET_S


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how right forecasts of load are.")
    parser.add_argument("--quick", action="store_true", help="only one hour ahead")
    arguments = parser.parse_args()
    requests = read_rates()
    print(
        f"{len(requests) / BUCKETS_PER_DAY:.1f} days of {RATES.stem.split('.')[0]}, a forecast each half hour"
    )
    print(f"{'ahead':>6} {'day':>4} | {'error':>7} {'naive':>7} {'yesterday':>9} | in bounds | told before")
    for hours in (1,) if arguments.quick else (1, 3, 12):
        horizon = hours * BUCKETS_PER_HOUR
        days = []
        for day in range(7):
            errors, naive, yesterday, inside, actual_sum, told = 0.0, 0.0, 0.0, [], 0.0, []
            for origin in range(day * BUCKETS_PER_DAY, (day + 1) * BUCKETS_PER_DAY, ORIGIN_STEP):
                if origin < BUCKETS_PER_HOUR or origin + horizon > len(requests):
                    continue
                past = requests[:origin]
                result = forecast_load(dict.fromkeys(QUANTITIES, past), horizon * BUCKET_S, BUCKET_S)
                assert result.total is not None
                expected = result.total.values["requests"]
                actual = float(requests[origin : origin + horizon].sum())
                actual_sum += actual
                errors += abs(expected.p50 - actual)
                naive += abs(float(past[-BUCKETS_PER_HOUR:].sum()) * hours - actual)
                if origin >= BUCKETS_PER_DAY:
                    same = requests[origin - BUCKETS_PER_DAY : origin - BUCKETS_PER_DAY + horizon]
                    yesterday += abs(float(same.sum()) - actual)
                inside.append(expected.p10 <= actual <= expected.p90)
                if result.accuracy is not None:
                    told.append(result.accuracy.weighted_error)
            last = f"{yesterday / actual_sum:9.1%}" if day else f"{'-':>9}"
            days.append(errors / actual_sum)
            print(
                f"{hours:4d} h {day + 1:4d} | {errors / actual_sum:7.1%} {naive / actual_sum:7.1%} {last} "
                f"| {np.mean(inside):9.0%} | {np.mean(told):.1%}"
            )
    start = time.process_time()
    count = 20
    for _ in range(count):
        forecast_load(dict.fromkeys(QUANTITIES, requests), 3600.0, BUCKET_S)
    print(f"one forecast from a week: {(time.process_time() - start) / count * 1000:.1f} ms of CPU")


if __name__ == "__main__":
    main()
