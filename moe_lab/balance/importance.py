"""Shazeer's importance loss."""

from torch import Tensor

from moe_lab.balance.base import Balancer, Layer, cv_squared
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "importance")
class Importance(Balancer):
    """CV(importance)^2, importance the sum of each expert's gate weights over the batch (arXiv 1701.06538).

    0 at balance, E - 1 at collapse (E/k - 1 where k experts share all weight equally).
    """

    def __init__(self, *, weight: Schedule = constant(0.1)):
        self.weight = weight

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        return cv_squared(routing.plan.importance_E())
