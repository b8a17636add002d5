"""Scheduling policies: the order of waiting requests. One module each."""
