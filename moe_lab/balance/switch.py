"""Switch Transformer's load-balancing loss."""

from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "switch")
class Switch(Balancer):
    """E * sum_i f_i P_i per layer (arXiv 2101.03961): f the share of assignments (no gradient), P the mean clean
    probability. 1 at balance; E/k at collapse, since no expert can get more than one of a token's k assignments.
    """

    def __init__(self, *, weight: Schedule = constant(0.01)):
        self.weight = weight

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        selected_E = routing.plan.selected_E
        f_E = selected_E / selected_E.sum()
        return selected_E.shape[0] * (f_E * routing.probs_TE.mean(0)).sum()
