"""What waits, and in whose order."""

from panels import MODEL, Dashboard, Panel, Query, Row, quantiles, summed_rate

_QUEUE = Row(
    "Queue",
    (
        Panel(
            "Requests that wait, by priority",
            [Query("sum by (priority) (sagecp_queue_class_requests{JOB})", "{{priority}}")],
            stacked=True,
        ),
        Panel(
            "Requests that wait, by model",
            [Query("sum by (model) (sagecp_queue_requests{MODEL})", "{{model}}")],
            stacked=True,
        ),
        Panel(
            "Age of the oldest",
            [
                Query(
                    "max by (model, priority) (sagecp_queue_oldest_age_seconds{MODEL})",
                    "{{model}} {{priority}}",
                )
            ],
            unit="s",
        ),
        Panel(
            "Wait until dispatch, p95 by priority",
            quantiles("sagecp_request_queue_wait_seconds", "MODEL", by="priority"),
            unit="s",
        ),
        Panel(
            "How full the queue is",
            [
                Query(
                    "sum by (job) (sagecp_queue_class_requests{JOB})"
                    " / sum by (job) (sagecp_queue_limit_requests{JOB})",
                    "{{job}}",
                )
            ],
            unit="percentunit",
            maximum=1,
            limits=(0.5, 0.8),
        ),
        Panel(
            "Prompt bytes that wait", [Query("sagecp_queue_size_bytes{JOB}", "{{instance}}")], unit="bytes"
        ),
        Panel(
            "Prefill work that waits",
            [Query("sagecp_queue_work_seconds{JOB}", "{{instance}}")],
            unit="s",
            description="Predicted engine seconds of all prompts in the queue.",
        ),
        Panel(
            "Arrivals and ends per second",
            [
                Query("sum(rate(sagecp_requests_accepted_total{MODEL}[RATE]))", "accepted"),
                Query("sum(rate(sagecp_requests_ended_total{MODEL}[RATE]))", "ended"),
                Query("sum(rate(sagecp_requests_refused_total{JOB}[RATE]))", "refused"),
            ],
            unit="reqps",
        ),
        Panel(
            "Lost attempts per second, by reason",
            [summed_rate("sagecp_attempts_lost_total", "MODEL", "reason")],
        ),
    ),
)

_DECISIONS = Row(
    "Decisions",
    (
        Panel("Policy in force", [Query("sagecp_scheduling_policy_in_force{JOB}", "{{policy}}")]),
        Panel(
            "Evaluations and switches of adaptive",
            [
                Query("increase(sagecp_policy_evaluations_total{JOB}[1h])", "evaluations per hour"),
                Query("increase(sagecp_policy_switches_total{JOB}[1h])", "switches per hour"),
            ],
        ),
        Panel(
            "Settings",
            [Query("sagecp_scheduling_info{JOB}"), Query("sagecp_scheduling_settings_version{JOB}")],
            kind="table",
        ),
        Panel(
            "Prediction error",
            [Query('sagecp_prediction_error_ratio{JOB, stat="median"}', "{{quantity}}")],
            unit="percentunit",
            description="Median of |predicted - actual| / actual over about the last thousand.",
            limits=(0.3, 0.5),
        ),
        Panel(
            "Prediction bias",
            [Query('sagecp_prediction_error_ratio{JOB, stat="bias"}', "{{quantity}}")],
            description="Above 1, things take longer than predicted.",
        ),
        Panel(
            "Observed by planned step time",
            [Query('sagecp_step_time_ratio{MODEL, phase="all"}', "{{model}} {{gpu}} {{plan}}")],
            description="Above 1, steps take longer than the plan says.",
            limits=(1.2, 1.5),
        ),
        Panel(
            "Predictions compared per second",
            [summed_rate("sagecp_predictions_compared_total", "JOB", "quantity")],
        ),
    ),
)

_TENANTS = Row(
    "Tenants",
    (
        Panel(
            "Requests per second, the busiest tenants",
            [
                Query(
                    "topk(10, sum by (tenant) (rate(sagecp_tenant_requests_ended_total{JOB}[RATE])))",
                    "{{tenant}}",
                )
            ],
            unit="reqps",
            width=12,
        ),
        Panel(
            "Tokens per second, the busiest tenants",
            [
                Query(
                    "topk(10, sum by (tenant) (rate(sagecp_tenant_input_tokens_total{JOB}[RATE])"
                    " + rate(sagecp_tenant_output_tokens_total{JOB}[RATE])))",
                    "{{tenant}}",
                )
            ],
            width=12,
        ),
    ),
)

QUEUE = Dashboard(
    uid="sagecp-queue",
    title="sagecp / Queue and scheduling",
    description="What waits, for how long, in whose order, and how right the predictions are.",
    variables=(MODEL,),
    rows=(_QUEUE, _DECISIONS, _TENANTS),
)
