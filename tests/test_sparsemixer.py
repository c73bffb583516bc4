"""SparseMixer and SparseMixer-v2: against loops with gradients by hand, and PhiMoE's code fed the same draws."""

from typing import Any

import pytest
import torch
from layers import context, dense_weights, grad, make_router, preset, randn
from oracles import scored as oracle
from peers import FP64, close, hf
from torch import Tensor

from moe_lab import seeding
from moe_lab.config import registered
from moe_lab.routing import Assignments, Router

T, D, E = 40, 8, 6
VERSIONS = [("v1", 1), ("v2", 1), ("v2", 2), ("v2", E)]


def sparsemixer(version: str, k: int, r: float = 0.4, **changes: Any) -> Router:
    return make_router(preset("router", "sparsemixer", version=version, k=k, r=r, **changes), D, E)


def drawn(router: Router, tokens: int) -> dict[str, Tensor]:
    shapes = {"TE": (tokens, router.num_experts), "T": (tokens,)}
    return {
        name: seeding.noise(draw.kind, shapes[draw.shape], "test", name).double() for name, draw in router.draws.items()
    }


def plan_of(router: Router, x_TD: Tensor, **told: Any) -> Assignments:
    plan = router(x_TD, context(**told)).plan
    assert isinstance(plan, Assignments)
    return plan


@pytest.mark.parametrize(("version", "k"), VERSIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_against_loops(version: str, k: int, training: bool, temperature: float):
    router, x_TD, c_TK = sparsemixer(version, k), randn(T, D), randn(T, k)
    draws = drawn(router, T) if training else {}
    plan = plan_of(router, x_TD, draws=draws, temperature=temperature)
    (plan.weight_TK * c_TK).sum().backward()
    row_ED = router.get_parameter("weight_ED").detach()
    expected_ED, rescaled = torch.zeros(E, D, dtype=torch.float64), 0
    for t in range(T):
        scores = [float(oracle.linear_score(x_TD[t], row)) for row in row_ED]
        gumbel = [draws[f"gumbel_{i}"][t].tolist() for i in range(k)] if training else None
        uniform = [float(draws[f"uniform_{i}"][t]) for i in range(k)] if training else None
        told = scores, gumbel, uniform, k, version, 0.4, c_TK[t].tolist(), temperature
        chosen, weights, gradient = oracle.sparsemixer(*told)
        assert plan.expert_TK[t].tolist() == chosen
        torch.testing.assert_close(plan.weight_TK[t].tolist(), weights, rtol=1e-12, atol=1e-14)
        rescaled += chosen != oracle.ranked(scores)[:k]
        for e in range(E):
            expected_ED[e] += gradient[e] * x_TD[t]
    torch.testing.assert_close(grad(router.weight_ED), expected_ED, rtol=1e-9, atol=1e-12)
    assert bool(rescaled) == training, "another expert than the best was never drawn: too little is compared"


def test_phimoe(monkeypatch: pytest.MonkeyPatch):
    """transformers' sparsemixer (v2, k=2), its draws replaced by ours: choice, weights and its hand-written backward.

    It writes a third as 0.3333, in fp32."""
    router, x_TD, c_TK = sparsemixer("v2", 2), randn(T, D), randn(T, 2)
    draws = drawn(router, T)
    plan = plan_of(router, x_TD, draws=draws)
    (plan.weight_TK * c_TK).sum().backward()

    exponential = iter([(-draws[f"gumbel_{i}"]).exp() for i in range(2)])
    uniform = iter([draws[f"uniform_{i}"][:, None] for i in range(2)])
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(next(exponential)))
    monkeypatch.setattr(torch, "rand_like", lambda t: torch.empty_like(t).copy_(next(uniform)))
    monkeypatch.setattr(Tensor, "uniform_", lambda self: self)
    row_ED = router.get_parameter("weight_ED").detach().clone().requires_grad_()
    their_TK, chosen_TK = hf("phimoe").sparsemixer(x_TD @ row_ED.T, jitter_eps=0.4, training=True)
    (their_TK * c_TK).sum().backward()
    monkeypatch.undo()

    assert torch.equal(plan.expert_TK, chosen_TK)
    third = (plan.weight_TK / their_TK > 1.00005).double()
    assert 0 < third.sum() < third.numel()
    exact_TK = their_TK * (1 + third * (1 / 3 / float(torch.tensor(0.3333)) - 1))
    close({"weights": (plan.weight_TK, exact_TK), "gradient": (grad(router.weight_ED), grad(row_ED))}, FP64)


def test_phimoe_in_evaluation():
    router, x_TD = sparsemixer("v2", 2), randn(T, D)
    plan = plan_of(router, x_TD)
    their_TK, chosen_TK = hf("phimoe").sparsemixer(x_TD @ router.weight_ED.T, jitter_eps=0.4, training=False)
    assert torch.equal(plan.expert_TK, chosen_TK)
    close({"weights": (plan.weight_TK, their_TK)}, FP64)


@pytest.mark.parametrize(("version", "degree"), [("v1", 2), ("v2", 3)])
def test_the_rules_are_exact_for_polynomials(version: str, degree: int):
    """What choosing an expert that is not the best is worth: L(p) - L(0) = p E[L'(a p)].

    v2's rule of third order gives it for cubic losses. v1 gives it, by the midpoint, together with the gate's own
    p L'(p), for quadratic ones. The mean is taken over a fine grid of the uniform draw."""
    n = 400
    router = sparsemixer(version, 1, r=10.0)
    x_TD = randn(1, D).expand(n, D)
    second = int((x_TD[0] @ router.get_parameter("weight_ED").T).argsort(descending=True)[1])
    gumbel_TE = torch.zeros(n, E).double().index_fill(1, torch.tensor(second), 100.0)
    draws = {"gumbel_0": gumbel_TE, "uniform_0": (torch.arange(n).double() + 0.5) / n}
    plan = plan_of(router, x_TD, draws=draws)
    assert torch.equal(plan.selected_TK, torch.full((n, 1), second))
    p = float((x_TD[0] @ router.get_parameter("weight_ED").T).softmax(-1)[second].detach())

    def loss(weight: float) -> float:
        return 3 * weight - 5 * weight**2 + (2 * weight**3 if degree == 3 else 0)

    slope_T1 = 3 - 10 * plan.weight_TK.detach() + (6 * plan.weight_TK.detach() ** 2 if degree == 3 else 0)
    (plan.weight_TK * slope_T1).mean().backward()
    found = grad(router.weight_ED)[second]
    worth = loss(p) - loss(0) + (p * (3 - 10 * p) if version == "v1" else 0)
    torch.testing.assert_close(found, worth * (1 - p) * x_TD[0], rtol=1e-9, atol=1e-12)  # dp/dz = p (1 - p)


def test_draws_follow_the_softmax_of_those_near():
    n, logits_E = 20_000, torch.tensor([2.0, 1.8, 1.5, -1.0])
    router = make_router(preset("router", "sparsemixer", r=0.2), 4, 4)
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(torch.eye(4))
    plan = plan_of(router, logits_E.double().expand(n, 4), draws=drawn(router, n))
    p_E = torch.cat([logits_E[:3].softmax(-1), torch.zeros(1)])  # 3 is further than 40 % of 2 below it
    assert ((plan.selected_E / n - p_E).abs() <= 4 * (p_E * (1 - p_E) / n).sqrt()).all()


def test_one_expert_and_equal_scores():
    alone = make_router(preset("router", "sparsemixer"), D, 1)
    assert torch.equal(dense_weights(plan_of(alone, randn(3, D), draws=drawn(alone, 3))), torch.ones(3, 1).double())
    assert not registered("router")["sparsemixer"].traits(preset("router", "sparsemixer"), 1).live
    router = sparsemixer("v2", 2)
    plan = plan_of(router, torch.zeros(T, D).double(), draws=drawn(router, T))  # all near: 0 <= 0
    assert (plan.selected_E > 0).all() and (plan.expert_TK[:, 0] != plan.expert_TK[:, 1]).all()
    assert ((plan.weight_TK[:, 0] - 1 / E).abs() * (plan.weight_TK[:, 0] - 1 / E / 3).abs() < 1e-15).all()
