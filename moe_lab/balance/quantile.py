"""Quantile balancing: the bias that would have evened out the update's load, at once and without a step size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.balance.base import Layer
from moe_lab.balance.bias import MovesBias
from moe_lab.config import option, registered
from moe_lab.routing import Router, Routing
from moe_lab.sizes import routed

BINS = 1000


@option("balance", "quantile")
class Quantile(MovesBias):
    """b_i <- the k/E quantile, over the update's tokens, of the bias that would have let expert i in: the token's
    (k+1)-th best biased merit less the expert's own merit. In other words minus the (1 - k/E) quantile of the
    margins. Then less the mean over experts (Kimi K3's quantile balancing, known to us from its public ports).

    A histogram of 1000 bins over [min b - 1, max b + 1], in which all these lie since merits are gate values of [0, 1],
    adds up over micro-batches; the quantile is linear within a bin, as in the ports. schedule.bias_rate below 1 goes
    only that part of the way (ours; 1 is the paper). Explorers that choose otherwise are not counted.
    """

    def __init__(self):
        pass

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        assert layer.moe is not None and routing.noisy_TE is not None
        moe = layer.moe
        # -inf where an explorer leaves an expert out, which says nothing of the bias that it needs.
        merit_TE = moe.router.merit(torch.where(routing.noisy_TE.isinf(), routing.logits_TE, routing.noisy_TE))
        next_T1 = (merit_TE + moe.bias_E).topk(moe.router.k + 1, -1).values[:, -1:]
        low, width = bins(moe.bias_E)
        bin_TE = ((next_T1 - merit_TE - low) / width).long().clamp(0, BINS - 1)
        count_EB = torch.zeros(moe.experts.num, BINS, dtype=torch.int64, device=merit_TE.device)
        return {"count_EB": count_EB.scatter_add_(1, bin_TE.T, torch.ones_like(bin_TE.T))}

    def after_step(self, layer: Layer, stats: Mapping[str, Tensor], rate: float, progress: float) -> None:
        moe = layer.moe
        assert moe is not None
        low, width = bins(moe.bias_E)
        needed_E = low + width * quantile(stats["count_EB"], moe.router.k / moe.experts.num)
        moe.bias_E += min(rate, 1.0) * (needed_E - needed_E.mean() - moe.bias_E)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        asked = f"router.k={cfg['router']['k']} of experts.num={cfg['experts']['num']}"
        E, k = routed(cfg)
        if found := super().conflicts(node, cfg):
            return found
        if registered("router")[cfg["router"]["name"]].merit is not Router.merit:
            return [f"balance.quantile: router={cfg['router']['name']} ranks by other values than gates of [0, 1]"]
        return [f"balance.quantile: nothing to choose with {asked}"] if k >= E else []


def bins(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first bin begins and how wide each is."""
    low, high = bias_E.min() - 1, bias_E.max() + 1
    return low, (high - low) / BINS


def quantile(count_EB: Tensor, share: float) -> Tensor:
    """Where each row's running count reaches `share` of its total, in bins from the left, linear within a bin."""
    upto_EB = count_EB.cumsum(-1)
    wanted_E1 = share * upto_EB[:, -1:].float()
    bin_E1 = (upto_EB < wanted_E1).sum(-1, keepdim=True)
    inside_E1 = count_EB.gather(-1, bin_E1)
    before_E1 = upto_EB.gather(-1, bin_E1) - inside_E1
    return (bin_E1 + (wanted_E1 - before_E1) / inside_E1).squeeze(-1)
