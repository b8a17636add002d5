"""Figures out of a text in Prometheus's format."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def sample_of(text: str, name: str, **labels: str) -> float | None:
    """Return the one sample with this name and these labels; ``None``: there is none."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None
