"""Simulation of whole fleets: traces in, engines modelled step by step, statistics out."""
