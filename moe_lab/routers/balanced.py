"""Routers that assign a whole micro-batch at once in training, so that the experts share it evenly.

Each token's expert then depends on all tokens, also on later ones and on other sequences. In evaluation a token goes
where it wants most, which is causal.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.assignment import balanced, prices
from moe_lab.config import option
from moe_lab.routing import Assignments, Choices, Context, Plan, Scored, Touches, Traits


class Balanced(Scored):
    """A gate by sigmoid, independent of the other experts."""

    scored = False

    def gate(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        return F.logsigmoid(logits_TE).softmax(-1)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        return {"choice": "assigns all tokens of a micro-batch together; no token ranks its experts by itself"}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return Traits(causal=False, batch_independent=False, rows="selected")


@option("router", "base")
class Base(Balanced):
    """BASE layers: the assignment of largest total score with at most ceil(T / E) tokens per expert, weighed by the
    sigmoid of the score (arXiv 2103.16716). No loss balances. In evaluation the best expert of each token.

    Ours: the assignment is nearly the best, by a fixed number of operations (moe_lab/assignment.py). For 2048 tokens,
    8 experts, it lost 0.002 % of what the best gains over an even one that knows nothing, in 18 ms on one core; SciPy's
    linear_sum_assignment, which finds the best on the host, took 160 to 2900 ms. For 64 experts: up to 0.4 %, 60 ms.
    """

    even = True

    def __init__(self, dim: int, num_experts: int, *, k: Annotated[int, Field(ge=1, le=1)] = 1, **common: Any):
        super().__init__(dim, num_experts, k=k, **common)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        if not ctx.training:
            return self.top_k(rank_TE, gates_TE)
        expert_TK = balanced(rank_TE)[:, None]
        return Assignments(expert_TK, gates_TE.gather(1, expert_TK), self.num_experts)


@option("router", "sinkhorn")
class Sinkhorn(Balanced):
    """The k largest of exp(logits) after Sinkhorn scaling of rows and columns, weighed by the gate of the raw logits:
    sigmoid for k=1, softmax for more (S-BASE, arXiv 2202.01169). In evaluation the k largest logits.

    Ours: a fixed number of scalings, where others stop at a tolerance. It balances the scaled matrix and not its
    largest entries, so loads are near to even, never exactly.
    """

    def __init__(
        self, dim: int, num_experts: int, *, k: Choices = 1, iterations: Annotated[int, Field(ge=1)] = 8, **common: Any
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.iterations = iterations

    def gate(self, logits_TE: Tensor) -> Tensor:
        return super().gate(logits_TE) if self.k == 1 else logits_TE.softmax(-1)

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        return super().distribution(logits_TE, gates_TE) if self.k == 1 else gates_TE

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        if ctx.training:  # a token's own factor changes nothing between its experts
            rank_TE = rank_TE - prices(rank_TE, [1.0] * self.iterations)
        return self.top_k(rank_TE, gates_TE)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return Traits(causal=False, batch_independent=False, rows="selected" if node["k"] == 1 else "all")
