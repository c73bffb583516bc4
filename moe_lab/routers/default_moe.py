"""Default MoE: the running mean of what an expert says stands in for it where it does not run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.plans import shares
from moe_lab.routers.gated import Gated
from moe_lab.routing import Choices, Context, Plan, Routing, Traits
from moe_lab.schedules import Schedule, constant


@option("router", "default_moe")
class DefaultMoE(Gated):
    """y = sum of p_i E_i(x) over the k most probable experts + sum of p_i m_i over the others (arXiv 2504.12463).

    p is the softmax over all experts, so every gate gets a gradient that says something of its own expert. After each
    update m_i moves by `rate` to the mean of expert i's outputs in it, over the rows that it computed.

    Ours: m_i starts at 0, where the layer is plain top-k without renormalising; the rate; the same sum in evaluation;
    an expert that ran on no token keeps its m_i; a token that capacity drops gets nothing in the expert's place. Where
    the weights of the k are made to sum to one (order, renormalise), each m_i keeps its share of the gate over all;
    with k=1 the task then trains the router through these alone, once the first update has moved them from 0.
    """

    wants_outputs = True
    mean_ED: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        rate: Schedule = constant(0.05),
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.rate = rate
        self.register_buffer("mean_ED", torch.zeros(num_experts, dim))

    def offset(self, plan: Plan, gates_TE: Tensor, ctx: Context) -> Tensor:
        if self.among_chosen:  # of sigmoids too
            gates_TE = shares(gates_TE)
        # One more column takes the slots that hold no choice.
        runs_TX = torch.zeros_like(gates_TE[:, :1], dtype=torch.bool).repeat(1, self.num_experts + 1)
        runs_TE = runs_TX.scatter(1, plan.selected_TK, True)[:, :-1]
        return gates_TE.masked_fill(runs_TE, 0) @ self.mean_ED

    def statistics(self, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
        return {"output_sum_ED": routing.extra["output_sum_ED"], "rows_E": routing.plan.counts_E}

    def after_step(self, stats: Mapping[str, Tensor], progress: float) -> None:
        rows_E1 = stats["rows_E"][:, None]
        now_ED = stats["output_sum_ED"] / rows_E1.clamp_min(1)
        self.mean_ED += self.rate.at(progress) * (rows_E1 > 0) * (now_ED - self.mean_ED)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        found = super().traits(node, E)
        return found if node["k"] >= E else replace(found, live=True, rows="all")  # through the stand-ins
