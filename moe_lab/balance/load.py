"""Shazeer's load loss: the expected number of tokens per expert, smooth through the router's noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.balance.base import cv_squared
from moe_lab.balance.scopes import LoadLoss, over_groups
from moe_lab.config import option, registered
from moe_lab.routing import Routing
from moe_lab.schedules import Schedule, constant
from moe_lab.sizes import routed


@option("balance", "load")
class Load(LoadLoss):
    """CV(load)^2 with load_i = sum_x P(x, i), the probability that fresh noise on expert i would still have it
    chosen (arXiv 1701.06538, appendix A). 0 at balance, E/k - 1 at collapse onto k experts.
    """

    def __init__(self, *, weight: Schedule = constant(0.1), **common: Any):
        super().__init__(weight=weight, **common)

    def sums(self, routing: Routing, groups: int) -> tuple[Tensor, ...]:
        return (over_groups(chances(routing), groups),)

    def of_means(self, *means_GE: Tensor) -> Tensor:
        return cv_squared(means_GE[0])

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        router = cfg["router"]
        kind = registered("router")[router["name"]]
        if not kind.scored:
            return [f"balance.load: it is about each token's k best scores, router={router['name']} chooses otherwise"]
        noise = kind.noise
        if noise != "gaussian" and "gaussian" not in cfg["explore"]:
            return [
                f"balance.load: needs Gaussian noise on the logits, router={router['name']} has {noise}; "
                "try router=noisy_topk or explore=[gaussian]"
            ]
        for name in cfg["balance"]:
            if registered("balance")[name].moves_bias:
                return [f"balance.load: knows nothing of the bias that balance.{name} moves; take one of them"]
        E, k = routed(cfg)
        if k >= E:
            asked = f"router.k={router['k']} of experts.num={cfg['experts']['num']}"
            return [f"balance.load: nothing to choose with {asked}"]
        return []


def chances(routing: Routing) -> Tensor:
    """Phi((clean_i - k-th largest noisy logit among the others) / std_i), fp32 [T, E]; sums to about k per token."""
    assert routing.noisy_TE is not None and routing.noise_std_TE is not None
    k = routing.plan.selected_TK.shape[1]
    top = routing.noisy_TE.topk(k + 1, -1).values
    inside_TE = routing.noisy_TE >= top[:, k - 1 : k]
    threshold_TE = torch.where(inside_TE, top[:, k : k + 1], top[:, k - 1 : k])
    p_TE = torch.special.ndtr((routing.logits_TE - threshold_TE) / routing.noise_std_TE.clamp_min(1e-6))
    # Where a schedule has silenced the noise the load is the count itself: a step, which has no gradient.
    return torch.where(routing.noise_std_TE > 1e-6, p_TE, inside_TE.to(p_TE.dtype))
