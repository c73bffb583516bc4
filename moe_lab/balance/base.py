"""What balances the load: a loss on the routing, or a selection bias moved after each update.

Shapes: T tokens, E experts, K chosen per token, L MoE layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.routing import Routing


class Balancer:
    """Both hooks do nothing in the base. `loss` is per layer and unweighted; the loop averages layers and weighs it.

    `weight` is None for balancers without a loss. A balancer that `moves_bias` is given each layer's selected counts,
    summed over the micro-batches of the update.
    """

    weight: float | None = None
    moves_bias = False

    def loss(self, routing: Routing) -> Tensor:
        """0-dim fp32, with gradients to the router."""
        raise NotImplementedError

    def after_step(self, bias_E: Tensor, selected_E: Tensor, rate: float) -> None:
        """Move one layer's selection bias in place, from the counts of the update and the schedule's multiplier."""

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        return []


def cv_squared(x_E: Tensor) -> Tensor:
    """Squared coefficient of variation with the population variance: 0 at balance, E - 1 when one holds all.

    Straight from the variance: a gradient through std would be undefined at perfect balance.
    """
    return x_E.var(unbiased=False) / x_E.mean().square()


def mean_over_layers(balancer: Balancer, routings: Sequence[Routing]) -> Tensor:
    """Each layer's own loss, then their mean: pooling the layers first would hide a collapse in one of them."""
    return torch.stack([balancer.loss(routing) for routing in routings]).mean()
