"""Variance of each expert's gate over the tokens: a gate that is the same for all has not been learned."""

from typing import Any

from torch import Tensor

from moe_lab.balance.scopes import LoadLoss, over_groups
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "variance")
class Variance(LoadLoss):
    """1 - 1/E - sum_i var_t(p_ti), p the clean probabilities. The sum is the diversity term of Bengio et al. 2015
    (arXiv 1511.06297); counting down from its largest value, so that the loss is 0 at its best, is ours.

    0 where every token is decided and the tokens are spread evenly; 1 - 1/E at collapse and where none is decided:
    mutual information (`entropy`) with squares in the place of logarithms. The variance over experts, of their mean
    gates, is another thing: E^2 times it is `squared_load`.
    """

    tables = 2

    def __init__(self, *, weight: Schedule = constant(0.01), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return over_groups(routing.probs_TE, groups), over_groups(routing.probs_TE.square(), groups)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        mean_GE, square_GE = means_GE
        return 1 - 1 / mean_GE.shape[1] - (square_GE - mean_GE.square()).sum(-1)
