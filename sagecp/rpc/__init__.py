"""Speaks gRPC: converts, maps errors, serves. Decides nothing."""
