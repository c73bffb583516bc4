"""Policy gradients against gradients by hand for given draws, and against every choice enumerated.

Shapes: T tokens, D width, E experts, K chosen per token, N draws.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from layers import context, dense_weights, draw, grad, make_router, preset, randn
from oracles import reinforce as oracle
from torch import Tensor

from moe_lab import seeding
from moe_lab.routers.reinforce import Reinforce, ordered_log_prob
from moe_lab.routing import Assignments, Context

T, D, E = 12, 8, 5


def router(E: int = E, **changes: Any) -> Reinforce:
    made = make_router(preset("router", "reinforce", **changes), D, E)
    assert isinstance(made, Reinforce)
    made.running_2.copy_(torch.tensor([6.0, 4.0]))  # losses so far: 1.5 on average
    return made


def told(noise_TE: Tensor | None, bonus: float = 0.0, **more: Any) -> Context:
    return context(noise_TE, strengths={"entropy": torch.tensor(bonus, dtype=torch.float64)}, **more)


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_the_probability_of_an_ordered_choice(k: int) -> None:
    z_TE = randn(T, E).requires_grad_()
    choice_TK = randn(T, E, key=("choice",)).argsort(-1)[:, :k]
    log_prob_T = ordered_log_prob(z_TE, choice_TK)
    rows, choices = z_TE.tolist(), choice_TK.tolist()
    expected = [oracle.log_prob(z, c) for z, c in zip(rows, choices, strict=True)]
    torch.testing.assert_close(log_prob_T, torch.tensor(expected, dtype=torch.float64))
    log_prob_T.sum().backward()
    slopes = [oracle.score(z, c) for z, c in zip(rows, choices, strict=True)]
    torch.testing.assert_close(z_TE.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("baseline", ["none", "mean", "critic"])
def test_gradient_of_given_draws_by_hand(baseline: str, k: int) -> None:
    """Some tokens do not count; the critic learns from the squared error and the tokens get no gradient of it."""
    r, x_TD = router(k=k, baseline=baseline), randn(T, D).requires_grad_()
    loss_T, counted_T = randn(T, key=("loss",)).abs(), torch.arange(T) % 3 > 0
    routing = r(x_TD, told(draw(r, T), bonus=0.3))
    term = r.objective(routing, loss_T * counted_T, counted_T)
    term.backward()
    z_TE = (x_TD @ r.weight_ED.T).tolist()
    guess = {"none": 0.0, "mean": 1.5, "critic": 1.5}[baseline]
    baseline_T = torch.full((T,), guess, dtype=torch.float64)
    if r.critic_1D is not None:
        baseline_T = baseline_T + (x_TD @ r.critic_1D[0]).detach()
        error_T = (loss_T - baseline_T) * counted_T
        expected = -2 * (error_T[:, None] * x_TD.detach()).sum(0) / counted_T.sum()
        torch.testing.assert_close(grad(r.critic_1D)[0], expected, rtol=1e-10, atol=1e-12)
    choices = routing.plan.selected_TK.tolist()
    dz = oracle.gradient(z_TE, choices, loss_T.tolist(), baseline_T.tolist(), counted_T.tolist(), 0.3)
    dz_TE = torch.tensor(dz, dtype=torch.float64)
    torch.testing.assert_close(grad(r.weight_ED), dz_TE.T @ x_TD.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad(x_TD), dz_TE @ r.weight_ED.detach(), rtol=1e-6, atol=1e-9)


def drawn_gradients(r: Reinforce, x_TD: Tensor, losses: dict[tuple[int, ...], Tensor], N: int) -> Tensor:
    """d objective / d logits of N draws for each token, [N, T, E], where a choice costs token t losses[choice][t]."""
    n = x_TD.shape[0]
    x_ND = x_TD.repeat(N, 1)
    routing = r(x_ND, told(seeding.noise("gumbel", (N * n, r.num_experts), "draws").double()))
    table = torch.stack([losses[c] for c in sorted(losses)])
    code = {c: i for i, c in enumerate(sorted(losses))}
    which_N = torch.tensor([code[tuple(c)] for c in routing.plan.selected_TK.tolist()])
    loss_N = table[which_N, torch.arange(N * n) % n]
    term = r.objective(routing, loss_N, torch.ones(N * n))
    (dz,) = torch.autograd.grad(term, routing.logits_TE)
    return dz.view(N, n, -1) * N


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("baseline", ["none", "mean", "critic"])
def test_the_mean_over_draws_is_the_gradient_of_the_expected_loss(baseline: str, k: int) -> None:
    """Within its standard error of the sum over all ordered choices: no baseline may bias it."""
    n, few, N = 3, 4, 4000
    r, x_TD = router(few, k=k, baseline=baseline), randn(n, D)
    choices = list(itertools.permutations(range(few), k))
    losses = {c: 3 + randn(n, key=("loss", *sorted(c))) for c in choices}
    exact_TE = oracle.exact(x_TD @ r.weight_ED.T, lambda t, c: float(losses[c][t]), k)
    sampled = drawn_gradients(r, x_TD, losses, N)
    error_TE = sampled.std(0) / N**0.5
    assert (sampled.mean(0) - exact_TE).abs().max() > 0
    assert ((sampled.mean(0) - exact_TE).abs() / error_TE).max() < 4
    assert exact_TE.abs().max() > 10 * error_TE.min(), "the draws are too few to tell"


def test_a_baseline_saves_variance() -> None:
    n, few, N = 3, 4, 2000
    choices = list(itertools.permutations(range(few), 1))
    losses = {c: 3 + randn(n, key=("loss", *c)) for c in choices}
    variance = {}
    for baseline in ("none", "mean"):
        r = router(few, baseline=baseline)
        r.running_2.copy_(torch.tensor([3.0, 1.0]))
        variance[baseline] = float(drawn_gradients(r, randn(n, D), losses, N).var(0).sum())
    assert variance["mean"] < variance["none"] / 4


@pytest.mark.parametrize(("scale", "biased"), [(1.0, False), (0.5, False), (2.0, True)])
def test_what_is_sampled_and_what_it_says_of_its_probability(scale: float, biased: bool) -> None:
    """Frequencies and log-probabilities are those of softmax((logits + bias) / schedule.noise)."""
    N = 20000
    r, x_D = router(), randn(1, D)
    bias_E = randn(E, key=("bias",)) if biased else None
    routing = r(x_D.expand(N, D), told(draw(r, N), bias_E=bias_E, noise=scale))
    z_E = x_D[0] @ r.weight_ED.T + (0 if bias_E is None else bias_E)
    p_E = (z_E / scale).softmax(-1)
    share_E = routing.plan.selected_E / N
    assert ((share_E - p_E).abs() / (p_E * (1 - p_E) / N).sqrt()).max() < 4
    expected = [oracle.log_prob((z_E / scale).tolist(), c) for c in routing.plan.selected_TK[:20].tolist()]
    got = routing.extra["log_prob_T"][:20]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_an_expert_that_may_not_be_chosen_is_no_part_of_the_policy() -> None:
    z_TE = randn(T, E)
    z_TE[:, 2] = -math.inf
    z_TE.requires_grad_()
    choice_TK = torch.tensor([[0, 4]] * T)
    log_prob_T = ordered_log_prob(z_TE, choice_TK)
    left = [[z[i] for i in (0, 1, 3, 4)] for z in z_TE.tolist()]
    expected = [oracle.log_prob(z, [0, 3]) for z in left]
    torch.testing.assert_close(log_prob_T, torch.tensor(expected, dtype=torch.float64))
    log_prob_T.sum().backward()
    assert torch.isfinite(grad(z_TE)).all() and not grad(z_TE)[:, 2].any()


def test_silenced_noise_is_the_argmax_without_a_policy_gradient() -> None:
    r, x_TD = router(), randn(T, D)
    routing = r(x_TD, told(draw(r, T), noise=0.0))
    assert torch.equal(routing.plan.selected_TK[:, 0], routing.logits_TE.argmax(-1))
    loss_T = randn(T, key=("loss",))
    r.objective(routing, loss_T, torch.ones(T)).backward()
    assert not grad(r.weight_ED).any()


@pytest.mark.parametrize("k", [1, 2])
def test_weights_are_one_over_k_and_carry_no_gradient(k: int) -> None:
    r = router(k=k)
    for noise_TE in (draw(r, T), None):
        plan = r(randn(T, D), told(noise_TE)).plan
        assert isinstance(plan, Assignments) and not plan.weight_TK.requires_grad
        assert dense_weights(plan).sum(-1).eq(1).all() and plan.weight_TK.eq(1 / k).all()
    assert not r(randn(T, D), told(None)).extra, "nothing to learn from in evaluation"


def test_one_expert_has_nothing_to_learn() -> None:
    r = router(1)
    routing = r(randn(T, D), told(draw(r, T)))
    r.objective(routing, randn(T, key=("loss",)), torch.ones(T)).backward()
    assert not grad(r.weight_ED).any() and int(routing.plan.selected_E) == T


def test_no_token_counts() -> None:
    r = router()
    term = r.objective(r(randn(T, D), told(draw(r, T))), torch.zeros(T), torch.zeros(T, dtype=torch.bool))
    term.backward()
    assert term == 0 and not grad(r.weight_ED).any()


def test_the_running_mean_by_hand() -> None:
    """Rate 1/4, updates of 2 tokens with 5 in all and of 6 tokens with 3: (5/4 * 3/4 + 3/4) / (2/4 * 3/4 + 6/4)."""
    r = router(baseline="mean", rate=0.25)
    r.running_2.zero_()
    assert not r(randn(T, D), told(draw(r, T))).extra["baseline_T"].any(), "nothing is known before the first update"
    for loss, tokens in ((5.0, 2.0), (3.0, 6.0)):
        r.after_step({"loss_2": torch.tensor([loss, tokens])}, 0.0)
    expected = (1.25 * 0.75 + 0.75) / (0.5 * 0.75 + 1.5)
    got = r(randn(T, D), told(draw(r, T))).extra["baseline_T"]
    torch.testing.assert_close(got, torch.full((T,), expected, dtype=torch.float64))
