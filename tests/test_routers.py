"""What every router must do, held against every preset in conf/router, and the straight-through gradients by hand.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import (
    context,
    dense_weights,
    draw,
    fits,
    grad,
    make_moe,
    make_router,
    norm,
    preset,
    randn,
    router_cases,
    told,
    traits,
    underway,
)
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import build, registered
from moe_lab.routing import Assignments, Mixture, Router, Traits

T, D, E = 48, 16, 6
CASES = router_cases()
every_router = pytest.mark.parametrize("node", CASES)


def those_that(promise: Callable[[type[Router], Traits], bool]) -> Any:
    """The cases whose class and traits fulfil `promise`."""
    nodes = [(case, case.values[0]) for case in CASES]
    cases = [case for case, node in nodes if promise(registered("router")[node["name"]], traits(node, E))]
    return pytest.mark.parametrize("node", cases)


DRAWN_FROM_THE_GATE = ("sparsemixer",)  # whose estimates are right for draws from the weights' own distribution


def chosen(router: Router, x_TD: Tensor, **kwargs: Any) -> Tensor:
    """The set of experts of each token, sorted, [T, K]."""
    return router(x_TD, context(**kwargs)).plan.selected_TK.sort(-1).values


def different_choices(selected_TK: Tensor, k: int | None) -> None:
    """No token chooses an expert twice, and each chooses k; k None: any number."""
    for row in selected_TK.tolist():
        choices = [e for e in row if e < E]
        assert len(set(choices)) == len(choices) and k in (None, len(choices))


@every_router
def test_weights_and_counts(node: dict[str, Any]):
    router = make_router(node, D, E)
    routing = router(randn(T, D), context(**told(router, T)))
    weight_TE = dense_weights(routing.plan)
    assert torch.isfinite(weight_TE).all() and (weight_TE >= 0).all()
    assert weight_TE.sum() > 0
    selected_TK = routing.plan.selected_TK
    choices = selected_TK[selected_TK < E]  # E: no choice
    assert int(routing.plan.selected_E.sum()) == len(choices)
    torch.testing.assert_close(routing.plan.importance_E(), weight_TE.sum(0))
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(T, dtype=torch.float64))
    assert torch.equal(torch.bincount(choices, minlength=E), routing.plan.selected_E)
    different_choices(selected_TK, None if routing.plan.ragged else node["k"])


@every_router
def test_noise_matters_in_training_and_is_off_in_evaluation(node: dict[str, Any]):
    router, x_TD = make_router(node, D, E), randn(T, D)
    still = told(router, T, training=False)
    quiet = router(x_TD, context(**still))
    assert torch.equal(dense_weights(quiet.plan), dense_weights(router(x_TD, context(**still)).plan))
    first, second = (router(x_TD, context(**told(router, T, i))) for i in range(2))
    assert torch.equal(first.plan.selected_TK, second.plan.selected_TK) != traits(node, E).stochastic
    assert torch.equal(first.logits_TE, quiet.logits_TE)
    if router.noise == "none":
        return
    assert torch.equal(first.probs_TE, quiet.probs_TE)
    silenced = router(x_TD, context(**told(router, T), noise=0.0))
    assert torch.equal(dense_weights(silenced.plan), dense_weights(quiet.plan))


@those_that(lambda cls, traits: traits.live is not None and cls.objective is Router.objective)
def test_task_gradient_reaches_the_gate(node: dict[str, Any]):
    """Except where the weight is 1 whatever the logits: there rounding leaves about 1e-6 of the experts' gradient."""
    moe = underway(make_moe(node, D, E, dtype=torch.float32))
    x_TD, target_TD = randn(T, D).float(), randn(T, D, key=("target",)).float()
    y_TD, _ = moe(x_TD, context(**told(moe.router, T)))
    (y_TD - target_TD).square().mean().backward()
    reached = [p.grad for p in moe.router.parameters() if p.grad is not None]
    ratio = norm(reached) / norm(p.grad for p in moe.experts.parameters())
    assert ratio < 1e-4 if traits(node, E).rows == "none" else ratio > 1e-2


@every_router
def test_permuting_tokens_permutes_decisions(node: dict[str, Any]):
    router, x_TD = make_router(node, D, E), randn(T, D)
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    here = told(router, T)
    noise_TE, draws = here["noise_TE"], {name: drawn[order_T] for name, drawn in here["draws"].items()}
    there = here | {"noise_TE": None if noise_TE is None else noise_TE[order_T], "draws": draws, "ids_T": order_T}
    plain = router(x_TD, context(**here)).plan
    moved = router(x_TD[order_T], context(**there)).plan
    assert torch.equal(moved.selected_TK, plain.selected_TK[order_T])
    torch.testing.assert_close(dense_weights(moved), dense_weights(plain)[order_T])


@those_that(lambda cls, traits: cls.scored)
def test_bias_moves_the_choice_and_not_the_weight(node: dict[str, Any]):
    router, x_TD = make_router(node, D, E), randn(T, D)
    noise_TE = draw(router, T)
    bias_E = torch.zeros(E, dtype=torch.float64)
    plain = router(x_TD, context(noise_TE)).plan
    zero = router(x_TD, context(noise_TE, bias_E)).plan
    assert torch.equal(zero.selected_TK, plain.selected_TK)
    assert torch.equal(dense_weights(zero), dense_weights(plain))
    raised = router(x_TD, context(noise_TE, bias_E + 0.3)).plan  # all experts alike: no choice changes
    assert torch.equal(dense_weights(raised), dense_weights(plain))
    least = int(plain.selected_E.argmin())
    bias_E[least] = 10.0  # more than any gate value: it serves every token
    pushed = router(x_TD, context(noise_TE, bias_E)).plan
    assert int(plain.selected_E[least]) < T and int(pushed.selected_E[least]) == T
    harder = router(x_TD, context(noise_TE, 2 * bias_E)).plan
    assert torch.equal(dense_weights(harder), dense_weights(pushed)), "the weight depends on the size of the bias"


@every_router
def test_temperature_never_changes_the_choice(node: dict[str, Any]):
    router, x_TD = make_router(node, D, E), randn(T, D)
    here = told(router, T, training=node["name"] not in DRAWN_FROM_THE_GATE)
    for bias_E in (None, 0.1 * randn(E, key=("bias",))) if router.scored else (None,):
        plain = chosen(router, x_TD, **here, bias_E=bias_E)
        for temperature in (0.05, 0.5, 4.0):
            other = chosen(router, x_TD, **here, bias_E=bias_E, temperature=temperature)
            assert torch.equal(other, plain)


@every_router
def test_one_expert_and_all_experts(node: dict[str, Any]):
    x_TD = randn(T, D)
    alone = make_router(node | {"k": 1}, D, 1)
    routing = alone(x_TD, context(**told(alone, T)))
    assert routing.plan.ragged or int(routing.plan.selected_E) == T
    assert torch.isfinite(dense_weights(routing.plan)).all()
    if not fits("router", node | {"k": E}):  # BASE gives each token one
        return
    full = make_router(node | {"k": E}, D, E)
    plan = full(x_TD, context(**told(full, T))).plan
    assert plan.ragged or plan.selected_E.tolist() == [T] * E
    assert torch.isfinite(dense_weights(plan)).all()


@every_router
def test_ties_still_choose_k_different_experts(node: dict[str, Any]):
    router = make_router(node, D, E)
    routing = router(torch.zeros(T, D, dtype=torch.float64), context(**told(router, T, training=False)))
    plan, logits_TE = routing.plan, routing.logits_TE
    different_choices(plan.selected_TK, None if plan.ragged else node["k"])
    weight_TE = dense_weights(plan)
    if node["name"] in DRAWN_FROM_THE_GATE or (logits_TE != logits_TE[:, :1]).any():
        return  # the second draw is weighed without the first; lpr's encoder has a shift
    assert weight_TE[weight_TE > 0].unique().numel() <= 1, "equal logits, unequal weights"
    assert plan.ragged or weight_TE.any()


@those_that(lambda cls, traits: cls.scored)
@pytest.mark.parametrize("bias", [None, 10.0])
@pytest.mark.parametrize("hard", [None, 1])
def test_extreme_logits(node: dict[str, Any], bias: float | None, hard: int | None):
    """Logits of +-1e4: softmax and sigmoid saturate to exact zeros, and a bias can choose what has weight zero."""
    moe = make_moe(node, E, E, dtype=torch.float32, width=8)
    router = moe.router
    with torch.no_grad():
        if hasattr(router, "weight_ED"):
            router.get_parameter("weight_ED").copy_(torch.eye(E))  # the tokens are the logits
    one, signs = torch.eye(E), torch.tensor([1.0, -1.0]).repeat(E // 2)
    rows = [torch.ones(1, E), -torch.ones(1, E), torch.zeros(1, E), signs[None], one, -one, 2 * one - 1]
    x_TD = (1e4 * torch.cat(rows)).requires_grad_()
    bias_E = None if bias is None else bias * one[3]
    routing = router(x_TD, context(**told(router, len(x_TD)), bias_E=bias_E, hard=hard))
    loss = (dense_weights(routing.plan) * randn(len(x_TD), E).float()).sum()
    cfg = {
        "router": node,
        "experts": preset("experts", "swiglu", num=E, width=8),
        "explore": {},
        "model": preset("model", "nano"),
    }
    for name in sorted(registered("balance")):
        balancer: Balancer = build("balance", {"name": name})
        refused = balancer.conflicts(preset("balance", name), cfg | {"balance": {name: preset("balance", name)}})
        if balancer.weight is not None and not refused:
            draws = {n: torch.rand(E, E) for n in balancer.draws}
            state = balancer.start(copy.deepcopy(moe))  # some start with other weights
            loss = loss + balancer.loss(routing, Layer(moe, 1, {}, state, draws))
    loss.backward()
    assert torch.isfinite(dense_weights(routing.plan)).all() and torch.isfinite(loss)
    for p in (x_TD, *router.parameters()):
        assert p.grad is None or torch.isfinite(p.grad).all()
    assert x_TD.grad is not None


@every_router
def test_hard_evaluation_keeps_the_strongest_and_the_whole_weight(node: dict[str, Any]):
    router, x_TD = make_router(node, D, E), randn(T, D)
    here = told(router, T, training=False)
    plan, top1 = router(x_TD, context(**here)).plan, router(x_TD, context(**here, hard=1)).plan
    assert torch.equal(top1.selected_TK, plan.selected_TK[:, :1])
    torch.testing.assert_close(dense_weights(top1).sum(-1), dense_weights(plan).sum(-1))
    used_T = dense_weights(plan).sum(-1) > 0  # expert choice leaves some tokens out
    assert torch.equal((dense_weights(top1) > 0).sum(-1), used_T.long()) and used_T.any()


# Straight-through routers. c_TD is the gradient of the loss at the layer's output, a_TE = <c_t, expert_e(x_t)>.

STE = [
    pytest.param(preset("router", name, backward=backward, k=k), id=f"{name}-{backward}-{k}")
    for name in ("softmax_ste", "gumbel_ste")
    for backward in ("selected", "dense")
    for k in (1, 2)
]


def every_expert_output(moe: Any, x_TD: Tensor) -> Tensor:
    """What each expert says of each token, without a plan, [T, E, D]."""
    gate_TEF, up_TEF = torch.einsum("td,eid->tei", x_TD, moe.experts.w_in_EID).chunk(2, -1)
    return torch.einsum("tef,efd->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, moe.experts.w_out_EFD)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("backward", ["selected", "dense"])
@pytest.mark.parametrize("name", ["softmax_ste", "gumbel_ste"])
def test_straight_through_is_exactly_hard_forward(name: str, backward: str, k: int):
    """Of many tokens and also for a third, where s + (1/k - s) would be hard only up to rounding."""
    n = 5000
    router = make_router(preset("router", name, backward=backward, k=k), D, E, torch.float32)
    weight_TE = dense_weights(router(randn(n, D).float(), context(draw(router, n), temperature=0.75)).plan)
    assert torch.equal(weight_TE.unique(), torch.tensor([0.0, 1 / k]))
    assert torch.equal((weight_TE > 0).sum(-1), torch.full((n,), k))


@pytest.mark.parametrize("node", STE)
def test_straight_through_gradients_by_hand(node: dict[str, Any]):
    """d loss / d z_j = p_j (a_j m_j - sum_i a_i p_i m_i) / t: m marks the chosen (selected) or is 1 (dense).

    p is the (Gumbel-)softmax at temperature t. Each expert's own gradient is that of sum hard_e expert_e: with no
    hard weight it is exactly zero.
    """
    t = 0.75  # exact in fp32, in which knobs are told
    moe = make_moe(node, D, E)
    x_TD, c_TD = randn(T, D), randn(T, D, key=("c",))
    noise_TE = draw(moe.router, T)
    y_TD, routing = moe(x_TD, context(noise_TE, temperature=t))
    (y_TD * c_TD).sum().backward()
    assert isinstance(routing.plan, Mixture if node["backward"] == "dense" else Assignments)

    with torch.no_grad():
        z_TE = x_TD @ moe.router.weight_ED.T + (0 if noise_TE is None else noise_TE)
        p_TE = (z_TE / t).softmax(-1)
        hard_TE = torch.zeros_like(p_TE).scatter(1, z_TE.topk(node["k"], -1).indices, 1 / node["k"])
        a_TE = torch.einsum("td,ted->te", c_TD, every_expert_output(moe, x_TD))
        m_TE = torch.ones_like(p_TE) if node["backward"] == "dense" else (hard_TE > 0).double()
        dz_TE = p_TE * (a_TE * m_TE - (a_TE * p_TE * m_TE).sum(-1, keepdim=True)) / t
    torch.testing.assert_close(grad(moe.router.weight_ED), dz_TE.T @ x_TD, rtol=1e-10, atol=1e-12)

    twin = make_moe(node, D, E)
    (torch.einsum("te,ted->td", hard_TE, every_expert_output(twin, x_TD)) * c_TD).sum().backward()
    torch.testing.assert_close(grad(moe.experts.w_in_EID), grad(twin.experts.w_in_EID), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad(moe.experts.w_out_EFD), grad(twin.experts.w_out_EFD), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("node", STE)
def test_unselected_experts_get_exactly_no_gradient(node: dict[str, Any]):
    moe = make_moe(node, D, E)
    y_TD, routing = moe(randn(1, D), context(draw(moe.router, 1)))
    y_TD.sum().backward()
    chosen_K = routing.plan.selected_TK[0].tolist()
    for e in range(E):
        assert bool(grad(moe.experts.w_in_EID)[e].any()) == (e in chosen_K)
        assert bool(grad(moe.experts.w_out_EFD)[e].any()) == (e in chosen_K)


def test_dense_backward_is_the_gradient_of_the_full_relaxation():
    """Same numbers, two routers: gumbel_ste dense against gumbel_softmax, which is that relaxation."""
    hard = make_moe(preset("router", "gumbel_ste", backward="dense"), D, E)
    soft = make_moe(preset("router", "gumbel_softmax"), D, E)
    x_TD, c_TD, noise_TE = randn(T, D), randn(T, D, key=("c",)), draw(hard.router, T)
    for moe in (hard, soft):
        (moe(x_TD, context(noise_TE, temperature=0.75))[0] * c_TD).sum().backward()
    torch.testing.assert_close(grad(hard.router.weight_ED), grad(soft.router.weight_ED), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(grad(hard.experts.w_in_EID), grad(soft.experts.w_in_EID))


@pytest.mark.parametrize("temperature", [0.2, 3.0])
@pytest.mark.parametrize("name", ["gumbel_ste", "gumbel_softmax"])
def test_gumbel_choice_samples_the_softmax_at_any_temperature(name: str, temperature: float):
    n, logits_E = 20_000, torch.tensor([1.0, 0.0, -1.0, 0.5])
    router = make_router(preset("router", name), 4, 4, torch.float32)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))
    plan = router(logits_E.expand(n, 4), context(draw(router, n), temperature=temperature)).plan
    p_E = logits_E.softmax(-1)
    error_E = (plan.selected_E / n - p_E).abs()
    assert (error_E < 4 * (p_E * (1 - p_E) / n).sqrt()).all()


def test_noisy_topk_by_hand():
    """One token, three experts, k=2: H = (1 + 2 ln2, 0, 3 - 3 ln2) = (2.386, 0, 0.921): experts 0 and 2 are chosen,
    with the softmax over their two scores, 1 / (1 + e^-1.4657) = 0.8124 and 0.1876."""
    router = make_router(preset("router", "noisy_topk"), 3, 3)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(3))
        router.get_parameter("noise_ED").zero_()  # softplus(0) = ln 2
    routing = router(torch.tensor([[1.0, 0.0, 3.0]]).double(), context(torch.tensor([[2.0, 0.0, -3.0]])))
    assert routing.plan.selected_TK.tolist() == [[0, 2]]
    expected = torch.tensor([[0.8124, 0.1876]]).double()
    torch.testing.assert_close(dense_weights(routing.plan)[:, [0, 2]], expected, rtol=0, atol=5e-5)


def test_sigmoid_topk_by_hand():
    """Sigmoids of (0, ln 3, -ln 3) are (1/2, 3/4, 1/4). k=2: experts 1 and 0, weights 3/5 and 2/5.
    With a bias of 0.6 on expert 2 (0.85): experts 2 and 1, weights 1/4 and 3/4, without the bias in them."""
    router = make_router(preset("router", "sigmoid_topk"), 3, 3)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(3))
    x_TD = torch.tensor([[0.0, 3.0, 1 / 3]]).double()
    x_TD[0, 1:] = x_TD[0, 1:].log()
    routing = router(x_TD, context())
    torch.testing.assert_close(dense_weights(routing.plan), torch.tensor([[0.4, 0.6, 0.0]]).double())
    torch.testing.assert_close(routing.probs_TE, torch.tensor([[2, 3, 1]]).double() / 6)
    biased = dense_weights(router(x_TD, context(bias_E=torch.tensor([0.0, 0.0, 0.6]))).plan)
    torch.testing.assert_close(biased, torch.tensor([[0.0, 0.75, 0.25]]).double())
