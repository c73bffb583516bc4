"""Squared deviation of the soft load from an even one."""

from typing import Any

from torch import Tensor

from moe_lab.balance.scopes import LoadLoss, over_groups
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "squared_load")
class SquaredLoad(LoadLoss):
    """E * sum_i (P_i - 1/E)^2, P the mean clean probability: CV(P)^2. Bengio et al. 2015 (arXiv 1511.06297) have the
    sum for gates that are to be on at a given rate; the factor E, so that values compare with importance, is ours.

    0 at balance, E - 1 at collapse. The push on a dead expert dies with its probability.
    """

    def __init__(self, *, weight: Schedule = constant(0.01), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return (over_groups(routing.probs_TE, groups),)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        (mean_GE,) = means_GE
        E = mean_GE.shape[1]
        return E * (mean_GE - 1 / E).square().sum(-1)
