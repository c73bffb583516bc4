"""BASE and Sinkhorn: whole assignments against every assignment there is, SciPy's optimum and plain loops.

Shapes: T tokens, D width, E experts, K chosen per token.
"""

import itertools
from typing import Any

import pytest
import torch
from layers import context, dense_weights, each_expert, make_moe, make_router, preset, randn, same_gradients
from oracles import across
from torch import Tensor

from moe_lab.assignment import balanced, prices

D = 8


def scores(kind: str, T: int, E: int) -> Tensor:
    """Scores of independent tokens, of tokens that agree on the better experts, of a few kinds of tokens, and of
    tokens that nearly all want expert 0 for about the same."""
    s_TE = randn(T, E, key=("scores",))
    if kind == "agreed":
        return 0.3 * s_TE + torch.linspace(0, 3, E)
    if kind == "kinds":
        return randn(3, E, key=("kinds",))[torch.arange(T) % 3] + 0.05 * s_TE
    return 0.01 * s_TE + 5 * (torch.arange(E) == 0) if kind == "collapsed" else s_TE


KINDS = ["independent", "agreed", "kinds", "collapsed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "E"), [(6, 3), (7, 3), (8, 2), (3, 5), (5, 5), (1, 4)])
def test_an_even_assignment_of_few_tokens_is_the_best_there_is(kind: str, T: int, E: int):
    s_TE = scores(kind, T, E)
    expert_T = balanced(s_TE)
    assert torch.bincount(expert_T, minlength=E).max() <= -(-T // E)
    best = across.best_balanced(s_TE)
    spread = float(s_TE.max() - s_TE.min())
    assert float(s_TE.gather(1, expert_T[:, None]).sum()) >= best - 0.01 * T * spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "E"), [(512, 8), (300, 7), (256, 64), (64, 64)])
def test_an_even_assignment_is_close_to_scipys(kind: str, T: int, E: int):
    """Of what the optimum gains over a balanced assignment that knows nothing, 2 % is lost at most."""
    optimize = pytest.importorskip("scipy.optimize")
    s_TE, room = scores(kind, T, E), -(-T // E)
    expert_T = balanced(s_TE.float())
    assert torch.bincount(expert_T, minlength=E).max() <= room
    rows, places = optimize.linear_sum_assignment(s_TE.repeat_interleave(room, 1).numpy(), maximize=True)
    best = float(s_TE[rows, places // room].sum())
    ignorant = float(s_TE[torch.arange(T), torch.arange(T) % E].sum())
    got = float(s_TE.gather(1, expert_T[:, None]).sum())
    assert best + 1e-6 >= got >= best - 0.02 * (best - ignorant)


@pytest.mark.parametrize(("T", "E"), [(12, 4), (5, 1), (3, 8)])
def test_equal_scores_are_shared_evenly(T: int, E: int):
    expert_T = balanced(torch.zeros(T, E))
    assert torch.bincount(expert_T, minlength=E).max() <= -(-T // E)


@pytest.mark.parametrize(("T", "E", "iterations"), [(12, 4, 1), (12, 4, 5), (7, 3, 8), (2, 6, 3), (4, 1, 2)])
def test_prices_are_sinkhorns_columns(T: int, E: int, iterations: int):
    """exp(score - price), rows scaled, is the matrix after as many scalings in plain loops."""
    s_TE = 2 * randn(T, E)
    matrix_TE = torch.tensor(across.sinkhorn(s_TE, iterations), dtype=torch.float64)
    mine_TE = (s_TE - prices(s_TE, [1.0] * iterations)).softmax(-1)
    torch.testing.assert_close(mine_TE, matrix_TE / matrix_TE.sum(-1, keepdim=True))


def chosen(kind: str, k: int, x_TD: Tensor, weight_ED: Tensor) -> list[list[int]]:
    """The oracle's choice in training."""
    logits_TE = x_TD @ weight_ED.T
    matrix = across.sinkhorn(logits_TE, preset("router", "sinkhorn")["iterations"])
    return [sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in matrix]


@pytest.mark.parametrize(("T", "E", "k"), [(24, 4, 1), (24, 4, 2), (24, 4, 4), (2, 6, 2), (5, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_is_its_formula(T: int, E: int, k: int, training: bool):
    """Choice from the balanced matrix in training and from the logits in evaluation, weights from the logits."""
    moe = make_moe(preset("router", "sinkhorn", k=k), D, E)
    x_TD = randn(T, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(training=training))
    logits_TE = x_TD @ moe.router.weight_ED.T
    by_hand = chosen("sinkhorn", k, x_TD.detach(), moe.router.weight_ED.detach())
    if not training:
        by_hand = logits_TE.topk(k, -1).indices.tolist()
    assert [set(row) for row in routing.plan.selected_TK.tolist()] == [set(row) for row in by_hand]
    experts, rows = each_expert(moe), []
    for t in range(T):
        gate = torch.sigmoid(logits_TE[t]) if k == 1 else torch.exp(logits_TE[t]) / torch.exp(logits_TE[t]).sum()
        rows.append(sum((gate[e] * experts[e](x_TD[t]) for e in by_hand[t]), torch.zeros(D).double()))
    if E > 1 or k == 1:
        same_gradients(moe, x_TD, y_TD, torch.stack(rows))


def test_base_finds_the_best_assignment():
    """Of its own scores, for few tokens, against every assignment there is."""
    router, x_TD = make_router(preset("router", "base"), D, 3), randn(8, D)
    logits_TE = x_TD @ router.weight_ED.detach().T
    expert_TK = router(x_TD, context(training=True)).plan.selected_TK
    assert float(logits_TE.gather(1, expert_TK).sum()) == pytest.approx(across.best_balanced(logits_TE))


@pytest.mark.parametrize("training", [True, False])
def test_base_weighs_its_expert_by_a_sigmoid(training: bool):
    T, E = 24, 4
    moe = make_moe(preset("router", "base"), D, E)
    x_TD = randn(T, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(training=training))
    logits_TE = x_TD @ moe.router.weight_ED.T
    expert_T = routing.plan.selected_TK[:, 0].tolist()
    if not training:
        assert expert_T == [max(range(E), key=row.__getitem__) for row in logits_TE.tolist()]
    experts = each_expert(moe)
    rows = [torch.sigmoid(logits_TE[t, e]) * experts[e](x_TD[t]) for t, e in enumerate(expert_T)]
    same_gradients(moe, x_TD, y_TD, torch.stack(rows))


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_a_collapse_is_undone_in_training_alone(name: str):
    """All tokens want expert 0 in evaluation; in training base shares exactly, sinkhorn nearly."""
    T, E = 240, 4
    router, x_TD = make_router(preset("router", name), D, E), randn(T, D)
    x_TD[:, 0] = 20.0
    with torch.no_grad():
        router.weight_ED[:, 0] = 0.5 * (torch.arange(E) == 0)
    plans = {training: router(x_TD, context(training=training)).plan for training in (True, False)}
    assert plans[False].selected_E.tolist() == [T, 0, 0, 0]
    load_E = plans[True].selected_E
    assert load_E.tolist() == [T // E] * E if name == "base" else load_E.min() > T // E // 2


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_only_training_looks_at_other_tokens(name: str):
    T, E = 48, 4
    router, x_TD = make_router(preset("router", name), D, E), randn(T, D)
    other_TD = torch.cat([x_TD[: T // 2], 3 * randn(T // 2, D, key=("other",))])

    def differ(training: bool) -> Tensor:
        plans = (router(x, context(training=training)).plan for x in (x_TD, other_TD))
        first, second = (dense_weights(plan)[: T // 2] for plan in plans)
        return (first != second).any(-1)

    assert differ(True).any() and not differ(False).any()


def test_the_balanced_choice_sends_no_gradient_through_its_scaling():
    """d weight / d logits is that of the sigmoid of the chosen logit, as if the choice were given."""
    nodes: list[dict[str, Any]] = [preset("router", "sinkhorn"), preset("router", "base")]
    for node, (T, E) in itertools.product(nodes, [(12, 3)]):
        router, x_TD = make_router(node, D, E), randn(T, D)
        plan = router(x_TD, context(training=True)).plan
        (got,) = torch.autograd.grad(plan.importance_E()[1], router.weight_ED)
        mine_T = plan.selected_TK[:, 0] == 1
        s_T = torch.sigmoid(x_TD @ router.weight_ED[1].detach())
        expected_ED = torch.zeros(E, D).double()
        expected_ED[1] = ((s_T * (1 - s_T) * mine_T)[:, None] * x_TD).sum(0)
        torch.testing.assert_close(got, expected_ED)
