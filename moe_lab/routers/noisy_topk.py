"""Shazeer's noisy top-k gating: a learned amount of Gaussian noise per token and expert."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import option
from moe_lab.precise import linear
from moe_lab.routers.gated import Gated, Order
from moe_lab.routing import Choices
from moe_lab.seeding import parameter


@option("router", "noisy_topk")
class NoisyTopK(Gated):
    """H = xW + N(0,1) softplus(x W_noise); the gate is the softmax over the k largest of H (arXiv 1701.06538).

    Both matrices start at zero: no signal and some noise. k=1 leaves that gate at 1 and the router without a task
    gradient (verdict: frozen); order=gate_first does not, nor does gate=sigmoid.
    """

    noise = "gaussian"

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 2, order: Order = "topk_first", **common: Any):
        super().__init__(dim, num_experts, k=k, order=order, **common)
        self.weight_ED = parameter(num_experts, self.scored_dim, std=0.0)
        self.noise_ED = parameter(num_experts, self.scored_dim, std=0.0)

    def noise_std(self, seen_TX: Tensor) -> Tensor:
        return F.softplus(linear(seen_TX, self.noise_ED))
