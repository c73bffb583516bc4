"""A router's decision, and the base classes of all routers.

Shapes: T tokens (batch-major), D width, E experts, K chosen per token.

A router turns tokens into a `Routing`: its clean scores and a plan of how rows move (plans.py). Losses and observers
read the same value that trained the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moe_lab.context import Context, Draw, Exploring, Knobs, Plan
from moe_lab.plans import Assignments, Mixture, best, shares
from moe_lab.precise import linear, precise
from moe_lab.rows import Rows
from moe_lab.schedules import Curve
from moe_lab.scores import softmax
from moe_lab.seeding import parameter
from moe_lab.sizes import routed
from moe_lab.slots import Slots
from moe_lab.traits import Traits

__all__ = [
    "Assignments",
    "Choices",
    "Context",
    "Draw",
    "Exploring",
    "Knobs",
    "Mixture",
    "Plan",
    "Router",
    "Routing",
    "Rows",
    "Scored",
    "Slots",
    "Touches",
    "Traits",
    "best",
    "with_outputs",
]
Choices = Annotated[int, Field(ge=1)]
# What an explorer changes: the tokens as the router reads them; its logits; who can be chosen or how experts rank.
Touches = Literal["input", "logits", "choice"]


@dataclass(frozen=True)
class Routing:
    """One layer's decision on one batch; a field is None where the router has no such thing.

    logits_TE: clean scores, fp32 (zeros where a router has none). probs_TE: the clean gate as a distribution over
    experts at the current temperature, free of noise: what balance losses differentiate. noisy_TE, noise_std_TE: the
    scores that chose, and the standard deviation of their noise (Shazeer's load needs both). extra: what else a
    router tells its own objective. offset_TD: what the router itself adds to the layer's output.
    """

    plan: Plan
    logits_TE: Tensor
    probs_TE: Tensor
    noisy_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    offset_TD: Tensor | None = None


class Router(nn.Module):
    """Base of all routers: score, noise, choice, gate, in fp32 whatever the model's dtype.

    A subclass writes `choose` and sometimes `score`, `gate` or another of the methods below, or `route` as a whole. It
    draws no random numbers (the loop passes them in), and holds no balance loss, no counter and no metric. Temperature
    shapes the gate and never the choice: argmax((z+g)/t) samples softmax(z), argmax(z/t+g) would not.
    """

    noise: str = "none"  # the distribution of its own logit noise: none, gaussian, gumbel
    draws: Mapping[str, Draw] = {}  # what else the loop draws for it
    every_expert: bool = False  # whether all experts run on all tokens
    learns: bool = True  # whether anything of it moves: parameters, or buffers after an update
    even: bool = False  # whether in training all experts get equally many rows, whatever the scores (up to rounding)
    ragged: bool = False  # whether a token may have more or fewer than k experts
    scored: bool = True  # whether a ranking of each token's scores decides: what a selection bias moves
    wants_outputs: bool = False  # whether it is told the sum of each expert's outputs, extra["output_sum_ED"]
    wants_losses: bool = False  # whether `statistics` is told each token's task loss, extra["loss_T"], ["counted_T"]
    curves: Mapping[str, Curve] = {}  # what of its own moves over the run: ctx.strengths
    data_dependent_init: bool = False  # whether `init_from` fills its buffers before step 0
    weight_ED: Tensor  # of routers with a learned row per expert; `directions_ED` serves all

    def __init__(self, dim: int, num_experts: int, *, k: Choices = 1):
        super().__init__()
        self.dim, self.num_experts, self.k = dim, num_experts, k

    def features(self, x_TD: Tensor) -> Tensor:
        """What scores and noise are made of, [T, X]; computed once. Tokens come in the model's dtype."""
        return precise(x_TD)

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        """Clean logits [T, E] of the features."""
        raise NotImplementedError

    def noise_std(self, seen_TX: Tensor) -> Tensor:
        """Standard deviation of the logit noise, broadcastable to [T, E], before the schedule scales it."""
        return seen_TX.new_ones(())

    def gate(self, logits_TE: Tensor) -> Tensor:
        """Gate values of logits that are already divided by the temperature."""
        return softmax(logits_TE)

    def distribution(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        """The gate normalised over experts; `gates_TE` are the gate values of `logits_TE`."""
        return gates_TE

    def merit(self, noisy_TE: Tensor) -> Tensor:
        """What a selection bias is added to: gate values at temperature 1."""
        return self.gate(noisy_TE)

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        """From what ranks the experts (noisy logits, or merits plus selection bias) and the gate values, the plan."""
        raise NotImplementedError

    def extras(self, x_TD: Tensor, seen_TX: Tensor, noisy_TE: Tensor, plan: Plan, ctx: Context) -> dict[str, Tensor]:
        """What else `objective` and `statistics` need to know of this decision."""
        return {}

    def offset(self, plan: Plan, gates_TE: Tensor, ctx: Context) -> Tensor | None:
        """What the router itself adds to the layer's output [T, D], or None."""
        return None

    def objective(self, routing: Routing, loss_T: Tensor, counted_T: Tensor) -> Tensor | None:
        """A loss of the router's own, 0-dim, from each token's task loss (detached, 0 where it does not count). Of
        routers that want losses it is a mean over the tokens that count, and the way in which the task trains them."""
        return None

    def init_from(self, x_TD: Tensor) -> None:
        """Fill the buffers from this layer's input of the first batch."""

    def statistics(self, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
        """What `after_step` needs: sums over the tokens of a micro-batch, detached."""
        return {}

    def after_step(self, stats: Mapping[str, Tensor], progress: float) -> None:
        """Move the buffers, once per update, from the sums over its micro-batches; progress is in [0, 1]."""

    @property
    def active(self) -> int:
        """How many experts shape a token's output."""
        return self.num_experts if self.every_expert else self.k

    def rows_per_token(self, seq_len: int) -> float:
        """Rows that the experts run per token of sequences of this length."""
        return self.num_experts if self.every_expert else self.k

    def most_per_token(self) -> int:
        """Experts that a token can get."""
        return self.num_experts if self.ragged else self.k

    def top_k(self, rank_TE: Tensor, gates_TE: Tensor, renormalise: bool = False) -> Assignments:
        """The k best-ranked experts of each token, weighted by their gate values (renormalised to sum to one)."""
        expert_TK = best(rank_TE, self.k)
        weight_TK = gates_TE.gather(1, expert_TK)
        if renormalise:
            weight_TK = shares(weight_TK)
        return Assignments(expert_TK, weight_TK, self.num_experts)

    def directions_ED(self) -> Tensor | None:
        """One row per expert for geometry, or None."""
        return None

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            for e in ctx.exploring:
                x_TD = e.explorer.input(precise(x_TD), e.drawn, e.strength)
            routing = self.route(x_TD, ctx)
        if ctx.hard is not None:
            routing = replace(routing, plan=routing.plan.harden(ctx.hard))
        return routing

    def route(self, x_TD: Tensor, ctx: Context) -> Routing:
        """The decision on tokens; routers without scores per token and expert write their own."""
        seen_TX = self.features(x_TD)
        logits_TE = self.score(seen_TX, ctx)
        sharp_TE = logits_TE / ctx.knobs.temperature
        clean_TE = gates_TE = self.gate(sharp_TE)
        noisy_TE, std_TE, allowed = self._disturbed(seen_TX, logits_TE, ctx)
        if noisy_TE is not logits_TE:
            gates_TE = self.gate(noisy_TE / ctx.knobs.temperature)
        rank_TE = noisy_TE if ctx.bias_E is None else self.merit(noisy_TE) + ctx.bias_E
        for e in ctx.exploring:
            rank_TE = e.explorer.rank(rank_TE, e.drawn, e.strength)
        if allowed is not None:  # last: a bias must not bring an expert back
            rank_TE = rank_TE.masked_fill(~allowed, -torch.inf)
        plan = self.choose(rank_TE.detach(), gates_TE, ctx)
        for e in ctx.exploring:
            plan = e.explorer.plan(plan, gates_TE, e.drawn, e.strength)
        probs_TE = self.distribution(sharp_TE, clean_TE)
        extra, offset_TD = self.extras(x_TD, seen_TX, noisy_TE, plan, ctx), self.offset(plan, gates_TE, ctx)
        return Routing(plan, logits_TE, probs_TE, noisy_TE, std_TE, extra, offset_TD)

    def _disturbed(
        self, seen_TX: Tensor, logits_TE: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits with noise, -inf for experts that may not be chosen; the noise's standard deviation; who may be."""
        noisy_TE, std_TE, allowed = logits_TE, None, None
        if ctx.noise_TE is not None:
            std_TE = (self.noise_std(seen_TX) * ctx.knobs.noise).expand_as(logits_TE)
            noisy_TE = logits_TE + ctx.noise_TE * std_TE
        for e in ctx.exploring:
            noisy_TE = e.explorer.logits(noisy_TE, e.drawn, e.strength)
            if (std := e.explorer.noise_std(e.strength)) is not None:
                std_TE = std.expand_as(logits_TE)
            if (mine := e.explorer.allowed(logits_TE, e.drawn, e.strength, self.k)) is not None:
                allowed = mine if allowed is None else allowed & mine
        if allowed is not None:
            noisy_TE = noisy_TE.masked_fill(~allowed, -torch.inf)
        return noisy_TE, std_TE, allowed

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        """What this router promises with these options and E experts."""
        return Traits(stochastic=cls.noise != "none", flops=E / node["k"] if cls.every_expert else 1.0)

    @classmethod
    def unexplored(cls, node: Mapping[str, Any]) -> Mapping[Touches, str]:
        """What explorers must leave alone, each with the reason, to be read after "router=NAME"."""
        return {}

    @classmethod
    def unlimited(cls, node: Mapping[str, Any]) -> str | None:
        """Why there is no capacity that could limit its choice, to be read after "router=NAME"; None: there is."""
        if cls.every_expert or node.get("backward") == "dense":
            instead = "; router.backward=selected does not" if "backward" in node else ""
            return f"runs every expert on every token{instead}"
        return None

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        """Combinations that cannot work, one line each."""
        E, k = routed(cfg)
        if k > E:
            there = f"experts.num={cfg['experts']['num']}"
            free = E // cfg["experts"]["granularity"] - cfg["experts"]["num"]
            there += f" and {free} without a network" if free else ""
            return [f"router.k={node['k']}: at most {there} can be chosen"]
        capacity = cfg["experts"]["capacity_factor"]
        if capacity is not None and (why := cls.unlimited(node)):
            return [f"experts.capacity_factor={capacity}: router={node['name']} {why}"]
        return []


class Scored(Router):
    """A router with one learned row per expert, whose products with the token are its scores.

    scoring=mlp puts a hidden layer before the rows: silu(H x), a quarter as wide as the token. The rows then are no
    directions of the token's space. Our choices: the activation; the width, since a router should cost little beside
    what it routes (half as wide, a bf16 layer takes 1.15 times as long as its two experts, `benchmarks/methods`); H
    runs in the dtype of the tokens, as the experts do, and the rows and all that follows in fp32.
    """

    def __init__(self, dim: int, num_experts: int, *, scoring: Literal["linear", "mlp"] = "linear", **common: Any):
        super().__init__(dim, num_experts, **common)
        self.scored_dim = dim if scoring == "linear" else math.ceil(dim / 4)  # the width of what the rows meet
        self.weight_ED = parameter(num_experts, self.scored_dim, std=0.02)
        self.hidden_XD = parameter(self.scored_dim, dim, std=dim**-0.5) if scoring == "mlp" else None

    def features(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.hidden_XD is None else F.silu(F.linear(x_TD, self.hidden_XD.to(x_TD.dtype)))

    def score(self, seen_TX: Tensor, ctx: Context) -> Tensor:
        return linear(seen_TX, self.weight_ED)

    def directions_ED(self) -> Tensor | None:
        return self.weight_ED if self.hidden_XD is None else None

    @classmethod
    def traits(cls, node: Mapping[str, Any], E: int) -> Traits:
        found = super().traits(node, E)
        return found if E > 1 else replace(found, live=False, rows="none")  # a softmax over one expert is 1


def with_outputs(routing: Routing, out_ND: Tensor) -> Routing:
    """The routing with the sum of each expert's outputs, for routers that ask for it."""
    ends_E = routing.plan.counts_E.cumsum(0)
    row_N = torch.arange(out_ND.shape[0], device=out_ND.device)
    expert_N = torch.searchsorted(ends_E, row_N, right=True)  # E: rows that no expert computed
    total_ED = out_ND.new_zeros(
        len(ends_E) + 1, out_ND.shape[1], dtype=torch.promote_types(out_ND.dtype, torch.float32)
    )
    sums_ED = total_ED.index_add(0, expert_N, out_ND.detach().to(total_ED.dtype))[:-1]
    return replace(routing, extra={**routing.extra, "output_sum_ED": sums_ED})
