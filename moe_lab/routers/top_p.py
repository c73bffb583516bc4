"""As many experts as it takes to reach a probability: few where the router is sure, more where it is not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.plans import shares
from moe_lab.routers.gated import Gated
from moe_lab.routing import Assignments, Choices, Context, Plan, Traits, best


@option("router", "top_p")
class TopP(Gated):
    """The best experts until their probabilities sum to p, weighted by their gate values (arXiv 2403.07652).

    The mass is counted in the gate as a distribution at temperature 1, so that the schedule's temperature changes
    weights and never the choice. How many rows are computed depends on the data; k is what is reckoned with where one
    number is needed (capacity, the ceiling of the load's measures).
    """

    ragged = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        p: Annotated[float, Field(gt=0, le=1)] = 0.4,
        most: Choices | None = None,
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.p, self.most = p, min(most or num_experts, num_experts)

    def most_per_token(self) -> int:
        return self.most

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        expert_TK = best(rank_TE, self.most)
        mass_TK = self._mass(rank_TE, ctx).gather(1, expert_TK)
        before_TK = mass_TK.cumsum(-1) - mass_TK
        # An expert that may not be chosen ranks at -inf; rounding could leave the others just below p = 1.
        chosen_TK = (before_TK < self.p) & rank_TE.gather(1, expert_TK).isfinite()
        weight_TK = gates_TE.gather(1, expert_TK).masked_fill(~chosen_TK, 0)
        weight_TK = shares(weight_TK) if self.among_chosen else weight_TK
        return Assignments(expert_TK, weight_TK, self.num_experts, chosen_TK=chosen_TK)

    def _mass(self, rank_TE: Tensor, ctx: Context) -> Tensor:
        """The probabilities of what ranks: logits, or gate values plus a selection bias, which adds no mass."""
        if ctx.bias_E is None:
            return self.distribution(rank_TE, self.gate(rank_TE))
        return shares((rank_TE - ctx.bias_E).clamp_min(0))

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        # The best expert has at least 1 / E of the mass.
        alone = node["most"] == 1 or node["p"] <= 1 / E
        return replace(super().traits(dict(node) | {"k": 1 if alone else 2}, E), flops=None)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found = super().conflicts(node, cfg)
        if "load" in cfg["balance"]:
            found.append("balance.load: it is about the k best, and router=top_p has no k; take balance=[importance]")
        return found
