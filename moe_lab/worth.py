"""What balance losses are worth on given router logits: value, gradient, and what of it reaches a dead expert.

Shapes: L MoE layers, T tokens, E experts, K chosen per token, D width, F neurons of an expert.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab import seeding
from moe_lab.balance.base import Balancer, Layer, mean_over_layers
from moe_lab.config import build, registered
from moe_lab.conventions import START_STD, Convention
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Knobs, Router, Routing

FAR = 10.0  # logits above and below 0 in a collapse: deep for softmax and sigmoid, and far from underflow
ROUTERS = {"load": "noisy_topk", "l1_adaptive": "relu"}  # whose choice a loss is about; of all others: topk
ONE_NEURON = {"name": "mlp", "width": 1}


@dataclass(frozen=True)
class Worth:
    """gradient: its norm over all that the loss acts on. dead: over experts without a token; None: there are none."""

    value: float
    gradient: float
    dead: float | None


class Missing(Exception):
    """A loss asked for something that is not there."""


@dataclass(frozen=True)
class Case:
    """Logits, and standard normal draws for the losses that need noise on them. seed: of what else a loss draws.

    offset_LE: what all tokens' logits of an expert have in common (None: not known).
    """

    logits_LTE: Tensor
    noise_LTE: Tensor
    offset_LE: Tensor | None = None
    seed: int = 0

    def rows_LED(self) -> Tensor:
        """A router that makes such logits of tokens of width E + 1 that all share one direction: each row has a
        direction of its own, as long as 1, and the offset along the shared one."""
        if self.offset_LE is None:
            raise Missing("the layer's weights, which logits do not tell")
        L, E = self.offset_LE.shape
        return torch.cat([torch.eye(E, dtype=torch.float64).expand(L, E, E), self.offset_LE[..., None]], -1)


@dataclass(frozen=True)
class Loss:
    """A value, what it may have a gradient by (logits, weights [L, E, ...]), and how many tokens each expert has."""

    value: Tensor
    logits_LTE: Tensor
    selected_LE: Tensor
    weights: tuple[Tensor, ...] = ()


def situations(E: int, k: int, T: int, L: int, seed: int) -> dict[str, Case]:
    """Random logits [L, T, E] in float64.

    balanced: N(0, 1), every token in all E rotations (its noise too), which is exact where E divides T. skewed: the
    same and a slope from +2 to -2 over the experts. collapse: all tokens to the first k experts. halves (two layers or
    more): even layers use one half of the experts, odd layers the other.
    """
    g = torch.Generator().manual_seed(seed)
    even, noise_LTE = _rotated(E, T, L, g), _rotated(E, T, L, g)
    expert_E = torch.arange(E)
    offsets = {
        "balanced": torch.zeros(E, dtype=torch.float64),
        "skewed": torch.linspace(2, -2, E, dtype=torch.float64),
        "collapse": _far(expert_E < k),
    }
    found = {name: offset_E.expand(L, E) for name, offset_E in offsets.items()}
    if L > 1 and k <= E // 2:
        left_E, right_E = expert_E < E // 2, expert_E >= E - E // 2
        found["halves"] = _far(torch.stack([right_E if layer % 2 else left_E for layer in range(L)]))
    return {name: Case(even + offset[:, None], noise_LTE, offset, seed) for name, offset in found.items()}


def given(logits_LTE: Tensor, seed: int) -> Case:
    """Logits of one's own."""
    drawn = torch.randn(logits_LTE.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Case(logits_LTE, drawn, seed=seed)


def _rotated(E: int, T: int, L: int, g: torch.Generator) -> Tensor:
    drawn = torch.randn(L, math.ceil(T / E), E, generator=g, dtype=torch.float64)
    return torch.stack([drawn.roll(i, -1) for i in range(E)], 2).flatten(1, 2)[:, :T]


def _far(used: Tensor) -> Tensor:
    return torch.where(used, FAR, -FAR).double()


def names() -> list[str]:
    """Our balancers."""
    return sorted(registered("balance"))


def based_on(name: str) -> str:
    """The router whose choice one of ours is measured on, or "weights"."""
    return "weights" if registered("balance")[name].of_weights else ROUTERS.get(name, "topk")


def ours(name: str, case: Case, k: int) -> Loss | None:
    """The loss of balance=[name] as the loop adds it with a weight of 1, the mean over layers, in the first update;
    None: it has none. Missing where it needs more than there is."""
    balancer: Balancer = build("balance", {"name": name})
    if balancer.weight is None:
        return None
    logits_LTE, weights = _leaf(case.logits_LTE), ()
    if balancer.of_weights:
        rows_LED = case.rows_LED()
        weights = _leaf(rows_LED), _leaf(rows_LED[:, :, None])  # experts of one neuron, which is like the row
    routings, layers = [], []
    of_layers = zip(logits_LTE.unbind(), *(weight.unbind() for weight in weights), strict=True)
    for i, (logits_TE, *of_layer) in enumerate(of_layers):
        moe = _moe(ROUTERS.get(name, "topk"), logits_TE, k, of_layer)
        (T, E), D = logits_TE.shape, moe.router.dim
        sizes = {"T": T, "E": E, "D": D}
        draws = {
            n: seeding.noise(d.kind, tuple(sizes[x] for x in d.shape), "losses", case.seed, i, n)
            for n, d in balancer.draws.items()
        }
        state = {} if weights else balancer.start(moe)  # which may set weights
        layers.append(Layer(moe, T, state=state, draws=draws))
        routings.append(_routing(moe.router, case.noise_LTE[i]))
    selected_LE = torch.stack([routing.plan.selected_E for routing in routings])
    return Loss(mean_over_layers(balancer, routings, layers), logits_LTE, selected_LE, weights)


def _moe(router: str, logits_TE: Tensor, k: int, weights: Sequence[Tensor]) -> MoE:
    """A layer whose router scores every batch with these logits, and whose rows and experts are `weights` if given."""
    E, D = logits_TE.shape[1], weights[0].shape[-1] if weights else 1
    moe = MoE(build("router", {"name": router, "k": k}, D, E), build("experts", ONE_NEURON | {"num": E}, D, 1), 1)
    seeding.initialise(moe, 0)
    moe.double()
    moe.router.score = lambda seen_TX, ctx: logits_TE
    for part, name, weight in zip((moe.router, moe.experts), ("weight_ED", "w_in_EID"), weights, strict=False):
        delattr(part, name)  # a parameter could not be a slice of the leaf
        setattr(part, name, weight)
    return moe


def _routing(router: Router, noise_TE: Tensor) -> Routing:
    """Its choice in the first update of a run."""
    if router.noise != "none" and router.k == router.num_experts:
        raise Missing("a choice: here all experts are chosen")
    one = torch.ones((), dtype=torch.float64)
    ctx = Context(Knobs(one, one), None if router.noise == "none" else noise_TE, training=True)
    return router(noise_TE.new_zeros(len(noise_TE), router.dim), ctx)


def theirs(convention: Convention, case: Case, k: int) -> Loss:
    """Of each layer as one sequence."""
    if convention.noisy and k == case.logits_LTE.shape[-1]:
        raise Missing("a choice: here all experts are chosen")
    logits_LTE = _leaf(case.logits_LTE)
    noise = (case.noise_LTE,) if convention.noisy else ()
    seen_LTE = logits_LTE + START_STD * case.noise_LTE if convention.noisy else logits_LTE
    chosen_LTE = torch.zeros_like(logits_LTE).scatter(-1, seen_LTE.topk(k, -1).indices, 1)
    return Loss(convention.value(logits_LTE, k, 1, *noise), logits_LTE, chosen_LTE.sum(1))


def measure(loss: Loss) -> Worth:
    leaves = [loss.logits_LTE, *loss.weights]
    value = loss.value + 0 * loss.logits_LTE.sum()
    grads = torch.autograd.grad(value, leaves, materialize_grads=True)
    grad_LEN = torch.cat([grads[0].transpose(1, 2), *(g.flatten(2) for g in grads[1:])], -1)
    dead_LE = loss.selected_LE == 0
    dead = grad_LEN[dead_LE].norm().item() if bool(dead_LE.any()) else None
    return Worth(loss.value.item(), grad_LEN.norm().item(), dead)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()
