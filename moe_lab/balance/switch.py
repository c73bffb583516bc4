"""Switch Transformer's load-balancing loss."""

from typing import Any

from torch import Tensor

from moe_lab.balance.scopes import LoadLoss, chosen, over_groups
from moe_lab.config import option
from moe_lab.plans import shares
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "switch")
class Switch(LoadLoss):
    """E * sum_i f_i P_i per layer (arXiv 2101.03961): f the share of assignments (no gradient), P the mean clean
    probability. 1 at balance; E/k at collapse, since no expert can get more than one of a token's k assignments.
    """

    tables = 2

    def __init__(self, *, weight: Schedule = constant(0.01), **common: Any):
        super().__init__(weight=weight, **common)

    def scores(self, routing: Routing) -> Tensor:
        """A distribution per token, [T, E]."""
        return routing.probs_TE

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return chosen(routing, groups), over_groups(self.scores(routing), groups)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        selected_GE, mean_GE = means_GE
        return mean_GE.shape[1] * (shares(selected_GE) * mean_GE).sum(-1)
