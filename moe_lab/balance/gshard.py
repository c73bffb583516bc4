"""GShard's auxiliary loss: counts of first choices against mean gates."""

from typing import Any

from torch import Tensor

from moe_lab.balance.scopes import LoadLoss, over_groups
from moe_lab.config import option
from moe_lab.counting import count_by_group
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "gshard")
class GShard(LoadLoss):
    """E * sum_e (c_e / T) m_e: c how many tokens have e as their first choice (no gradient), m the mean clean
    probability (arXiv 2006.16668, where it is 1/E sum, E^2 times less; the larger scale is that of Mesh TensorFlow's
    code). 1 at balance, E at collapse onto one expert whatever k, E/k where k experts share all. A second choice counts
    for nothing.
    """

    tables = 2

    def __init__(self, *, weight: Schedule = constant(0.01), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        E = routing.probs_TE.shape[1]
        first_GE = count_by_group(routing.plan.selected_TK[:, :1], E, groups)
        return first_GE, over_groups(routing.probs_TE, groups)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        first_GE, mean_GE = means_GE
        return mean_GE.shape[1] * (first_GE * mean_GE).sum(-1)
