"""Balance losses worked by hand at balance, at collapse and in between; gradients against finite differences.

Shapes: T tokens, E experts, K chosen per token.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from layers import context, draw, make_router, preset, randn
from torch import Tensor
from torch.autograd import gradcheck

from moe_lab import seeding
from moe_lab.balance.base import Balancer, Layer, mean_over_layers
from moe_lab.balance.load import chances
from moe_lab.config import build
from moe_lab.routing import Assignments, Routing

BALANCED = [[0.50, 0.25, 0.25], [0.25, 0.50, 0.25], [0.25, 0.25, 0.50]]
UNEVEN = [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]
COLLAPSED = [[1.0, 0.0, 0.0]] * 3
PAIR = [[0.5, 0.5, 0.0]] * 3  # collapse onto two experts


def routing(probs: list[list[float]], k: int = 1, shift: list[float] | None = None) -> Routing:
    """Three tokens with these probabilities (logits are their logarithms, plus a shift per token)."""
    probs_TE = torch.tensor(probs, dtype=torch.float64)
    logits_TE = probs_TE.clamp_min(1e-300).log()
    if shift is not None:
        logits_TE = logits_TE + torch.tensor(shift, dtype=torch.float64)[:, None]
    expert_TK = probs_TE.topk(k).indices
    return Routing(Assignments(expert_TK, probs_TE.gather(1, expert_TK), probs_TE.shape[1]), logits_TE, probs_TE)


def loss(name: str, r: Routing) -> float:
    balancer: Balancer = build("balance", {"name": name})
    return balancer.loss(r).item()


def test_switch_by_hand():
    """E sum f P. Uneven: f = (2, 1, 0)/3, P = (1.4, 1.3, 0.3)/3, so 3 (2.8 + 1.3)/9 = 4.1/3.
    k=2: f is the share of all assignments. Tokens choose {0,1} thrice: f = (1, 1, 0)/2, 3 (1.4 + 1.3)/6 = 1.35.
    Collapse: E for k=1 and E/k in general, since no expert can get more than one of a token's k assignments."""
    assert loss("switch", routing(BALANCED)) == pytest.approx(1)
    assert loss("switch", routing(UNEVEN)) == pytest.approx(4.1 / 3)
    assert loss("switch", routing(COLLAPSED)) == pytest.approx(3)
    assert loss("switch", routing(UNEVEN, k=2)) == pytest.approx(1.35)
    assert loss("switch", routing(PAIR, k=2)) == pytest.approx(1.5)
    assert loss("switch", routing(COLLAPSED, k=2)) == pytest.approx(1.5)
    assert loss("switch", routing(BALANCED, k=3)) == pytest.approx(1)


def test_switch_gradient_by_hand():
    """d loss / d s_tj = E/T p_tj (f_j - sum_i f_i p_ti): every row is pushed by every token, chosen or not."""
    T, E, k = 20, 5, 2
    logits_TE = randn(T, E).requires_grad_()
    probs_TE = logits_TE.softmax(-1)
    plan = Assignments(logits_TE.topk(k).indices, probs_TE.topk(k).values, E)
    build("balance", {"name": "switch"}).loss(Routing(plan, logits_TE, probs_TE)).backward()
    p_TE = probs_TE.detach()
    f_E = torch.bincount(plan.expert_TK.flatten(), minlength=E) / (T * k)
    torch.testing.assert_close(logits_TE.grad, E / T * p_TE * (f_E - (p_TE * f_E).sum(-1, keepdim=True)))


def test_switch_cannot_be_cheated_through_tiny_sigmoids():
    """Scores far below zero keep their proportions: sigmoid(z - 200) is e^(z - 200), whose shares are softmax(z)."""
    x_TE = randn(40, 6)
    router = make_router(preset("router", "sigmoid_topk"), 6, 6)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(6))
    far = router(x_TE - 200, context())
    torch.testing.assert_close(far.probs_TE, x_TE.softmax(-1))
    assert loss("switch", far) > 1


def test_importance_by_hand():
    """CV^2 = E sum I^2 / (sum I)^2 - 1. Uneven, k=1: I = (1.2, 0.7, 0), 3 * 1.93 / 3.61 - 1 = 0.60388.
    k=2: I = (1.4, 1.3, 0), 3 * 3.65 / 7.29 - 1 = 0.50206. Collapse: E - 1; onto k experts: E/k - 1."""
    assert loss("importance", routing(BALANCED)) == pytest.approx(0, abs=1e-15)
    assert loss("importance", routing(UNEVEN)) == pytest.approx(5.79 / 3.61 - 1)
    assert loss("importance", routing(UNEVEN, k=2)) == pytest.approx(10.95 / 7.29 - 1)
    assert loss("importance", routing(COLLAPSED)) == pytest.approx(2)
    assert loss("importance", routing(PAIR, k=2)) == pytest.approx(0.5)


def test_importance_gradient_is_zero_and_finite_at_perfect_balance():
    weight_TK = torch.full((6, 1), 0.5).requires_grad_()
    plan = Assignments(torch.arange(6)[:, None] % 3, weight_TK, 3)
    build("balance", {"name": "importance"}).loss(Routing(plan, weight_TK, weight_TK)).backward()
    assert weight_TK.grad is not None and not weight_TK.grad.any()


def test_entropy_by_hand():
    """log E - H(P). Uneven: P = (1.4, 1.3, 0.3)/3 = (0.4667, 0.4333, 0.1), H = 0.35567 + 0.36237 + 0.23026."""
    assert loss("entropy", routing(BALANCED)) == pytest.approx(0, abs=1e-15)
    assert loss("entropy", routing(UNEVEN)) == pytest.approx(math.log(3) - 0.94830, abs=1e-5)
    assert loss("entropy", routing(COLLAPSED)) == pytest.approx(math.log(3))
    assert loss("entropy", routing(PAIR)) == pytest.approx(math.log(3) - math.log(2))


def test_z_loss_by_hand():
    """Log-probabilities have logsumexp 0; shifted by (0, 1, 2) the loss is (0 + 1 + 4)/3. Zero logits: (ln 3)^2."""
    assert loss("z_loss", routing(UNEVEN)) == pytest.approx(0, abs=1e-15)
    assert loss("z_loss", routing(UNEVEN, shift=[0, 1, 2])) == pytest.approx(5 / 3)
    assert loss("z_loss", routing(COLLAPSED, shift=[-3, -3, -3])) == pytest.approx(9)
    assert loss("z_loss", routing([[1 / 3] * 3] * 3, shift=[math.log(3)] * 3)) == pytest.approx(math.log(3) ** 2)


def noisy(clean: list[list[float]], drawn: list[list[float]], std: list[list[float]], k: int = 1) -> Routing:
    clean_TE, noisy_TE, std_TE = (torch.tensor(v, dtype=torch.float64) for v in (clean, drawn, std))
    plan = Assignments(noisy_TE.topk(k).indices, noisy_TE.topk(k).values.softmax(-1), clean_TE.shape[1])
    return Routing(plan, clean_TE, clean_TE.softmax(-1), noisy_TE, std_TE)


def test_load_by_hand():
    """One token, k=1, clean (1, 0, -1), drawn (0.5, 0.8, -1), std (1, 1, 2). The best of the others is 0.8 for expert
    0, 0.5 for expert 1 (itself the best) and 0.8 for expert 2: Phi(0.2), Phi(-0.5), Phi(-0.9)
    = 0.57926, 0.30854, 0.18406. CV^2 = 3 * 0.46462 / 1.07186^2 - 1 = 0.21322."""
    r = noisy([[1, 0, -1]], [[0.5, 0.8, -1]], [[1, 1, 2]])
    expected = torch.tensor([0.57926, 0.30854, 0.18406], dtype=torch.float64)
    torch.testing.assert_close(chances(r).sum(0), expected, rtol=0, atol=1e-5)
    assert loss("load", r) == pytest.approx(0.21322, abs=2e-5)
    # Equal clean logits and every order of the same draws: all loads are Phi(0) + 2 Phi(-1) = 0.81731.
    turns: list[list[float]] = [[1, 0, -1], [-1, 1, 0], [0, -1, 1]]
    even = noisy([[0, 0, 0]] * 3, turns, [[1, 1, 1]] * 3)
    expected = torch.full((3,), 0.81731, dtype=torch.float64)
    torch.testing.assert_close(chances(even).sum(0), expected, rtol=0, atol=1e-5)
    assert loss("load", even) == pytest.approx(0, abs=1e-15)
    # A margin of 50 standard deviations is certainty: E/k - 1.
    assert loss("load", noisy([[50, 0, 0]] * 3, [[50, 0, 1]] * 3, [[1, 1, 1]] * 3)) == pytest.approx(2)
    assert loss("load", noisy([[50, 60, 0]] * 3, [[50, 60, 1]] * 3, [[1, 1, 1]] * 3, k=2)) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_is_shazeers_probability(k: int):
    """P(x, i) = Phi((clean_i - k-th largest of H without its i-th) / std_i), component by component."""
    T, E = 30, 5
    r = noisy(randn(T, E).tolist(), randn(T, E, key=("h",)).tolist(), (0.1 + randn(T, E).abs()).tolist(), k)
    assert r.noisy_TE is not None and r.noise_std_TE is not None
    load_E = [0.0] * E
    for t in range(T):
        for i in range(E):
            others = sorted((h for j, h in enumerate(r.noisy_TE[t].tolist()) if j != i), reverse=True)
            z = (float(r.logits_TE[t, i]) - others[k - 1]) / float(r.noise_std_TE[t, i])
            load_E[i] += 0.5 * math.erfc(-z / math.sqrt(2))
    torch.testing.assert_close(chances(r).sum(0), torch.tensor(load_E, dtype=torch.float64))


def test_load_sums_to_k_tokens_at_the_start():
    """Zero weights: noise ln 2 on equal logits. An expert would be chosen again with probability k/E on average."""
    T, E, k = 4000, 8, 2
    router = build("router", preset("router", "noisy_topk"), 16, E)
    seeding.initialise(router, 0)
    load_E = chances(router(randn(T, 16).float(), context(draw(router, T)))).sum(0)
    assert load_E.sum().item() == pytest.approx(k * T, rel=0.02)
    assert (load_E / (k * T / E) - 1).abs().max() < 0.05


def test_load_of_silenced_noise_is_the_count_without_a_gradient():
    """At std 0 the load is a step function. Without care two logits 1e-7 apart would get a gradient of 1e5."""
    logits_TE = torch.tensor([[1.0, 1.0 - 1e-7, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    std_TE = torch.zeros(2, 3, dtype=torch.float64)
    plan = Assignments(logits_TE.topk(1).indices, logits_TE.topk(1).values, 3)
    r = Routing(plan, logits_TE, logits_TE.softmax(-1), logits_TE, std_TE)
    load_E = chances(r).sum(0)
    assert load_E.tolist() == plan.selected_E.tolist() == [1, 1, 0]
    (load_E * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logits_TE.grad is not None and not logits_TE.grad.any()


@pytest.mark.parametrize("name", ["switch", "importance", "load", "z_loss", "entropy"])
@pytest.mark.parametrize("k", [1, 2])
def test_gradients_against_finite_differences(name: str, k: int):
    """Through Shazeer's router, in both of its matrices: it has everything that a loss may ask for."""
    T, D, E = 9, 3, 4
    router = make_router(preset("router", "noisy_topk", k=k), D, E)
    x_TD, noise_TE = randn(T, D), draw(router, T)
    balancer: Balancer = build("balance", {"name": name})

    def term(weight_ED: Tensor, noise_ED: Tensor) -> Tensor:
        weights = {"weight_ED": weight_ED, "noise_ED": noise_ED}
        return balancer.loss(torch.func.functional_call(router, weights, (x_TD, context(noise_TE))))

    weights = (router.weight_ED, router.get_parameter("noise_ED"))
    assert gradcheck(term, weights)
    gradients = torch.autograd.grad(term(*weights), weights, allow_unused=True)
    reaches_gate, reaches_noise = (g is not None and bool(g.abs().max() > 1e-6) for g in gradients)
    # Renormalised, k=1 has weight 1 whatever the logits; only the noisy scores depend on the noise's scale.
    assert reaches_gate == (name != "importance" or k == 2)
    assert reaches_noise == (name == "load" or (name == "importance" and k == 2))


def test_layers_are_averaged_and_not_pooled():
    """Two layers, each with the other half of four experts dead: each reads E sum f P = 4 (1/4 + 1/4) = 2. Pooled,
    f = P = 1/4 would read 1, as if all were well."""
    left = routing([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])
    right = routing([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    assert loss("switch", left) == loss("switch", right) == pytest.approx(2)
    balancer: Balancer = build("balance", {"name": "switch"})
    assert mean_over_layers(balancer, [left, right]).item() == pytest.approx(2)
    assert mean_over_layers(balancer, [routing(BALANCED), routing(COLLAPSED)]).item() == pytest.approx(2)


def move(balancer: Balancer, bias_E: Tensor, selected_E: Tensor, rate: float) -> None:
    """One update of a layer whose experts were chosen so often."""
    layer = Layer(SimpleNamespace(bias_E=bias_E))  # pyright: ignore[reportArgumentType]
    balancer.after_step(layer, {"selected_E": selected_E}, rate, 0.0)


def test_loss_free_by_hand():
    """Loads (6, 5, 0, 3), mean 3.5. Sign: down, down, up, up. Proportional: 1 - load/3.5 = -5/7, -3/7, 1, 1/7.
    At the mean nothing moves. The schedule's multiplier scales the rate."""
    counts_E = torch.tensor([6, 5, 0, 3])
    sign: Balancer = build("balance", {"name": "loss_free", "rate": 0.01})
    bias_E = torch.tensor([0.0, 0.0, 0.0, 1.0])
    move(sign, bias_E, counts_E, 1.0)
    torch.testing.assert_close(bias_E, torch.tensor([-0.01, -0.01, 0.01, 1.01]))
    move(sign, bias_E, counts_E, 0.5)
    torch.testing.assert_close(bias_E, torch.tensor([-0.015, -0.015, 0.015, 1.015]))
    proportional: Balancer = build("balance", {"name": "loss_free", "rate": 0.07, "update": "proportional"})
    bias_E = torch.zeros(4)
    move(proportional, bias_E, counts_E, 1.0)
    torch.testing.assert_close(bias_E, torch.tensor([-0.05, -0.03, 0.07, 0.01]))
    for balancer in (sign, proportional):
        still_E = torch.ones(4)
        move(balancer, still_E, torch.full((4,), 7), 1.0)
        assert torch.equal(still_E, torch.ones(4))


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_loss_free_evens_out_a_fixed_batch(update: str):
    """A router that prefers expert 0: after enough updates the largest load is near the mean."""
    T, E = 400, 4
    router = make_router(preset("router", "sigmoid_topk"), E, E)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    x_TE = randn(T, E) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    balancer: Balancer = build("balance", {"name": "loss_free", "rate": 0.01, "update": update})
    bias_E, max_vio = torch.zeros(E), []
    for _ in range(200):
        selected_E = router(x_TE, context(bias_E=bias_E)).plan.selected_E
        max_vio.append(float(selected_E.max() / selected_E.double().mean() - 1))
        move(balancer, bias_E, selected_E, 1.0)
    assert max_vio[0] > 0.5 and max_vio[-1] < 0.1
