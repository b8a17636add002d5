"""Parallelism planning: how to spread a model over GPUs."""
