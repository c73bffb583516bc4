"""What balance losses are worth on given router logits: value, gradient, and what of it reaches a dead expert.

Shapes: L MoE layers, T tokens, E experts, K chosen per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer, mean_over_layers
from moe_lab.config import build, registered
from moe_lab.routing import Assignments, Routing

FAR = 10.0  # logits above and below 0 in a collapse: deep for softmax and sigmoid, and far from underflow


@dataclass(frozen=True)
class Worth:
    """gradient: its norm over the logits of all layers. dead: over those of experts without a token; None: none is."""

    value: float
    gradient: float
    dead: float | None


class Missing(Exception):
    """A loss asked for something that logits do not tell."""


class _Absent:
    """Stands where a run has something else than logits, and says what as soon as it is touched."""

    def __init__(self, what: str):
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise Missing(self._what)


_MOE = cast(Any, _Absent("the layer: its router or its weights"))
_NOISE = cast(Any, _Absent("noise on the logits"))


def situations(E: int, k: int, T: int, L: int, seed: int) -> dict[str, Tensor]:
    """Random logits [L, T, E] in float64.

    balanced: N(0, 1), every token in all E rotations, which is exact where E divides T. skewed: the same and a slope
    from +2 to -2 over the experts. collapse: all tokens to the first k experts. halves (two layers or more): even
    layers use one half of the experts, odd layers the other.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(L, math.ceil(T / E), E, generator=g, dtype=torch.float64)
    even = torch.stack([drawn.roll(i, -1) for i in range(E)], 2).flatten(1, 2)[:, :T]
    expert_E = torch.arange(E)
    found = {
        "balanced": even,
        "skewed": even + torch.linspace(2, -2, E, dtype=torch.float64),
        "collapse": even + torch.where(expert_E < k, FAR, -FAR),
    }
    if L > 1 and k <= E // 2:
        left_E, right_E = expert_E < E // 2, expert_E >= E - E // 2
        uses_LE = torch.stack([right_E if layer % 2 else left_E for layer in range(L)])
        found["halves"] = even + torch.where(uses_LE[:, None], FAR, -FAR)
    return found


def names() -> list[str]:
    """Our balancers."""
    return sorted(registered("balance"))


def ours(name: str, k: int) -> Callable[[Tensor], Tensor] | None:
    """The loss of balance=[name] as the loop adds it with a weight of 1, the mean over layers; None: it has none."""
    balancer: Balancer = build("balance", {"name": name})
    if balancer.weight is None:
        return None

    def loss(logits_LTE: Tensor) -> Tensor:
        layers = [Layer(_MOE, logits_LTE.shape[1], state=balancer.start(_MOE)) for _ in logits_LTE]
        return mean_over_layers(balancer, [routing(logits_TE, k) for logits_TE in logits_LTE], layers)

    return loss


def routing(logits_TE: Tensor, k: int) -> Routing:
    """What router=topk decides by these logits: the weights are the softmax over the k chosen."""
    top = logits_TE.topk(k, -1)
    plan = Assignments(top.indices, top.values.softmax(-1), logits_TE.shape[1])
    return Routing(plan, logits_TE, logits_TE.softmax(-1), _NOISE, _NOISE)


def measure(loss: Callable[[Tensor], Tensor], logits_LTE: Tensor, k: int) -> Worth:
    """Missing where the loss needs more than logits."""
    logits_LTE = logits_LTE.detach().requires_grad_()
    value = loss(logits_LTE)
    (grad_LTE,) = torch.autograd.grad(value + 0 * logits_LTE.sum(), logits_LTE)
    chosen_LTE = torch.zeros_like(grad_LTE).scatter(-1, logits_LTE.topk(k, -1).indices, 1)
    dead_LE = chosen_LTE.sum(1) == 0
    dead = grad_LTE.transpose(1, 2)[dead_LE]
    return Worth(value.item(), grad_LTE.norm().item(), dead.norm().item() if bool(dead_LE.any()) else None)
