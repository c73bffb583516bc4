"""The fully soft mixture: every expert on every token, weighted by its probability."""

from typing import Any

from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Choices, Context, Mixture, Plan, Scored, best


@option("router", "dense")
class Dense(Scored):
    """Exact gradient at E times the cost of one expert. Its k strongest count as its choice.

    Source: the mixture of Jacobs et al. 1991, per layer and token.
    """

    every_expert = True

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 1, **common: Any):
        super().__init__(dim, num_experts, k=k, **common)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        return Mixture(gates_TE, best(rank_TE, self.k))


@option("router", "gumbel_softmax")
class GumbelSoftmax(Dense):
    """A soft sample: softmax((logits + Gumbel noise) / temperature), every expert run (arXiv 1611.01144)."""

    noise = "gumbel"
