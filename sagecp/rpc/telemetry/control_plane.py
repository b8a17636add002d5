"""What the control plane says of itself: its queue, policy, predictions, journal and event loop."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator

from sagecp.core.prediction.step_time_report import StepTimeReport
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import RequestPriority
from sagecp.rpc.telemetry.families import gauges
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.version import __version__

# Some 2 ms of looking at them.
_REQUESTS_PER_PIECE = 5000


def queue_pieces(scheduler: Scheduler, now: float) -> Iterator[str]:
    """Return what waits as text, piece by piece.

    Args:
        scheduler: The core; it may change between pieces.
        now: On the core's clock.
    """
    queue = scheduler.queue
    counts: dict[tuple[str, str], int] = {}
    for (model, _, priority), count in queue.kinds.items():
        key = model, RequestPriority(priority).name
        counts[key] = counts.get(key, 0) + count
    # Oldest first, so that the search is over once each class was met. A copy costs little:
    # requests come and go between pieces.
    oldest_s: dict[tuple[str, str], float] = {}
    for number, request in enumerate(list(scheduler.requests())):
        if len(oldest_s) == len(counts):
            break
        if request.queued:
            oldest_s.setdefault((request.model, request.metadata.priority.name), request.arrival_s)
        if number % _REQUESTS_PER_PIECE == _REQUESTS_PER_PIECE - 1:
            yield ""
    labels = "model", "priority"
    yield gauges("sagecp_queue_requests", "Requests that wait.", labels, list(counts.items()))
    yield gauges(
        "sagecp_queue_oldest_age_seconds",
        "Time since the arrival of the oldest request that waits.",
        labels,
        [(key, max(0.0, now - arrival_s)) for key, arrival_s in oldest_s.items()],
    )
    by_priority = queue.count_by_priority()
    yield gauges(
        "sagecp_queue_class_requests",
        "Requests that wait, by priority; zeros included.",
        ("priority",),
        [((priority.name,), by_priority.get(priority, 0)) for priority in RequestPriority],
    )
    yield gauges("sagecp_queue_size_bytes", "Prompt bytes that wait.", (), [((), queue.size_bytes)])
    yield gauges(
        "sagecp_queue_limit_requests", "Most requests that may wait.", (), [((), queue.max_request_count)]
    )
    yield gauges(
        "sagecp_queue_work_seconds",
        "Predicted engine time of all prompts that wait.",
        (),
        [((), max(0.0, queue.work_s))],
    )


def control_plane_pieces(manager: ControlPlaneManager, now: float) -> Iterator[str]:
    """Return the state of the control plane as text.

    Args:
        manager: The control plane.
        now: On the core's clock.
    """
    scheduler = manager.scheduler
    yield gauges(
        "sagecp_build_info",
        "1, with the versions of the server and of Python.",
        ("version", "python_version"),
        [((__version__, platform.python_version()), 1)],
    )
    yield gauges(
        "sagecp_requests_active", "Requests on engines.", (), [((), scheduler.active_count)]
    )  # fmt: skip
    yield gauges(
        "sagecp_accepting_requests", "1 while new requests are taken.", (), [((), int(manager.accepting))]
    )
    yield gauges(
        "sagecp_event_loop_lag_seconds",
        "How late the event loop ran its last measured callback.",
        (),
        [((), manager.monitor.event_loop_lag_s)],
    )
    heartbeats = manager.heartbeat_counts
    yield gauges(
        "sagecp_heartbeats_taken_total",
        "Heartbeats that were taken.",
        (),
        [((), heartbeats.runs.count)],
        kind="counter",
    )
    yield gauges(
        "sagecp_heartbeats_refused_total",
        "Heartbeats that were refused, in part (BAD_FIGURE) or as a whole, by why.",
        ("reason",),
        [((reason,), count) for reason, count in heartbeats.refused_counts.items()],
        kind="counter",
    )
    yield gauges(
        "sagecp_events_total",
        "Events that operators were told, by kind and severity.",
        ("kind", "severity"),
        [((kind.name, severity.name), count) for (kind, severity), count in manager.events.counts.items()],
        kind="counter",
    )
    yield from _scheduling(manager)
    yield from _predictions(manager)
    yield from _journal(manager)


def _scheduling(manager: ControlPlaneManager) -> Iterator[str]:
    scheduler = manager.scheduler
    settings, book = scheduler.settings.current, scheduler.adaptation
    yield gauges(
        "sagecp_scheduling_policy_in_force",
        "1 for the policy that orders the queue, which adaptive chooses.",
        ("policy",),
        [((scheduler.policy_in_force,), 1)],
    )
    yield gauges(
        "sagecp_scheduling_info",
        "1, with the settings in force.",
        ("policy", "routing_strategy", "load_balancer"),
        [((settings.scheduling_policy, settings.routing_strategy, settings.load_balancer), 1)],
    )
    yield gauges(
        "sagecp_scheduling_settings_version",
        "Version of the scheduling settings in force.",
        (),
        [((), settings.version)],
    )
    yield gauges(
        "sagecp_policy_evaluations_total",
        "Replays that adaptive judged by.",
        (),
        [((), book.evaluation_count)],
        kind="counter",
    )
    yield gauges(
        "sagecp_policy_switches_total",
        "Times that adaptive let another policy decide.",
        (),
        [((), book.switch_count)],
        kind="counter",
    )


def _predictions(manager: ControlPlaneManager) -> Iterator[str]:
    accuracy = manager.prediction_accuracy()
    yield gauges(
        "sagecp_predictions_compared_total",
        "Predictions compared with what came.",
        ("quantity",),
        [((quantity,), each.count) for quantity, each in accuracy.items()],
        kind="counter",
    )
    yield gauges(
        "sagecp_prediction_error_ratio",
        "How wrong recent predictions were: bias is the geometric mean of actual by predicted, "
        "median and p90 are quantiles of |predicted - actual| / actual.",
        ("quantity", "stat"),
        [
            ((quantity, stat), value)
            for quantity, each in accuracy.items()
            for stat, value in (
                ("bias", each.bias_ratio),
                ("median", each.median_error_ratio),
                ("p90", each.p90_error_ratio),
            )
        ],
    )
    yield from _step_times(manager.step_time_accuracy())
    yield gauges(
        "sagecp_prediction_coverage_ratio",
        "Share of actual values at or below the predicted upper bound.",
        ("quantity",),
        [
            ((quantity,), each.upper_coverage)
            for quantity, each in accuracy.items()
            if each.upper_coverage is not None
        ],
    )


def _step_times(reports: Iterable[StepTimeReport]) -> Iterator[str]:
    kinds = [((each.model, each.gpu_name, str(each.config)), each) for each in reports]
    yield gauges(
        "sagecp_step_time_ratio",
        "Observed by planned step time of late, by kind of instance; above 1: slower than planned.",
        ("model", "gpu", "plan", "phase"),
        [
            ((*kind, phase), value)
            for kind, report in kinds
            for phase, value in (
                ("all", report.ratio),
                ("decode", report.decode_ratio),
                ("prefill", report.prefill_ratio),
            )
            if value is not None
        ],
    )
    yield gauges(
        "sagecp_step_time_drifting",
        "1 while a kind of instance is off its planned step time by more than prediction.step_time_drift.",
        ("model", "gpu", "plan"),
        [(kind, float(report.drifting)) for kind, report in kinds],
    )


def _journal(manager: ControlPlaneManager) -> Iterator[str]:
    status = manager.store_status()
    if status is None:
        return
    yield gauges(
        "sagecp_journal_accepting",
        "1 while the journal takes new requests.",
        (),
        [((), int(status.accepting))],
    )
    yield gauges(
        "sagecp_journal_trouble",
        "1 while the journal is in trouble, which GetStatus puts into words.",
        (),
        [((), int(bool(status.trouble)))],
    )
    yield gauges(
        "sagecp_journal_records_pending", "Records that wait to be written.", (), [((), status.pending_count)]
    )
    yield gauges(
        "sagecp_journal_records_written_total",
        "Records written.",
        (),
        [((), status.written_count)],
        kind="counter",
    )
    yield gauges(
        "sagecp_journal_commits_total",
        "Transactions: many records share one.",
        (),
        [((), status.commit_count)],
        kind="counter",
    )
    yield gauges(
        "sagecp_journal_commit_seconds_total",
        "Time that transactions took, until their records were on the medium where that was asked.",
        (),
        [((), status.commit_s)],
        kind="counter",
    )
    yield gauges(
        "sagecp_journal_pending_bytes", "Size of the records that wait.", (), [((), status.pending_bytes)]
    )
    yield gauges("sagecp_journal_size_bytes", "Size of the journal on disk.", (), [((), status.size_bytes)])
