"""Who keeps a place in a full expert: against plain loops and the libraries, by position and by probability.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

import math
from typing import Any

import pytest
import torch
from exploring import at_work
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import explore as oracle
from peers import FP64, close, gating, hf, hf_config, set_weights
from torch import Tensor

from moe_lab.plans import Assignments, best

T, D, E = 40, 12, 5
BY = pytest.mark.parametrize("by", ["position", "probability"])


def kept(plan: Any) -> Tensor:
    assert isinstance(plan, Assignments) and plan.executed_TK is not None
    return plan.executed_TK


@pytest.mark.parametrize("factor", [1e-9, 0.3, 1.0, 1.7, 10.0])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("pull", [0.0, 1.0, 50.0])
@BY
def test_the_places_are_those_of_plain_loops(by: Any, pull: float, k: int, ragged: bool, factor: float):
    """From balance to collapse (every token's first choice is expert 0), also where some slots hold no choice."""
    p_TE = (randn(T, E) + pull * torch.eye(E)[0]).softmax(-1)
    expert_TK = best(p_TE, k)
    weight_TK = p_TE.gather(1, expert_TK)
    chosen_TK = randn(T, k, key=("chosen",)) > -0.5 if ragged else None
    plan = Assignments(expert_TK, weight_TK, E, chosen_TK=chosen_TK).limit(factor, by=by)
    rows = math.ceil(round(factor * T * k / E, 4))
    loops = oracle.within_capacity(plan.selected_TK.tolist(), weight_TK.tolist(), rows, by, none=E)
    assert kept(plan).tolist() == loops
    assert int(plan.kept_E.max()) <= rows and torch.equal(plan.kept_E, plan.counts_E)
    assert int(plan.selected_E.sum()) == (T * k if chosen_TK is None else int(chosen_TK.sum()))


@BY
def test_outputs_and_gradients_are_those_of_the_choices_that_are_kept(by: str):
    """y = sum over kept choices of weight * expert(x), for the layer as a whole, router, experts and tokens."""
    layers = [make_moe(preset("router", "topk", renormalise=False), D, E, drop=by) for _ in range(2)]
    x_TD, twin_TD = randn(T, D).requires_grad_(), randn(T, D).requires_grad_()
    c_TD = randn(T, D, key=("c",))
    y_TD, routing = layers[0](x_TD, context(capacity=0.6))
    (y_TD * c_TD).sum().backward()

    weight_TE = dense_weights(layers[1].router(twin_TD, context()).plan)
    kept_TE = torch.zeros(T, E).scatter(1, routing.plan.selected_TK, kept(routing.plan).float())
    assert 0 < int(kept_TE.sum()) < 2 * T
    out_ETD = layers[1].experts(twin_TD.repeat(E, 1), torch.full((E,), T)).view(E, T, D)
    expected_TD = torch.einsum("te,etd->td", weight_TE * kept_TE, out_ETD)
    (expected_TD * c_TD).sum().backward()
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad(x_TD), grad(twin_TD), rtol=1e-9, atol=1e-11)
    for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(grad(mine), grad(other), rtol=1e-9, atol=1e-11)


def test_equal_weights_keep_the_first():
    plan = Assignments(torch.zeros(9, 1, dtype=torch.int64), torch.full((9, 1), 0.5), 3)
    assert torch.equal(kept(plan.limit(1.0, by="probability")), kept(plan.limit(1.0)))
    assert kept(plan.limit(1.0)).flatten().tolist() == [True] * 3 + [False] * 6


def test_only_by_position_do_later_tokens_change_nothing():
    """The last quarter of the tokens changes: by probability some of it takes the places of earlier tokens."""
    changed = {}
    for by in ("position", "probability"):
        moe, x_TD = make_moe(preset("router", "switch"), D, E, drop=by), randn(T, D)
        other_TD = torch.cat([x_TD[:30], randn(10, D, key=("other",))])
        y_TD, other = (moe(x, context(capacity=0.6))[0][:30] for x in (x_TD, other_TD))
        changed[by] = int((y_TD != other).any(-1).sum())
    assert changed["position"] == 0 < changed["probability"]


@pytest.mark.parametrize("capacity", [1, 4, 7])
@BY
def test_first_choices_are_those_of_nllb(by: str, capacity: int):
    """transformers' batch prioritised routing serves first choices by their probability, the plain one by position."""
    config = hf_config("NllbMoeConfig", d_model=D, num_experts=E, expert_capacity=capacity)
    config.batch_prioritized_routing = by == "probability"
    config.moe_eval_capacity_token_fraction = -1.0
    theirs = hf("nllb_moe").NllbMoeTop2Router(config).double().eval()
    theirs.dtype = torch.float64
    moe = make_moe(preset("router", "switch"), D, E, drop=by)
    set_weights({theirs.classifier.weight: moe.router.get_parameter("weight_ED")})
    _, routing = moe(randn(T, D), context(capacity=capacity * E / T))
    mask_TE = theirs(randn(T, D))[0]
    kept_TE = torch.zeros(T, E, dtype=torch.int64).scatter(1, routing.plan.selected_TK, kept(routing.plan).long())
    assert torch.equal(kept_TE, mask_TE) and 0 < int(mask_TE.sum()) < T


def test_what_second_experts_leave_is_free_for_others():
    """st-moe-pytorch with a threshold that no second expert passes, against ours with the same draws: the first experts
    alone fill the places, each with its share of both weights. (With second experts it serves all first choices before
    any second one, ours goes by token, which looks at nothing that comes later.)"""
    rows = 5  # it gives 4 at least
    theirs = gating(D, E, 2, threshold=1e9, factor=rows * E / T).train()
    moe, x_TD = make_moe(preset("router", "topk"), D, E), randn(T, D)
    set_weights({theirs.to_gates.weight: moe.router.get_parameter("weight_ED")})
    work = at_work("second_expert", T, D, E, 1e9)
    _, routing = moe(x_TD, context(capacity=rows / 2 * E / T, exploring=(work,), training=True))
    combine_TE = theirs(x_TD[None])[1].sum(-1)[0]
    close({"weights": (dense_weights(routing.plan), combine_TE)}, FP64)
    assert 0 < int((combine_TE > 0).sum()) < T and int(routing.plan.selected_E.sum()) == T


def test_the_router_reads_nothing_of_capacity():
    """Choice and weights before dropping are those without a capacity."""
    router, x_TD = make_router(preset("router", "topk"), D, E), randn(T, D)
    plain, limited = router(x_TD, context()).plan, router(x_TD, context(capacity=0.5)).plan
    assert torch.equal(plain.selected_TK, limited.selected_TK) and limited.kept_TK is None
