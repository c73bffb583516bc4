"""Experts without a network (MoE++, arXiv 2410.07348): a token that needs less computation chooses one of these.

Shapes: N rows, D width, C constant experts.
"""

import torch
from torch import Tensor, nn

from moe_lab.seeding import parameter


class Weightless(nn.Module):
    """First zero experts, E(x) = 0, then copy experts, E(x) = x, then constant experts, E(x) = a_1 x + a_2 v.

    [a_1, a_2] = softmax(W_c x). v starts from N(0, 1), as in public code, and W_c as small as router rows (ours),
    so that both begin at one half.
    """

    def __init__(self, dim: int, zero: int, copy: int, constant: int):
        super().__init__()
        self.dim, self.num, self.constant = dim, zero + copy + constant, constant
        self.zero, self.moving = zero, zero + copy  # where copy and constant experts begin
        if constant:
            self.mix_C2D = parameter(constant, 2, dim, std=0.02)
            self.v_CD = parameter(constant, dim, std=1.0)

    def forward(self, rows_ND: Tensor, place_N: Tensor) -> Tensor:
        """Row n through the expert at place_N[n] of these; a row of any other place gives 0."""
        kept_N1 = ((place_N >= self.zero) & (place_N < self.moving))[:, None].to(rows_ND.dtype)
        if not self.constant:
            return rows_ND * kept_N1
        own_NC = place_N[:, None] == torch.arange(self.moving, self.num, device=place_N.device)
        share_NC2 = (rows_ND @ self.mix_C2D.to(rows_ND.dtype).flatten(0, 1).T).unflatten(1, (-1, 2)).softmax(-1)
        share_NC2 = share_NC2 * own_NC[:, :, None]
        kept_N1 = kept_N1 + share_NC2[:, :, 0].sum(1, keepdim=True)
        return rows_ND * kept_N1 + share_NC2[:, :, 1] @ self.v_CD.to(rows_ND.dtype)

    def products(self) -> list[int]:
        """Weights that meet one row of each: none but for constant experts."""
        return [0] * self.moving + [3 * self.dim] * self.constant
