"""Explorers against plain loops and the libraries.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

from typing import Any

import pytest
import torch
from exploring import EXPLORERS, PROBABILITIES, at_work, explorer, in_loops
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import explore as oracle
from peers import FP32, FP64, close, gating, hf, hf_config, set_weights
from torch import Tensor

T, D, E = 24, 12, 6
ROUTERS = {
    "topk": preset("router", "topk"),
    "plain": preset("router", "topk", renormalise=False),
    "switch": preset("router", "switch"),
}
STRENGTHS: dict[str, float] = dict.fromkeys(PROBABILITIES, 0.375)
STRENGTHS |= {"gaussian": 0.5, "gumbel": 1.0, "jitter": 0.25, "second_expert": 0.5, "expert_dropout": 0.75}
each_explorer = pytest.mark.parametrize("name", EXPLORERS)


def route(node: dict[str, Any], x_TD: Tensor, *exploring: Any, E: int = E, **more: Any):
    router = make_router(node, x_TD.shape[1], E)
    return router, router(x_TD, context(exploring=exploring, training=True, **more))


# --- values and gradients


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
@each_explorer
def test_weights_and_gradients_equal_plain_loops(name: str, router: str, k: int, collapsed: bool):
    """Every token and every row of the router; collapsed: one expert is the first choice of all."""
    if name == "second_expert" and k == 1:
        pytest.skip("it needs two")
    node, s = ROUTERS[router] | {"k": k}, STRENGTHS[name]
    work = at_work(name, T, D, E, s)
    x_TD, c_TE = randn(T, D).requires_grad_(), randn(T, E, key=("c",))
    mine = make_router(node, D, E)
    if collapsed:
        with torch.no_grad():
            x_TD[:, 0] = 4
            mine.get_parameter("weight_ED")[1, 0] = 2
    weight_TE = dense_weights(mine(x_TD, context(exploring=(work,), training=True)).plan)
    (weight_TE * c_TE).sum().backward()

    twin_TD, w_ED = x_TD.detach().clone().requires_grad_(), mine.get_parameter("weight_ED").detach().clone()
    w_ED.requires_grad_()
    renormalise = node.get("renormalise") is True
    loops_TE = oracle.weights(twin_TD, w_ED, k, renormalise, **in_loops(name, dict(work.drawn), s, k))
    (loops_TE * c_TE).sum().backward()
    torch.testing.assert_close(weight_TE, loops_TE, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad(x_TD), grad(twin_TD), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad(mine.get_parameter("weight_ED")), grad(w_ED), rtol=1e-9, atol=1e-11)


@each_explorer
def test_it_changes_the_choice_or_the_weights_and_at_strength_0_nothing(name: str):
    x_TD, node = randn(T, D), ROUTERS["plain"]
    _, plain = route(node, x_TD)
    _, silent = route(node, x_TD, at_work(name, T, D, E, 0.0))
    _, loud = route(node, x_TD, at_work(name, T, D, E, STRENGTHS[name]))
    assert torch.equal(dense_weights(silent.plan), dense_weights(plain.plan))
    assert torch.equal(silent.plan.selected_TK, plain.plan.selected_TK)
    assert not torch.equal(dense_weights(loud.plan), dense_weights(plain.plan))
    again = route(node, x_TD, at_work(name, T, D, E, STRENGTHS[name], key=1))[1]
    assert not torch.equal(dense_weights(loud.plan), dense_weights(again.plan)), "other draws, the same plan"


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probability_1_and_beyond(name: str):
    """Nothing is heard, every token is at random, k experts are left: finite, with finite gradients."""
    x_TD = randn(T, D).requires_grad_()
    for strength in (1.0, 2.5):  # a schedule of the noise may go above 1
        router, routing = route(ROUTERS["plain"], x_TD, at_work(name, T, D, E, strength))
        weight_TE = dense_weights(routing.plan)
        assert torch.isfinite(weight_TE).all() and (weight_TE > 0).sum(-1).eq(2).all()
        if name == "dropout":
            assert not routing.logits_TE.any()
        if name in ("expert_dropout", "router_dropout"):
            torch.testing.assert_close(weight_TE.sum(-1), torch.ones(T).double())  # the softmax is over these two
        (weight_TE * randn(T, E)).sum().backward()
        assert torch.isfinite(grad(x_TD)).all() and torch.isfinite(grad(router.get_parameter("weight_ED"))).all()


@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (3, 6, 2), (5, 2, 2), (4, 4, 1)])
@each_explorer
def test_few_tokens_and_few_experts(name: str, tokens: int, experts: int, k: int):
    if name == "second_expert" and k == 1:
        pytest.skip("it needs two")
    work = at_work(name, tokens, D, experts, 0.9)
    _, routing = route(ROUTERS["topk"] | {"k": k}, randn(tokens, D), work, E=experts)
    assert torch.isfinite(dense_weights(routing.plan)).all()
    fewest = tokens if name == "second_expert" else tokens * k
    assert fewest <= int(routing.plan.selected_E.sum()) <= tokens * k


@pytest.mark.parametrize("name", ["expert_dropout", "router_dropout"])
def test_a_bias_brings_no_expert_back(name: str):
    work = at_work(name, T, D, E, 0.75)
    draws_TE = work.drawn["experts"].expand(T, E)
    out_TE = ~torch.tensor([oracle.can_be_chosen(u_E, 0.75, 2) for u_E in draws_TE])
    assert out_TE.any()
    bias_E = 10.0 * torch.arange(E).double()
    for bias in (bias_E, bias_E.flip(0)):
        _, routing = route(ROUTERS["topk"], randn(T, D), work, bias_E=bias)
        assert not out_TE.gather(1, routing.plan.selected_TK).any()


@pytest.mark.parametrize("name", ["jitter", "dropout"])
def test_the_experts_see_the_clean_input(name: str):
    """y = sum of weight * expert(x), with the weights of what the router heard and x as it came; the gradient of x
    from the experts is that of the clean input too."""
    moe, x_TD = make_moe(preset("router", "topk"), D, E), randn(T, D)
    y_TD, routing = moe(x_TD, context(exploring=(at_work(name, T, D, E, STRENGTHS[name]),), training=True))
    rows_ND = x_TD.repeat(E, 1)
    out_ETD = moe.experts(rows_ND, torch.full((E,), T)).view(E, T, D)
    expected_TD = torch.einsum("te,etd->td", dense_weights(routing.plan), out_ETD)
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-12)
    assert not torch.allclose(routing.logits_TE, x_TD @ moe.router.get_parameter("weight_ED").T)


def test_two_explorers_at_once():
    """Jitter, noise, a mask and random experts together are the loops together."""
    names, k = ("jitter", "gaussian", "expert_dropout", "reroute"), 2
    works = [at_work(name, T, D, E, STRENGTHS[name]) for name in names]
    x_TD = randn(T, D)
    router, routing = route(ROUTERS["plain"], x_TD, *works)
    hooks: dict[str, Any] = {}
    for name, work in zip(names, works, strict=True):
        hooks |= in_loops(name, dict(work.drawn), STRENGTHS[name], k)
    loops_TE = oracle.weights(x_TD, router.get_parameter("weight_ED"), k, False, **hooks)
    torch.testing.assert_close(dense_weights(routing.plan), loops_TE, rtol=0, atol=1e-12)


# --- the libraries


def test_jitter_is_that_of_switch():
    """transformers draws uniform_(1 - eps, 1 + eps) in place, from the same generator as rand; its experts then read
    the noisy tokens, ours do not, so that only the scores are compared."""
    config = hf_config(
        "SwitchTransformersConfig", d_model=D, num_experts=E, router_jitter_noise=0.25, expert_capacity=T
    )
    theirs = hf("switch_transformers").SwitchTransformersTop1Router(config).train()
    router, x_TD = make_router(ROUTERS["switch"], D, E), randn(T, D)
    set_weights({theirs.classifier.weight: router.get_parameter("weight_ED")})
    torch.manual_seed(0)
    work = at_work("jitter", T, D, E, 0.25)
    work.drawn["channels"].copy_(torch.rand(T, D))
    torch.manual_seed(0)
    _, probs_T1, logits_TE = theirs(x_TD.float())
    routing = router(x_TD, context(exploring=(work,), training=True))
    pairs = {"logits": (routing.logits_TE, logits_TE), "weights": (dense_weights(routing.plan).sum(-1), probs_T1[:, 0])}
    close(pairs, FP32)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 2.0])
def test_second_expert_is_the_threshold_of_st_moe(threshold: float):
    """Its uniform draws are one per token and choice; those of the second are handed to ours. Values and gradients."""
    theirs = gating(D, E, 2, threshold).train()
    x_TD = randn(T, D).requires_grad_()
    router = make_router(ROUTERS["topk"], D, E)
    set_weights({theirs.to_gates.weight: router.get_parameter("weight_ED")})
    work = at_work("second_expert", T, D, E, threshold)
    torch.manual_seed(0)
    work.drawn["tokens"].copy_(torch.zeros(T, 2, dtype=torch.float64).uniform_(0.0, 1.0)[:, 1])
    torch.manual_seed(0)
    theirs_TD, c_TE = x_TD.detach().clone().requires_grad_(), randn(T, E, key=("c",))
    combine_TE = theirs(theirs_TD[None])[1].sum(-1)[0]
    weight_TE = dense_weights(router(x_TD, context(exploring=(work,), training=True)).plan)
    for w_TE in (combine_TE, weight_TE):
        (w_TE * c_TE).sum().backward()
    assert 0 < int((weight_TE > 0).sum()) - T < T
    router_grads = grad(router.get_parameter("weight_ED")), grad(theirs.to_gates.weight)
    close({"weights": (weight_TE, combine_TE), "x": (grad(x_TD), grad(theirs_TD)), "router": router_grads}, FP64)


def test_second_expert_by_its_gate_is_the_random_policy_of_nllb():
    """transformers keeps it where 2 p2 > u with p2 of the softmax over all experts, then renormalises what is left;
    the choice is compared, and the weights where both stay."""
    config = hf_config("NllbMoeConfig", d_model=D, num_experts=E, second_expert_policy="random", expert_capacity=T)
    theirs = hf("nllb_moe").NllbMoeTop2Router(config).train()
    router = make_router(ROUTERS["topk"], D, E, torch.float32)
    set_weights({theirs.classifier.weight: router.get_parameter("weight_ED")})
    work = at_work("second_expert", T, D, E, 0.5, of="gate")
    torch.manual_seed(0)
    work.drawn["tokens"].copy_(torch.rand(T))
    torch.manual_seed(0)
    _, theirs_TE, _ = theirs(randn(T, D).float())
    weight_TE = dense_weights(router(randn(T, D).float(), context(exploring=(work,), training=True)).plan)
    assert torch.equal(weight_TE > 0, theirs_TE > 0)
    both_T = (weight_TE > 0).sum(-1) == 2
    assert 0 < int(both_T.sum()) < T
    close({"weights": (weight_TE[both_T], theirs_TE[both_T])}, FP32)


def test_every_explorer_is_tested_here():
    assert set(EXPLORERS) == set(STRENGTHS) and all(explorer(name).strength.at(0.5) > 0 for name in EXPLORERS)
