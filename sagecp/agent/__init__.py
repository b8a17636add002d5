"""The daemon beside an engine: probes, registration, heartbeats."""
