"""DSelect-k against plain loops, settled selectors, and numbers of experts that are no power of two.

Shapes: T tokens, D width, E experts, K selectors, J binary digits.
"""

import math

import pytest
import torch
from layers import context, dense_weights, each_expert, make_moe, make_router, preset, randn, same_gradients
from oracles import across
from torch import Tensor

from moe_lab.routers.dselect_k import smooth_step
from moe_lab.routing import Router

T, D = 9, 6


def by_hand(router: Router, x_TD: Tensor, k: int, E: int, t: float = 1.0) -> list[tuple[list[list[Tensor]], list]]:
    """z [K][J] and a [K] of every token."""
    J = math.ceil(math.log2(E))
    code_PD, share_KD = router.get_parameter("digit_PD"), router.get_parameter("share_KD")
    found = []
    for x_D in x_TD:
        z = [[(code_PD[s * J + j] * x_D).sum() / t for j in range(J)] for s in range(k)]
        found.append((z, [(share_KD[s] * x_D).sum() / t for s in range(k)]))
    return found


@pytest.mark.parametrize(("E", "k"), [(8, 2), (4, 1), (4, 3), (2, 2), (6, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("width", [1.0, 4.0])
def test_values_and_gradients_are_those_of_the_formula(E: int, k: int, width: float):
    """With most steps inside the cubic (width 4) and many outside of it (width 1)."""
    moe = make_moe(preset("router", "dselect_k", k=k, width=width), D, E)
    x_TD = randn(T, D).requires_grad_()
    y_TD, routing = moe(x_TD, context(temperature=0.5))
    experts, rows = each_expert(moe), []
    for x_D, (z, a) in zip(x_TD, by_hand(moe.router, x_TD, k, E, 0.5), strict=True):
        q = across.dselect_k(z, a, E, width)
        rows.append(sum((w * f(x_D) for w, f in zip(q, experts, strict=True)), torch.zeros(D).double()))
    if E == 1:  # nothing to choose: the only expert, whole
        torch.testing.assert_close(y_TD, torch.stack(rows))
    elif k == 1:  # one selector has the whole share
        torch.testing.assert_close(y_TD, torch.stack(rows))
        c_TD, code = randn(T, D, key=("c",)), moe.router.get_parameter("digit_PD")
        mine, other = (torch.autograd.grad((o * c_TD).sum(), code)[0] for o in (y_TD, torch.stack(rows)))
        assert other.any()
        torch.testing.assert_close(mine, other)
    else:
        same_gradients(moe, x_TD, y_TD, torch.stack(rows))
    assert routing.probs_TE.sum(-1).allclose(torch.ones(T).double())


@pytest.mark.parametrize(("E", "k"), [(8, 2), (6, 2), (5, 1), (1, 1)])
def test_the_objective_is_the_entropy_of_selectors_and_what_codes_of_no_expert_take(E: int, k: int):
    node = preset("router", "dselect_k", k=k, width=6.0)
    router, x_TD = make_router(node, D, E), randn(T, D)
    routing = router(x_TD, context(strengths={"entropy": torch.tensor(0.3).double()}))
    got = router.objective(routing, torch.zeros(T), torch.ones(T))
    expected = torch.zeros(()).double()
    for z, _ in by_hand(router, x_TD, k, E):
        expected = expected + (0.3 * across.selector_entropy(z, E, 6.0) + across.unreachable(z, E, 6.0)) / T
    assert got is not None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-9)
    if E > 1:
        code = router.get_parameter("digit_PD")
        mine, other = (torch.autograd.grad(total, code, retain_graph=True)[0] for total in (got, expected))
        assert other.any()
        torch.testing.assert_close(mine, other)


def test_undecided_and_settled():
    """z = 0: each expert weighs 1/E, the entropy is k log E. z beyond the step: one-hot, no entropy, no gradient."""
    E, k = 8, 2
    router, x_TD = make_router(preset("router", "dselect_k", k=k), D, E), torch.ones(1, D).double()
    code, zeros = router.get_parameter("digit_PD"), torch.zeros(1)

    def at(*z: float) -> tuple[Tensor, float]:
        with torch.no_grad():
            code.copy_(torch.tensor(z)[:, None] / D)
        routing = router(x_TD, context(strengths={"entropy": torch.ones(())}))
        own = router.objective(routing, zeros, zeros)
        assert own is not None
        return dense_weights(routing.plan)[0], float(own.detach())

    weight_E, entropy = at(0, 0, 0, 0, 0, 0)
    torch.testing.assert_close(weight_E, torch.full((E,), 1 / E).double())
    assert entropy == pytest.approx(k * math.log(E), abs=1e-4)
    weight_E, entropy = at(9, -9, 9, -9, 9, 9)  # 101 and 011
    assert weight_E.nonzero().flatten().tolist() == [3, 5] and entropy == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad((weight_E * randn(E)).sum(), code)
    assert not gradient.any()


def test_a_token_whose_selectors_all_name_no_expert_gets_nothing():
    router, x_TD = make_router(preset("router", "dselect_k", k=1), D, 5), torch.ones(1, D).double()
    with torch.no_grad():
        router.get_parameter("digit_PD").fill_(9.0)  # 111 is no expert of five
    routing = router(x_TD, context())
    own = router.objective(routing, torch.zeros(1), torch.ones(1))
    assert not dense_weights(routing.plan).any() and own is not None and own.isfinite()
    assert routing.logits_TE.isfinite().all() and routing.probs_TE.isfinite().all()


def test_the_step():
    """0 and 1 outside of [-1/2, 1/2], 1/2 in the middle, 27/32 at 1/4, and smooth at both ends."""
    z = torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    s = smooth_step(z)
    torch.testing.assert_close(s, torch.tensor([0, 0, 0.5, 27 / 32, 1, 1], dtype=torch.float64))
    (slope,) = torch.autograd.grad(s.sum(), z)
    torch.testing.assert_close(slope, torch.tensor([0, 0, 1.5, 9 / 8, 0, 0], dtype=torch.float64))
