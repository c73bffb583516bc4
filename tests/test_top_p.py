"""top_p: as many experts as reach a probability, against loops over tokens and experts."""

from typing import Any

import pytest
import torch
from layers import context, dense_weights, grad, make_moe, make_router, preset, randn
from oracles import scored as oracle

from moe_lab.config import registered
from moe_lab.routing import Assignments

T, D, E = 30, 8, 6


def node(**changes: Any) -> dict[str, Any]:
    return preset("router", "top_p", **changes)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_against_loops(p: float, gate: str, renormalise: bool, most: int | None, biased: bool):
    """At a temperature, which must not change how many are taken."""
    router = make_router(node(p=p, gate=gate, renormalise=renormalise, most=most), D, E)
    x_TD, c_TE = 2 * randn(T, D), randn(T, E)
    bias_E = 0.3 * randn(E, key=("bias",)) if biased else None
    plan = router(x_TD, context(bias_E=bias_E, temperature=0.5)).plan
    assert isinstance(plan, Assignments)
    mine_TE = dense_weights(plan)
    (mine_TE * c_TE).sum().backward()

    row_ED = router.get_parameter("weight_ED").detach().clone().requires_grad_()
    expected_TE, total = torch.zeros(T, E, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(T):
        scores = [oracle.linear_score(x_TD[t], row) for row in row_ED]
        bias = None if bias_E is None else bias_E.tolist()
        weights = oracle.top_p(scores, p, most or E, gate, renormalise, 0.5, bias)
        assert [e for e in plan.selected_TK[t].tolist() if e < E] == [*weights]
        for e, w in weights.items():
            expected_TE[t, e] = w.detach()
            total = total + w * c_TE[t, e]
    total.backward()
    torch.testing.assert_close(mine_TE, expected_TE, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad(router.weight_ED), grad(row_ED), rtol=1e-9, atol=1e-12)


def test_one_where_the_router_is_sure_and_many_where_it_is_not():
    router = make_router(node(p=0.6), E, E)
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(torch.eye(E))
    x_TD = torch.stack([10 * torch.eye(E)[2], torch.zeros(E)]).double()
    plan = router(x_TD, context()).plan
    assert plan.selected_TK[0].tolist() == [2] + [E] * (E - 1)
    assert (plan.selected_TK[1] < E).sum() == 4, "4/6 is the first multiple of 1/6 that reaches 0.6"
    assert int(plan.counts_E.sum()) == 5, "what is not chosen is not computed"


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_the_layer_is_the_weighted_sum_of_the_chosen_experts(p: float):
    """Gather, experts and combine of a ragged plan, against every expert on every token, weighted."""
    moe, x_TD = make_moe(node(p=p), D, E), 2 * randn(T, D)
    y_TD, routing = moe(x_TD, context())
    gate_TEF, up_TEF = torch.einsum("td,eid->tei", x_TD, moe.experts.w_in_EID).chunk(2, -1)
    out_TED = torch.einsum("tef,efd->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, moe.experts.w_out_EFD)
    torch.testing.assert_close(y_TD, torch.einsum("te,ted->td", dense_weights(routing.plan), out_TED))
    assert (routing.plan.selected_TK < E).sum() == routing.plan.counts_E.sum()


def test_a_masked_expert_is_never_taken():
    """-inf ranks below all; with p=1 rounding must not reach it."""
    router, x_TD = make_router(node(p=1.0), D, E, torch.float32), randn(500, D).float()
    rank_TE = (x_TD @ router.get_parameter("weight_ED").T).detach()
    rank_TE[:, 4] = -torch.inf
    plan = router.choose(rank_TE, rank_TE.softmax(-1), context())
    assert int(plan.selected_E[4]) == 0 and int(plan.selected_E.sum()) > 4 * 500


@pytest.mark.parametrize(
    ("changes", "live"), [({"most": 1}, False), ({"p": 1 / E}, False), ({"p": 0.5}, True), ({}, True)]
)
def test_renormalised_it_is_dead_where_one_expert_is_taken_at_most(changes: dict[str, Any], live: bool):
    told = node(renormalise=True, **changes)
    router = make_router(told, D, E)
    (dense_weights(router(randn(T, D), context()).plan) * randn(T, E)).sum().backward()
    traits = registered("router")["top_p"].traits(told, E)
    assert (grad(router.weight_ED).abs().max() > 1e-12) == traits.live == live
    assert traits.flops is None
