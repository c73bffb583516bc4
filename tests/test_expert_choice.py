"""Expert choice against plain loops.

Shapes: B sequences of S tokens, T tokens, D width, E experts.
"""

import pytest
import torch
from layers import context, each_expert, make_moe, make_router, preset, randn, same_gradients
from oracles import across
from torch import Tensor

from moe_lab.routing import Rows

B, S, D, E = 3, 10, 8, 4


GROUPS = {
    "sequence": [list(range(b * S, (b + 1) * S)) for b in range(B)],
    "micro_batch": [list(range(B * S))],
    "mixed": [list(range(b, B * S, B)) for b in range(B)],
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("k", "capacity"), [(1, 1.0), (2, 1.0), (2, 0.5), (1, 2.5), (3, 1.1), (4, 1.0)])
def test_values_and_gradients_are_those_of_the_formula(group: str, k: int, capacity: float):
    moe = make_moe(preset("router", "expert_choice", k=k, capacity=capacity) | {"group": group}, D, E)
    x_TD = randn(B * S, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(seq_len=S))
    expected_TD = torch.zeros_like(y_TD)
    for tokens in GROUPS[group]:
        y_nD = across.expert_choice(x_TD[tokens], moe.router.weight_ED, each_expert(moe), k * capacity)
        expected_TD = expected_TD.index_add(0, torch.tensor(tokens), y_nD)
    same_gradients(moe, x_TD, y_TD, expected_TD)
    assert isinstance(routing.plan, Rows)
    rows = moe.router.rows_per_token(len(GROUPS[group][0]))
    assert int(routing.plan.counts_E.sum()) == round(B * S * rows)


@pytest.mark.parametrize(("tokens", "num_experts"), [(5, 1), (2, 12), (1, 3)])
def test_one_expert_and_more_experts_than_tokens(tokens: int, num_experts: int):
    moe = make_moe(preset("router", "expert_choice", k=1), D, num_experts)
    x_TD = randn(tokens, D).requires_grad_()
    y_TD, routing = moe(x_TD, context())
    expected_TD = across.expert_choice(x_TD, moe.router.weight_ED, each_expert(moe), 1)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-9, atol=1e-11)
    assert routing.plan.counts_E.tolist() == [-(-tokens // num_experts)] * num_experts


def test_at_collapse_the_load_is_even_and_whom_nobody_wants_keeps_its_residual():
    """All tokens want expert 0: it takes its share like every other, and the rest of the tokens get nothing."""
    moe = make_moe(preset("router", "expert_choice", k=1), D, E)
    x_TD = randn(S * E, D).abs()
    with torch.no_grad():
        moe.router.weight_ED.fill_(0).add_(10 * torch.eye(E, 1))
    y_TD, routing = moe(x_TD, context())
    assert routing.plan.selected_E.tolist() == [S] * E
    taken_T = (routing.plan.selected_TK < E).sum(-1)
    assert int(taken_T.sum()) == S * E and taken_T.max() > 1
    assert torch.equal(y_TD.any(-1), taken_T > 0) and not y_TD.any(-1).all()


def changed(group: str, first: Tensor, second: Tensor) -> Tensor:
    moe = make_moe(preset("router", "expert_choice") | {"group": group}, D, E)
    return (moe(first, context(seq_len=S))[0] != moe(second, context(seq_len=S))[0]).any(-1)


@pytest.mark.parametrize("group", GROUPS)
def test_later_tokens_change_earlier_outputs(group: str):
    x_TD, other_TD = randn(B * S, D), randn(B * S, D, key=("other",))
    assert changed(group, x_TD, torch.cat([x_TD[: S // 2], 3 * other_TD[S // 2 :]]))[: S // 2].any()


def test_sequences_meet_in_a_micro_batch():
    x_TD, other_TD = randn(B * S, D), 3 * randn(B * S, D, key=("other",))
    other_TD = torch.cat([x_TD[:S], other_TD[S:]])
    assert not changed("sequence", x_TD, other_TD)[:S].any()
    assert changed("micro_batch", x_TD, other_TD)[:S].any() and changed("mixed", x_TD, other_TD)[:S].any()


def test_temperature_changes_weights_and_not_the_choice():
    router, x_TD = make_router(preset("router", "expert_choice"), D, E), randn(B * S, D)
    one, two = (router(x_TD, context(seq_len=S, temperature=t)).plan for t in (1.0, 0.1))
    assert isinstance(one, Rows) and isinstance(two, Rows)
    assert torch.equal(one.token_EC, two.token_EC) and not torch.allclose(one.weight_EC, two.weight_EC)
