"""hash and random: no learning, no scores but those of the frozen matrix, the choice as its own distribution."""

import pytest
import torch
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import scored as oracle
from torch import Tensor

from moe_lab import seeding

T, D, E = 40, 8, 6


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeding.generator("test", "uniform"))


@pytest.mark.parametrize("k", [1, 2, E])
def test_hash_is_the_id_modulo_the_experts(k: int):
    router, ids_T = make_router(preset("router", "hash", k=k), D, E), torch.arange(T) * 7 % 31
    routing = router(randn(T, D), context(ids_T=ids_T))
    assert routing.plan.selected_TK.tolist() == [oracle.hashed(int(i), E, k) for i in ids_T]
    other = router(randn(T, D, key=("other",)), context(ids_T=ids_T))
    assert torch.equal(routing.plan.selected_TK, other.plan.selected_TK), "only the token's id matters"
    assert routing.plan.selected_E.sum() == T * k
    even = router(randn(2 * E, D), context(ids_T=torch.arange(2 * E))).plan.selected_E
    assert torch.equal(even, torch.full_like(even, 2 * k))


@pytest.mark.parametrize("k", [1, 2])
def test_random_fixed_takes_the_best_rows_of_a_matrix_that_never_moves(k: int):
    moe = make_moe(preset("router", "random", k=k), D, E)
    x_TD = randn(T, D)
    y_TD, routing = moe(x_TD, context())
    y_TD.sum().backward()
    row_ED = moe.router.get_parameter("weight_ED")
    for t in range(T):
        scores = [float(oracle.linear_score(x_TD[t], row)) for row in row_ED]
        assert routing.plan.selected_TK[t].tolist() == oracle.ranked(scores)[:k]
        torch.testing.assert_close(routing.logits_TE[t].tolist(), scores)
    assert row_ED.grad is None and not row_ED.requires_grad
    assert moe.router.directions_ED() is row_ED


@pytest.mark.parametrize("k", [1, 2])
def test_random_fresh_takes_the_best_draws(k: int):
    router, drawn_TE = make_router(preset("router", "random", k=k, draw="fresh"), D, E), uniform(T, E)
    assert not list(router.parameters()) and router.directions_ED() is None
    plan = router(randn(T, D), context(draws={"rank": drawn_TE})).plan
    assert plan.selected_TK.tolist() == [oracle.uniformly(row.tolist(), k) for row in drawn_TE]
    n = 6000
    counts_E = router(randn(n, D), context(draws={"rank": uniform(n, E)})).plan.selected_E
    p = k / E
    assert ((counts_E / n - p).abs() < 4 * (p * (1 - p) / n) ** 0.5).all(), "experts are not equally likely"
    assert router.draws["rank"].evaluate, "evaluation needs draws as well"


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ["hash", "random"])
def test_weights_are_equal_and_the_distribution_is_the_choice(name: str, k: int):
    moe = make_moe(preset("router", name, k=k), D, E)
    x_TD = randn(T, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(ids_T=torch.arange(T)))
    weight_TE = dense_weights(routing.plan)
    assert torch.equal(weight_TE, routing.probs_TE) and torch.equal(
        weight_TE.unique(), torch.tensor([0, 1 / k]).double()
    )
    assert name == "random" or not routing.logits_TE.any()
    y_TD.sum().backward()
    assert grad(x_TD).isfinite().all() and not routing.probs_TE.requires_grad
    hard = moe.router(x_TD, context(ids_T=torch.arange(T), hard=1)).plan
    assert torch.equal(hard.selected_TK, routing.plan.selected_TK[:, :1])
    torch.testing.assert_close(dense_weights(hard).sum(-1), torch.ones(T).double())
