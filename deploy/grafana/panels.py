"""Pieces of Grafana dashboards as plain data: panels, their queries, and their places on a grid of 24."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
GRID_WIDTH = 24
# Of the JSON that is written; Grafana 10 and later read it and move it on by themselves.
SCHEMA_VERSION = 39


# What expressions say in capitals: the choices at the top of a dashboard, and Grafana's window for rates.
_WORDS = {
    "JOB": 'job=~"$job"',
    "MODEL": 'job=~"$job", model=~"$model"',
    "INSTANCE": 'job=~"$job", model=~"$model", instance_id=~"$instance_id"',
    "GPU": 'job=~"$job", instance_id=~"$instance_id"',
    "RATE": "$__rate_interval",
}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


def expand(expr: str) -> str:
    """Return an expression with its words in capitals replaced: ``up{JOB}`` is ``up{job=~"$job"}``."""
    return _WORD.sub(lambda word: _WORDS[word.group()], expr)


@dataclass(frozen=True)
class Query:
    """A PromQL expression, with :func:`expand`'s words, and how its series are called."""

    expr: str
    legend: str = "__auto"


def summed_rate(metric: str, selector: str, by: str) -> Query:
    """Return the query of a counter's rate, summed by labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return Query(f"sum by ({by}) (rate({metric}{{{selector}}}[RATE]))", legend)


def quantiles(metric: str, selector: str, by: str = "") -> list[Query]:
    """Return the queries of three quantiles of a histogram, or of one by a label."""
    labels = f"{by}, le" if by else "le"
    chosen = [(0.95, f"p95 {{{{{by}}}}}")] if by else [(0.5, "p50"), (0.95, "p95"), (0.99, "p99")]
    return [
        Query(
            f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}[RATE])))",
            legend,
        )
        for share, legend in chosen
    ]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it shows.
        queries: What it asks.
        kind: ``timeseries``, ``stat``, ``bargauge``, ``table`` or ``heatmap``.
        unit: Grafana's name of the unit: ``s``, ``bytes``, ``percentunit``, ``short``, ...
        description: What to make of it.
        width: Of 24.
        height: In rows of the grid.
        stacked: Whether series add up.
        limits: Values from which on it is orange and red.
        maximum: Upper end of the axis; ``None``: as it comes.
    """

    title: str
    queries: Sequence[Query]
    _: KW_ONLY
    kind: str = "timeseries"
    unit: str = "short"
    description: str = ""
    width: int = 8
    height: int = 8
    stacked: bool = False
    limits: tuple[float, float] | None = None
    maximum: float | None = None

    def to_json(self, number: int, x: int, y: int) -> Json:
        """Return the panel at a place."""
        defaults: Json = {"unit": self.unit, "min": 0, "custom": {}}
        if self.maximum is not None:
            defaults["max"] = self.maximum
        if self.limits is not None:
            orange, red = self.limits
            steps = [("green", None), ("orange", orange), ("red", red)]
            defaults["thresholds"] = {
                "mode": "absolute",
                "steps": [{"color": color, "value": value} for color, value in steps],
            }
            defaults["color"] = {"mode": "thresholds" if self.kind != "timeseries" else "palette-classic"}
        if self.kind == "timeseries":
            defaults["custom"] = {
                "fillOpacity": 20 if self.stacked else 5,
                "lineWidth": 1,
                "showPoints": "never",
                "stacking": {"mode": "normal" if self.stacked else "none"},
            }
        return {
            "id": number,
            "title": self.title,
            "description": self.description,
            "type": self.kind,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": self._options(),
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": DATASOURCE,
                    "expr": expand(query.expr),
                    "legendFormat": query.legend,
                    "instant": self.kind in {"stat", "bargauge", "table"},
                    "range": self.kind not in {"stat", "bargauge", "table"},
                    **({"format": "table"} if self.kind == "table" else {}),
                    **({"format": "heatmap"} if self.kind == "heatmap" else {}),
                }
                for index, query in enumerate(self.queries)
            ],
            **({"transformations": _TABLE_TRANSFORMATIONS} if self.kind == "table" else {}),
        }

    def _options(self) -> Json:
        if self.kind == "timeseries":
            return {
                "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        if self.kind == "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        if self.kind == "bargauge":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
        if self.kind == "heatmap":
            return {"calculate": False, "yAxis": {"unit": self.unit}, "color": {"scheme": "Spectral"}}
        return {"showHeader": True}


# Several instant queries become the columns of one table.
_TABLE_TRANSFORMATIONS: list[Json] = [
    {"id": "merge", "options": {}},
    {"id": "organize", "options": {"excludeByName": {"Time": True, "__name__": True, "job": True}}},
]


def top(title: str, expr: str, legend: str = "{{instance_id}}", **more: Any) -> Panel:  # noqa: ANN401 - Panel has the types
    """Return a panel of the 20 largest series: a fleet has thousands."""
    return Panel(title, [Query(f"topk(20, {expr})", legend)], **more)


def figure(title: str, expr: str, **more: Any) -> Panel:  # noqa: ANN401 - as above
    """Return a panel with one number."""
    return Panel(title, [Query(expr)], kind="stat", width=4, height=5, **more)


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label.

    Attributes:
        name: Of the variable.
        label: Whose values.
        of: Selector of the series that carry it.
    """

    name: str
    label: str
    of: str

    def to_json(self) -> Json:
        """Return the variable."""
        query = f"label_values({expand(self.of)}, {self.label})"
        return {
            "name": self.name,
            "label": self.name.replace("_", " "),
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": "variable"},
            "definition": query,
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": "All", "value": "$__all"},
        }


JOB = Variable(name="job", label="job", of="sagecp_build_info")
MODEL = Variable(name="model", label="model", of="sagecp_instances{JOB}")
INSTANCE = Variable(name="instance_id", label="instance_id", of="sagecp_instance_state{MODEL}")
GPU_INSTANCE = Variable(name="instance_id", label="instance_id", of="sagecp_gpu_info{JOB}")


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: Stable name, also of its file.
        title: What it shows.
        description: Whom it helps with what.
        rows: From top to bottom.
        variables: Choices beside data source and job.
    """

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = field(default_factory=tuple)

    def to_json(self) -> Json:
        """Return the dashboard as Grafana imports it."""
        panels: list[Json] = []
        y = 0
        for row in self.rows:
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1},
                    "panels": [],
                }
            )
            y += 1
            x = height = 0
            for panel in row.panels:
                if x + panel.width > GRID_WIDTH:
                    x, y, height = 0, y + height, 0
                panels.append(panel.to_json(len(panels) + 1, x, y))
                x += panel.width
                height = max(height, panel.height)
            y += height
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["sagecp"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": []},
            "links": [
                {
                    "title": "sagecp",
                    "type": "dashboards",
                    "tags": ["sagecp"],
                    "asDropdown": True,
                    "keepTime": True,
                }
            ],
            "templating": {
                "list": [
                    {
                        "name": "datasource",
                        "label": "data source",
                        "type": "datasource",
                        "query": "prometheus",
                    },
                    *(variable.to_json() for variable in (JOB, *self.variables)),
                ]
            },
            "panels": panels,
        }
