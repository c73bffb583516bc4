"""DSelect-k: a differentiable choice by binary codes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.plans import Mixture, best, shares
from moe_lab.precise import linear
from moe_lab.routing import Choices, Context, Router, Routing, Touches, Traits
from moe_lab.schedules import Schedule, constant
from moe_lab.seeding import parameter


@option("router", "dselect_k")
class DSelectK(Router):
    """q = sum_s softmax(a)_s r(z_s) with k selectors s; a selector's r(z)_i multiplies over the binary digits j of i
    S(z_j) where digit j is 1 and 1 - S(z_j) where it is 0. S is a smooth step, exactly 0 and 1 outside of `width`, so a
    selector that has made up its mind is one-hot, and gets no more gradient (arXiv 2106.03760, conditioned on the
    token). Until then up to E experts have weight: all run, at E / k times the FLOPs of a choice, to the end.

    `objective` (from the authors' code, where both are sums over the batch; means here): `entropy` times the entropies
    of the selectors, 0 where all are one-hot and k log E at first. Where E is no power of two, codes of no expert take
    weight that is lost: plus sum_s 1 / (weight on experts) - 1, which is 0 once there is none.

    Ours: no bias; the k largest q at temperature 1 count as the choice, a second one also where its weight is 0; the
    temperature divides a and z; log max(q, 1e-6) stands for logits.
    """

    scored = False
    every_expert = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        width: Annotated[float, Field(gt=0)] = 1.0,
        entropy: Schedule = constant(0.001),
    ):
        super().__init__(dim, num_experts, k=k)
        self.width, self.curves = width, {"entropy": entropy}
        self.digits = (num_experts - 1).bit_length()
        # The spread of the authors' uniform distributions, on [-width / 100, width / 100] and [-0.05, 0.05].
        self.digit_PD = parameter(k * self.digits, dim, std=width / 100 / 3**0.5)
        self.share_KD = parameter(k, dim, std=0.05 / 3**0.5)

    def route(self, x_TD: Tensor, ctx: Context) -> Routing:
        z_TKJ = linear(x_TD, self.digit_PD).view(len(x_TD), self.k, self.digits)
        a_TK = linear(x_TD, self.share_KD)
        t = ctx.knobs.temperature
        chosen_TKE, chosen_TE = self._weights(z_TKJ / t, a_TK / t)
        clean_TE = self._weights(z_TKJ, a_TK)[1]
        extra = {
            "entropy_T": -(chosen_TKE * (chosen_TKE + 1e-6).log()).sum((1, 2)),
            "entropy_weight": ctx.strengths.get("entropy", a_TK.new_zeros(())),
            "unreachable_T": (1 / chosen_TKE.sum(-1).clamp_min(1e-3) - 1).sum(1),
        }
        plan = Mixture(chosen_TE, best(clean_TE.detach(), self.k))
        return Routing(plan, clean_TE.clamp_min(1e-6).log(), shares(chosen_TE + 1e-9), extra=extra)

    def _weights(self, z_TKJ: Tensor, a_TK: Tensor) -> tuple[Tensor, Tensor]:
        """What each selector gives each expert, [T, K, E], and their mixture [T, E]."""
        code_TKC = z_TKJ.new_ones(*a_TK.shape, 1)
        for step_TK in smooth_step(z_TKJ / self.width).unbind(-1):  # codes by the digits so far, the highest first
            code_TKC = torch.stack([code_TKC * (1 - step_TK[..., None]), code_TKC * step_TK[..., None]], -1).flatten(-2)
        each_TKE = code_TKC[..., : self.num_experts]
        return each_TKE, (a_TK.softmax(-1)[..., None] * each_TKE).sum(1)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        why = "makes weights of binary digits; its experts have no scores of their own"
        return {"logits": why, "choice": why}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), live=E > 1, rows="shared")

    def objective(self, routing: Routing, loss_T: Tensor, counted_T: Tensor) -> Tensor:
        extra = routing.extra
        return extra["entropy_weight"] * extra["entropy_T"].mean() + extra["unreachable_T"].mean()


def smooth_step(z: Tensor) -> Tensor:
    """0 up to -1/2, 1 from 1/2, and -2 z^3 + 3/2 z + 1/2 between (arXiv 2002.07772)."""
    t = (z + 0.5).clamp(0, 1)
    return t * t * (3 - 2 * t)
