"""Routers that assign a whole micro-batch at once in training, so that the experts share it evenly.

Each token's expert then depends on all tokens, also on later ones and on other sequences. In evaluation a token goes
where it wants most, which is causal.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from moe_lab.assignment import balanced, prices
from moe_lab.config import option
from moe_lab.routers.gated import Gate, Gated, Weighed
from moe_lab.routing import Assignments, Choices, Context, Plan, Router, Touches, Traits


class Balanced(Router):
    """Beside a class that weighs, what all of them promise."""

    scored = False

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        return {"choice": "assigns all tokens of a micro-batch together; no token ranks its experts by itself"}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), causal=False, batch_independent=False)


@option("router", "base")
class Base(Weighed, Balanced):
    """BASE layers: the assignment of largest total score with at most ceil(T / E) tokens per expert, weighed by the
    sigmoid of the score (arXiv 2103.16716). No loss balances. In evaluation the best expert of each token.

    Ours: the assignment is nearly the best, by a fixed number of operations (moe_lab/assignment.py). For 2048 tokens,
    8 experts, it lost 0.002 % of what the best gains over an even one that knows nothing, in 18 ms on one core; SciPy's
    linear_sum_assignment, which finds the best on the host, took 160 to 2900 ms. For 64 experts: up to 0.4 %, 60 ms.
    The scores are assigned whatever the gate; a softmax sends a gradient to all rows.
    """

    even = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Annotated[int, Field(ge=1, le=1)] = 1,
        gate: Gate = "sigmoid",
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, gate=gate, **common)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        if not ctx.training:
            return self.top_k(rank_TE, gates_TE)
        expert_TK = balanced(rank_TE)[:, None]
        return Assignments(expert_TK, gates_TE.gather(1, expert_TK), self.num_experts)


@option("router", "sinkhorn")
class Sinkhorn(Gated, Balanced):
    """The k largest of exp(logits) after Sinkhorn scaling of rows and columns, weighed by the gate of the raw logits:
    sigmoid for k=1, softmax for more, unless `gate` names one (S-BASE, arXiv 2202.01169). In evaluation the k largest
    logits.

    Ours: a fixed number of scalings, where others stop at a tolerance. It balances the scaled matrix and not its
    largest entries, so loads are near to even, never exactly.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        iterations: Annotated[int, Field(ge=1)] = 8,
        gate: Gate | None = None,
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, gate=gate or _by_choices(k), **common)
        self.iterations = iterations

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        if ctx.training:  # a token's own factor changes nothing between its experts
            rank_TE = rank_TE - prices(rank_TE, [1.0] * self.iterations)
        return super().choose(rank_TE, gates_TE, ctx)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return super().traits(dict(node) | {"gate": node["gate"] or _by_choices(node["k"])}, E)


def _by_choices(k: int) -> Gate:
    return "sigmoid" if k == 1 else "softmax"
