"""Benchmarks. Each compares alternatives within one run and prints medians; nothing asserts on them."""
