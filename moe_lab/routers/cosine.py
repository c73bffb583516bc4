"""X-MoE: the cosine between a token and an expert's embedding in a small space, at a learned temperature."""

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.precise import linear
from moe_lab.routers.gated import Gate, Gated
from moe_lab.routing import Choices, Context
from moe_lab.seeding import parameter


@option("router", "cosine")
class Cosine(Gated):
    """s_i = cos(W h, e_i) / tau with W [latent, D]; the gate is a softmax or sigmoids of s (arXiv 2204.09179).

    tau is learned; probs_TE, which the balance losses see, holds it at its start: 0.3 under a softmax and 0.07 under
    sigmoids, as the paper fixes it there. Our choices: tau starts at the same values and is 0.3 * exp(learned), so that
    it stays positive; e_i is only normalised, never rescaled; at least two dimensions (in one, a cosine is a sign).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        latent: Annotated[int, Field(ge=2)] | None = None,
        gate: Gate = "softmax",
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, gate=gate, **common)
        latent = latent or max(2, num_experts // 2)
        self.start = 0.3 if gate == "softmax" else 0.07
        del self.weight_ED  # its rows live in the latent space
        self.project_LD = parameter(latent, self.scored_dim, std=self.scored_dim**-0.5)
        self.embedding_EL = parameter(num_experts, latent, std=latent**-0.5)
        self.log_tau = parameter(std=0.0)  # relative to the start

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        h_TL = linear(seen_TX, self.project_LD)
        cosine_TE = F.linear(F.normalize(h_TL, dim=-1), F.normalize(self.embedding_EL, dim=-1))
        return cosine_TE / (self.start * self.log_tau.exp())

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        fixed_TE = logits_TE * self.log_tau.exp()
        return super().distribution(fixed_TE, self.gate(fixed_TE))

    def directions_ED(self) -> Tensor | None:
        """Each embedding seen from the token: e_i W."""
        return None if self.hidden_XD is not None else F.normalize(self.embedding_EL, dim=-1) @ self.project_LD
