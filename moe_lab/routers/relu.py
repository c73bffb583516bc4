"""ReMoE: a ReLU gate. As many experts as have positive scores, none for some tokens, and no discontinuity."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Assignments, Context, Plan, Scored, Touches, Traits


@option("router", "relu")
class ReLU(Scored):
    """y = sum of relu(score_i) E_i(x) (arXiv 2412.14711). k is the mean number of experts that balance=[l1_adaptive]
    steers to; without it nothing holds the number down, and it starts at about E/2.

    How many experts run, and their FLOPs, depends on the data: E/(2k) of top-k's at the start, 1 once the penalty has
    done its work. A token without a positive score keeps its residual.
    """

    ragged = True
    scored = False  # a threshold decides, and an expert that a bias let in would have weight 0

    def gate(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.relu()

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        total_T1 = gates_TE.sum(-1, keepdim=True)
        some_T1 = total_T1 > 0
        return torch.where(some_T1, gates_TE / torch.where(some_T1, total_T1, 1), 1 / self.num_experts)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        expert_TK = rank_TE.argsort(dim=-1, descending=True, stable=True)
        weight_TK = gates_TE.gather(1, expert_TK)
        return Assignments(expert_TK, weight_TK, self.num_experts, chosen_TK=weight_TK > 0)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        return {"choice": "takes every expert with a positive score; no ranking decides"}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), live=True, rows="selected", flops=None)  # of one expert as well
