"""The MoE layer: route, gather, run experts, combine. It owns the selection bias, which a balancer may move.

Shapes: T tokens, D width, E experts.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_lab.model.experts import Experts, FeedForward
from moe_lab.routing import Assignments, Context, Router, Routing, with_outputs


class MoE(nn.Module):
    """x [T, D] -> (y [T, D], Routing). Tokens dropped by capacity get nothing here and keep their residual."""

    bias_E: Tensor

    def __init__(self, router: Router, experts: Experts, depth: int):
        super().__init__()
        self.router, self.experts = router, experts
        width = experts.shared_experts * experts.whole
        self.shared = FeedForward(router.dim, width, type(experts), depth) if width else None
        self.register_buffer("bias_E", torch.zeros(experts.num))

    def forward(self, x_TD: Tensor, ctx: Context) -> tuple[Tensor, Routing]:
        routing = self.router(x_TD, ctx)
        plan = routing.plan
        if ctx.knobs.capacity is not None and isinstance(plan, Assignments):
            plan = plan.limit(ctx.knobs.capacity, ctx.hard or self.router.k, self.experts.drop)
            routing = replace(routing, plan=plan)
        out_ND = self.experts(plan.gather(x_TD), plan.counts_E)
        y_TD = plan.combine(out_ND)
        if self.router.wants_outputs:
            routing = with_outputs(routing, out_ND)
        if routing.offset_TD is not None:
            y_TD = y_TD + routing.offset_TD.to(y_TD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, routing
