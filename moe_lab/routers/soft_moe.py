"""Soft MoE: experts read mixtures of tokens, and tokens read mixtures of what the experts say."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.plans import best
from moe_lab.precise import precise
from moe_lab.routing import Choices, Context, Router, Routing, Touches, Traits
from moe_lab.seeding import parameter
from moe_lab.slots import Mix, Slots, before, running, whole

PosInt = Annotated[int, Field(ge=1)]


@option("router", "soft_moe")
class SoftMoE(Router):
    """Slot p holds sum_i D_ip x_i and token t gets sum_p C_tp f(slot p). D is the softmax of the logits over tokens, C
    that over slots, logits = x/|x| . scale phi/|phi| (arXiv 2308.00951, algorithm 2). Experts run once per slot.

    D looks at the whole sequence, so that a decoder would see its future. Two forms do not:
    *prefix* makes token t's slots of the tokens up to t. That is exact and dear: a token has all slots for itself,
    E * slots expert rows per token, each of them in memory.
    *blocks* lends a block of tokens the slots of the block before it. That is the idea of Lory (arXiv 2405.03133),
    whose first segment takes its own mean with a stopped gradient, which tells its early tokens of later ones; here
    each slot of the first block is the first token, with a stopped gradient.

    Ours: the k experts with most combine weight at temperature 1 count as the choice; the temperature divides the
    logits of both softmaxes; an expert's logit is the logsumexp of its slots'; phi starts with rows of about unit norm.
    """

    scored = False
    every_expert = even = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        slots: PosInt = 1,
        causal: Literal["none", "blocks", "prefix"] = "none",
        block: PosInt = 32,
    ):
        super().__init__(dim, num_experts, k=k)
        self.causal, self.block = causal, block
        self.phi_PD = parameter(num_experts * slots, dim, std=dim**-0.5)
        self.scale_1 = parameter(1, std=torch.inf)

    def directions_ED(self) -> Tensor:
        """The mean of each expert's slot vectors."""
        return unit(self.phi_PD).unflatten(0, (self.num_experts, -1)).mean(1)

    def route(self, x_TD: Tensor, ctx: Context) -> Routing:
        logits_TP = F.linear(unit(precise(x_TD)), self.scale_1 * unit(self.phi_PD))
        logits_TE = logits_TP
        if len(self.phi_PD) > self.num_experts:
            logits_TE = logits_TP.unflatten(1, (self.num_experts, -1)).logsumexp(-1)
        sharp_TP = logits_TP / ctx.knobs.temperature
        S = ctx.seq_len or len(x_TD)
        mix: Mix = {"none": whole, "blocks": before(self.block), "prefix": running}[self.causal]
        chosen_TK = best(logits_TE.detach(), self.k)
        plan = Slots(sharp_TP, sharp_TP.softmax(-1), chosen_TK, self.num_experts, S, self._readers(S), mix)
        return Routing(plan, logits_TE, plan.mass(len(x_TD)))

    def _readers(self, seq_len: int) -> int:
        """Tokens that share a set of slots."""
        return {"none": seq_len, "blocks": self.block, "prefix": 1}[self.causal]

    def rows_per_token(self, seq_len: int) -> float:
        return -(-seq_len // self._readers(seq_len)) * len(self.phi_PD) / seq_len

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        why = "mixes tokens into slots by weights of the slots; no token chooses an expert"
        return {"logits": why, "choice": why}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        alone = node["causal"] == "prefix"
        return Traits(causal=node["causal"] != "none", flops=E * node["slots"] / node["k"] if alone else None)

    @classmethod
    def unlimited(cls, node: Mapping[str, Any]) -> str:
        return "gives every expert the same number of slots, which cannot overflow; router.slots says how many"

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found = super().conflicts(node, cfg)
        if node["causal"] == "blocks" and node["block"] >= cfg["seq_len"]:
            found.append(
                f"router.block={node['block']}: must be below seq_len={cfg['seq_len']}; in a sequence of one block all "
                "experts read the first token alone"
            )
        return found


def unit(x_ND: Tensor) -> Tensor:
    """Rows at length 1; rows of zeros stay."""
    return x_ND / (torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True) + 1e-6)
