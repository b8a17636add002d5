"""Which instance does what."""

from panels import INSTANCE, MODEL, Dashboard, Panel, Query, Row, top

_HITS = "sagecp_instance_engine_prefix_cache_hit_tokens_total{INSTANCE}[RATE]"
_QUERIES = "sagecp_instance_engine_prefix_cache_query_tokens_total{INSTANCE}[RATE]"

_STATES = Row(
    "States",
    (
        Panel(
            "Instances by state",
            [Query("sum by (state) (sagecp_instances{MODEL})", "{{state}}")],
            stacked=True,
        ),
        Panel(
            "Out of the rotation",
            [Query("sagecp_instance_outage{INSTANCE} == 1", "{{instance_id}} {{kind}}")],
            description="Ejected after failures, stalled, or for a fault of a GPU.",
        ),
        top(
            "Age of the last heartbeat",
            "sagecp_instance_heartbeat_age_seconds{INSTANCE}",
            unit="s",
            limits=(3, 6),
        ),
        Panel(
            "Instances",
            [Query("sagecp_instance_state{INSTANCE} == 1"), Query("sagecp_instance_info{INSTANCE}")],
            kind="table",
            width=24,
            height=10,
        ),
    ),
)

_LOAD = Row(
    "Load",
    (
        top("Requests in flight", "sagecp_instance_requests_in_flight{INSTANCE}"),
        top(
            "Use of the concurrency limit",
            "sagecp_instance_requests_in_flight{INSTANCE}"
            " / sagecp_instance_concurrency_limit_requests{INSTANCE}",
            unit="percentunit",
        ),
        top(
            "Waiting inside engines",
            "sagecp_instance_engine_requests_waiting{INSTANCE}",
            description="Should be near 0: requests wait in the control plane, where they can be placed.",
        ),
        top("Running inside engines", "sagecp_instance_engine_requests_running{INSTANCE}"),
        top(
            "KV cache",
            "sagecp_instance_engine_kv_cache_usage_ratio{INSTANCE}",
            unit="percentunit",
            maximum=1,
            limits=(0.9, 0.97),
        ),
        Panel(
            "Prefix cache hits",
            [Query(f"sum by (model) (rate({_HITS})) / sum by (model) (rate({_QUERIES}))", "{{model}}")],
            unit="percentunit",
            maximum=1,
        ),
    ),
)

_SPEED = Row(
    "Speed",
    (
        top(
            "Tokens produced per second",
            "rate(sagecp_instance_engine_generation_tokens_total{INSTANCE}[RATE])",
        ),
        top(
            "Slowdown per token",
            "sagecp_instance_tpot_slowdown_ratio{INSTANCE}",
            description="Learned: 1 is as fast as its kind.",
        ),
        top("Slowdown to the first token", "sagecp_instance_ttft_slowdown_ratio{INSTANCE}"),
        top("Prefill backlog", "sagecp_instance_prefill_backlog_seconds{INSTANCE}", unit="s"),
        top("Failed attempts per second", "rate(sagecp_instance_attempts_failed_total{INSTANCE}[RATE])"),
        top("Preemptions per second", "rate(sagecp_instance_engine_preemptions_total{INSTANCE}[RATE])"),
    ),
)

FLEET = Dashboard(
    uid="sagecp-fleet",
    title="sagecp / Fleet",
    description="Which instance does what, which is out and why, which is slow.",
    variables=(MODEL, INSTANCE),
    rows=(_STATES, _LOAD, _SPEED),
)
