"""What happens around every call: identity, error mapping, log, metrics."""
