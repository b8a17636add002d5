"""Simulated engines, and later the virtual-time simulator that drives the core."""
