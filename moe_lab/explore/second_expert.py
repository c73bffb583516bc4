"""A second expert that takes part by chance."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.explore.base import SetChoice, runs_every_expert
from moe_lab.plans import Assignments, shares
from moe_lab.routing import Draw, Plan
from moe_lab.schedules import Schedule, constant
from moe_lab.sizes import routed


@option("explore", "second_expert")
class SecondExpert(SetChoice):
    """A token's second expert stays with probability min(1, g2 / strength); strength 0 keeps them all.

    GShard (arXiv 2006.16668, algorithm 1, as we remember it) keeps it where 2 g2 > u, a strength of 0.5;
    Mesh-TensorFlow's policy "threshold" has 0.2. g2 is the second gate value over the sum of both, or as it is. The
    first expert's weight stays as it was, and capacity counts only the experts that are left.
    """

    draws = {"tokens": Draw("uniform", "T")}

    def __init__(self, *, strength: Schedule = constant(0.5), of: Literal["share", "gate"] = "share"):
        super().__init__(strength=strength)
        self.of = of

    def plan(self, plan: Plan, gates_TE: Tensor, drawn, strength: Tensor) -> Plan:
        assert isinstance(plan, Assignments)
        g_TK = gates_TE.detach().gather(1, plan.expert_TK)
        second_T = (shares(g_TK) if self.of == "share" else g_TK)[:, 1]
        stays_T = drawn["tokens"] * strength <= second_T
        return replace(plan, chosen_TK=torch.stack([torch.ones_like(stays_T), stays_T], -1))

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found, router = super().conflicts(node, cfg), cfg["router"]
        if found:
            return found
        if runs_every_expert(router):
            return [f"explore.second_expert: router={router['name']} runs every expert here; it needs a choice of two"]
        if (k := routed(cfg)[1]) != 2:
            return [f"explore.second_expert: needs a choice of two (router.k=2), this is one of {k}"]
        return []
