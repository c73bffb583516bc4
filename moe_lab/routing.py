"""The values that routing is made of: the context a router sees, its decision, and the base class of all routers.

Shapes: T tokens (batch-major), D width, E experts, K chosen per token.

A router turns tokens into a `Routing`: its clean scores and a plan of how rows move (plans.py). Losses and observers
read the same value that trained the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.plans import Assignments, Mixture, Plan, best, shares
from moe_lab.seeding import parameter

__all__ = ["Assignments", "Context", "Knobs", "Mixture", "Plan", "Router", "Routing", "best"]


@dataclass(frozen=True)
class Knobs:
    """What schedules move, as 0-dim fp32 tensors (a Python float would recompile a compiled graph at each value)."""

    temperature: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Context:
    """What one layer's router is told beside its tokens.

    noise_TE: standard draws of the router's own distribution, None in evaluation and for routers without noise.
    bias_E:   the layer's selection bias, None where no balancer moves one.
    hard:     evaluate with only the `hard` strongest experts of each token's choice, None for the choice as trained.
    """

    knobs: Knobs
    noise_TE: Tensor | None = None
    bias_E: Tensor | None = None
    hard: int | None = None


@dataclass(frozen=True)
class Routing:
    """One layer's decision on one batch; a field is None where the router has no such thing.

    logits_TE: clean scores, fp32. probs_TE: the clean gate as a distribution over experts at the current temperature,
    free of noise: what balance losses differentiate. noisy_TE, noise_std_TE: the scores that chose, and the standard
    deviation of their noise (Shazeer's load needs both).
    """

    plan: Plan
    logits_TE: Tensor
    probs_TE: Tensor
    noisy_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None


class Router(nn.Module):
    """Base of all routers: score, noise, choice, gate, in fp32 whatever the model's dtype.

    A subclass writes `choose` and sometimes `score` or `gate`. It draws no random numbers (the loop passes them in),
    and holds no loss, no counter and no metric. Temperature shapes the gate and never the choice: argmax((z+g)/t)
    samples softmax(z), argmax(z/t+g) would not.
    """

    noise: str = "none"  # the distribution that the loop draws for this router: none, gaussian, gumbel
    every_expert: bool = False  # whether all experts run on all tokens

    def __init__(self, dim: int, num_experts: int, *, k: int):
        super().__init__()
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.weight_ED = parameter(num_experts, dim, std=0.02)

    def score(self, x_TD: Tensor) -> Tensor:
        """Clean logits [T, E] of fp32 tokens."""
        return F.linear(x_TD, self.weight_ED)

    def noise_std(self, x_TD: Tensor) -> Tensor:
        """Standard deviation of the logit noise, broadcastable to [T, E], before the schedule scales it."""
        return x_TD.new_ones(())

    def gate(self, logits_TE: Tensor) -> Tensor:
        """Gate values of logits that are already divided by the temperature."""
        return logits_TE.softmax(-1)

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        """The gate normalised over experts; `gates_TE` are the gate values of `logits_TE`."""
        return gates_TE

    def choose(self, rank_TE: Tensor, gates_TE: Tensor) -> Plan:
        """From what ranks the experts (noisy logits, or gates plus selection bias) and the gate values, the plan."""
        raise NotImplementedError

    @property
    def active(self) -> int:
        """How many experts shape a token's output."""
        return self.k

    def top_k(self, rank_TE: Tensor, gates_TE: Tensor, renormalise: bool = False) -> Assignments:
        """The k best-ranked experts of each token, weighted by their gate values (renormalised to sum to one)."""
        expert_TK = best(rank_TE, self.k)
        weight_TK = gates_TE.gather(1, expert_TK)
        if renormalise:
            weight_TK = shares(weight_TK)
        return Assignments(expert_TK, weight_TK, self.num_experts)

    def directions_ED(self) -> Tensor | None:
        """One row per expert for geometry, or None."""
        return self.weight_ED

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float() if x_TD.dtype != torch.float64 else x_TD
            logits_TE = self.score(x_TD)
            sharp_TE = logits_TE / ctx.knobs.temperature
            clean_TE = gates_TE = self.gate(sharp_TE)
            noisy_TE, std_TE = logits_TE, None
            if ctx.noise_TE is not None:
                std_TE = (self.noise_std(x_TD) * ctx.knobs.noise).expand_as(logits_TE)
                noisy_TE = logits_TE + ctx.noise_TE * std_TE
                gates_TE = self.gate(noisy_TE / ctx.knobs.temperature)
            rank_TE = noisy_TE if ctx.bias_E is None else self.gate(noisy_TE) + ctx.bias_E
            plan = self.choose(rank_TE.detach(), gates_TE)
            probs_TE = self.distribution(sharp_TE, clean_TE)
        if ctx.hard is not None:
            plan = plan.harden(ctx.hard)
        return Routing(plan, logits_TE, probs_TE, noisy_TE, std_TE)

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        """Combinations that cannot work, one line each."""
        E, k = cfg["experts"]["num"], node["k"]
        if k > E:
            return [f"router.k={k}: at most experts.num={E} experts can be chosen"]
        capacity = cfg["experts"]["capacity_factor"]
        if capacity is not None and (cls.every_expert or node.get("backward") == "dense"):
            return [
                f"experts.capacity_factor={capacity}: router={node['name']} runs every expert on every token; "
                "capacity limits a choice (router.backward=selected where the router has it)"
            ]
        return []
