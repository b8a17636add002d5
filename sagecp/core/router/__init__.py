"""Placement: which instance gets the next request. One module per strategy and balancer."""
