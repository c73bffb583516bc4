"""Online K-means routing against plain loops: cosines, choice, weights, gradients, means, and where they start.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

from typing import Any

import pytest
import torch
from layers import context, dense_weights, grad, make_router, preset, randn
from oracles import kmeans as oracle

from moe_lab.routers.kmeans import KMeans, distinct

T, D, E = 14, 8, 5
WEIGHTS = ["softmax", "sigmoid", "uniform"]


def router(E: int = E, **changes: Any) -> KMeans:
    made = make_router(preset("router", "kmeans", **changes), D, E)
    assert isinstance(made, KMeans)
    made.mean_ED.copy_(3 * randn(E, D, key=("means",)))  # their length does not matter
    return made


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_choice_weights_and_gradients(weight: str, k: int, biased: bool) -> None:
    """The bias is added to the cosine, and is no part of the weight."""
    x_TD, c_TE = randn(T, D).requires_grad_(), randn(T, E, key=("c",))
    bias_E = 0.3 * randn(E, key=("bias",)) if biased else None
    r = router(weight=weight, k=k)
    plan = r(x_TD, context(bias_E=bias_E)).plan
    w_TD = x_TD.detach().clone().requires_grad_()
    bias = [0.0] * E if bias_E is None else bias_E.tolist()
    experts, weights = oracle.route(w_TD, r.mean_ED, bias, k, 0.1, weight)
    assert plan.selected_TK.tolist() == experts
    expected = torch.stack([torch.stack(list(row)) for row in weights])
    torch.testing.assert_close(plan.weight_TK, expected, rtol=1e-9, atol=1e-12)
    if weight == "uniform" or (weight == "softmax" and k == 1):
        assert plan.weight_TK.eq(1 / k).all()
        return
    (plan.weight_TK * c_TE[:, :k]).sum().backward()
    (expected * c_TE[:, :k]).sum().backward()
    torch.testing.assert_close(grad(x_TD), grad(w_TD), rtol=1e-8, atol=1e-12)


def test_the_bias_changes_some_choice_here() -> None:
    """Or the test above would not see a bias that is left out, or is added to something else."""
    bias = (0.3 * randn(E, key=("bias",))).tolist()
    plain, _ = oracle.route(randn(T, D), router().mean_ED, [0.0] * E, 1, 0.1, "uniform")
    assert plain != oracle.route(randn(T, D), router().mean_ED, bias, 1, 0.1, "uniform")[0]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_gate_as_a_distribution(weight: str) -> None:
    routing = router(weight=weight)(randn(T, D), context(temperature=0.5))
    cosines = torch.stack([torch.stack([oracle.cosine(x, m) for m in router().mean_ED]) for x in randn(T, D)])
    torch.testing.assert_close(routing.logits_TE, cosines)
    sharp = cosines / 0.05
    p_TE = sharp.sigmoid() / sharp.sigmoid().sum(-1, keepdim=True) if weight == "sigmoid" else sharp.softmax(-1)
    torch.testing.assert_close(routing.probs_TE, p_TE)


def test_no_parameters() -> None:
    assert list(router().parameters()) == [] and set(router().state_dict()) == {"mean_ED"}
    assert router().directions_ED() is not None


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_the_means_move_once_per_update(k: int, parts: int) -> None:
    """To the mean over all micro-batches; an expert that no token chose keeps its own."""
    x_TD, r = randn(T, D), router(k=k, rate=0.25)
    before_ED, total, chosen = r.mean_ED.clone(), {}, []
    bias_E = -10.0 * torch.eye(E)[3]
    for part in x_TD.chunk(parts):
        routing = r(part, context(bias_E=bias_E))
        chosen += routing.plan.selected_TK.tolist()
        for name, t in r.statistics(part, routing).items():
            total[name] = total[name] + t if name in total else t
    assert torch.equal(r.mean_ED, before_ED), "a batch that moves the means routes by itself"
    r.after_step(total, 0.0)
    assert not any(3 in row for row in chosen)
    torch.testing.assert_close(r.mean_ED, oracle.moved(before_ED, x_TD, chosen, 0.25))


def test_a_rate_on_a_schedule() -> None:
    r = router(rate={"curve": "linear", "start": 1.0, "end": 0.0})
    stats = {"sum_ED": torch.zeros(E, D, dtype=torch.float64), "tokens_E": torch.ones(E, dtype=torch.int64)}
    before_ED = r.mean_ED.clone()
    r.after_step(stats, 1.0)
    assert torch.equal(r.mean_ED, before_ED)
    r.after_step(stats, 0.75)
    torch.testing.assert_close(r.mean_ED, 0.75 * before_ED)


def test_spread_takes_tokens_over_the_batch_and_none_twice() -> None:
    x_TD = randn(40, D)
    x_TD[24] = 2 * x_TD[12]  # the first two positions, pointing in one direction
    taken = distinct(x_TD, 6, farthest=False)
    assert taken == oracle.spread(x_TD, 6) and len(set(taken)) == 6 and not {24, 12} <= set(taken)
    assert max(taken) - min(taken) > 20


def test_farthest_takes_what_is_least_like_those_taken() -> None:
    x_TD = randn(40, D)
    taken = distinct(x_TD, 6, farthest=True)
    assert taken == oracle.farthest(x_TD, taken[0], 6)


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_with_fewer_directions_than_experts_tokens_repeat(same: bool, farthest: bool) -> None:
    """T < E, and a batch of one and the same token."""
    x_TD = torch.ones(3, D) if same else randn(3, D)
    taken = distinct(x_TD, 5, farthest)
    assert len(taken) == 5 and set(taken) <= {0, 1, 2}
    assert same or len(set(taken)) == 3
    r = router()
    r.init_from(x_TD)
    assert torch.isfinite(dense_weights(r(randn(T, D), context()).plan)).all()


@pytest.mark.parametrize("start", ["spread", "farthest"])
def test_the_start_separates_clusters(start: str) -> None:
    """Tokens around orthogonal directions: from the farthest tokens each expert gets one cluster."""
    x_TD = torch.eye(D, dtype=torch.float64)[torch.arange(60) % E] + 0.05 * randn(60, D)
    r = router(start=start, k=1)
    r.init_from(x_TD)
    chosen = r(x_TD, context()).plan.selected_TK[:, 0]
    pairs = {(int(e), t % E) for t, e in enumerate(chosen)}
    if start == "farthest":
        assert len(pairs) == E
    assert {tuple(row) for row in r.mean_ED.tolist()} <= {tuple(row) for row in x_TD.tolist()}


def test_a_zero_token_and_a_zero_mean_are_no_division_by_zero() -> None:
    r = router()
    r.mean_ED[1] = 0
    x_TD = torch.zeros(T, D, dtype=torch.float64, requires_grad=True)
    routing = r(x_TD, context())
    (routing.probs_TE * randn(T, E)).sum().backward()
    assert torch.isfinite(routing.logits_TE).all() and torch.isfinite(grad(x_TD)).all()


def test_sigmoids_that_underflow_are_a_distribution() -> None:
    """Two cosines of -1/4 at tau = 0.1 and a temperature of 0.01: both sigmoids are 0 in fp32."""
    router = make_router(preset("router", "kmeans", weight="sigmoid"), 16, 2, torch.float32)
    with torch.no_grad():
        router.get_buffer("mean_ED").copy_(torch.eye(2, 16))
    probs_TE = router(-torch.ones(3, 16), context(temperature=0.01)).probs_TE
    torch.testing.assert_close(probs_TE, torch.full((3, 2), 0.5))
