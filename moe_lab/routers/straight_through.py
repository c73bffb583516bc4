"""Straight-through routers: a hard choice forward, the gradient of a softmax backward.

The forward weight of each chosen expert is 1/k (1 for k = 1). backward=selected runs only those, and the gate's
gradient is that of their soft probabilities. backward=dense runs all experts, so that the router gets the gradient
of the full relaxation, while each expert is still trained with its hard weight.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Assignments, Choices, Context, Mixture, Plan, Scored, Traits, best


@option("router", "softmax_ste")
class SoftmaxSTE(Scored):
    """Deterministic: forward the argmax (top-k), backward the softmax (straight-through, arXiv 1308.3432)."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        backward: Literal["selected", "dense"] = "selected",
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.every_expert = backward == "dense"

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        expert_TK = best(rank_TE, self.k)
        if self.every_expert:
            hard_TE = torch.zeros_like(gates_TE).scatter(1, expert_TK, 1 / self.k)
            return Mixture(_straight_through(hard_TE, gates_TE), expert_TK)
        soft_TK = gates_TE.gather(1, expert_TK)
        hard_TK = torch.full_like(soft_TK, 1 / self.k)
        return Assignments(expert_TK, _straight_through(hard_TK, soft_TK), self.num_experts)

    @property
    def active(self) -> int:
        return self.k

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), flops=E / node["k"] if node["backward"] == "dense" else 1.0)


@option("router", "gumbel_ste")
class GumbelSTE(SoftmaxSTE):
    """Forward a hard sample, backward the Gumbel-softmax at the temperature (arXiv 1611.01144)."""

    noise = "gumbel"


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, exactly, with the gradient of `soft`."""
    return hard + (soft - soft.detach())
