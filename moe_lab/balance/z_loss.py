"""ST-MoE's router z-loss."""

from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "z_loss")
class ZLoss(Balancer):
    """mean_t logsumexp(logits_t)^2 (arXiv 2202.08906): bounds the scale of the logits, balances nothing.

    (log E)^2 at zero logits; grows with the square of the logits, collapsed or not.
    """

    def __init__(self, *, weight: Schedule = constant(0.001)):
        self.weight = weight

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        return routing.logits_TE.logsumexp(-1).square().mean()
