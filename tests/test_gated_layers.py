"""Gate options of the routers that do more than take the k best: whole layers against loops over tokens and experts in
float64, under every gate, order and renormalising, at a temperature.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from layers import context, each_expert, make_moe, make_router, preset, randn, told, traits, underway
from oracles import across
from oracles import scored as oracle
from torch import Tensor

from moe_lab.model.moe import MoE

T, D, E = 10, 6, 4
HOT = 0.75  # a temperature that fp32, in which knobs are told, holds exactly
GATES, ORDERS = ("softmax", "sigmoid", "normalised_sigmoid"), ("gate_first", "topk_first")
OPTIONS = [
    {"gate": gate, "order": order, "renormalise": renormalise}
    for gate, order, renormalise in itertools.product(GATES, ORDERS, (False, True))
]
every_gate = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
each_k = pytest.mark.parametrize("k", [1, 2])
Options = dict[str, Any]


def scores_of(moe: MoE, x_TD: Tensor) -> list[list[Tensor]]:
    return [[oracle.linear_score(x_D, row_D) for row_D in moe.router.weight_ED] for x_D in x_TD]


def sharp(scores: list[Tensor]) -> list[Tensor]:
    return [s / HOT for s in scores]


def mixed(moe: MoE, x_TD: Tensor, weights: list[dict[int, Tensor]]) -> Tensor:
    """sum of weight * expert(x) for each token."""
    experts, zero_D = each_expert(moe), torch.zeros(D, dtype=torch.float64)
    pairs = zip(x_TD, weights, strict=True)
    return torch.stack([sum((w * experts[e](x_D) for e, w in own.items()), zero_D) for x_D, own in pairs])


def same(node: Options, moe: MoE, x_TD: Tensor, y_TD: Tensor, loops_TD: Tensor) -> None:
    """Outputs and all gradients of a random projection of them; what is not live gets a gradient of rounding alone."""
    torch.testing.assert_close(y_TD, loops_TD, rtol=1e-9, atol=1e-11)
    c_TD, leaves = randn(T, D, key=("c",)), [x_TD, *moe.parameters()]
    mine, theirs = (
        torch.autograd.grad((out * c_TD).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (y_TD, loops_TD)
    )
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    largest = {id(p): float(g.abs().max()) for p, g in zip(leaves, mine, strict=True)}
    assert all((largest[id(p)] > 1e-6) == traits(node, E).live for p in moe.router.parameters())


def layer(name: str, **options: Any) -> tuple[Options, MoE, Tensor]:
    node = preset("router", name, **options)
    return node, underway(make_moe(node, D, E)), randn(T, D).requires_grad_()


@every_gate
@each_k
def test_noisy_topk(options: Options, k: int):
    """The gate is that of the noisy scores, which chose."""
    node, moe, x_TD = layer("noisy_topk", k=k, **options)
    tell = told(moe.router, T)
    noise_ED = moe.router.get_parameter("noise_ED")
    weights = []
    for t, scores in enumerate(scores_of(moe, x_TD)):
        std = [(1 + torch.exp(oracle.linear_score(x_TD[t], row_D))).log() for row_D in noise_ED]
        noisy = [s + 0.5 * float(tell["noise_TE"][t, e]) * std[e] for e, s in enumerate(scores)]
        weights.append(oracle.gated(noisy, k, **options, temperature=HOT))
    y_TD, _ = moe(x_TD, context(temperature=HOT, noise=0.5, **tell))
    same(node, moe, x_TD, y_TD, mixed(moe, x_TD, weights))


@every_gate
@each_k
def test_default_moe(options: Options, k: int):
    node, moe, x_TD = layer("default_moe", k=k, **options)
    weights, means = [], []
    for scores in scores_of(moe, x_TD):
        best = oracle.ranked([float(s.detach()) for s in scores])[:k]
        weights.append(oracle.weigh(sharp(scores), best, **options))
        others = oracle.stand_ins(sharp(scores), best, **options)
        means.append(sum(w * moe.router.get_buffer("mean_ED")[e] for e, w in others.items()))
    y_TD, _ = moe(x_TD, context(temperature=HOT))
    same(node, moe, x_TD, y_TD, mixed(moe, x_TD, weights) + torch.stack(means))


@every_gate
@each_k
def test_expert_choice(options: Options, k: int):
    """What is compared is at temperature 1, what weighs is not."""
    node, moe, x_TD = layer("expert_choice", k=k, **options)
    scores = scores_of(moe, x_TD)
    chosen = oracle.wanted(scores, math.ceil(k * T / E), options["gate"], options["order"])
    y_TD, routing = moe(x_TD, context(temperature=HOT, seq_len=T))
    assert [sorted(e for e in row if e < E) for row in routing.plan.selected_TK.tolist()] == chosen
    weights = [oracle.weigh(sharp(own), experts, **options) for own, experts in zip(scores, chosen, strict=True)]
    same(node, moe, x_TD, y_TD, mixed(moe, x_TD, weights))


def test_experts_compare_gate_values_or_scores():
    """Expert 0 takes token 0 by score, 2 of (2, 2), and token 1 by probability, 1 of (1, -9), but not by sigmoid."""
    x_TD = torch.tensor([[2.0, 2.0], [1.0, -9.0]]).double()

    def first(gate: str, order: str) -> int:
        router = make_router(preset("router", "expert_choice", k=1, gate=gate, order=order), 2, 2)
        with torch.no_grad():
            router.weight_ED.copy_(torch.eye(2))
        return int((router(x_TD, context()).plan.selected_TK == 0).any(-1).nonzero())

    assert {gate: [first(gate, order) for order in ORDERS] for gate in GATES} == {
        "softmax": [1, 0],
        "sigmoid": [0, 0],
        "normalised_sigmoid": [1, 0],
    }


@every_gate
@each_k
def test_sinkhorn(options: Options, k: int):
    """The balanced scores choose, the raw ones weigh."""
    node, moe, x_TD = layer("sinkhorn", k=k, **options)
    matrix = across.sinkhorn((x_TD @ moe.router.weight_ED.T).detach(), node["iterations"])
    pairs = zip(scores_of(moe, x_TD), matrix, strict=True)
    weights = [oracle.weigh(sharp(scores), oracle.ranked(row)[:k], **options) for scores, row in pairs]
    y_TD, _ = moe(x_TD, context(temperature=HOT, training=True))
    same(node, moe, x_TD, y_TD, mixed(moe, x_TD, weights))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_base(gate: str, training: bool):
    """The assignment is that of the scores, under any gate."""
    node, moe, x_TD = layer("base", gate=gate)
    y_TD, routing = moe(x_TD, context(temperature=HOT, training=training))
    chosen = routing.plan.selected_TK.tolist()
    _, plain, _ = layer("base")
    assert chosen == plain(x_TD, context(training=training))[1].plan.selected_TK.tolist()
    pairs = zip(scores_of(moe, x_TD), chosen, strict=True)
    weights = [oracle.weigh(sharp(scores), row, gate, "gate_first", False) for scores, row in pairs]
    same(node, moe, x_TD, y_TD, mixed(moe, x_TD, weights))
