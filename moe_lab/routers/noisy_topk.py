"""Shazeer's noisy top-k gating: a learned amount of Gaussian noise per token and expert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Choices, Context, Plan, Scored, Traits
from moe_lab.seeding import parameter


@option("router", "noisy_topk")
class NoisyTopK(Scored):
    """H = xW + N(0,1) softplus(x W_noise); the gate is the softmax over the k largest of H (arXiv 1701.06538).

    Both matrices start at zero: no signal and some noise. k=1 leaves the gate at 1 and the router without a task
    gradient (verdict: frozen).
    """

    noise = "gaussian"

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 2, **common: Any):
        super().__init__(dim, num_experts, k=k, **common)
        self.weight_ED = parameter(num_experts, dim, std=0.0)
        self.noise_ED = parameter(num_experts, dim, std=0.0)

    def noise_std(self, x_TD: Tensor) -> Tensor:
        return F.softplus(F.linear(self.features(x_TD), self.noise_ED))

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        # Renormalised, the softmax over all experts is the softmax over the chosen ones.
        return self.top_k(rank_TE, gates_TE, renormalise=True)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        alone = node["k"] == 1
        return replace(super().traits(node, E), live=not alone, rows="none" if alone else "selected")
