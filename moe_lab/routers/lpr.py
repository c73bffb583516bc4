"""Latent Prototype Routing: tokens are encoded into a small space and go to the nearest prototypes there."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.precise import precise
from moe_lab.routers.gated import Gated, Order
from moe_lab.routing import Choices, Context, Plan, Routing, Traits
from moe_lab.seeding import parameter

Weight = Annotated[float, Field(ge=0)]


@option("router", "lpr")
class LPR(Gated):
    """s_i = cos(W silu(LayerNorm(h)) + b, p_i), a gate among the chosen, and two losses (arXiv 2506.21328).

    diversity: the mean squared entry of P P' - I for the unit prototypes: 0 where they are orthogonal, (E - 1) / E
    where all are one. align: the mean of 1 - cos over tokens and the prototypes that they chose, which moves the
    prototypes alone: 0 where each token is its prototype.

    Widths and weights are those of the authors' published configs. Our choices: the plain encoder of the two that the
    paper tries (not the variational one, and so no KL term); prototypes learned by gradient (no running means, which
    the paper tries as well); cosines in the alignment; nothing is decoded back into the token.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        latent: Annotated[int, Field(ge=2)] = 16,
        diversity: Weight = 1.0,
        align: Weight = 0.05,
        order: Order = "topk_first",
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, order=order, **common)
        self.diversity, self.align = diversity, align
        del self.weight_ED  # its rows are the prototypes
        dim = self.scored_dim
        self.gain_D, self.shift_D = parameter(dim, std=torch.inf), parameter(dim, std=0.0)
        self.encode_LD, self.shift_L = parameter(latent, dim, std=dim**-0.5), parameter(latent, std=0.0)
        self.prototype_EL = parameter(num_experts, latent, std=latent**-0.5)  # as good as on the unit sphere

    def features(self, x_TD: Tensor) -> Tensor:
        """Where a token stands in the small space, [T, L], of length 1."""
        normed_TD = F.layer_norm(precise(super().features(x_TD)), self.gain_D.shape, self.gain_D, self.shift_D)
        return F.normalize(F.linear(F.silu(normed_TD), self.encode_LD, self.shift_L), dim=-1)

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        return F.linear(seen_TX, F.normalize(self.prototype_EL, dim=-1))

    def extras(self, x_TD: Tensor, seen_TX: Tensor, noisy_TE: Tensor, plan: Plan, ctx: Context) -> dict[str, Tensor]:
        return {"latent_TL": seen_TX.detach()}

    def objective(self, routing: Routing, loss_T: Tensor, counted_T: Tensor) -> Tensor | None:
        unit_EL = F.normalize(self.prototype_EL, dim=-1)
        same_EE = torch.eye(self.num_experts, device=unit_EL.device)
        diversity = (unit_EL @ unit_EL.T - same_EE).square().mean()
        selected_TK = routing.plan.selected_TK
        chosen_TK = selected_TK < self.num_experts
        cosine_TE = F.linear(routing.extra["latent_TL"], unit_EL)
        cosine_TK = cosine_TE.gather(1, selected_TK.clamp_max(self.num_experts - 1))
        align = 1 - (cosine_TK * chosen_TK).sum() / chosen_TK.sum()
        return self.diversity * diversity + self.align * align

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        found = super().traits(node, E)  # rows are about the task, live is about its own losses as well
        return replace(found, live=bool(found.live or node["align"] or (node["diversity"] and E > 1)))

    def directions_ED(self) -> Tensor | None:
        return None  # the encoder is not linear
