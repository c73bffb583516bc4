"""Entropy of the mean gate, of each token's gate, or their difference."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from moe_lab.balance.scopes import TINY, LoadLoss, over_groups
from moe_lab.config import option
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant


@option("balance", "entropy")
class Entropy(LoadLoss):
    """of=mean: log E - H(P), P the mean clean probability. Pushes the mean gate to uniform and leaves each token free
    to be decided. 0 at balance, log E at collapse.
    of=token: mean_t H(p_t). Makes each token decided and balances nothing. log E where none is decided, 0 at collapse.
    of=mutual_information: log E - (H(P) - mean_t H(p_t)), their sum. 0 where every token is decided and they are
    spread evenly; log E at collapse, and log E where none is decided.

    Source: information maximisation (RIM, Krause et al. 2010), whose loss is mutual_information's less log E.
    """

    def __init__(
        self,
        *,
        weight: Schedule = constant(0.01),
        of: Literal["mean", "token", "mutual_information"] = "mean",
        **common: Any,
    ):
        super().__init__(weight=weight, **common)
        self.of = of
        self.tables = 2 if of == "mutual_information" else 1

    @classmethod
    def spreads(cls, node: Mapping[str, Any]) -> bool:
        return node.get("of") != "token"

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        p_TE = routing.probs_TE
        tables = []
        if self.of != "token":
            tables.append(over_groups(p_TE, groups))
        if self.of != "mean":
            tables.append(over_groups(-p_log_p(p_TE), groups))
        return tuple(tables)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        if self.of == "token":
            return means_GE[0].sum(-1)
        balance_G = math.log(means_GE[0].shape[1]) + p_log_p(means_GE[0]).sum(-1)
        return balance_G if self.of == "mean" else balance_G + means_GE[1].sum(-1)


def p_log_p(p: Tensor) -> Tensor:
    return p * p.clamp_min(TINY).log()
