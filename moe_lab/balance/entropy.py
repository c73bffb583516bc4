"""Entropy of the mean gate."""

import math

from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "entropy")
class Entropy(Balancer):
    """log E - H(mean_t p_t): pushes the batch's mean gate to uniform and leaves each token free to be decided.

    0 at balance, log E at collapse. The balance half of mutual-information losses (RIM, Krause et al. 2010).
    """

    def __init__(self, *, weight: Schedule = constant(0.01)):
        self.weight = weight

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        # The floor keeps the gradient finite where every token's probability underflowed.
        mean_E = routing.probs_TE.mean(0).clamp_min(1e-30)
        return math.log(mean_E.shape[0]) + (mean_E * mean_E.log()).sum()
