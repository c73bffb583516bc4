"""What explorers do on average, at fixed seeds, within four standard deviations.

Shapes: N tokens or updates, E experts, K chosen per token.
"""

import math
from typing import Any

import pytest
import torch
from exploring import at_work, explorer
from layers import context, dense_weights, make_router, preset
from torch import Tensor

from moe_lab import seeding
from moe_lab.plans import Assignments
from moe_lab.routing import Router

D, E = 12, 6


def share_is(count: float, n: int, p: float) -> None:
    assert abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n), (count / n, p)


def uniform_router(N: int, k: int = 2, E: int = E, **options: Any) -> tuple[Router, Tensor]:
    """Logits 1, ..., E for each of N tokens."""
    router = make_router(preset("router", "topk", renormalise=False, k=k, **options), E, E)
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(torch.eye(E))
    return router, torch.arange(1, E + 1).double().expand(N, E)


def test_moments_of_jitter_and_dropout():
    N, eps, p = 20_000, 0.25, 0.375
    x_TD = torch.full((N, 5), 2.0, dtype=torch.float64)
    work = at_work("jitter", N, 5, E, eps)
    f = work.explorer.input(x_TD, work.drawn, work.strength) / 2
    assert float(f.min()) >= 1 - eps and float(f.max()) <= 1 + eps
    n = f.numel()
    assert abs(float(f.mean()) - 1) < 4 * eps / math.sqrt(3 * n)
    # Var (f - 1)^2 = eps^4 (1/5 - 1/9).
    assert abs(float((f - 1).square().mean()) - eps**2 / 3) < 4 * eps**2 * math.sqrt((1 / 5 - 1 / 9) / n)
    work = at_work("dropout", N, 5, E, p)
    y = work.explorer.input(x_TD, work.drawn, work.strength)
    share_is(float((y == 0).sum()), n, p)
    assert set(y.unique().tolist()) == {0.0, 2 / (1 - p)}


@pytest.mark.parametrize("name, mean, variance", [("gaussian", 0.0, 1.0), ("gumbel", 0.5772156649, math.pi**2 / 6)])
def test_moments_of_logit_noise(name: str, mean: float, variance: float):
    N, s = 20_000, 0.5
    router, x_TD = uniform_router(N)
    routing = router(x_TD, context(exploring=(at_work(name, N, E, E, s),), training=True))
    assert routing.noisy_TE is not None
    noise = (routing.noisy_TE - routing.logits_TE).detach() / s
    assert abs(float(noise.mean()) - mean) < 4 * math.sqrt(variance / noise.numel())
    kurtosis = {"gaussian": 3.0, "gumbel": 5.4}[name]
    assert abs(float(noise.var()) - variance) < 4 * variance * math.sqrt((kurtosis - 1) / noise.numel())


def test_gumbel_noise_of_strength_1_samples_the_softmax():
    N = 20_000
    router, x_TD = uniform_router(N, k=1)
    plan = router(x_TD / 2, context(exploring=(at_work("gumbel", N, E, E, 1.0),), training=True)).plan
    for count, p in zip(plan.selected_E.tolist(), (x_TD[0] / 2).softmax(-1).tolist(), strict=True):
        share_is(count, N, p)


def test_rerouted_tokens_are_as_many_as_asked_and_go_anywhere():
    """Logits leave experts 5 and 4 to all; of the others, each unordered pair of the 15 is as likely."""
    N, eps = 30_000, 0.3
    router, x_TD = uniform_router(N)
    work = at_work("reroute", N, E, E, eps)
    selected_TK = router(x_TD, context(exploring=(work,), training=True)).plan.selected_TK.sort(-1).values
    rerouted_T = work.drawn["tokens"] < eps
    share_is(int(rerouted_T.sum()), N, eps)
    assert selected_TK[~rerouted_T].unique(dim=0).tolist() == [[4, 5]]
    pairs, counts = selected_TK[rerouted_T].unique(dim=0, return_counts=True)
    assert len(pairs) == 15
    for count in counts.tolist():
        share_is(count, int(rerouted_T.sum()), 1 / 15)


def out_rate(q: float, k: int) -> float:
    """P(u < q and k or more of the E - 1 other draws are larger), the integral over u < q."""
    u = torch.linspace(0, q, 20_001).double()
    fewer = torch.stack([math.comb(E - 1, j) * (1 - u) ** j * u ** (E - 1 - j) for j in range(k)]).sum(0)
    return float(torch.trapezoid(1 - fewer, u))


@pytest.mark.parametrize("q, k", [(0.1, 2), (0.5, 2), (0.9, 1), (1.0, 4)])
@pytest.mark.parametrize("name", ["expert_dropout", "router_dropout"])
def test_experts_are_out_as_often_as_asked_and_k_stay(name: str, q: float, k: int):
    """Over 4000 updates, or tokens: expert by expert, and how many at most."""
    N = 4000
    found, strength = explorer(name), torch.tensor(q).double()
    if name == "expert_dropout":
        draws = [seeding.noise("uniform", (E,), "test", step).double() for step in range(N)]
    else:
        draws = [at_work(name, N, D, E, q).drawn["experts"]]
    allowed = [found.allowed(torch.zeros(1, E), {"experts": u}, strength, k) for u in draws]
    allowed_NE = torch.cat([a.view(-1, E) for a in allowed if a is not None])
    fewest = int(allowed_NE.sum(-1).min())
    assert fewest == k if q > 0.4 else fewest >= k
    for out in (~allowed_NE).sum(0).tolist():
        share_is(out, N, out_rate(q, k))
    assert out_rate(0.1, 2) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("strength", [0.2, 0.5, 3.0])
@pytest.mark.parametrize("of", ["share", "gate"])
def test_the_second_expert_stays_as_often_as_asked(of: str, strength: float):
    """Logits 1 to 6: p5 = 0.2331, p6 = 0.6337, so that g2 = 0.2689 as a share and 0.2331 as it is."""
    N = 20_000
    router, x_TD = uniform_router(N)
    work = at_work("second_expert", N, E, E, strength, of=of)
    plan = router(x_TD, context(exploring=(work,), training=True)).plan
    assert isinstance(plan, Assignments) and plan.selected_E.tolist()[:4] == [0] * 4 and int(plan.selected_E[5]) == N
    g2 = {"share": 0.2689, "gate": 0.2331}[of]
    if g2 >= strength:
        assert int(plan.selected_E[4]) == N
    else:
        share_is(int(plan.selected_E[4]), N, g2 / strength)
    first_TE = dense_weights(plan)[:, 5]
    torch.testing.assert_close(first_TE, torch.full_like(first_TE, 0.633691), rtol=0, atol=1e-6)
