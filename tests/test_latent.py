"""Routers that compare in a small space, cosine (X-MoE) and lpr (latent prototypes), against loops over tokens.

Shapes: T tokens, D width, L latent, E experts.
"""

import pytest
import torch
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import scored as oracle
from peers import FP64, close
from torch import Tensor

from moe_lab.config import build, registered
from moe_lab.routing import Router

T, D, E = 12, 8, 6


def copies(router: Router) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in router.named_parameters()}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "normalised_sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_cosine_against_loops(gate: str, k: int):
    """Weights and the gradients of all three parts. The learned temperature is far from its start."""
    router, x_TD, c_TE = make_router(preset("router", "cosine", k=k, gate=gate), D, E), randn(T, D), randn(T, E)
    mine_TE = dense_weights(router(x_TD, context(temperature=0.5)).plan)
    (mine_TE * c_TE).sum().backward()

    own = copies(router)
    tau = (0.3 if gate == "softmax" else 0.07) * own["log_tau"].exp()
    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        scores = [oracle.cosine_score(x_TD[t], own["project_LD"], row, tau) for row in own["embedding_EL"]]
        for e, w in oracle.gated(scores, k, gate, "gate_first", False, temperature=0.5).items():
            expected_TE[t, e] = w.detach()
            total = total + w * c_TE[t, e]
    total.backward()
    pairs = {name: (grad(p), grad(own[name])) for name, p in router.named_parameters()}
    close(pairs | {"weights": (mine_TE, expected_TE)}, FP64)


@pytest.mark.parametrize(("gate", "tau"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_cosine_balances_at_a_fixed_temperature(gate: str, tau: float):
    """What the balance losses see is the gate at tau's start, whatever tau has become, and does not move it."""
    router, x_TD = make_router(preset("router", "cosine", gate=gate), D, E), randn(T, D)
    routing = router(x_TD, context())
    unit = torch.nn.functional.normalize
    cosine_TE = unit(x_TD @ router.get_parameter("project_LD").T) @ unit(router.get_parameter("embedding_EL")).T
    fixed_TE = cosine_TE / tau
    expected_TE = fixed_TE.softmax(-1) if gate == "softmax" else fixed_TE.sigmoid() / fixed_TE.sigmoid().sum(-1, True)
    torch.testing.assert_close(routing.probs_TE, expected_TE)
    (routing.probs_TE * randn(T, E)).sum().backward()
    assert grad(router.get_parameter("log_tau")).abs() < 1e-12
    assert grad(router.get_parameter("project_LD")).abs().max() > 1e-3


def test_cosine_starts_and_is_as_the_paper_says():
    """tau starts at its fixed values, half as many dimensions as experts, and length decides nothing."""
    router = build("router", preset("router", "cosine"), D, 32)
    assert router.project_LD.shape == (16, D) and router.embedding_EL.shape == (32, 16)
    assert build("router", preset("router", "cosine"), D, 2).project_LD.shape == (2, D)
    router, x_TD = make_router(preset("router", "cosine"), D, E), randn(T, D)
    plain = router(x_TD, context()).logits_TE
    with torch.no_grad():
        router.get_parameter("embedding_EL").mul_(7)
    torch.testing.assert_close(router(3 * x_TD, context()).logits_TE, plain)
    with torch.no_grad():
        router.get_parameter("log_tau").zero_()
    assert plain.abs().max() > 0 and router(x_TD, context()).logits_TE.abs().max() <= 1 / 0.3 + 1e-6
    directions_ED = router.directions_ED()
    assert directions_ED is not None and directions_ED.shape == (E, D)
    ratio_TE = router(x_TD, context()).logits_TE / (x_TD @ directions_ED.T)  # one factor for each token
    torch.testing.assert_close(ratio_TE, ratio_TE[:, :1].expand(T, E))


@pytest.mark.parametrize("order", ["topk_first", "gate_first"])
@pytest.mark.parametrize("k", [1, 2])
def test_lpr_against_loops(order: str, k: int):
    """Task gradient and the router's own objective, each by all parameters."""
    node = preset("router", "lpr", k=k, order=order, latent=3, diversity=0.7, align=0.4)
    router, x_TD, c_TE = make_router(node, D, E), randn(T, D), randn(T, E)
    routing = router(x_TD, context(training=True))
    mine_TE = dense_weights(routing.plan)
    objective = router.objective(routing, torch.ones(T), torch.ones(T, dtype=torch.bool))
    assert objective is not None
    ((mine_TE * c_TE).sum() + objective).backward()

    own = copies(router)
    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    latents, choices = [], []
    for t in range(T):
        z = oracle.lpr_latent(x_TD[t], own["gain_D"], own["shift_D"], own["encode_LD"], own["shift_L"])
        scores = [oracle.cosine(z, row) for row in own["prototype_EL"]]
        weights = oracle.gated(scores, k, "softmax", order, False)
        for e, w in weights.items():
            expected_TE[t, e] = w.detach()
            total = total + w * c_TE[t, e]
        latents.append(z)
        choices.append([*weights])
    expected = 0.7 * oracle.lpr_diversity(own["prototype_EL"])
    expected = expected + 0.4 * oracle.lpr_alignment(latents, choices, own["prototype_EL"])
    (total + expected).backward()
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(mine_TE, expected_TE)
    for name, p in router.named_parameters():
        if k == 1 and order == "topk_first" and name != "prototype_EL":  # weights are 1: only the objective is left
            assert grad(p).abs().max() < 1e-12
        else:
            torch.testing.assert_close(grad(p), grad(own[name]), rtol=1e-9, atol=1e-12)


def test_lpr_losses_at_their_ends():
    """Orthogonal prototypes cost nothing and equal ones (E - 1) / E; a token at its prototype costs nothing."""
    node = preset("router", "lpr", k=1, latent=E, diversity=1.0, align=0.0)
    router, x_TD = make_router(node, D, E), randn(T, D)
    told = torch.ones(T), torch.ones(T, dtype=torch.bool)

    def objective() -> float:
        value = router.objective(router(x_TD, context()), *told)
        assert value is not None
        return float(value.detach())

    with torch.no_grad():
        router.get_parameter("prototype_EL").copy_(3 * torch.eye(E))
        assert objective() == pytest.approx(0, abs=1e-12)
        router.get_parameter("prototype_EL").fill_(1.0)
        assert objective() == pytest.approx((E - 1) / E)
    node |= {"diversity": 0.0, "align": 1.0}
    router = make_router(node, D, E)
    x_TD = x_TD[:1].expand(T, D)
    with torch.no_grad():
        z_L = torch.stack([*router(x_TD, context()).extra["latent_TL"]])[0]
        router.get_parameter("prototype_EL")[2].copy_(5 * z_L)
    assert objective() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "lpr"])
def test_one_expert_few_tokens_and_an_expert_never_chosen(name: str):
    alone = make_router(preset("router", name, k=1), D, 1)
    routing = alone(randn(2, D), context())
    assert torch.equal(dense_weights(routing.plan), torch.ones(2, 1).double())
    traits = registered("router")[name].traits(preset("router", name, k=1), 1)
    assert traits.rows == "none" and traits.live == (name == "lpr")  # which still draws its prototype to the tokens
    moe = make_moe(preset("router", name, k=1), D, E)
    y_TD, routing = moe(randn(2, D), context())  # fewer tokens than experts
    y_TD.sum().backward()
    for e in range(E):
        assert bool(grad(moe.experts.w_in_EID)[e].any()) == bool(routing.plan.selected_E[e])
    assert (routing.plan.selected_E == 0).sum() >= E - 2
