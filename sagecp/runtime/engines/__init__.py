"""Clients for inference engines, behind the port in `base`."""
