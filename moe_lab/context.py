"""What a router is told beside its tokens: knobs, random draws, explorers at work, a selection bias.

Shapes: T tokens (batch-major), D width, E experts, K chosen per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from moe_lab.plans import Assignments, Mixture
from moe_lab.rows import Rows
from moe_lab.slots import Slots

Plan = Assignments | Mixture | Rows | Slots  # how rows move; every kind has the methods of Assignments


@dataclass(frozen=True)
class Draw:
    """Random numbers that the loop draws by position: (seed, step, layer, name).

    gaussian is N(0, 1), gumbel -log(Exp(1)), uniform in [0, 1). shape: per token and expert, per token and input
    channel, per token; or per expert, or expert and input channel: then once per update, the same in all its
    micro-batches. Drawn in training alone, unless `evaluate` (by a fixed key).
    """

    kind: Literal["gaussian", "gumbel", "uniform"]
    shape: Literal["TE", "TD", "T", "E", "ED"]
    evaluate: bool = False


@dataclass(frozen=True)
class Knobs:
    """What schedules move, as 0-dim fp32 tensors (a Python float would recompile a compiled graph at each value)."""

    temperature: Tensor
    noise: Tensor
    capacity: Tensor | None = None


class Explorer(Protocol):
    """What tries other experts than the router's choice while it trains; see explore/base.py, which explains each."""

    def input(self, x_TD: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor: ...
    def logits(self, logits_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor: ...
    def noise_std(self, strength: Tensor) -> Tensor | None: ...
    def allowed(self, logits_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor, k: int) -> Tensor | None: ...
    def rank(self, rank_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor: ...
    def plan(self, plan: Plan, gates_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Plan: ...


@dataclass(frozen=True)
class Exploring:
    """One explorer at work: its strength at this step (0-dim) and what was drawn for it."""

    explorer: Explorer
    strength: Tensor
    drawn: Mapping[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What one layer's router is told beside its tokens.

    noise_TE: standard draws of the router's own logit noise, None in evaluation and for routers without noise.
    bias_E:   the layer's selection bias, None where no balancer moves one.
    hard:     evaluate with only the `hard` strongest experts of each token's choice, None for the choice as trained.
    seq_len:  tokens are sequences of so many, one behind the other. ids_T: the input's token ids.
    draws:    what the router's `draws` ask for, by name. exploring: the explorers at work, none in evaluation.
    strengths: what the router's `curves` say at this point of the run, by name.
    """

    knobs: Knobs
    noise_TE: Tensor | None = None
    bias_E: Tensor | None = None
    hard: int | None = None
    seq_len: int | None = None
    ids_T: Tensor | None = None
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    exploring: tuple[Exploring, ...] = ()
    training: bool = False
    strengths: Mapping[str, Tensor] = field(default_factory=dict)
