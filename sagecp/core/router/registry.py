"""Routing strategies and load balancers by name."""

from __future__ import annotations

import random

from sagecp.core.parameters import Parameter
from sagecp.core.registry import Registry
from sagecp.core.router.affinity import AffinityStrategy
from sagecp.core.router.balancers.least_connections import LeastConnectionsBalancer
from sagecp.core.router.balancers.least_response_time import LeastResponseTimeBalancer
from sagecp.core.router.balancers.power_of_two import PowerOfTwoBalancer
from sagecp.core.router.balancers.predicted_latency import PredictedLatencyBalancer
from sagecp.core.router.balancers.weighted_round_robin import WeightedRoundRobinBalancer
from sagecp.core.router.base import LoadBalancer, RoutingStrategy, ScorerContext
from sagecp.core.router.load_balanced import LoadBalancedStrategy
from sagecp.core.router.locality import LocalityStrategy
from sagecp.core.router.random_choice import RandomStrategy
from sagecp.core.router.round_robin import RoundRobinStrategy

ROUTING_STRATEGIES: Registry[RoutingStrategy] = Registry(
    "routing strategy",
    [
        (AffinityStrategy.name, AffinityStrategy),
        (LoadBalancedStrategy.name, LoadBalancedStrategy),
        (LocalityStrategy.name, LocalityStrategy),
        (RandomStrategy.name, RandomStrategy),
        (RoundRobinStrategy.name, RoundRobinStrategy),
    ],
)

LOAD_BALANCERS: Registry[LoadBalancer] = Registry(
    "load balancer",
    [
        (LeastConnectionsBalancer.name, LeastConnectionsBalancer),
        (LeastResponseTimeBalancer.name, LeastResponseTimeBalancer),
        (PowerOfTwoBalancer.name, PowerOfTwoBalancer),
        (PredictedLatencyBalancer.name, PredictedLatencyBalancer),
        (WeightedRoundRobinBalancer.name, WeightedRoundRobinBalancer),
    ],
)

ROUTER_PARAMETERS: tuple[Parameter, ...] = tuple(
    parameter
    for scorers in (ROUTING_STRATEGIES, LOAD_BALANCERS)
    for name in scorers.names
    for parameter in scorers.get(name).PARAMETERS
)
"""Parameters of all strategies and balancers."""


def make_strategy(routing_strategy: str, load_balancer: str, generator: random.Random) -> RoutingStrategy:
    """Build a strategy and its balancer from their names.

    Raises:
        UnknownNameError: One of the names is not known.
    """
    strategy = ROUTING_STRATEGIES.get(routing_strategy)
    balancer = LOAD_BALANCERS.get(load_balancer)
    context = ScorerContext(generator)
    return strategy(context, balancer(context))
