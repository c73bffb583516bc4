"""Plans move rows: against a naive loop over tokens and experts, values and gradients, with and without capacity.

Shapes: T tokens, D width, E experts, K chosen per token, N rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import context, dense_weights, grad, make_moe, preset, randn
from torch import Tensor
from torch.autograd import Function, gradcheck

from moe_lab.routing import Assignments, Mixture, Plan, Rows

T, D, E, K = 7, 3, 4, 2


def weights(*shape: int) -> Tensor:
    return (randn(*shape, key=("weight",)).softmax(-1)).requires_grad_()


def assignments(expert_TK: list[list[int]], **kwargs: Any) -> Assignments:
    return Assignments(torch.tensor(expert_TK), weights(len(expert_TK), len(expert_TK[0])), E, **kwargs)


UNEVEN = [[0, 1], [1, 0], [0, 3], [0, 1], [3, 0], [0, 1], [1, 3]]  # 0: 6 rows, 1: 5, 2: none, 3: 3


def mixture() -> Mixture:
    weight_TE = weights(T, E)
    return Mixture(weight_TE, weight_TE.topk(K).indices)


def fake_experts(rows_ND: Tensor, counts_E: Tensor, scale_ED: Tensor) -> Tensor:
    """Expert e computes tanh(scale_e * row); rows behind the last expert's are NaN, and so is what they hand back."""
    computed = int(counts_E.sum())
    of_row = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E)
    return Undefined.apply(torch.tanh(scale_ED[of_row] * rows_ND[:computed]), rows_ND, computed)  # pyright: ignore


class Undefined(Function):
    """Fill the rows behind `computed` with NaN, values and gradients: what an uninitialised tail could hold."""

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, rows_ND: Tensor, computed: int) -> Tensor:
        ctx.computed, ctx.n = computed, len(rows_ND)
        return torch.cat([out_MD, out_MD.new_full((ctx.n - computed, out_MD.shape[1]), torch.nan)])

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        tail = grad_ND.new_full((ctx.n - ctx.computed, grad_ND.shape[1]), torch.nan)
        return grad_ND[: ctx.computed], torch.cat([grad_ND.new_zeros(ctx.computed, grad_ND.shape[1]), tail]), None


def naive(plan: Plan, x_TD: Tensor, scale_ED: Tensor) -> Tensor:
    """y_t = sum over the choices that are computed of weight * expert(x_t), one at a time."""
    rows = [torch.zeros(D, dtype=torch.float64) for _ in x_TD]
    for t, e, weight in computed(plan):
        rows[t] = rows[t] + weight * torch.tanh(scale_ED[e] * x_TD[t])
    return torch.stack(rows)


def computed(plan: Plan) -> Iterator[tuple[int, int, Tensor]]:
    """(token, expert, weight) of each choice that is chosen and kept."""
    if isinstance(plan, Assignments):
        for t, experts in enumerate(plan.expert_TK.tolist()):
            for j, e in enumerate(experts):
                if all(mask is None or mask[t, j] for mask in (plan.kept_TK, plan.chosen_TK)):
                    yield t, e, plan.weight_TK[t, j]
    elif isinstance(plan, Mixture):
        yield from ((t, e, plan.weight_TE[t, e]) for t in range(T) for e in range(E))
    else:
        assert isinstance(plan, Rows)
        for e, tokens in enumerate(plan.token_EC.tolist()):
            yield from ((t, e, plan.weight_EC[e, c]) for c, t in enumerate(tokens))


def weight_of(plan: Plan) -> Tensor:
    return getattr(plan, WEIGHT[type(plan)])


WEIGHT = {Assignments: "weight_TK", Mixture: "weight_TE", Rows: "weight_EC"}
# Token 1 has one choice, token 3 none; of the experts, 2 gets no token.
CHOSEN = torch.tensor([[True, True], [True, False], [True, True], [False, False], *[[True, True]] * (T - 4)])


PLANS: dict[str, Callable[[], Plan]] = {
    "uneven": lambda: assignments(UNEVEN),
    "one expert takes all": lambda: assignments([[2]] * T),
    "limited": lambda: assignments(UNEVEN).limit(1.0),
    "limited to one row": lambda: assignments(UNEVEN).limit(0.01),
    "all dropped": lambda: assignments(UNEVEN, kept_TK=torch.zeros(T, K, dtype=torch.bool)),
    "mixture": mixture,
    "ragged": lambda: assignments(UNEVEN, chosen_TK=CHOSEN),
    "ragged and limited": lambda: assignments(UNEVEN, chosen_TK=CHOSEN).limit(0.5),
    "expert choice": lambda: Rows(torch.tensor([[0, 2], [2, 3], [1, 0], [2, 0]]), weights(E, 2), T),
}


@pytest.mark.parametrize("name", PLANS)
def test_gather_and_combine_equal_a_naive_loop(name: str):
    plan = PLANS[name]()
    weight = weight_of(plan)
    found = []
    for fast in (True, False):
        x_TD, scale_ED = randn(T, D).requires_grad_(), randn(E, D, key=("scale",)).requires_grad_()
        if fast:
            y_TD = plan.combine(fake_experts(plan.gather(x_TD), plan.counts_E, scale_ED))
        else:
            y_TD = naive(plan, x_TD, scale_ED)
        loss = (y_TD * randn(T, D, key=("c",))).sum() + 0 * (x_TD.sum() + scale_ED.sum() + weight.sum())
        found.append([y_TD, *torch.autograd.grad(loss, (x_TD, scale_ED, weight))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ragged", "ragged and limited", "expert choice"])
@pytest.mark.parametrize("groups", [1, 7])
def test_counts_and_mass_by_stretch(name: str, groups: int):
    """T = 7 tokens, as a whole and one by one, by hand from the choices."""
    plan = PLANS[name]()
    selected_GE, mass_GE = torch.zeros(groups, E, dtype=torch.int64), torch.zeros(groups, E, dtype=torch.float64)
    everything = replace(plan, kept_TK=None) if isinstance(plan, Assignments) else plan
    for t, e, weight in computed(everything):
        selected_GE[t * groups // T, e] += 1
        mass_GE[t * groups // T, e] += weight.detach()
    assert torch.equal(plan.selected(groups), selected_GE) and torch.equal(plan.selected_E, selected_GE.sum(0))
    torch.testing.assert_close(plan.mass(groups), mass_GE)
    torch.testing.assert_close(plan.importance_E(), mass_GE.sum(0))
    chosen = [sorted(e for t, e, _ in computed(everything) if t == token) for token in range(T)]
    assert [sorted(e for e in row if e < E) for row in plan.selected_TK.tolist()] == chosen


@pytest.mark.parametrize("name", PLANS)
def test_gradients_against_finite_differences(name: str):
    plan = PLANS[name]()

    def layer(x_TD: Tensor, scale_ED: Tensor, weight: Tensor) -> Tensor:
        same = replace(plan, **{WEIGHT[type(plan)]: weight})
        return same.combine(fake_experts(same.gather(x_TD), same.counts_E, scale_ED))

    weight = weight_of(plan)
    inputs = (randn(T, D).requires_grad_(), randn(E, D, key=("scale",)).requires_grad_(), weight)
    assert gradcheck(layer, inputs)


def test_rows_come_sorted_by_expert_in_token_order():
    plan = assignments(UNEVEN)
    rows_ND = plan.gather(torch.arange(T, dtype=torch.float64)[:, None])
    assert plan.counts_E.tolist() == plan.selected_E.tolist() == plan.kept_E.tolist() == [6, 5, 0, 3]
    assert rows_ND.flatten().tolist() == [*[0, 1, 2, 3, 4, 5], *[0, 1, 3, 5, 6], *[2, 4, 6]]


def test_capacity_keeps_the_first_in_token_order():
    """14 assignments over 4 experts at factor 1: ceil(3.5) = 4 rows each. Expert 0 loses its tokens 4 and 5, expert 1
    its token 6. Selected stays what the router chose; kept and executed are what capacity left."""
    plan = assignments(UNEVEN).limit(1.0)
    assert plan.kept_TK is not None
    dropped = (~plan.kept_TK).nonzero().tolist()
    assert dropped == [[4, 1], [5, 0], [6, 0]]
    assert plan.selected_E.tolist() == [6, 5, 0, 3]
    assert plan.kept_E.tolist() == plan.counts_E.tolist() == [4, 4, 0, 3]
    rows_ND = plan.gather(torch.arange(T, dtype=torch.float64)[:, None])
    assert rows_ND[:11].flatten().tolist() == [*[0, 1, 2, 3], *[0, 1, 3, 5], *[2, 4, 6]]
    torch.testing.assert_close(plan.importance_E(), assignments(UNEVEN).importance_E())


@pytest.mark.parametrize(("tokens", "factor", "rows"), [(100, 1.1, 11), (100, 1.0, 10), (100, 1.01, 11), (30, 0.7, 3)])
def test_capacity_in_rows(tokens: int, factor: float, rows: int):
    """ceil(factor * T * K / E) of ten experts, exactly: 1.1 * 100 / 10 in floating point is above 11."""
    plan = Assignments(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), 10)
    for told in (factor, torch.tensor(factor)):  # as a schedule tells it: 1.1 in fp32 is above 1.1
        assert int(plan.limit(told).kept_E.sum()) == rows


def test_a_token_dropped_everywhere_keeps_its_residual_and_gets_no_gradient_here():
    moe = make_moe(preset("router", "switch"), D, E, experts="mlp", backend="loop")
    x_TD = randn(T, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(capacity=0.01))
    y_TD.sum().backward()
    assert isinstance(routing.plan, Assignments) and routing.plan.kept_TK is not None
    gone_T = ~routing.plan.kept_TK.any(-1)
    assert int(routing.plan.kept_E.max()) == 1 and int(gone_T.sum()) == T - int(routing.plan.kept_E.sum()) > 0
    assert not y_TD[gone_T].any() and not grad(x_TD)[gone_T].any()
    assert y_TD[~gone_T].abs().sum(-1).gt(0).all() and grad(x_TD)[~gone_T].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_all_dropped_is_zero_with_zero_gradients(backend: str):
    moe = make_moe(preset("router", "topk"), 16, E, dtype=torch.float32, backend=backend)
    x_TD = randn(T, 16).float().requires_grad_()
    routing = moe.router(x_TD, context())
    assert isinstance(routing.plan, Assignments)
    plan = Assignments(routing.plan.expert_TK, routing.plan.weight_TK, E, torch.zeros(T, 2, dtype=torch.bool))
    y_TD = plan.combine(moe.experts(plan.gather(x_TD), plan.counts_E))
    y_TD.sum().backward()
    assert not y_TD.any() and not grad(x_TD).any()
    assert not grad(moe.experts.w_in_EID).any() and not grad(moe.experts.w_out_EFD).any()


def test_hardened_choice_shares_the_whole_weight():
    """(0.5, 0.3, 0.2) to two: 5/8 and 3/8 of 1. (0.2, 0.1, 0.1) to two: 2/3 and 1/3 of 0.4."""
    weight_TK = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.1, 0.1]])
    plan = Assignments(torch.tensor([[2, 0, 1], [0, 3, 1]]), weight_TK, E).harden(2)
    expected = torch.tensor([[0.375, 0, 0.625, 0], [0.8 / 3, 0, 0, 0.4 / 3]])
    torch.testing.assert_close(dense_weights(plan), expected)
    assert plan.selected_E.tolist() == [2, 0, 1, 1]
    mix = Mixture(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[3, 2]]))
    torch.testing.assert_close(dense_weights(mix.harden(1)), torch.tensor([[0.0, 0, 0, 1]]))
    torch.testing.assert_close(dense_weights(mix.harden(2)), torch.tensor([[0.0, 0, 3 / 7, 4 / 7]]))


def test_mixture_runs_all_and_counts_its_choice():
    plan = mixture()
    assert plan.counts_E.tolist() == [T] * E
    assert int(plan.selected_E.sum()) == T * K and torch.equal(plan.kept_E, plan.selected_E)
    torch.testing.assert_close(plan.importance_E(), plan.weight_TE.sum(0))
