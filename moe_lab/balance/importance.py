"""Shazeer's importance loss."""

from typing import Any

from torch import Tensor

from moe_lab.balance.base import cv_squared
from moe_lab.balance.scopes import LoadLoss
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "importance")
class Importance(LoadLoss):
    """CV(importance)^2, importance the sum of each expert's gate weights over the batch (arXiv 1701.06538).

    0 at balance, E - 1 at collapse (E/k - 1 where k experts share all weight equally). An expert that no token chose
    has no weight that could grow: it gets no push.
    """

    def __init__(self, *, weight: Schedule = constant(0.1), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return (routing.plan.mass(groups),)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        return cv_squared(means_GE[0])
