"""Parameters that belong to no single policy, strategy or balancer."""

from __future__ import annotations

from sagecp.core.parameters import Parameter

SHARED_PARAMETERS = (
    Parameter(
        "dispatch.prefill_window_s",
        0.1,
        0.0,
        3600.0,
        "An engine gets more work when less prefill than this is before it. Large: engines queue.",
    ),
    Parameter(
        "dispatch.patience", 0.1, 0.0, 10.0, "Loss for which a busy better instance is not waited for."
    ),
    Parameter("objectives.ttft_base_s", 1.0, 0.001, 3600.0, "TTFT objective of requests that state none."),
    Parameter("objectives.ttft_per_1000_tokens_s", 0.25, 0.0, 3600.0, "Added to it per 1,000 prompt tokens."),
    Parameter("objectives.tpot_s", 0.15, 0.0001, 60.0, "TPOT objective of requests that state none."),
    Parameter(
        "admission.refuse_infeasible",
        1.0,
        0.0,
        1.0,
        "1: refuse requests whose deadline cannot be met. 0: take them as best effort.",
    ),
    Parameter(
        "admission.tolerance",
        1.1,
        1.0,
        100.0,
        "A deadline is out of reach when the predicted time is more than this many times as long.",
    ),
    Parameter(
        "prediction.step_time_drift",
        0.2,
        0.01,
        10.0,
        "Share of the planned step time by which a kind of instance may differ before an event tells.",
    ),
    Parameter(
        "placement.plan_preference",
        0.1,
        0.0,
        10.0,
        "Share by which a score may be worse where an instance's plan suits the request. 0: no preference.",
    ),
    Parameter(
        "placement.long_request_tokens",
        8192.0,
        1.0,
        1e9,
        "Prompt and answer of so many tokens prefer the plan that serves them fastest, if plans differ.",
    ),
)
