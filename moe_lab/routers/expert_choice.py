"""Expert choice: each expert takes the tokens that want it most."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe_lab.config import option
from moe_lab.routers.gated import Gated, Order
from moe_lab.routing import Choices, Context, Plan, Rows, Touches, Traits
from moe_lab.sizes import routed

Group = Literal["sequence", "micro_batch", "mixed"]


@option("router", "expert_choice")
class ExpertChoice(Gated):
    """Of every group of n tokens each expert takes the ceil(capacity n k / E) of highest probability, which is also the
    weight of its output (arXiv 2202.09368, whose capacity factor, 2 there, is capacity k here; rounding up is ours).
    The load is equal by construction; a token gets any number of experts, k of them on average at capacity 1, and none
    at all where nobody wants it.

    Ours: another gate is compared and weighs in the place of the probability. With order=topk_first experts compare
    scores, and the gate is taken over the experts that took the token; renormalise divides by the sum over these
    (a token that one expert took then sends the router no gradient).

    Whether an expert takes a token depends on the tokens after it: not causal, in evaluation neither. group=mixed is
    the control that arXiv 2408.15664 (appendix D) has in shuffled tokens: groups as large as a sequence whose tokens
    are dealt from all sequences of the micro-batch in turn (ours: no chance), so that few are a token's own future.
    """

    scored = False
    even = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 2,
        capacity: Annotated[float, Field(gt=0)] = 1.0,
        group: Group = "sequence",
        order: Order = "gate_first",
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, order=order, **common)
        self.capacity, self.group, self.order = capacity, group, order

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        T, E = rank_TE.shape
        n = T if self.group == "micro_batch" else ctx.seq_len or T
        wish_TE = self.gate(rank_TE) if self.order == "gate_first" else rank_TE
        token_Gn = self._groups(torch.arange(T, device=rank_TE.device), n)
        taken_GCE = wish_TE[token_Gn].topk(self._takes(n), 1).indices
        token_GCE = token_Gn[:, :, None].expand(-1, -1, E).gather(1, taken_GCE)
        token_EC = token_GCE.permute(2, 0, 1).flatten(1)
        plan = Rows(token_EC, gates_TE.T.gather(1, token_EC), T)
        return plan.renormalised() if self.among_chosen else plan

    def _groups(self, token_T: Tensor, n: int) -> Tensor:
        """The tokens of each group of n: neighbours, or dealt in turn."""
        return token_T.view(n, -1).T if self.group == "mixed" else token_T.view(-1, n)

    def _takes(self, n: int) -> int:
        """Tokens of a group of n that each expert takes."""
        return min(n, math.ceil(self.capacity * n * self.k / self.num_experts - 1e-6))

    def rows_per_token(self, seq_len: int) -> float:
        return self._takes(seq_len) * self.num_experts / seq_len

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        return {"choice": "lets experts choose their tokens; no token ranks its experts"}

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        found = super().traits(dict(node) | {"k": min(2, E)}, E)  # tokens have other numbers of experts
        alone, flops = node["group"] == "sequence", min(node["capacity"], E / node["k"])
        return replace(found, causal=False, batch_independent=alone, dropless=False, flops=flops)

    @classmethod
    def unlimited(cls, node: Mapping[str, Any]) -> str:
        return "fills every expert by itself; router.capacity says how far"

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found, (E, k) = super().conflicts(node, cfg), routed(cfg)
        if not found and node["capacity"] * k > E:
            found.append(
                f"router.capacity={node['capacity']:g}: at most {E / k:g} with router.k={node['k']} of "
                f"experts.num={cfg['experts']['num']}; then each expert takes all tokens"
            )
        batch, accumulate = cfg["batch_size"], cfg["optim"]["accumulate"]
        if node["group"] == "mixed" and batch == accumulate:
            found.append(
                f"router.group=mixed: batch_size={batch} with optim.accumulate={accumulate} leaves one sequence in a "
                "micro-batch, whose tokens would be each other's future; at least two can be mixed"
            )
        return found
