"""SparseMixer: a sampled expert whose gate also carries the gradient of having been sampled."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Assignments, Choices, Context, Draw, Plan, Scored, Touches, Traits
from moe_lab.scores import softmax

# How often an expert that is not the best one is scaled down, to what part, and the factor of the gradient.
VERSIONS = {"v1": (0.5, 1 / 2, 2.0), "v2": (0.75, 1 / 3, 1.0)}


@option("router", "sparsemixer")
class SparseMixer(Scored):
    """D ~ p, the softmax over the scores near the largest; the weight is a * p_D, its gradient c times that of p_D.

    a = 1 where D is the best expert. Elsewhere v1 (arXiv 2310.00811) draws a = 1/2 half the time and c is 2: the
    midpoint rule for what choosing D is worth, beside the gate's own gradient. v2 (GRIN, arXiv 2409.12136) draws
    a = 1/3 three times in four, Heun's third-order rule, and c is 1. Evaluation takes the best expert, and a = 1.

    An expert is near if max - z <= 2 r max(|z|, max). Further experts are drawn without those before, from a softmax
    of their own. After the authors' code, without v1's learned scale of each output channel. Nothing else may rank
    or disturb: the gradient is right for draws from p alone. So the temperature shapes the draw here as well.
    """

    scored = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        version: Literal["v1", "v2"] = "v2",
        r: Annotated[float, Field(ge=0)] = 0.1,
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.rule, self.r = VERSIONS[version], r
        self.draws = {f"gumbel_{i}": Draw("gumbel", "TE") for i in range(k)}
        self.draws |= {f"uniform_{i}": Draw("uniform", "T") for i in range(k)}

    def gate(self, logits_TE: Tensor) -> Tensor:
        return logits_TE  # `choose` takes a softmax over those that are near

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        return softmax(logits_TE)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        left_TE, picks, weights = rank_TE, [], []
        for i in range(self.k):
            top_T1, best_T1 = left_TE.max(-1, keepdim=True)
            near_TE = (top_T1 - left_TE) <= 2 * self.r * torch.maximum(rank_TE.abs(), top_T1)
            sharp_TE = torch.where(near_TE, gates_TE, -torch.inf)
            pick_T1 = best_T1
            if ctx.draws:
                pick_T1 = (sharp_TE.detach() + ctx.draws[f"gumbel_{i}"]).max(-1, keepdim=True).indices
            weight_T1 = softmax(sharp_TE).gather(1, pick_T1)
            if ctx.draws:
                weight_T1 = self._rescaled(weight_T1, pick_T1 == best_T1, ctx.draws[f"uniform_{i}"][:, None])
            picks.append(pick_T1)
            weights.append(weight_T1)
            if i + 1 < self.k:
                left_TE = left_TE.scatter(1, pick_T1, -torch.inf)
        return Assignments(torch.cat(picks, 1), torch.cat(weights, 1), self.num_experts)

    def _rescaled(self, weight_T1: Tensor, is_best_T1: Tensor, uniform_T1: Tensor) -> Tensor:
        often, part, factor = self.rule
        value_T1 = torch.where(is_best_T1 | (uniform_T1 > often), weight_T1, weight_T1 * part).detach()
        return value_T1 + factor * (weight_T1 - weight_T1.detach())

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        why = "has a gradient that is right for draws from its own distribution alone"
        return {"logits": why, "choice": why}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), stochastic=E > 1)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found = super().conflicts(node, cfg)
        if node["version"] == "v1" and node["k"] > 1:
            found.append(f"router.k={node['k']}: router.version=v1 draws one expert; v2 draws several")
        return found
