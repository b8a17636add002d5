"""How many requests met their objectives, and where the time goes."""

from panels import MODEL, Dashboard, Panel, Query, Row, quantiles

_ALL = 'sagecp_slo_requests_total{MODEL, objective="all"}'
_MISSED = 'sagecp_slo_requests_total{MODEL, objective="all", outcome="violated"}'
_MET = 'sagecp_slo_requests_total{MODEL, objective="all", outcome="met"}'

_BUDGET = Row(
    "Budget",
    (
        Panel(
            "Budget left of 30 days",
            [
                Query(
                    f"clamp_min(1 - (sum by (model) (increase({_MISSED}[30d]))"
                    f" / sum by (model) (increase({_ALL}[30d])))"
                    " / scalar(sagecp:slo_error_budget:ratio), 0)",
                    "{{model}}",
                )
            ],
            kind="bargauge",
            unit="percentunit",
            maximum=1,
        ),
        Panel(
            "Burn rate",
            [
                Query(
                    f"job_model:sagecp_slo_violations:ratio_rate{window}{{MODEL}}"
                    " / scalar(sagecp:slo_error_budget:ratio)",
                    f"{window} {{{{model}}}}",
                )
                for window in ("5m", "1h", "6h")
            ],
            width=16,
            description="1 uses up the budget in 30 days, 14.4 in two. What to do: docs/runbook.md.",
            limits=(1, 6),
        ),
    ),
)

_OBJECTIVES = Row(
    "Objectives",
    (
        Panel(
            "Met, by objective",
            [
                Query(
                    'sum by (objective) (rate(sagecp_slo_requests_total{MODEL, outcome="met"}[RATE]))'
                    " / sum by (objective) (rate(sagecp_slo_requests_total{MODEL}[RATE]))",
                    "{{objective}}",
                )
            ],
            unit="percentunit",
            maximum=1,
        ),
        Panel(
            "Met, by priority",
            [
                Query(
                    f"sum by (priority) (rate({_MET}[RATE])) / sum by (priority) (rate({_ALL}[RATE]))",
                    "{{priority}}",
                )
            ],
            unit="percentunit",
            maximum=1,
        ),
        Panel(
            "Requests with an objective per second",
            [Query(f"sum by (outcome) (rate({_ALL}[RATE]))", "{{outcome}}")],
            unit="reqps",
            stacked=True,
        ),
    ),
)


def _heatmap(title: str, metric: str) -> Panel:
    return Panel(
        title,
        [Query(f"sum by (le) (increase({metric}_bucket{{MODEL}}[RATE]))", "{{le}}")],
        kind="heatmap",
        unit="s",
        width=12,
    )


_TIME = Row(
    "Where the time goes",
    (
        Panel(
            "Queue wait, p95 by model",
            quantiles("sagecp_request_queue_wait_seconds", "MODEL", by="model"),
            unit="s",
        ),
        Panel(
            "Time to the first token, p95 by model",
            quantiles("sagecp_request_ttft_seconds", "MODEL", by="model"),
            unit="s",
        ),
        Panel(
            "Time per output token, p95 by model",
            quantiles("sagecp_request_tpot_seconds", "MODEL", by="model"),
            unit="s",
        ),
        _heatmap("Time to the first token", "sagecp_request_ttft_seconds"),
        _heatmap("Latency", "sagecp_request_latency_seconds"),
    ),
)

SLO = Dashboard(
    uid="sagecp-slo",
    title="sagecp / Objectives",
    description="How many requests met their objectives, how fast the budget burns, and where the time goes.",
    variables=(MODEL,),
    rows=(_BUDGET, _OBJECTIVES, _TIME),
)
