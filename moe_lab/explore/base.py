"""What tries experts that the router would not choose. It acts in training only.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lab.config import registered
from moe_lab.routing import Draw, Plan, Touches
from moe_lab.schedules import Schedule


class Explorer:
    """Each hook leaves things as they are; an explorer writes the one it needs. They are called in this order.

    strength: on a schedule of its own, and times schedule.noise. draws: what the loop draws for it, told to each hook
    by name. An explorer holds no state and draws nothing itself.
    """

    draws: Mapping[str, Draw] = {}
    touches: Touches = "choice"
    overrules = False  # whether it changes the choice beside the logits: balance=[load] would not know

    def __init__(self, *, strength: Schedule):
        self.strength = strength

    def input(self, x_TD: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        """What the router reads in the place of its tokens; the experts see the tokens as they are."""
        return x_TD

    def logits(self, logits_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        """Logits with noise, which choose and gate."""
        return logits_TE

    def noise_std(self, strength: Tensor) -> Tensor | None:
        """Standard deviation of Gaussian noise on the logits (balance=[load] needs it), or None."""
        return None

    def allowed(self, logits_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor, k: int) -> Tensor | None:
        """Which experts may be chosen, bool, broadcastable to [T, E], at least k of each token; None: all."""
        return None

    def rank(self, rank_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        """What ranks the experts, with the selection bias in it; the gate values stay."""
        return rank_TE

    def plan(self, plan: Plan, gates_TE: Tensor, drawn: Mapping[str, Tensor], strength: Tensor) -> Plan:
        """The plan, once the experts are chosen."""
        return plan

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        name, router = node["name"], cfg["router"]["name"]
        if why := registered("router")[router].unexplored(cfg["router"]).get(cls.touches):
            return [f"explore.{name}: router={router} {why}"]
        if cls.overrules and any(balancer["name"] == "load" for balancer in cfg["balance"].values()):
            return [f"explore.{name}: balance.load knows nothing of what it changes; take one of them"]
        return []


class LogitNoise(Explorer):
    """Noise added to the logits, where the router has none of its own."""

    touches = "logits"

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        name, router = node["name"], cfg["router"]["name"]
        own = registered("router")[router].noise
        if own != "none":
            return [f"explore.{name}: router={router} has {own} noise of its own; schedule.noise scales that"]
        if (first := first_of(LogitNoise, cfg)) is not node:
            return [f"explore.{name}: explore.{first['name']} puts noise on the logits already; take one of them"]
        return super().conflicts(node, cfg)


def first_of(kind: type[Explorer], cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first explorer of its kind in a config that has one: of some kinds there can be one alone."""
    known = registered("explore")
    return next(node for node in cfg["explore"].values() if issubclass(known[node["name"]], kind))


class SetChoice(Explorer):
    """One that sets itself who the k experts of a token are."""

    overrules = True

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        name, router = node["name"], cfg["router"]
        kind = registered("router")[router["name"]]
        if kind.wants_losses:
            return [f"explore.{name}: router={router['name']} learns from the probability of its own choice alone"]
        if kind.scored and kind.ragged:
            return [f"explore.{name}: router={router['name']} chooses as many experts as it takes; there is no k"]
        return super().conflicts(node, cfg)


def runs_every_expert(router: Mapping[str, Any]) -> bool:
    """Whether the router of this config has all experts on all tokens."""
    return registered("router")[router["name"]].every_expert or router.get("backward") == "dense"
