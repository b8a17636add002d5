"""Is it well?"""

from panels import MODEL, Dashboard, Panel, Query, Row, figure, quantiles, summed_rate

_NOW = Row(
    "Now",
    (
        figure("Instances that take work", 'sum(sagecp_instances{MODEL, state="READY"})'),
        figure(
            "Instances that do not", 'sum(sagecp_instances{MODEL, state=~"UNHEALTHY|LOST"})', limits=(1, 5)
        ),
        figure("Requests that wait", "sum(sagecp_queue_class_requests{JOB})", limits=(100, 10_000)),
        figure("Requests on engines", "sum(sagecp_requests_active{JOB})"),
        figure(
            "Objectives missed (1 h)",
            'sum(rate(sagecp_slo_requests_total{MODEL, objective="all", outcome="violated"}[1h]))'
            ' / sum(rate(sagecp_slo_requests_total{MODEL, objective="all"}[1h]))',
            unit="percentunit",
            limits=(0.01, 0.05),
            description="Of the requests that had any.",
        ),
        figure("Mean GPU utilization", "avg(sagecp_gpu_utilization_ratio{JOB})", unit="percentunit"),
    ),
)

_REQUESTS = Row(
    "Requests",
    (
        Panel(
            "Requests per second, by how they ended",
            [summed_rate("sagecp_requests_ended_total", "MODEL", "state")],
            unit="reqps",
            stacked=True,
        ),
        Panel("Latency", quantiles("sagecp_request_latency_seconds", "MODEL"), unit="s"),
        Panel("Time to the first token", quantiles("sagecp_request_ttft_seconds", "MODEL"), unit="s"),
        Panel("Time per output token", quantiles("sagecp_request_tpot_seconds", "MODEL"), unit="s"),
        Panel(
            "Tokens per second",
            [
                Query("sum(rate(sagecp_input_tokens_total{MODEL}[RATE]))", "prompt"),
                Query("sum(rate(sagecp_cached_input_tokens_total{MODEL}[RATE]))", "of these cached"),
                Query("sum(rate(sagecp_output_tokens_total{MODEL}[RATE]))", "output"),
            ],
        ),
        Panel(
            "Refused and retried",
            [
                Query(
                    "sum by (reason) (rate(sagecp_requests_refused_total{JOB}[RATE]))", "refused: {{reason}}"
                ),
                Query("sum by (reason) (rate(sagecp_attempts_lost_total{MODEL}[RATE]))", "lost: {{reason}}"),
            ],
            unit="reqps",
        ),
    ),
)


_COST = Row(
    "Cost (where prices are known)",
    (
        Panel(
            "Engines per hour",
            [
                Query("3600 * sum(rate(sagecp_instance_busy_cost_usd_total{MODEL}[RATE]))", "busy"),
                Query("3600 * sum(rate(sagecp_instance_idle_cost_usd_total{MODEL}[RATE]))", "idle"),
            ],
            unit="currencyUSD",
            stacked=True,
            description="What the registered instances cost. Idle: nothing runs there.",
        ),
        Panel(
            "Requests per hour, by model",
            [Query("3600 * sum by (model) (rate(sagecp_request_cost_usd_total{MODEL}[RATE]))", "{{model}}")],
            unit="currencyUSD",
            stacked=True,
            description="Counted when requests end.",
        ),
        Panel(
            "Requests per hour, the dearest tenants",
            [
                Query(
                    "topk(10, 3600 * sum by (tenant) (rate(sagecp_tenant_cost_usd_total{JOB}[RATE])))",
                    "{{tenant}}",
                )
            ],
            unit="currencyUSD",
        ),
        Panel(
            "Per million output tokens",
            [
                Query(
                    "1e6 * sum by (model) (rate(sagecp_request_cost_usd_total{MODEL}[RATE]))"
                    " / sum by (model) (rate(sagecp_output_tokens_total{MODEL}[RATE]))",
                    "{{model}}",
                )
            ],
            unit="currencyUSD",
        ),
    ),
)


def _own(title: str, expr: str, unit: str = "short", **more: object) -> Panel:
    return Panel(title, [Query(expr, "{{instance}}")], unit=unit, width=6, **more)  # type: ignore[arg-type]


_CONTROL_PLANE = Row(
    "Control plane",
    (
        _own(
            "CPU",
            "rate(process_cpu_seconds_total{JOB}[RATE])",
            "percentunit",
            limits=(0.7, 0.9),
            description="100 % is one core, and the end of what the event loop can do.",
        ),
        _own("Memory", "process_resident_memory_bytes{JOB}", "bytes"),
        _own("Event loop lag", "sagecp_event_loop_lag_seconds{JOB}", "s", limits=(0.1, 0.25)),
        Panel(
            "RPCs per second",
            [summed_rate("sagecp_rpc_handled_total", "JOB", "method, code")],
            unit="reqps",
            width=6,
        ),
        Panel("Open RPCs", [Query("sum by (method) (sagecp_rpc_open{JOB})", "{{method}}")], width=6),
        _own("Journal: records that wait", "sagecp_journal_records_pending{JOB}"),
        _own("Journal: records per second", "rate(sagecp_journal_records_written_total{JOB}[RATE])"),
        _own(
            "Journal: time per transaction",
            "rate(sagecp_journal_commit_seconds_total{JOB}[RATE])"
            " / rate(sagecp_journal_commits_total{JOB}[RATE])",
            "s",
            limits=(0.05, 0.25),
        ),
        _own("Journal: size", "sagecp_journal_size_bytes{JOB}", "bytes"),
    ),
)

OVERVIEW = Dashboard(
    uid="sagecp-overview",
    title="sagecp / Overview",
    description="Is it well? Requests, their latency, the fleet and the control plane in one look.",
    variables=(MODEL,),
    rows=(_NOW, _REQUESTS, _COST, _CONTROL_PLANE),
)
