"""Divergence of the mean gate from uniform, in the direction that does not let go of a dead expert."""

import math
from typing import Any

from torch import Tensor

from moe_lab.balance.scopes import TINY, LoadLoss, over_groups
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "kl_uniform")
class KLUniform(LoadLoss):
    """KL(uniform || P) = -log E - mean_i log P_i, P the mean clean probability. (KL(P || uniform) is `entropy`.)

    0 at balance; without bound towards collapse, where each dead expert adds -1/E log P_i. Its logits get -1/E in
    all, however dead it is, while the push of `entropy`, `switch` or a squared load dies with P_i (below 1e-30 this
    one does too).
    """

    def __init__(self, *, weight: Schedule = constant(0.01), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return (over_groups(routing.probs_TE, groups),)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        (mean_GE,) = means_GE
        return -math.log(mean_GE.shape[1]) - mean_GE.clamp_min(TINY).log().mean(-1)
