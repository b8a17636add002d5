"""Keeps what must survive a restart: the port, its records, and one module per store."""
