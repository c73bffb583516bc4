"""Routers that learn nothing: by a hash of the token, by a frozen random matrix, by chance. Controls for the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import option
from moe_lab.precise import precise
from moe_lab.routing import Assignments, Choices, Context, Draw, Router, Routing, Touches, Traits, best
from moe_lab.seeding import parameter


class Unlearned(Router):
    """k experts per token, each weighted by 1 / k. probs_TE is that choice; logits_TE are zeros without scores."""

    scored = False
    learns = False

    def rank(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """What decides, [T, E]: the highest are chosen."""
        raise NotImplementedError

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        return seen_TX.new_zeros(seen_TX.shape[0], self.num_experts)

    @torch.no_grad()
    def route(self, x_TD: Tensor, ctx: Context) -> Routing:
        x_TD = precise(x_TD)
        expert_TK = best(self.rank(x_TD, ctx), self.k)
        weight_TK = x_TD.new_full(expert_TK.shape, 1 / self.k)
        logits_TE = self.score(x_TD, ctx)
        probs_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK)
        return Routing(Assignments(expert_TK, weight_TK, self.num_experts), logits_TE, probs_TE)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        why = "learns nothing from what it tries"
        return {"logits": why, "choice": why}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), live=None, rows="none")


@option("router", "hash")
class Hash(Unlearned):
    """The token's id modulo E (arXiv 2106.04426); the further choices of k > 1 are the experts after it (ours)."""

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 1):
        super().__init__(dim, num_experts, k=k)

    def rank(self, x_TD: Tensor, ctx: Context) -> Tensor:
        assert ctx.ids_T is not None
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        return -((expert_E - ctx.ids_T[:, None]) % self.num_experts)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        return {**super().unexplored(node), "input": "reads the token's id alone"}


@option("router", "random")
class Random(Unlearned):
    """draw=fixed: the best of a random matrix's rows that is never trained: nearby tokens go together.
    draw=fresh: experts by chance for every token and update; evaluation has one draw of its own.

    fixed starts where `topk` starts with the same seed. Both weigh by 1 / k (ours), so that routing does not matter
    to the gradient.
    """

    weight_ED: Tensor | None

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 1, draw: Literal["fixed", "fresh"] = "fixed"):
        super().__init__(dim, num_experts, k=k)
        self.weight_ED = None
        if draw == "fixed":
            self.weight_ED = parameter(num_experts, dim, std=0.02).requires_grad_(False)
        else:
            self.draws = {"rank": Draw("uniform", "TE", evaluate=True)}

    def rank(self, x_TD: Tensor, ctx: Context) -> Tensor:
        return self.score(x_TD, ctx) if self.weight_ED is not None else ctx.draws["rank"]

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        return super().score(seen_TX, ctx) if self.weight_ED is None else F.linear(seen_TX, self.weight_ED)

    def directions_ED(self) -> Tensor | None:
        return self.weight_ED

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        found = super().unexplored(node)
        return {**found, "input": "draws without a look at the token"} if node["draw"] == "fresh" else found

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), stochastic=node["draw"] == "fresh")
