"""Metrics of a server under test, read as Prometheus would read them."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.rpc_rig import Rig

Samples = dict[tuple[Any, ...], float]
"""Values by name and labels: ``samples["sagecp_instances", ("model", "m"), ("state", "READY")]``."""


def read_samples(text: str) -> Samples:
    """Return every sample of a text, with its labels in the order of their names.

    Raises:
        AssertionError: A sample is there twice.
    """
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


async def samples_of(rig: Rig) -> Samples:
    """Return the present metrics of a server."""
    return read_samples((await rig.server.exporter.render()).decode())
