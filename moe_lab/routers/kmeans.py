"""Online K-means: tokens go to the experts whose running mean of earlier tokens points most nearly where they do."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routing import Choices, Context, Plan, Router, Routing, Traits
from moe_lab.schedules import Schedule, constant
from moe_lab.scores import softmax


@option("router", "kmeans")
class KMeans(Router):
    """Scores are cosines with each expert's running mean of the tokens routed to it; no parameters (arXiv 2605.12476).

    After each update mean_i moves by `rate` to the mean of the update's tokens that chose expert i, so that no batch
    is routed by itself. balance=[loss_free] adds the sign-updated bias, to the cosine.

    Ours, since we know the abstract and secondary notes only: the rate; means of the tokens as the layer gets them,
    not of their directions; the start; the gate (gradient reaches the token through it, never a mean) and tau; an
    expert that no token chose keeps its mean, and none is reseeded.
    """

    data_dependent_init = True
    mean_ED: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        rate: Schedule = constant(0.05),
        start: Literal["spread", "farthest"] = "spread",
        weight: Literal["softmax", "sigmoid", "uniform"] = "softmax",
        tau: Annotated[float, Field(gt=0)] = 0.1,
    ):
        super().__init__(dim, num_experts, k=k)
        self.rate, self.start, self.weight, self.tau = rate, start, weight, tau
        self.register_buffer("mean_ED", torch.zeros(num_experts, dim))

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        return F.linear(F.normalize(seen_TX, dim=-1), F.normalize(self.mean_ED, dim=-1))

    def gate(self, logits_TE: Tensor) -> Tensor:
        sharp_TE = logits_TE / self.tau
        return sharp_TE.sigmoid() if self.weight == "sigmoid" else softmax(sharp_TE)

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        # Of sigmoids through logarithms: a distribution also where every one of them underflows.
        return softmax(F.logsigmoid(logits_TE / self.tau)) if self.weight == "sigmoid" else gates_TE

    def merit(self, noisy_TE: Tensor) -> Tensor:
        return noisy_TE

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        plan = self.top_k(rank_TE, gates_TE, renormalise=self.weight == "softmax")
        if self.weight != "uniform":
            return plan
        return replace(plan, weight_TK=torch.full_like(plan.weight_TK, 1 / self.k))

    def directions_ED(self) -> Tensor:
        return self.mean_ED

    @torch.no_grad()
    def init_from(self, x_TD: Tensor) -> None:
        self.mean_ED.copy_(x_TD[distinct(x_TD, self.num_experts, self.start == "farthest")])

    def statistics(self, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
        E, x_TD = self.num_experts, x_TD.to(self.mean_ED.dtype)
        chose_TX = x_TD.new_zeros(x_TD.shape[0], E + 1)  # one more column takes the slots that hold no choice
        chose_TX.scatter_(1, routing.plan.selected_TK, 1)
        return {"sum_ED": chose_TX[:, :E].T @ x_TD, "tokens_E": routing.plan.selected_E}

    def after_step(self, stats: Mapping[str, Tensor], progress: float) -> None:
        tokens_E1 = stats["tokens_E"][:, None]
        now_ED = stats["sum_ED"] / tokens_E1.clamp_min(1)
        self.mean_ED += self.rate.at(progress) * (tokens_E1 > 0) * (now_ED - self.mean_ED)

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        return replace(super().traits(node, E), live=None, rows="none")


def distinct(x_TD: Tensor, n: int, farthest: bool) -> list[int]:
    """n tokens that point in different directions, at positions that the golden ratio spreads over the batch.

    farthest: after the first, always the token whose largest cosine with those taken is smallest (K-means++ without
    chance). Where there are fewer directions than n, tokens repeat.
    """
    T, unit_TD = x_TD.shape[0], F.normalize(x_TD.double(), dim=-1)
    ratio = (math.sqrt(5) - 1) / 2
    order = [int(T * math.fmod(i * ratio, 1)) for i in range(1, 20 * T + 1)]
    taken: list[int] = []
    near_T = torch.full_like(unit_TD[:, 0], -1.0)  # the largest cosine with those taken
    while len(taken) < n:
        new_T = (near_T < 1 - 1e-6).tolist()
        token = next((t for t in order if new_T[t]), None)
        if token is None or (farthest and taken):
            token = int(near_T.argmin())
        taken.append(token)
        near_T = torch.maximum(near_T, unit_TD @ unit_TD[taken[-1]])
    return taken
