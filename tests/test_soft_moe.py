"""Soft MoE and its causal forms against plain loops and soft-moe-pytorch, and what leaks and what does not.

Shapes: B sequences of S tokens, T tokens, D width, E experts, P slots.
"""

from typing import Any

import pytest
import torch
from layers import context, dense_weights, each_expert, grad, make_moe, make_router, preset, randn, same_gradients
from oracles import across
from peers import close, set_weights, soft_moe_pytorch
from torch import Tensor

from moe_lab import slots as mixing
from moe_lab.routing import Assignments, Slots

B, S, D, E = 2, 7, 8, 3
FORMS = [("none", 1), ("blocks", 3), ("blocks", 2), ("blocks", 1), ("blocks", 9), ("prefix", 1)]
form = pytest.mark.parametrize(("causal", "block"), FORMS)


def soft(causal: str = "none", block: int = 1, **more: Any) -> dict[str, Any]:
    return preset("router", "soft_moe", causal=causal, block=block, **more)


@form
@pytest.mark.parametrize("per_expert", [1, 2])
def test_values_and_gradients_are_those_of_the_formula(causal: str, block: int, per_expert: int):
    moe = make_moe(soft(causal, block, slots=per_expert), D, E)
    with torch.no_grad():
        moe.router.get_parameter("scale_1").fill_(3.0)
    x_TD = randn(B * S, D).requires_grad_()
    y_TD, _ = moe(x_TD, context(seq_len=S))
    phi, scale = moe.router.get_parameter("phi_PD"), moe.router.get_parameter("scale_1")[0]
    expected = [across.soft_moe(x_SD, list(phi), scale, each_expert(moe), causal, block) for x_SD in x_TD.view(B, S, D)]
    same_gradients(moe, x_TD, y_TD, torch.cat(expected))


@pytest.mark.parametrize("num_experts", [1, 12])
@form
def test_one_expert_and_more_experts_than_tokens(causal: str, block: int, num_experts: int):
    moe = make_moe(soft(causal, block), D, num_experts)
    for tokens in (1, 2):
        x_TD = randn(tokens, D).requires_grad_()
        y_TD, _ = moe(x_TD, context())
        phi, scale = moe.router.get_parameter("phi_PD"), moe.router.get_parameter("scale_1")[0]
        expected_TD = across.soft_moe(x_TD, list(phi), scale, each_expert(moe), causal, block)
        torch.testing.assert_close(y_TD, expected_TD, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("per_expert", [1, 4])
def test_it_is_soft_moe_pytorch(per_expert: int):
    """Theirs scales tokens and slots to length sqrt(D) times a learned gain: that is a scale of D here, and their
    tokens are sqrt(D) x/|x|, which both mix. Their experts are two layers with a bias and a GELU."""
    theirs = soft_moe_pytorch()(D, num_slots=per_expert, num_experts=E, expert_mult=2).double()
    moe = make_moe(soft(slots=per_expert), D, E, experts="mlp", width=2 * D)
    pairs = {theirs.slot_embeds: moe.router.get_parameter("phi_PD").view(E, per_expert, D)}
    for e, net in enumerate(theirs.experts.experts):
        pairs |= {net[0].weight: moe.experts.w_in_EID[e], net[3].weight: moe.experts.w_out_EFD[e].T}
        pairs |= {linear.bias: torch.zeros_like(linear.bias) for linear in (net[0], net[3])}
    set_weights(pairs)
    with torch.no_grad():
        moe.router.get_parameter("scale_1").fill_(D)
    x_TD = randn(B * S, D)
    length_TD = D**0.5 * x_TD / x_TD.norm(dim=-1, keepdim=True)
    y_TD, _ = moe(length_TD, context(seq_len=S))
    expected_TD = theirs(x_TD.view(B, S, D)).view(-1, D)
    c_TD = randn(B * S, D, key=("c",))
    for out in (y_TD, expected_TD):
        (out * c_TD).sum().backward()
    gradients = [theirs.slot_embeds.grad.view(-1, D), *(net[0].weight.grad for net in theirs.experts.experts)]
    ours = [grad(moe.router.get_parameter("phi_PD")), *grad(moe.experts.w_in_EID)]
    close({"output": (y_TD, expected_TD)}, 1e-5)  # epsilons of the lengths: 1e-6 here, 1e-12 there
    close({str(i): pair for i, pair in enumerate(zip(ours, gradients, strict=True))}, 1e-5)


def outputs(node: dict[str, Any], x_TD: Tensor, seq_len: int) -> Tensor:
    weights = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return make_moe(node, D, E, dtype=weights)(x_TD, context(seq_len=seq_len))[0]


@form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_comes_later_changes_no_bit(causal: str, block: int, dtype: torch.dtype):
    """Over more than one chunk of running sums. Without causal the very first output changes."""
    n = 2 * mixing.CHUNK + 5
    node = soft(causal, block, slots=2)
    x_TD = randn(n, D).to(dtype)
    plain_TD = outputs(node, x_TD, n)
    for t in (0, 1, 2, block, mixing.CHUNK - 1, mixing.CHUNK, n - 2):
        other_TD = torch.cat([x_TD[: t + 1], 3 * randn(n - t - 1, D, key=("other",)).to(dtype)])
        changed_T = (outputs(node, other_TD, n) != plain_TD).any(-1)
        if causal == "none":
            assert changed_T[0], "none looks at the whole sequence"
        else:
            assert not changed_T[: t + 1].any() and changed_T[t + 1 :].any()


@form
def test_sequences_do_not_meet(causal: str, block: int):
    x_TD = randn(B * S, D)
    other_TD = torch.cat([x_TD[:S], randn(S, D, key=("other",))])
    node = soft(causal, block)
    assert torch.equal(outputs(node, x_TD, S)[:S], outputs(node, other_TD, S)[:S])


def test_the_first_block_sends_no_gradient_to_its_slots():
    """Tokens of the first block read the first token's value, and no gradient goes back to it."""
    moe = make_moe(soft("blocks", 3), D, E)
    x_TD = randn(S, D).requires_grad_()
    y_TD, _ = moe(x_TD, context())
    (first,) = torch.autograd.grad(y_TD[1].sum(), x_TD, retain_graph=True)
    assert not first[0].any() and first[1].any()
    (second,) = torch.autograd.grad(y_TD[3].sum(), x_TD)
    assert second[:4].any(-1).all() and not second[4:].any()


def test_running_sums_survive_logits_of_any_size():
    """Logits to +-1e4, rising and falling: what a direct softmax over each prefix gives, in values and gradients."""
    n = 2 * mixing.CHUNK + 3
    logits = (1e4 * randn(1, n, 2, key=("logits",))).requires_grad_()
    x = randn(1, n, D).requires_grad_()
    got = mixing.running(x, logits)
    expected = torch.stack([(logits[:, : t + 1].softmax(1).mT @ x[:, : t + 1]) for t in range(n)], 1)
    torch.testing.assert_close(got, expected)
    c = randn(*got.shape, key=("c",))
    for mine, other in zip(*(torch.autograd.grad((o * c).sum(), [x, logits]) for o in (got, expected)), strict=True):
        torch.testing.assert_close(mine, other)


@form
def test_rows_and_weights(causal: str, block: int):
    """Rows are counted as they are run, weights of a token sum to one, and a hard choice runs on the token itself."""
    router, x_TD = make_router(soft(causal, block, slots=2, k=2), D, E), randn(B * S, D)
    routing = router(x_TD, context(seq_len=S))
    plan = routing.plan
    assert isinstance(plan, Slots)
    assert len(plan.gather(x_TD)) == int(plan.counts_E.sum()) == B * S * router.rows_per_token(S)
    weight_TE = dense_weights(plan)
    torch.testing.assert_close(weight_TE.sum(-1), torch.ones(B * S).double())
    torch.testing.assert_close(weight_TE, routing.probs_TE)
    torch.testing.assert_close(weight_TE, routing.logits_TE.softmax(-1))
    torch.testing.assert_close(plan.mass(B), weight_TE.view(B, S, E).sum(1))
    assert torch.equal(plan.selected_TK, weight_TE.topk(2).indices)
    hard = router(x_TD, context(seq_len=S, hard=1)).plan
    assert isinstance(hard, Assignments) and torch.equal(hard.selected_TK, plan.selected_TK[:, :1])
    torch.testing.assert_close(dense_weights(hard).sum(-1), torch.ones(B * S).double())
