"""Routing strategies and load balancers by name."""

from __future__ import annotations

import random

from sagecp.core.registry import Registry
from sagecp.core.router.balancers.least_connections import LeastConnectionsBalancer
from sagecp.core.router.balancers.predicted_latency import PredictedLatencyBalancer
from sagecp.core.router.base import LoadBalancer, RoutingContext, RoutingStrategy
from sagecp.core.router.load_balanced import LoadBalancedStrategy
from sagecp.core.router.random_choice import RandomStrategy
from sagecp.core.router.round_robin import RoundRobinStrategy

ROUTING_STRATEGIES: Registry[RoutingStrategy] = Registry(
    "routing strategy",
    [
        (LoadBalancedStrategy.name, LoadBalancedStrategy),
        (RandomStrategy.name, RandomStrategy),
        (RoundRobinStrategy.name, RoundRobinStrategy),
    ],
    planned=("affinity", "locality"),
)

LOAD_BALANCERS: Registry[LoadBalancer] = Registry(
    "load balancer",
    [
        (LeastConnectionsBalancer.name, LeastConnectionsBalancer),
        (PredictedLatencyBalancer.name, PredictedLatencyBalancer),
    ],
    planned=("weighted_round_robin", "least_response_time", "power_of_two"),
)


def make_strategy(routing_strategy: str, load_balancer: str, generator: random.Random) -> RoutingStrategy:
    """Build a strategy and its balancer from their names.

    Raises:
        UnknownNameError: One of the names is not known.
    """
    strategy = ROUTING_STRATEGIES.get(routing_strategy)
    balancer = LOAD_BALANCERS.get(load_balancer)()
    return strategy(RoutingContext(balancer, generator))
