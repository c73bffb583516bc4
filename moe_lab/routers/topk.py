"""Softmax over all experts, then the k most probable."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Choices, Context, Plan, Scored, Traits


@option("router", "topk")
class TopK(Scored):
    """Gate weights are the probabilities of the chosen experts, renormalised to sum to one or as they are.

    With k=1 and renormalise=true the weight is always 1 and the router gets no task gradient (verdict: frozen).
    Sources: OLMoE (arXiv 2409.02060) does not renormalise, Mixtral (arXiv 2401.04088) does.
    """

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 2, renormalise: bool = True):
        super().__init__(dim, num_experts, k=k)
        self.renormalise = renormalise

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        return self.top_k(rank_TE, gates_TE, self.renormalise)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        own = super().traits(node, E)
        return replace(own, live=node["k"] > 1, rows="selected") if node["renormalise"] else own
